"""Measure routing: what a filter or a function adds to a message, and twenty filtered consumers of one table under load.

    python bench/routing.py [--messages 10000] [--rounds 5] [--seconds 20] [--rate 2000]

First each variant takes the same messages of the log, claim and ack in batches of 100, in alternating rounds; every filter lets
everything through, so that all deliver the same. Then an appender writes RATE changes a second, and receivers take turns over
twenty consumers, each with a filter of its own that lets a twentieth through: the longest lag, second by second.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench._store import store  # noqa: E402

BATCH = 100
VARIANTS: dict[str, tuple[str, str]] = {
    "none": ("", ""),
    "where: one column": ("status <> 'gone'", ""),
    "where: five columns": ("status <> 'gone' AND total > -1 AND active AND price < 1e9 AND created_at >= '2020-01-01'", ""),
    "where: jsonb @>": ("meta @> '{\"vip\": true}'", ""),
    "where: old and new": ("new.status IS DISTINCT FROM old.status", ""),
    "transform: two fields": ("", "function transform(a, record) return {id = record.id, status = record.status} end"),
    "transform: pass-through": ("", "function transform(a, record, changes, metadata) return {record = record, metadata = metadata} end"),
    "transform: a text": ("", "function transform(a, record, changes) return 'order ' .. record.id .. ' is ' .. record.status end"),
}
COLUMNS = (
    ("id", 20, "bigint"), ("status", 25, "text"), ("total", 1700, "numeric"), ("price", 701, "double precision"), ("active", 16, "boolean"),
    ("created_at", 1184, "timestamp with time zone"), ("meta", 3802, "jsonb"), ("note", 25, "text"),
)  # fmt: skip


class Orders:
    """A source's log of updates of one table, written without capture."""

    def __init__(self) -> None:
        from consumers.models import Source
        from consumers.store.appender import Appender
        from consumers.store.types import ColumnShape, Progress, RelationShape

        self.source = Source.objects.create(name="bench", host="localhost", database="d", username="u", status="paused")
        self.appender = Appender(self.source.pk)
        self.progress = Progress(1, "1", 1, 100, 0, 0, 100)
        self.appender.begin_history(self.progress)
        columns = tuple(ColumnShape(name, oid, -1, type_name) for name, oid, type_name in COLUMNS)
        self.relation = self.appender.register_relation(1, RelationShape(7, "public", "orders", columns, ("id",), "f"))
        self.lsn = 1000

    def append(self, first: int, count: int) -> None:
        from consumers.store.types import LogRow

        rows = []
        for number in range(first, first + count):
            self.lsn += 10
            record = (
                b'{"id":%d,"status":"paid","total":154.97,"price":%d.5,"active":true,"created_at":"2026-11-23T10:00:00.123456+00:00",'
                b'"meta":{"vip":true,"tags":["a","b"]},"note":"as it came, with a few words more to read over"}' % (number % 5000, number)
            )
            rows.append(LogRow(
                self.relation, 7, b"U", b'["%d"]' % (number % 5000), None, 7, self.lsn, 0, int((time.time() - 946684800) * 1e6), record,
                b'{"status":"new"}', None, True,
            ))  # fmt: skip
        after = self.progress._replace(stored_lsn=self.lsn + 1, reached_lsn=self.lsn + 1)
        self.appender.append(rows, self.progress, after)
        self.progress = after

    def consumer(self, name: str, where: str, transform: str) -> Any:
        from consumers.models import Consumer
        from consumers.store import lifecycle

        made = Consumer.objects.create(
            name=name, source=self.source, kind="pull", tables=["public.orders"], where=where, transform=transform, max_ack_pending=1_000_000
        )
        lifecycle.create_position(made.pk, self.source.pk, 0)
        return made


def drain(consumer: Any, to: Any) -> int:
    """Take what there is, make payloads, acknowledge. Returns how many."""
    from consumers.store import claims
    from delivery.transforming import make, settle

    count = 0
    while True:
        claim = claims.claim(consumer.pk, BATCH, lease_ms=60_000)
        if claim.token is None:
            if claim.at_end:
                return count
            continue
        ready = settle(consumer.pk, claim.token, make(consumer.pk, consumer.transform, to, claim.messages, 60))
        claims.ack(consumer.pk, [(claim.token, item.message.id) for item in ready])
        count += len(ready)


def rewind(consumer_id: UUID) -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("UPDATE consumer_position SET position = 0 WHERE consumer = %s", [consumer_id])


def cost(orders: Orders, messages: int, rounds: int) -> None:
    from consumers.trying import address_of

    consumers = {name: orders.consumer(name.replace(" ", "-").replace(":", "").replace("@>", "contains"), *texts) for name, texts in VARIANTS.items()}
    for first in range(0, messages, 2000):
        orders.append(first, min(2000, messages - first))
    took: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 1):
        for name, consumer in consumers.items():
            rewind(consumer.pk)
            began = time.perf_counter()
            count = drain(consumer, address_of(consumer))
            assert count == messages, (name, count)
            if turn:
                took[name].append((time.perf_counter() - began) / messages * 1e6)
    for name, found in took.items():
        more = statistics.median(a - b for a, b in zip(found, took["none"], strict=True))
        print(f"{name:<26}{statistics.median(found):7.1f} µs a message, {more:+6.1f} against none (median of {rounds} alternating rounds)")


def fan_out(orders: Orders, rate: int, seconds: int, receivers: int = 4) -> None:
    from django.db import connection

    from consumers.trying import address_of

    consumers = [orders.consumer(f"c{n}", f"id % 20 = {n} AND total > 0", "") for n in range(20)]
    stopping = threading.Event()
    delivered = [0]

    def append() -> None:
        began, number = time.monotonic(), 0
        while not stopping.is_set():
            orders.append(number, rate // 50)
            number += rate // 50
            stopping.wait(max(0.0, began + number / rate - time.monotonic()))

    def receive(mine: list[Any]) -> None:
        addresses = {consumer.pk: address_of(consumer) for consumer in mine}
        while not stopping.is_set():
            found = sum(drain(consumer, addresses[consumer.pk]) for consumer in mine)
            delivered[0] += found
            if not found:
                stopping.wait(0.002)
        connection.close()

    threads = [threading.Thread(target=append), *(threading.Thread(target=receive, args=(consumers[n::receivers],)) for n in range(receivers))]
    for thread in threads:
        thread.start()
    lags = []
    for _ in range(seconds):
        time.sleep(1)
        with connection.cursor() as cursor:
            cursor.execute("SELECT max(m.id) - min(p.position) FROM consumer_position p, (SELECT max(id) AS id FROM messages) m WHERE p.consumer = ANY (%s)",
                           [[consumer.pk for consumer in consumers]])  # fmt: skip
            lags.append(cursor.fetchone()[0])
    stopping.set()
    for thread in threads:
        thread.join()
    third = max(1, seconds // 3)
    print(
        f"20 filtered consumers at {rate:,} changes/s for {seconds} s: {delivered[0] / seconds:,.0f} delivered/s; the slowest consumer behind by"
        f" {statistics.median(lags[:third]):,.0f} changes in the first third, {statistics.median(lags[-third:]):,.0f} in the last (median)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--rate", type=int, default=2000)
    options = parser.parse_args()
    with store():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    orders = Orders()
    try:
        cost(orders, options.messages, options.rounds)
        fan_out(orders, options.rate, options.seconds)
    finally:
        from consumers.filters import filtering
        from delivery.transforming import pool

        pool.close()
        filtering.close()
        orders.appender.close()


if __name__ == "__main__":
    main()
