"""Capture through faults of the source, the network and itself: nothing lost, doubled or out of order, and never a silent gap.

Each run prints a verdict line (`make faults`, or pytest -s). The names F1 to F25 are those of the fault experiments that
docs/capture.md lists.
"""
from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from django.db import connection

from capture.reading import Reading
from consumers import changes
from consumers.models import Source
from tests.cluster import Cluster
from tests.conftest import wait_until
from tests.faults.rig import Scene, Writer, await_all, peak_mb, state_of, stored, stored_count, timed, verdict

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    made = Cluster("faulty", wal_sender_timeout="6s").start()
    yield made
    made.remove()


@pytest.fixture
def scene(server: Cluster, transactional_db: None) -> Iterator[Scene]:
    made = Scene(server)
    yield made
    made.close()
    if server.process is None or server.process.poll() is not None:
        server.start()

    def dropped() -> bool:
        server.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active")
        try:
            server.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        except psycopg.Error:
            return False
        return True

    wait_until(dropped, 20, "the slots to be gone")


@pytest.fixture
def forked() -> Iterator[Callable[..., int]]:
    """A reader in a forked process, with these module constants: `forked(source, **{"capture.stream.ASK_AFTER_S": 1})`."""
    pids: list[int] = []

    def start(source: Source, **constants: Any) -> int:
        connection.close()
        pid = os.fork()
        if pid == 0:
            import importlib

            for name, value in constants.items():
                module, attribute = name.rsplit(".", 1)
                setattr(importlib.import_module(module), attribute, value)
            try:
                Reading(Source.objects.get(pk=source.pk)).run()
            finally:
                os._exit(0)
        pids.append(pid)
        return pid

    yield start
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_f5_a_stopped_reader_finds_its_connection_gone(scene: Scene, forked: Any, long_run: bool) -> None:
    reader = forked(scene.source)
    scene.writer.start()
    scene.goes_on()
    os.kill(reader, signal.SIGSTOP)
    senders = "SELECT count(*) FROM pg_stat_replication"
    wait_until(lambda: scene.cluster.execute(senders) == [(0,)], 40, "the server to give the reader up")
    os.kill(reader, signal.SIGCONT)
    with timed() as took:
        scene.goes_on(10)
        recovery = took()
    scene.writer.stop()
    verdict("F5 SIGSTOP beyond wal_sender_timeout", await_all(scene.committed), recovery_s=recovery)


def test_f7_the_source_crashes(scene: Scene, forked: Any, long_run: bool) -> None:
    reader = forked(scene.source)
    scene.writer.start()
    recovery = 0.0
    for _ in range(20 if long_run else 3):
        scene.goes_on()
        scene.cluster.restart("immediate")
        with timed() as took:
            scene.goes_on()
            recovery = max(recovery, took())
    scene.writer.stop()
    verdict("F7 the source stops at once and starts again", await_all(scene.committed), recovery_s=recovery, peak_mb=peak_mb(reader))


def test_f11_the_network_resets(scene: Scene, forked: Any, long_run: bool) -> None:
    forked(scene.source)
    scene.writer.start()
    recovery = 0.0
    for _ in range(60 if long_run else 5):
        scene.goes_on()
        assert scene.proxy.reset() > 0
        with timed() as took:
            scene.goes_on()
            recovery = max(recovery, took())
    scene.writer.stop()
    verdict("F11 connections reset", await_all(scene.committed), recovery_s=recovery)
    senders = scene.cluster.execute("SELECT count(*) FROM pg_stat_replication")
    assert senders[0][0] <= 1, "no sender of a cut connection is left"


def test_f12_the_network_swallows_everything(scene: Scene, forked: Any, long_run: bool) -> None:
    limits = {} if long_run else {
        "capture.stream.ASK_AFTER_S": 0.5, "capture.stream.DEAD_AFTER_S": 1.0, "capture.surroundings.LOOK_WITHIN_S": 1.5,
        "capture.stream.ANSWER_WITHIN_S": 1.5, "consumers.source_connection.CONNECT_TIMEOUT_S": 2,
    }  # fmt: skip
    forked(scene.source, **limits)
    scene.writer.start()
    scene.goes_on()
    scene.proxy.blackhole = True
    with timed() as took:
        wait_until(lambda: state_of(scene.source)[0] not in ("active", ""), 60, "the dead connection to be noticed")
        noticed = took()
    scene.proxy.blackhole = False
    with timed() as took:
        scene.goes_on(40)
        recovery = took()
    scene.writer.stop()
    verdict(f"F12 blackhole, noticed after {noticed:.1f} s", await_all(scene.committed), recovery_s=recovery)


