"""Old snapshots keep vacuum from cleaning; the hot tables stay small all the same, and hold what they held."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest

from consumers.store import claims, hot
from consumers.store.connection import store_connection
from tests.conftest import wait_until
from tests.store.world import Log, fetch, keys, receipts, take  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

TABLES = [table for group in hot.GROUPS for table in group]
LARGE_BYTES = 100_000


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "GROUPS", tuple(dict.fromkeys(group, LARGE_BYTES) for group in hot.GROUPS))
    monkeypatch.setattr(hot, "OLD_SNAPSHOT_XIDS", 100)


@pytest.fixture
def store() -> Iterator[psycopg.Connection[Any]]:
    with store_connection() as conn:
        yield conn


def use(log: Log, consumer: UUID, times: int) -> None:  # noqa: F811
    log.append(*[log.row(key) for key in range(times)])
    for _ in range(times):
        claims.ack(consumer, receipts(take(consumer, 1)))


def contents() -> dict[str, list[tuple[Any, ...]]]:
    return {table: fetch(f"SELECT * FROM {table} ORDER BY 1") for table in TABLES}


def largest(store: psycopg.Connection[Any]) -> int:
    row = store.execute("SELECT max(pg_total_relation_size(t::regclass)) FROM unnest(%s::text[]) t", [TABLES]).fetchone()
    assert row is not None
    return int(row[0])


def test_behind_an_old_snapshot_they_are_rewritten_with_all_they_hold(log: Log, store: Any) -> None:  # noqa: F811
    consumer = log.consumer()
    log.append(*[log.row(key) for key in (901, 901, 902, 903)])
    out = take(consumer, 3)
    claims.nack(consumer, receipts(out)[2:], 60_000)
    with store_connection(autocommit=False) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM messages")
        use(log, consumer, 1200)
        before, grown = contents(), largest(store)
        assert grown > LARGE_BYTES
        assert set(hot.HotTables().look(store)) >= {"consumer_position", "leases"}
        assert contents() == before and largest(store) < LARGE_BYTES < grown
    assert claims.ack(consumer, receipts(out)) == (2, 1)
    log.append(log.row(901), log.row(902))
    came = keys(take(consumer))
    assert '["901"]' in came and '["902"]' not in came, "902 waits behind the one that was given back"


def test_without_one_vacuum_is_left_to_it(log: Log, store: Any) -> None:  # noqa: F811
    use(log, log.consumer(), 400)
    assert hot.HotTables().look(store) == []


def test_what_somebody_holds_is_left_alone_for_a_while(log: Log, store: Any) -> None:  # noqa: F811
    consumer = log.consumer()
    with store_connection(autocommit=False) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM leases")
        use(log, consumer, 400)
        tables = hot.HotTables()
        assert "leases" not in tables.look(store)
        assert tables._not_before[0] > 0
        use(log, consumer, 10)  # nobody queues behind it
    assert "leases" not in tables.look(store), "not so soon again"

    def look_at_once() -> list[str]:
        use(log, consumer, 50)  # vacuum may have cleaned meanwhile, or have them just now
        tables._not_before[0] = 0.0
        return tables.look(store)

    with store_connection(autocommit=False) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM messages")
        use(log, consumer, 400)
        wait_until(lambda: "leases" in look_at_once(), 20, "the rewriting")
