"""Backfills where a snapshot and the log disagree for long: a commit that waits for a standby; and a standby as the source."""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from consumers import changes
from consumers.models import Backfill, Consumer, Source
from tests.capture.backfill_world import begin, copy_of, counts, fetch, reads, stage_all, status, step_once, work_off
from tests.capture.test_backfill_order import MAKE
from tests.capture.world import logged, read_until, reading
from tests.cluster import Cluster
from tests.conftest import wait_until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("quick_reader")]


@pytest.fixture
def server() -> Iterator[Cluster]:
    made = Cluster("hanging").start()
    made.execute(MAKE)
    made.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    yield made
    made.remove()


def source_on(server: Cluster) -> Source:
    source = Source(name="shop", host=server.host, port=server.port, database="postgres", username="postgres", password=server.password)
    return source


@contextmanager
def hanging(server: Cluster, statement: str) -> Iterator[None]:
    """A statement whose commit waits for a standby that does not come, while the block runs: in the WAL, and in no snapshot."""
    server.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    server.execute("SELECT pg_reload_conf()")
    wait_until(lambda: server.execute("SHOW synchronous_standby_names") == [("nobody",)])
    thread = threading.Thread(target=lambda: server.execute(statement))
    thread.start()
    try:
        wait_until(lambda: server.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"))
        yield
    finally:
        server.execute("ALTER SYSTEM RESET synchronous_standby_names")
        server.execute("SELECT pg_reload_conf()")
        thread.join(60)
        assert not thread.is_alive()


def rows(server: Cluster) -> dict[str, Any]:
    return {f'["{row["id"]}"]': row for (row,) in server.execute("SELECT to_json(t) FROM t")}


def test_a_consumer_that_begins_while_a_commit_hangs_gets_it_as_a_change(server: Cluster, transactional_db: None) -> None:
    source = source_on(server)
    changes.save(source)
    with hanging(server, "UPDATE t SET n = 1000 WHERE id = 3"):
        read_until(source, lambda: logged())
        consumer = Consumer(name="all", source=source, kind="pull", tables=["public.t"], start_from="beginning")
        changes.save(consumer)
        assert fetch("SELECT position < (SELECT min(id) FROM messages) FROM consumer_position") == [(True,)]
        with reading(source):
            backfill = Backfill.objects.get().pk
            assert work_off(backfill) == "completed", status(backfill)
    assert counts(backfill) == (40, 1)
    assert copy_of(consumer) == rows(server) and copy_of(consumer)['["3"]']["n"] == 1000


def test_a_consumer_that_begins_while_a_commit_hangs_that_is_not_logged_yet(server: Cluster, transactional_db: None) -> None:
    source = source_on(server)
    changes.save(source)
    read_until(source, lambda: fetch("SELECT 1 FROM capture_progress"))
    with hanging(server, "UPDATE t SET n = 1000 WHERE id = 3"):
        consumer = Consumer(name="all", source=source, kind="pull", tables=["public.t"], start_from="beginning")
        changes.save(consumer)
        with reading(source):
            backfill = Backfill.objects.get().pk
            assert work_off(backfill) == "completed", status(backfill)
    assert copy_of(consumer) == rows(server) and copy_of(consumer)['["3"]']["n"] == 1000


def test_a_backfill_waits_for_a_change_that_its_consumer_does_not_get(server: Cluster, make_consumer: Any) -> None:
    """Committed before the consumer's start, so it does not come as a change; not visible yet, so it cannot be read."""
    source = source_on(server)
    changes.save(source)
    with hanging(server, "UPDATE t SET n = 1000 WHERE id = 3"):
        read_until(source, lambda: logged())
        consumer = make_consumer(source, tables=["public.t"])
        backfill = begin(consumer)
        with reading(source):
            wait_until(lambda: step_once() or "not visible on the source yet" in status(backfill)[1], 20)
            for _ in range(3):
                step_once()
            assert status(backfill)[0] == "running" and not reads()
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    assert counts(backfill) == (40, 0) and copy_of(consumer) == rows(server)


def test_a_change_that_hangs_and_is_taken_overtakes_its_row(server: Cluster, make_consumer: Any) -> None:
    source = source_on(server)
    changes.save(source)
    consumer = make_consumer(source, tables=["public.t"])
    with hanging(server, "UPDATE t SET n = 1000 WHERE id = 3"):
        read_until(source, lambda: logged())
        with reading(source):
            backfill = begin(consumer, page_rows=10)
            assert work_off(backfill) == "completed", status(backfill)
        assert counts(backfill) == (40, 1)
        assert fetch("SELECT seen_id < (SELECT min(id) FROM messages WHERE action = 'U') FROM backfills") == [(True,)]
    assert copy_of(consumer) == rows(server)


@pytest.fixture
def pair(server: Cluster) -> Iterator[tuple[Cluster, Cluster]]:
    standby = server.standby("standby").start()
    yield server, standby
    standby.remove()


@pytest.fixture
def on_standby(pair: tuple[Cluster, Cluster], transactional_db: None) -> Source:
    """A source on the standby. Making its slot there takes a snapshot of the primary."""
    primary, standby = pair
    source = source_on(standby)
    with primary.logging_snapshots():
        changes.save(source)
    return source


def test_a_standby_as_the_source(pair: tuple[Cluster, Cluster], on_standby: Source, make_consumer: Any) -> None:
    primary, _ = pair
    read_until(on_standby, lambda: fetch("SELECT 1 FROM capture_progress"))
    consumer = make_consumer(on_standby, tables=["public.t"])
    everything = Consumer(name="all", source=on_standby, kind="pull", tables=["public.t"], start_from="beginning")
    changes.save(everything)
    backfill = begin(consumer, page_rows=10)
    primary.execute("UPDATE t SET n = 100 WHERE id = 2")
    assert stage_all(backfill) > 0
    primary.execute("UPDATE t SET n = 1000 WHERE id IN (3, 30)")
    primary.execute("DELETE FROM t WHERE id = 4")
    with reading(on_standby):
        assert work_off(backfill) == "completed", status(backfill)
        assert work_off(Backfill.objects.get(consumer=everything).pk) == "completed"
    primary.execute("UPDATE t SET n = 2000 WHERE id = 5")
    read_until(on_standby, lambda: any(row.record.get("n") == 2000 for row in logged()))
    assert fetch("SELECT count(*) FROM backfill_chunks") == [(0,)]
    assert copy_of(consumer) == copy_of(everything) == rows(primary)


def test_a_standby_beside_writers(pair: tuple[Cluster, Cluster], on_standby: Source, make_consumer: Any) -> None:
    primary, _ = pair
    primary.execute("INSERT INTO t SELECT g, 'x', g FROM generate_series(41, 4000) g")
    read_until(on_standby, lambda: fetch("SELECT 1 FROM capture_progress"))
    consumer = make_consumer(on_standby, tables=["public.t"])
    stop = threading.Event()

    def write() -> None:
        with primary.connect() as conn:
            number = 10_000
            while not stop.is_set():
                number += 1
                conn.execute("UPDATE t SET n = %s WHERE id = %s", [number, number * 7 % 4000 + 1])
                if number % 5 == 0:
                    conn.execute("DELETE FROM t WHERE id = %s", [number * 11 % 4000 + 1])
                    conn.execute("INSERT INTO t VALUES (%s, 'again', %s) ON CONFLICT DO NOTHING", [number * 11 % 4000 + 1, number])
                time.sleep(0.001)

    writer = threading.Thread(target=write)
    with reading(on_standby):
        writer.start()
        try:
            backfill = begin(consumer, page_rows=50)
            assert work_off(backfill, 60) == "completed", status(backfill)
        finally:
            stop.set()
            writer.join()
    primary.execute("UPDATE t SET n = 99999 WHERE id = 1")
    read_until(on_standby, lambda: any(row.record.get("n") == 99999 for row in logged()))
    assert copy_of(consumer) == rows(primary) and counts(backfill)[0] > 1000
