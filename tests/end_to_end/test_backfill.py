"""A backfill with real processes: capture, workers; killed and stopped while it runs."""
from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from consumers import changes
from consumers.models import Backfill, Consumer, HttpEndpoint
from consumers.store.connection import store_connection
from tests.capture.backfill_world import fetch
from tests.conftest import SourceDatabase, wait_until
from tests.installation import process_tree
from tests.push.endpoint import Endpoint

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_consumer_that_begins_with_everything(
    source_database: SourceDatabase, make_source: Any, run: Any
) -> None:
    rows = 20_000
    source_database.execute(f"CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(1, {rows}) g")
    source = make_source()
    run("run_capture")
    run("run_workers")
    consumer = Consumer(name="all", source=source, kind="pull", tables=["public.t"], start_from="beginning")
    changes.save(consumer)
    backfill = Backfill.objects.get()

    def completed() -> bool:
        backfill.refresh_from_db()
        assert backfill.status in ("running", "completed"), backfill.reason
        return backfill.status == "completed"

    wait_until(completed, 60, "the backfill")
    assert fetch("SELECT count(*), count(DISTINCT key) FROM messages WHERE action = 'R'") == [(rows, rows)]


def replayers(watcher: int) -> list[int]:
    """The processes of the cluster that works on backfills."""

    def replays(pid: int) -> bool:
        try:
            return b"Q_CLUSTER_NAME=replay" in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False  # it has ended

    return [pid for pid in process_tree(watcher) if replays(pid)]


def send(pid: int, signal_: signal.Signals) -> None:
    try:
        os.kill(pid, signal_)
    except ProcessLookupError:
        pass


def test_pushes_do_not_wait_for_backfills(source_database: SourceDatabase, make_source: Any, make_consumer: Any, run: Any) -> None:
    """Four run, and their workers hang in the middle of them; the one worker that pushes goes on.

    Nobody receives the rows, and a backfill waits behind 50,000 messages of the log: all four are fewer.
    """
    source_database.execute("CREATE TABLE live (id int PRIMARY KEY); CREATE TABLE t (id int PRIMARY KEY, v text)")
    source_database.execute("INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(1, 10000) g")
    source, where = make_source(), Endpoint()
    endpoint = HttpEndpoint(name="here", url=where.url)
    changes.save(endpoint)
    make_consumer(source, "live", kind="push", endpoint=endpoint, tables=["public.live"])
    run("run_capture")
    watcher = run("run_workers", SEQUIN_WORKERS="1", SEQUIN_ALLOWED_NETWORKS="127.0.0.0/8")
    source_database.execute("INSERT INTO live VALUES (1)")
    wait_until(lambda: where.ids == [1], 60, "the first push")
    with store_connection(autocommit=False) as held:  # one of them, which so does not end meanwhile
        for number in range(4):
            changes.save(Consumer(name=f"all{number}", source=source, kind="pull", tables=["public.t"], start_from="beginning"))
        held.execute("SELECT FROM backfills WHERE consumer = %s FOR UPDATE", [Consumer.objects.get(name="all3").pk])
        wait_until(lambda: fetch("SELECT 1 FROM backfills WHERE rows_done > 0"), 60, "a backfill to get on")
        stopped = [watcher.pid, *replayers(watcher.pid)]  # the watcher would start them anew
        for pid in stopped:
            send(pid, signal.SIGSTOP)
        try:
            assert len(stopped) > 1
            source_database.execute("INSERT INTO live SELECT generate_series(2, 50)")
            wait_until(lambda: sorted(where.ids) == list(range(1, 51)), 30, "pushes to go on")
            assert fetch("SELECT 1 FROM backfills WHERE status = 'running'")
        finally:
            for pid in stopped:
                send(pid, signal.SIGCONT)
    wait_until(lambda: fetch("SELECT count(*) FROM backfills WHERE status = 'completed'") == [(4,)], 90, "the backfills")
    where.close()
