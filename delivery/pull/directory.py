"""Find the consumer a request names, from a short-lived cache that the listener empties when configuration changes."""
from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from django.db import connection
from rest_framework.exceptions import NotFound

from consumers.envelope import Addressing, addressing
from consumers.models import Consumer
from consumers.lookups import Lookups
from consumers.tokens import Caller


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


_receivers: Lookups[Receiver] = Lookups()  # by what requests call them


class Pushed(NotFound):
    """There is such a consumer, but it is pushed to."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer_id = consumer.pk
        super().__init__(f"{consumer.name} is a push consumer: its messages go to its endpoint; receiving needs one of kind pull")


def find(name_or_id: str, caller: Caller) -> Receiver:
    """The pull consumer with this id or name. Raises NotFound, also when the caller's token does not reach it."""
    receiver = _receivers.known(name_or_id)
    if receiver is None:
        connection.close()  # nobody waits with one in hand
        try:
            receiver = _receivers.find(name_or_id, load)
        except Pushed as pushed:
            if caller.reaches(pushed.consumer_id):
                raise
            raise NotFound(_missing(name_or_id)) from None
    if not caller.reaches(receiver.id):
        raise NotFound(_missing(name_or_id))
    return receiver


def forget() -> None:
    _receivers.forget()


def _missing(name_or_id: str) -> str:
    return f"there is no pull consumer {name_or_id!r}"


def load(name_or_id: str) -> Receiver:
    """As it is in the store now. Raises NotFound."""
    if "\0" in name_or_id:
        raise NotFound(_missing(name_or_id))
    found = Consumer.objects.select_related("source")
    try:
        consumer = found.filter(pk=UUID(name_or_id)).first()
    except ValueError:
        consumer = found.filter(name=name_or_id).first()
    if consumer is None:
        raise NotFound(_missing(name_or_id))
    if consumer.kind != "pull":
        raise Pushed(consumer)
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
