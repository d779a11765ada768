"""Histories that break, and tables that change all the time: what is missing is said, what is there is under its right name.

Each run prints a verdict line, as in test_capture_faults.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from consumers import changes
from tests.cluster import Cluster
from tests.conftest import wait_until
from tests.faults.rig import Scene, Writer
from tests.faults.test_capture_faults import begin, scene, server  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)


def drop_slot(cluster: Cluster) -> None:
    def drop() -> bool:
        try:
            cluster.execute("SELECT pg_drop_replication_slot('sequin_slot')")
        except psycopg.errors.ObjectInUse:
            return False
        return True

    wait_until(drop, 10, "the slot to be free")


@pytest.mark.parametrize("anew", [False, True], ids=["dropped", "dropped and made anew"])
def test_f18_a_slot_that_was_dropped_is_never_healthy(scene: Scene, anew: bool) -> None:
    begin(scene)
    scene.await_all()
    scene.capture.kill()
    drop_slot(scene.cluster)
    scene.cluster.execute("INSERT INTO load (key, number) VALUES (99, 1)", database="shop")  # lost, and to be said
    if anew:
        scene.cluster.execute("SELECT pg_create_logical_replication_slot('sequin_slot', 'pgoutput')", database="shop")
        scene.capture.start()
    else:
        scene.capture.start()
        scene.becomes("slot_missing")
        changes.recover(scene.source)
    scene.becomes("gap")
    scene.writer = Writer(lambda: scene.cluster.connect("shop"), seed=2)
    scene.writer.start()
    scene.recovers()
    state, reason = scene.state()
    assert state == "gap" and "changes in between are missing" in reason
    scene.verdict(f"F18 slot {'dropped and made anew' if anew else 'dropped, recovered by one action'}, gap said", gap={(99, 1)})


def test_f10_a_slot_past_its_cap_is_lost_and_made_anew_by_one_action(transactional_db: None) -> None:
    cluster = Cluster("capped", max_slot_wal_keep_size="32MB", min_wal_size="32MB", max_wal_size="32MB").start()
    scene = Scene(cluster)
    try:
        begin(scene)
        scene.await_all()
        scene.capture.kill()
        wait_until(lambda: cluster.execute("SELECT active FROM pg_replication_slots") == [(False,)], 10, "the slot to be free")
        cluster.execute("INSERT INTO load (key, number) VALUES (99, 1)", database="shop")  # lost, and to be said
        for _ in range(6):
            cluster.execute("SELECT pg_logical_emit_message(false, 'fill', repeat('x', 16000000))", database="shop")
            cluster.execute("SELECT pg_switch_wal()")
            cluster.execute("CHECKPOINT")
        assert cluster.execute("SELECT wal_status FROM pg_replication_slots") == [("lost",)]
        scene.capture.start()
        named = scene.becomes("slot_lost")
        scene.source.refresh_from_db()
        changes.recover(scene.source)
        scene.becomes("gap")
        scene.writer = Writer(lambda: cluster.connect("shop"), seed=2)
        scene.writer.start()
        scene.recovers()
        scene.verdict(f"F10 slot lost, named after {named:.1f} s, recovered by one action, gap said", gap={(99, 1)})
    finally:
        scene.close()
        cluster.remove()


STORM = [
    ("INSERT INTO storm VALUES ({0}, 'a{0}')", {"a": "a{0}"}),
    ("ALTER TABLE storm ADD b int DEFAULT 5", None),
    ("ALTER PUBLICATION storm SET TABLE storm, other", None),
    ("INSERT INTO storm VALUES ({1}, 'a{1}', {1})", {"a": "a{1}", "b": 1}),
    ("ALTER TABLE storm RENAME a TO c", None),
    ("ALTER TABLE storm ALTER b TYPE text USING 'b' || b", None),
    ("INSERT INTO storm (id, b, c) VALUES ({2}, 'b{2}', 'c{2}')", {"c": "c{2}", "b": "b{2}"}),
    ("ALTER TABLE other DETACH PARTITION other0", None),
    ("ALTER TABLE storm DROP b", None),
    ("ALTER TABLE other ATTACH PARTITION other0 FOR VALUES FROM (0) TO (1000000)", None),
    ("ALTER PUBLICATION storm SET TABLE storm", None),
    ("INSERT INTO storm (id, c) VALUES ({3}, 'c{3}')", {"c": "c{3}"}),
    ("ALTER TABLE storm RENAME c TO a", None),
]  # fmt: skip


def test_f24_ddl_storm(scene: Scene, long_run: bool) -> None:
    """Columns come, go, are renamed and change their type, partitions and tables join and leave, under load."""
    expected: list[dict[str, Any]] = []
    begin(scene)
    reader = scene.capture.reader()
    with scene.cluster.connect("shop") as conn:
        conn.execute("CREATE TABLE storm (id int PRIMARY KEY, a text)")
        conn.execute("CREATE TABLE other (id int PRIMARY KEY) PARTITION BY RANGE (id)")
        conn.execute("CREATE TABLE other0 PARTITION OF other FOR VALUES FROM (0) TO (1000000)")
        conn.execute("CREATE PUBLICATION storm FOR TABLE storm")
        for number in range(100 if long_run else 15):
            ids = [10 * number + offset for offset in range(4)]
            for statement, record in STORM:
                conn.execute(statement.format(*ids))  # type: ignore[arg-type]
                if record is not None:
                    at = len(expected) % 4
                    row = {name: value.format(*ids) if isinstance(value, str) else ids[at] for name, value in record.items()}
                    expected.append({"id": ids[at], **row})
    scene.recovers()
    rows = "SELECT m.record FROM messages m JOIN relation_version r ON r.id = m.relation WHERE r.table_name = 'storm' ORDER BY m.id"
    wait_until(lambda: len(scene.fetch(rows)) >= len(expected), 60, "every row")
    assert [json.loads(row[0]) for row in scene.fetch(rows)] == expected
    assert scene.capture.reader() == reader, "the reader lives"
    scene.verdict(f"F24 DDL storm, {len(expected)} rows between {len(expected) // 4 * 9} changes, each under its names")


@contextmanager
def primary_and_standby(slot: bool) -> Iterator[tuple[Scene, Cluster]]:
    """A scene on a primary with a standby; with the slot in step on both, or without."""
    primary = Cluster("primary").start()
    standby = None
    scene = Scene(primary)
    try:
        scene.source.slot_failover = slot
        primary.execute("SELECT pg_drop_replication_slot('sequin_slot')")
        if slot:
            primary.execute("SELECT pg_create_physical_replication_slot('to_standby')")
            primary.settings["synchronized_standby_slots"] = "to_standby"
            primary.restart()
        changes.recover(scene.source)
        standby = primary.standby("standby", **({"primary_slot_name": "to_standby", "sync_replication_slots": "on"} if slot else {}))
        standby.settings.pop("synchronized_standby_slots", None)
        with (standby.data / "postgresql.auto.conf").open("a") as file:
            file.write(
                f"\nprimary_conninfo = 'host=127.0.0.1 port={primary.port} user=postgres password={primary.password} dbname=postgres'\n"
            )
        standby.start()
        yield scene, standby
    finally:
        scene.close()
        primary.remove()
        if standby is not None:
            standby.remove()


def switch_to(scene: Scene, standby: Cluster) -> None:
    scene.cluster = standby
    scene.proxy.target = standby.port
    scene.proxy.reset()


def test_f25_a_standby_with_the_slot_in_step_is_promoted(transactional_db: None) -> None:
    with primary_and_standby(slot=True) as (scene, standby):
        begin(scene)
        # While the slot moves the standby looks at it often.
        synced = "SELECT synced AND NOT temporary FROM pg_replication_slots WHERE slot_name = 'sequin_slot'"
        wait_until(lambda: standby.execute(synced) == [(True,)], 60, "the slot to be kept in step")
        scene.await_all()
        scene.cluster.stop("fast")
        standby.promote()
        switch_to(scene, standby)
        scene.writer = Writer(lambda: standby.connect("shop"), seed=2)
        scene.writer.start()
        scene.recovers(40)
        assert scene.state()[0] == "active"
        scene.verdict("F25 promoted standby with the slot in step")


def test_f25_a_standby_that_was_behind_is_promoted(transactional_db: None) -> None:
    """Said, and no new row is taken for an old one: the new timeline uses the same LSNs again."""
    with primary_and_standby(slot=False) as (scene, standby):
        begin(scene)
        standby.execute("SELECT pg_wal_replay_pause()")
        wait_until(lambda: standby.execute("SELECT pg_get_wal_replay_pause_state()") == [("paused",)], 10, "replay to pause")
        at = scene.stored_count()
        wait_until(lambda: scene.stored_count() > at + 50, 20, "the log to get ahead of the standby")
        before = scene.await_all()
        # What the standby has received it would replay on promotion: it must not have received it.
        scene.cluster.stop("immediate")
        standby.settings["recovery_target_lsn"] = standby.execute("SELECT pg_last_wal_replay_lsn()")[0][0]
        standby.settings["recovery_target_action"] = "promote"
        standby.restart()
        wait_until(lambda: standby.execute("SELECT pg_is_in_recovery()") == [(False,)], 20, "the promotion")
        standby.settings.pop("recovery_target_lsn")
        switch_to(scene, standby)
        scene.becomes("slot_missing")
        gone = before - scene.committed()
        assert gone, "the standby lacks some of what the log has"
        changes.recover(scene.source)
        standby.execute("UPDATE load SET number = number", database="shop")
        standby.execute("DELETE FROM load WHERE key < 3", database="shop")
        scene.writer = Writer(lambda: standby.connect("shop"), seed=2, first=1_000_000)
        scene.writer.start()
        scene.recovers(40)
        state, reason = scene.state()
        assert state == "gap" and "may not exist there" in reason, reason
        assert scene.fetch("SELECT max(epoch) FROM messages") == [(2,)]
        scene.verdict(f"F25 promoted standby that was behind, {len(gone)} changes that it never had said", also=before)
