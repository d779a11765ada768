"""What tests of routing share: a source whose changes are read in this process, and taking all that a consumer gets."""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from consumers import changes
from consumers.models import Consumer, Source
from consumers.store import claims
from consumers.store.types import ClaimedMessage
from tests.capture.world import logged, read_until
from tests.conftest import SourceDatabase


class Shop:
    """A source, its database, and consumers on it."""

    def __init__(self, source: Source, database: SourceDatabase) -> None:
        self.source, self.database = source, database
        self._written = 0

    def execute(self, *statements: str) -> None:
        with self.database.connect() as conn:
            for statement in statements:
                conn.execute(statement)  # type: ignore[arg-type]

    def consumer(self, where: str = "", *, kind: str = "pull", **fields: Any) -> Consumer:
        name = fields.pop("name", f"c{Consumer.objects.count()}")
        consumer = Consumer(name=name, source=self.source, kind=kind, where=where, **fields)
        changes.save(consumer)
        return consumer

    def read(self) -> None:
        """Let capture store what was committed until now."""
        self._written += 1
        self.execute("CREATE TABLE IF NOT EXISTS public.mark (n int PRIMARY KEY)")
        self.execute(f"INSERT INTO public.mark VALUES ({self._written})")
        read_until(self.source, lambda: any(m.table == "public.mark" and m.record["n"] == self._written for m in logged(self.source)))


@pytest.fixture
def shop(make_source: Callable[..., Source], source_database: SourceDatabase) -> Shop:
    source = make_source()
    source_database.execute("CREATE TABLE public.mark (n int PRIMARY KEY)")
    with source_database.connect() as conn:
        conn.execute(f'ALTER PUBLICATION "{source.publication_name}" ADD TABLE public.mark')  # type: ignore[arg-type]
    return Shop(source, source_database)


def take(consumer: Consumer | UUID, limit: int = 1000) -> list[ClaimedMessage]:
    """Everything that can be had now, acknowledged."""
    consumer_id = consumer.pk if isinstance(consumer, Consumer) else consumer
    found: list[ClaimedMessage] = []
    for _ in range(10_000):
        claim = claims.claim(consumer_id, limit, lease_ms=60_000)
        if claim.token is not None:
            found += claim.messages
            claims.ack(consumer_id, [(claim.token, message.id) for message in claim.messages])
        elif claim.at_end:
            return found
    raise AssertionError("the claim never ends")


def record(message: ClaimedMessage) -> Any:
    return json.loads(message.record)
