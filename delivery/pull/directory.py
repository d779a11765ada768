"""Find the consumer a request names, from a short-lived cache that the listener empties when configuration changes."""
from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from django.db import connection
from rest_framework.exceptions import NotFound

from consumers.envelope import Addressing, addressing
from consumers.models import Consumer
from consumers.queueing import OneByOne
from consumers.tokens import Caller

CACHE_S = 5.0


@dataclass(frozen=True, slots=True)
class Receiver:
    """What pulling needs to know of a consumer."""

    id: UUID
    name: str
    source_id: UUID
    version: datetime
    """Of the consumer's configuration."""
    tables: tuple[str, ...]
    ack_wait_ms: int
    transform: str
    to: Addressing


_cache: dict[str, tuple[float, Receiver]] = {}
_forgotten = 0
_lock = threading.Lock()
_loading = OneByOne()


def find(name_or_id: str, caller: Caller) -> Receiver:
    """The pull consumer with this id or name. Raises NotFound, also when the caller's token does not reach it."""
    receiver = _known(name_or_id)
    if receiver is None:
        connection.close()  # nobody waits with one in hand
        with _loading.alone(name_or_id):
            receiver = _known(name_or_id) or _load_and_keep(name_or_id)
    if not caller.reaches(receiver.id):
        raise NotFound(_missing(name_or_id))
    return receiver


def forget() -> None:
    global _forgotten
    with _lock:
        _cache.clear()
        _forgotten += 1


def _known(name_or_id: str) -> Receiver | None:
    known = _cache.get(name_or_id)
    return None if known is None or known[0] <= time.monotonic() else known[1]


def _load_and_keep(name_or_id: str) -> Receiver:
    forgotten, now = _forgotten, time.monotonic()
    receiver = load(name_or_id)
    with _lock:
        if forgotten == _forgotten:  # else it may be from before the change
            if len(_cache) > 10_000:
                _cache.clear()
            _cache[name_or_id] = (now + CACHE_S, receiver)
    return receiver


def _missing(name_or_id: str) -> str:
    return f"there is no pull consumer {name_or_id!r}"


def load(name_or_id: str) -> Receiver:
    """As it is in the store now. Raises NotFound."""
    if "\0" in name_or_id:
        raise NotFound(_missing(name_or_id))
    found = Consumer.objects.select_related("source").filter(kind="pull")
    try:
        consumer = found.filter(pk=UUID(name_or_id)).first()
    except ValueError:
        consumer = found.filter(name=name_or_id).first()
    if consumer is None:
        raise NotFound(_missing(name_or_id))
    source = consumer.source
    return Receiver(
        consumer.pk,
        consumer.name,
        consumer.source_id,
        consumer.updated_at,
        tuple(consumer.tables),
        consumer.ack_wait_ms,
        consumer.transform,
        addressing(
            consumer_id=consumer.pk, consumer_name=consumer.name, source_id=source.pk, source_name=source.name,
            database=source.database, stream=consumer.stream,
        ),
    )  # fmt: skip
