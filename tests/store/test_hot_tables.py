"""Old snapshots keep vacuum from cleaning; the hot tables stay small all the same, and hold what they held."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from django.db import connection

from consumers.store import backfill_work, backfills, claims, hot
from consumers.store.backfill_work import BackfillWork, Chunk, Job, Snapshot
from consumers.store.connection import store_connection
from tests.conftest import wait_until
from tests.store.world import OID, Log, fetch, keys, receipts, take, waits_for_lock  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

TABLES = [table for group in hot.GROUPS for table in group]
LARGE_BYTES = 100_000


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "GROUPS", tuple(dict.fromkeys(group, LARGE_BYTES) for group in hot.GROUPS))
    monkeypatch.setattr(hot, "OLD_SNAPSHOT_XIDS", 100)
    # A waiting room that an earlier test has left in this process looks after them as well, and would by these sizes.
    look, here = hot.HotTables.look, threading.current_thread()
    monkeypatch.setattr(hot.HotTables, "look", lambda tables, conn: look(tables, conn) if threading.current_thread() is here else [])


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
    out = take(consumer, 3, 3_600_000)
    claims.nack(consumer, receipts(out)[2:], 3_600_000)
    with store_connection(autocommit=False) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM messages")
        use(log, consumer, 1200)
        before, grown = contents(), largest(store)
        assert grown > LARGE_BYTES
        wait_until(lambda: set(hot.HotTables().look(store)) >= {"consumer_position", "leases"}, 20, "the rewriting, which vacuum may hold up")
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


# What reads one of these tables through a function has the snapshot of its caller, which may be older than what is in the table.

SNAPSHOT = Snapshot(7, 7, (), None)  # sees nothing of what `Log.row` makes


def while_rewritten(table: str, statement: str, run: Callable[[], Any]) -> Any:
    """What `run` answers when its `statement` comes to the table while that is emptied and filled again."""
    answers: list[Any] = []

    def answer() -> None:
        try:
            answers.append(run())
        finally:
            connection.close()

    asking = threading.Thread(target=answer)
    with store_connection(autocommit=False) as conn:
        conn.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        asking.start()
        wait_until(lambda: waits_for_lock(f"%{statement}%"), 10, "the statement to wait")
        assert hot.rewrite(conn, {table: 0}) == [table]
    asking.join(60)
    return answers[0]


@pytest.fixture
def backfilling(log: Log, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[UUID, BackfillWork, Job]]:  # noqa: F811
    monkeypatch.setattr(hot, "DEAD_SHARE", 0)
    monkeypatch.setattr(backfill_work, "LOCK_MS", 60_000)
    monkeypatch.setattr(backfill_work, "STATEMENT_MS", 60_000)
    log.append(log.row(9))
    consumer = log.consumer()
    backfills.begin(uuid4(), consumer_id=consumer, source_id=log.source.pk, table="public.orders")
    with BackfillWork(uuid4()) as work:
        job = work.take_turn()
        assert job is not None and work.begin_from(job, work.last_id(job))
        yield consumer, work, job


def test_a_backfill_finds_what_overtook_its_rows_while_a_table_is_rewritten(log: Log, backfilling: Any) -> None:  # noqa: F811
    consumer, work, job = backfilling
    high = log.progress.reached_lsn
    chunk = Chunk(
        1, 1, SNAPSHOT, high, log.relation, OID, "2026-11-30 00:00:00+00", 0, None, True, [b'["1"]', b'["2"]'], [b'{"id":1}', b'{"id":2}'], None
    )
    log.append(log.row(1, old_key=1))
    assert work.stage(job, chunk)
    assert while_rewritten("consumer_position", "sequin_append_chunk", lambda: work.append(job)).outcome == "completed"
    assert [(message.action, message.key) for message in take(consumer).messages] == [("update", '["1"]'), ("read", '["2"]')]


def test_what_a_snapshot_sees_is_known_while_a_table_is_rewritten(log: Log, backfilling: Any) -> None:  # noqa: F811
    _, work, job = backfilling
    fetch("UPDATE messages SET xid = 6")
    before = work.last_id(job)
    log.append(log.row(1))
    assert while_rewritten("capture_progress", "sequin_seen", lambda: work.seen(job, work.last_id(job), SNAPSHOT)) == before


def test_what_waits_is_estimated_while_a_table_is_rewritten(log: Log, backfilling: Any) -> None:  # noqa: F811
    consumer, _, _ = backfilling
    log.append(log.row(1), log.row(2))
    asked = "SELECT messages FROM sequin_estimate(%s, 1000)"
    assert while_rewritten("consumer_position", "sequin_estimate", lambda: fetch(asked, consumer)) == [(2,)]