def test_f13_a_network_of_a_few_bytes_a_second_keeps_the_connection(scene: Scene, forked: Any) -> None:
    forked(scene.source)
    scene.writer.start()
    scene.goes_on()
    scene.writer.stop()
    await_all(scene.committed)
    lines = "SELECT pid FROM pg_stat_replication"
    sender = scene.cluster.execute(lines)
    scene.proxy.bytes_each_100_ms = 100
    # Longer than the server's wal_sender_timeout of 6 s: it would have ended a silent connection.
    sent = "SELECT now() > backend_start + interval '9 s' AND now() - reply_time < interval '5 s' FROM pg_stat_replication"
    wait_until(lambda: scene.cluster.execute(sent) == [(True,)], 30, "the connection to outlive the timeout")
    assert scene.cluster.execute(lines) == sender, "the same connection"
    verdict("F13 100 bytes each 100 ms", scene.committed())


def test_f18_a_slot_dropped_and_made_anew_is_never_healthy(scene: Scene, forked: Any) -> None:
    reader = forked(scene.source)
    scene.writer.start()
    scene.goes_on()
    scene.writer.stop()
    await_all(scene.committed)
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)

    def drop() -> bool:
        try:
            scene.cluster.execute("SELECT pg_drop_replication_slot('sequin_slot')")
        except psycopg.errors.ObjectInUse:
            return False
        return True

    wait_until(drop, 10, "the slot to be free")
    scene.cluster.execute("INSERT INTO load (key, number) VALUES (99, 1)", database="shop")  # lost, and to be said
    forked(scene.source)
    wait_until(lambda: state_of(scene.source)[0] == "slot_missing", 20, "the missing slot to be named")
    changes.recover(scene.source)
    scene.cluster.execute("INSERT INTO load (key, number) VALUES (99, 2)", database="shop")
    wait_until(lambda: (99, 2) in stored(), 20, "capture to go on")
    state, reason = state_of(scene.source)
    assert state == "gap" and "changes in between are missing" in reason
    assert (99, 1) not in stored()
    print("F18 slot dropped and made anew: slot_missing, then gap until acknowledged")  # noqa: T201


def test_f10_a_slot_past_its_cap_is_lost_and_made_anew_by_one_action(transactional_db: None, forked: Any) -> None:
    cluster = Cluster("capped", max_slot_wal_keep_size="32MB", min_wal_size="32MB", max_wal_size="32MB").start()
    try:
        scene = Scene(cluster)
        reader = forked(scene.source)
        scene.writer.start()
        scene.goes_on()
        scene.writer.stop()
        await_all(scene.committed)
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
        wait_until(lambda: cluster.execute("SELECT active FROM pg_replication_slots") == [(False,)], 10, "the slot to be free")
        for _ in range(6):
            cluster.execute("SELECT pg_logical_emit_message(false, 'fill', repeat('x', 16000000))", database="shop")
            cluster.execute("SELECT pg_switch_wal()")
            cluster.execute("CHECKPOINT")
        assert cluster.execute("SELECT wal_status FROM pg_replication_slots") == [("lost",)]
        forked(scene.source)
        with timed() as took:
            wait_until(lambda: state_of(scene.source)[0] == "slot_lost", 60, "the lost slot to be named")
            named = took()
        scene.source.refresh_from_db()
        changes.recover(scene.source)
        forked(scene.source)  # run_capture does this when a source was saved
        cluster.execute("INSERT INTO load (key, number) VALUES (99, 1)", database="shop")
        wait_until(lambda: (99, 1) in stored(), 20, "capture to go on")
        assert state_of(scene.source)[0] == "gap"
        print(f"F10 slot lost: named after {named:.1f} s, recovered by one action, gap shown")  # noqa: T201
        scene.close()
    finally:
        cluster.remove()


@pytest.mark.parametrize("kill", [False, True], ids=["whole", "killed"])
def test_f19_f20_a_huge_transaction(scene: Scene, forked: Any, long_run: bool, kill: bool) -> None:
    rows = 1_000_000 if long_run else 60_000
    scene.cluster.execute("CREATE TABLE big (id int PRIMARY KEY, filler text)", database="shop")
    reader = forked(scene.source)
    writer = subprocess.Popen(
        [scene.cluster.binaries / "psql", "-qc", f"INSERT INTO big SELECT g, repeat('x', 1000) FROM generate_series(1, {rows}) g",
         f"host=127.0.0.1 port={scene.cluster.port} user=postgres password={scene.cluster.password} dbname=shop"]
    )  # fmt: skip
    if kill:
        for part in (0.2, 0.5, 0.8):
            wait_until(lambda: stored_count() > rows * part, 300, "a part to be stored")  # noqa: B023
            os.kill(reader, signal.SIGKILL)
            os.waitpid(reader, 0)
            reader = forked(scene.source)
    wait_until(lambda: stored_count() >= rows, 600, "all rows")
    assert writer.wait(10) == 0
    peak = peak_mb(reader)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*), count(DISTINCT commit_idx), min(commit_idx), max(commit_idx),"
            " bool_and((record::json->>'id')::bigint = commit_idx + 1), bool_and(id > previous) FROM"
            " (SELECT *, lag(commit_idx, 1, -1::bigint) OVER (ORDER BY id) < commit_idx AS rising, lag(id, 1, 0::bigint)"
            " OVER (ORDER BY id) AS previous FROM messages) m"
        )
        assert cursor.fetchone() == (rows, rows, 0, rows - 1, True, True)
    name = "F20 one transaction, killed in its middle" if kill else "F19 one transaction"
    print(f"{name} of {rows} rows of 1 kB: whole, once, in order, peak {peak} MB")  # noqa: T201
    assert peak < 300


