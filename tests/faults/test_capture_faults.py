"""Capture through faults of itself, the source, the network and the store: nothing lost, doubled or out of order.

Each run prints a verdict line (`make faults`, or pytest -s). The names F1 to F25 are those of the fault experiments that
docs/capture.md lists; lost histories and huge transactions are beside this module.
"""
from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.capture.world import ForkedReader
from tests.cluster import Cluster
from tests.conftest import wait_until
from tests.faults.rig import Capture, OwnStore, Scene

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
    free_slots(server)


def free_slots(server: Cluster) -> None:
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


@pytest.fixture(scope="module")
def store(server: Cluster, django_db_setup: None) -> Iterator[OwnStore]:
    """A store on a server of its own."""
    made = OwnStore(max_connections="30")
    yield made
    made.cluster.remove()


@pytest.fixture
def stored_apart(server: Cluster, store: OwnStore, transactional_db: None) -> Iterator[Scene]:
    """The scene with that store."""
    made = Scene(server, store)
    yield made
    made.close()
    store.empty()
    free_slots(server)


def begin(scene: Scene) -> None:
    scene.capture.start()
    scene.writer.start()
    scene.goes_on()


# The reader ---------------------------------------------------------------------------------------------------------------


def test_f1_the_reader_is_killed(scene: Scene, long_run: bool) -> None:
    chance = random.Random(1)
    begin(scene)
    kills = 60 if long_run else 3
    for _ in range(kills):
        scene.capture.kill_reader()
        scene.recovers()
        until = time.monotonic() + (chance.uniform(2, 10) if long_run else 0)
        wait_until(lambda: time.monotonic() >= until, 15, "the next kill")  # noqa: B023
    scene.verdict(f"F1 the reader killed {kills} times")


def test_f1_another_stands_by_and_takes_over(scene: Scene) -> None:
    begin(scene)
    second = Capture().start()
    try:
        beats = "SELECT count(*) FROM heartbeats WHERE process = 'reader' AND at > now() - interval '6 s'"
        wait_until(lambda: scene.fetch(beats) >= [(2,)], 20, "the second reader to stand by")
        scene.capture.kill()
        scene.recovers(15)
        scene.verdict("F1 all of run_capture killed, another stands by", reader=second)
    finally:
        second.kill()


def test_f5_a_stopped_reader_finds_its_connection_gone(scene: Scene) -> None:
    begin(scene)
    reader = scene.capture.reader()
    os.kill(reader, signal.SIGSTOP)
    wait_until(lambda: scene.cluster.execute("SELECT count(*) FROM pg_stat_replication") == [(0,)], 40, "the server to give it up")
    os.kill(reader, signal.SIGCONT)
    scene.recovers(20)
    scene.verdict("F5 SIGSTOP beyond wal_sender_timeout")


# Source and store ---------------------------------------------------------------------------------------------------------


def test_f7_the_source_crashes(scene: Scene, long_run: bool) -> None:
    begin(scene)
    times = 20 if long_run else 3
    for _ in range(times):
        scene.goes_on()
        scene.cluster.restart("immediate")
        scene.recovers()
    scene.verdict(f"F7 the source crashed {times} times")


def test_f8_the_store_crashes(stored_apart: Scene, store: OwnStore, long_run: bool) -> None:
    """After each crash: what the source was told to forget is in the store."""
    scene = stored_apart
    begin(scene)
    times = 20 if long_run else 3
    for _ in range(times):
        scene.goes_on()
        store.cluster.stop("immediate")
        confirmed = "SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots"
        told = scene.cluster.execute(confirmed)[0][0]
        store.cluster.start()
        reached = scene.fetch("SELECT reached_lsn FROM capture_progress")[0][0]
        assert told <= reached, "confirmed and not stored"
        scene.recovers()
    scene.verdict(f"F8 the store crashed {times} times")


def test_f23_no_sender_is_free(scene: Scene) -> None:
    scene.cluster.stop()
    scene.cluster.settings["max_wal_senders"] = "0"
    scene.cluster.start()
    try:
        scene.capture.start()
        wait_until(lambda: "max_wal_senders" in scene.state()[1], 20, "the reason to be named")
    finally:
        scene.cluster.settings["max_wal_senders"] = "30"
        scene.cluster.restart()
    scene.writer.start()
    scene.recovers()
    scene.verdict("F23 max_wal_senders used up")


