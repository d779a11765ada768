"""The log written directly, without capture, and short words for what is done with claims."""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

from django.db import connection

from consumers.models import Consumer, Source
from consumers.store import claims, lifecycle
from consumers.store.appender import Appender
from consumers.store.types import ClaimedMessage, ColumnShape, LogRow, Progress, RelationShape

OID = 5
SHAPE = RelationShape(OID, "public", "orders", (ColumnShape("id", 20, -1, "bigint"),), ("id",), "d")


class Log:
    """A source whose log is written directly, without capture."""

    def __init__(self, source: Source | None = None) -> None:
        self.source = source or Source.objects.create(
            name=f"s-{uuid4().hex[:6]}", host="localhost", database="d", username="u", status="paused"
        )
        self.appender = Appender(self.source.pk)
        self.progress = Progress(1, "1", 1, 100, 0, 0, 100)
        self.appender.begin_history(self.progress)
        self.relation = self.appender.register_relation(1, SHAPE)
        self.lsn = 1000

    def alter(self) -> None:
        """The table has another column from here on: a shape that nobody knows yet."""
        column = ColumnShape(f"c{uuid4().hex[:6]}", 23, -1, "integer")
        self.relation = self.appender.register_relation(1, SHAPE._replace(columns=(*SHAPE.columns, column)))

    def row(self, key: int, old_key: int | None = None, action: bytes = b"I") -> LogRow:
        self.lsn += 10
        old = None if old_key is None else b'["%d"]' % old_key
        return LogRow(
            self.relation, OID, b"U" if old else action, b'["%d"]' % key, old, 7, self.lsn, 0, 0,
            b'{"id":%d,"n":%d}' % (key, self.lsn), None, None, True,
        )  # fmt: skip

    def append(self, *rows: LogRow) -> None:
        after = self.progress._replace(stored_lsn=self.lsn + 1, reached_lsn=self.lsn + 1)
        self.appender.append(rows, self.progress, after)
        self.progress = after

    def consumer(self, acked: int = 0, **fields: Any) -> UUID:
        """`acked`: already, long ago. From 1,000 on an ack is seldom timed, and then waits for nobody."""
        consumer = Consumer.objects.create(name=f"c-{uuid4().hex[:6]}", source=self.source, kind="pull", **fields)
        lifecycle.create_position(consumer.pk, self.source.pk, 0)
        fetch("UPDATE consumer_position SET acked_count = %s WHERE consumer = %s", acked, consumer.pk)
        return consumer.pk


def fetch(query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []


def beginning(run: Callable[[], Any]) -> threading.Thread:
    """Let this run in a thread, whose connection is closed with it."""

    def work() -> None:
        try:
            run()
        finally:
            connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def waits_for_lock(statement: str) -> bool:
    """Whether a statement like this, in LIKE's sense, waits for a lock."""
    return bool(fetch("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s", statement))


def receipts(claim: Any) -> list[tuple[UUID, int]]:
    return [(claim.token, message.id) for message in claim.messages]


def unsent(named: list[tuple[UUID, int]], max_batch: int | None = None) -> list[tuple[UUID, ClaimedMessage]]:
    """Receipts as what a pump holds and did not send."""
    nothing: dict[str, Any] = dict.fromkeys(ClaimedMessage._fields)
    return [(token, ClaimedMessage(**{**nothing, "id": id_, "max_batch": max_batch})) for token, id_ in named]


def take(consumer: UUID, limit: int = 100, lease_ms: int = 100_000) -> Any:
    return claims.claim(consumer, limit, lease_ms=lease_ms)


def keys(claim: Any) -> list[str]:
    return [message.key for message in claim.messages]


def parked_count(consumer: UUID) -> tuple[int, int]:
    """By the counter, and by the rows; dead letters apart."""
    return fetch(
        "SELECT parked_count, (SELECT coalesce(sum(cardinality(ids)), 0)::int FROM parked WHERE consumer = p.consumer AND reason <> 'dead')"
        " FROM consumer_position p WHERE consumer = %s", consumer,
    )[0]  # type: ignore[return-value]  # fmt: skip