def test_f23_no_sender_is_free(scene: Scene, forked: Any) -> None:
    scene.cluster.stop()
    scene.cluster.settings["max_wal_senders"] = "0"
    scene.cluster.settings["wal_level"] = "logical"
    scene.cluster.start()
    try:
        forked(scene.source)
        wait_until(lambda: "max_wal_senders" in state_of(scene.source)[1], 20, "the reason to be named")
    finally:
        scene.cluster.settings["max_wal_senders"] = "30"
        scene.cluster.restart()
    with timed() as took:
        scene.writer.start()
        scene.goes_on()
        recovery = took()
    scene.writer.stop()
    verdict("F23 max_wal_senders used up", await_all(scene.committed), recovery_s=recovery)


def test_f24_ddl_storm(scene: Scene, forked: Any, long_run: bool) -> None:
    """Values stay under the right names while columns come, go, are renamed and change their type."""
    reader = forked(scene.source)
    with scene.cluster.connect("shop") as conn:
        conn.execute("CREATE TABLE storm (id int PRIMARY KEY, a text)")
        expected: list[dict[str, Any]] = []
        for number in range(200 if long_run else 25):
            base = 10 * number
            for statement, record in (
                ("INSERT INTO storm VALUES ({0}, 'a{0}')", {"a": "a{0}"}),
                ("ALTER TABLE storm ADD b int DEFAULT 5", None),
                ("INSERT INTO storm VALUES ({1}, 'a{1}', {1})", {"a": "a{1}", "b": 1}),
                ("ALTER TABLE storm RENAME a TO c", None),
                ("ALTER TABLE storm ALTER b TYPE text USING 'b' || b", None),
                ("INSERT INTO storm (id, b, c) VALUES ({2}, 'b{2}', 'c{2}')", {"c": "c{2}", "b": "b{2}"}),
                ("ALTER TABLE storm DROP b", None),
                ("INSERT INTO storm (id, c) VALUES ({3}, 'c{3}')", {"c": "c{3}"}),
                ("ALTER TABLE storm RENAME c TO a", None),
            ):  # fmt: skip
                ids = [base + offset for offset in range(4)]
                conn.execute(statement.format(*ids))  # type: ignore[arg-type]
                if record is not None:
                    at = len(expected) % 4
                    row = {name: value.format(*ids) if isinstance(value, str) else ids[at] for name, value in record.items()}
                    expected.append({"id": ids[at], **row})
    wait_until(lambda: stored_count() >= len(expected), 60, "every row")
    with connection.cursor() as cursor:
        cursor.execute("SELECT record::jsonb FROM messages ORDER BY id")
        import json

        assert [json.loads(row[0]) if isinstance(row[0], str) else row[0] for row in cursor.fetchall()] == expected
    assert os.waitpid(reader, os.WNOHANG) == (0, 0), "the reader lives"
    print(f"F24 DDL storm: {len(expected)} rows between {len(expected) // 4 * 5} changes of the table, each under its names")  # noqa: T201