def test_f23_the_store_has_no_free_connection(stored_apart: Scene, store: OwnStore) -> None:
    scene = stored_apart
    begin(scene)
    taken = [store.cluster.connect("sequin")]

    def refused() -> bool:
        """Take every connection there is, the reader's too: it tries on, and is refused."""
        taken[0].execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'sequin%'")
        try:
            while True:
                taken.append(store.cluster.connect("sequin"))
        except psycopg.OperationalError:
            return "too many clients" in scene.capture.said()

    wait_until(refused, 20, "the reader to be refused, and to say so")
    for conn in taken:
        conn.close()
    scene.recovers()
    scene.verdict("F23 the store's max_connections used up")


def test_slow_storing_does_not_cost_the_connection(scene: Scene) -> None:
    """Status goes out by the clock while the store makes us wait longer than wal_sender_timeout."""
    begin(scene)
    sender = scene.cluster.execute("SELECT pid FROM pg_stat_replication")
    from consumers.store.connection import store_connection

    with store_connection() as lock, lock.transaction():
        lock.execute("SELECT 1 FROM capture_progress FOR UPDATE")
        waited = time.monotonic()
        wait_until(lambda: time.monotonic() - waited > 9, 10)  # beyond the 6 s of wal_sender_timeout
    scene.recovers()
    assert scene.cluster.execute("SELECT pid FROM pg_stat_replication") == sender, "the same connection"
    scene.verdict("The store slow for 9 s")


# The network --------------------------------------------------------------------------------------------------------------


def test_f11_the_network_resets(scene: Scene, long_run: bool) -> None:
    begin(scene)
    times = 60 if long_run else 5
    for _ in range(times):
        scene.goes_on()
        wait_until(scene.proxy.reset, 30, "a connection to reset")
        scene.recovers()
    scene.verdict(f"F11 connections reset {times} times")
    senders = "SELECT count(*) FROM pg_stat_replication"
    wait_until(lambda: scene.cluster.execute(senders)[0][0] <= 1, 20, "no sender of a cut connection to be left")


def test_f12_the_network_swallows_everything(scene: Scene, long_run: bool) -> None:
    """Noticed within two thirds of the default wal_sender_timeout of 60 s; in the suite with shorter limits."""
    reader: Any = scene.capture
    if not long_run:
        reader = ForkedReader(scene.source, **{
            "capture.stream.ASK_AFTER_S": 0.5, "capture.stream.DEAD_AFTER_S": 1.0, "capture.surroundings.LOOK_WITHIN_S": 1.5,
            "capture.stream.ANSWER_WITHIN_S": 1.5, "consumers.source_connection.CONNECT_TIMEOUT_S": 2,
        })  # fmt: skip
    reader.start()
    try:
        scene.writer.start()
        scene.goes_on()
        scene.proxy.blackhole = True
        began = time.monotonic()
        wait_until(lambda: scene.state()[0] not in ("active", ""), 60, "the dead connection to be noticed")
        noticed = time.monotonic() - began
        assert noticed < 40
        if long_run:
            wait_until(lambda: time.monotonic() > began + 300, 310, "five minutes")
        scene.proxy.blackhole = False
        scene.recovers(40)
        scene.verdict(f"F12 blackhole, noticed after {noticed:.0f} s", reader=reader)
    finally:
        reader.kill()


def test_f13_a_network_of_a_few_bytes_a_second_keeps_the_connection(scene: Scene) -> None:
    begin(scene)
    scene.await_all()
    lines = "SELECT pid FROM pg_stat_replication"
    sender = scene.cluster.execute(lines)
    scene.proxy.bytes_each_100_ms = 100
    # Longer than the server's wal_sender_timeout of 6 s: it would have ended a silent connection.
    sent = "SELECT now() > backend_start + interval '9 s' AND now() - reply_time < interval '5 s' FROM pg_stat_replication"
    wait_until(lambda: scene.cluster.execute(sent) == [(True,)], 30, "the connection to outlive the timeout")
    scene.cluster.execute("INSERT INTO load (key, number) VALUES (99, 1)", database="shop")
    wait_until(lambda: (99, 1) in scene.stored(), 30, "a change to come through")
    assert scene.cluster.execute(lines) == sender, "the same connection"
    scene.verdict("F13 100 bytes each 100 ms")