@pytest.mark.parametrize("behind", [False, True], ids=["in step", "behind"])
def test_f25_a_standby_is_promoted(transactional_db: None, forked: Any, behind: bool) -> None:
    """In step: nothing lost or doubled. Behind, without its slot: said, and no new row taken for an old one."""
    primary = Cluster("primary").start()
    standby = None
    try:
        scene = Scene(primary)
        scene.source.slot_failover = not behind
        primary.execute("SELECT pg_drop_replication_slot('sequin_slot')")
        if not behind:
            primary.execute("SELECT pg_create_physical_replication_slot('to_standby')")
            primary.settings["synchronized_standby_slots"] = "to_standby"
            primary.restart()
        changes.recover(scene.source)
        slot = {} if behind else {"primary_slot_name": "to_standby", "sync_replication_slots": "on"}
        standby = primary.standby("standby", **slot)
        standby.settings.pop("synchronized_standby_slots", None)
        with (standby.data / "postgresql.auto.conf").open("a") as file:
            file.write(
                f"\nprimary_conninfo = 'host=127.0.0.1 port={primary.port} user=postgres password={primary.password} dbname=postgres'\n"
            )
        standby.start()
        forked(scene.source)
        scene.writer.start()
        scene.goes_on()
        if behind:
            standby.execute("SELECT pg_wal_replay_pause()")
            wait_until(lambda: standby.execute("SELECT pg_get_wal_replay_pause_state()") == [("paused",)], 10, "replay to pause")
            at = stored_count()
            wait_until(lambda: stored_count() > at + 50, 20, "the log to get ahead of the standby")
            scene.writer.stop()
            await_all(scene.committed)
            # What the standby has received it would replay on promotion: it must not have received it.
            primary.stop("immediate")
            received = standby.execute("SELECT pg_last_wal_replay_lsn()")[0][0]
            standby.settings["recovery_target_lsn"] = received
            standby.settings["recovery_target_action"] = "promote"
            standby.restart()
            wait_until(lambda: standby.execute("SELECT pg_is_in_recovery()") == [(False,)], 20, "the promotion")
        else:
            # While the slot moves the standby looks at it often.
            synced = "SELECT synced AND NOT temporary FROM pg_replication_slots WHERE slot_name = 'sequin_slot'"
            wait_until(lambda: standby.execute(synced) == [(True,)], 60, "the slot to be kept in step")
            scene.writer.stop()
            await_all(scene.committed)
            primary.stop("fast")
            standby.promote()
        scene.cluster = standby
        scene.proxy.target = standby.port
        scene.proxy.reset()
        if behind:
            wait_until(lambda: state_of(scene.source)[0] == "slot_missing", 30, "the missing slot to be named")
            standby.settings.pop("recovery_target_lsn")
            changes.recover(scene.source)
        later = Writer(lambda: standby.connect("shop"), seed=2)  # type: ignore[union-attr]
        before = stored_count()
        later.start()
        with timed() as took:
            wait_until(lambda: stored_count() > before + 20, 40, "capture from the new primary")
            recovery = took()
        later.stop()
        if behind:
            state, reason = state_of(scene.source)
            assert state == "gap" and "may not exist there" in reason, reason
            newest = standby.execute("SELECT key, max(number) FROM load GROUP BY key", database="shop")
            wait_until(lambda: set(newest) <= set(stored()), 20, "the new rows")
            with connection.cursor() as cursor:
                cursor.execute("SELECT max(epoch) FROM messages")
                assert cursor.fetchone()[0] == 2
            print(f"F25 promoted standby that was behind: divergence shown, new rows in epoch 2, recovery {recovery:.1f} s")  # noqa: T201
        else:
            assert state_of(scene.source)[0] == "active"
            verdict("F25 promoted standby with the slot in step", await_all(scene.committed), recovery_s=recovery)
        scene.close()
    finally:
        primary.remove()
        if standby is not None:
            standby.remove()


def test_slow_storing_does_not_cost_the_connection(scene: Scene, forked: Any) -> None:
    """Status goes out by the clock while the store makes us wait longer than wal_sender_timeout."""
    forked(scene.source)
    scene.writer.start()
    scene.goes_on()
    sender = scene.cluster.execute("SELECT pid FROM pg_stat_replication")
    from consumers.store.connection import store_connection

    with store_connection() as lock, lock.transaction():
        lock.execute("SELECT 1 FROM capture_progress WHERE source = %s FOR UPDATE", [scene.source.pk])
        waited = time.monotonic()
        kept = "SELECT now() - reply_time < interval '4 s' FROM pg_stat_replication"
        while time.monotonic() - waited < 9:  # beyond the 6 s of wal_sender_timeout
            assert scene.cluster.execute(kept) == [(True,)]
    scene.goes_on()
    assert scene.cluster.execute("SELECT pid FROM pg_stat_replication") == sender, "the same connection"
    scene.writer.stop()
    verdict("slow storing for 9 s", await_all(scene.committed))


def test_a_standby_takes_over_within_five_seconds(scene: Scene, run: Any) -> None:
    first = run("run_capture")
    scene.writer.start()
    scene.goes_on()
    run("run_capture")
    wait_until(lambda: _readers() >= 2, 20, "the second reader to stand by")
    os.killpg(first.pid, signal.SIGKILL)
    with timed() as took:
        scene.goes_on(15)
        recovery = took()
    scene.writer.stop()
    verdict("F1 the reading process killed, another stands by", await_all(scene.committed), recovery_s=recovery)


def _readers() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM heartbeats WHERE process = 'reader' AND at > now() - interval '6 s'")
        return int(cursor.fetchone()[0])
