"""Servers of other kinds: a standby as the source, a host with IPv6 only; and the calls that bring a source back."""
from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from consumers import changes
from consumers.models import Source
from consumers.preflight import check
from consumers.tokens import create_token
from tests.capture.world import await_messages, events, gap, logged, read_until, reading
from tests.cluster import Cluster
from tests.conftest import wait_until

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def pair() -> Iterator[tuple[Cluster, Cluster]]:
    primary = Cluster("primary").start()
    primary.execute("CREATE TABLE t (id int PRIMARY KEY)")
    primary.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    standby = primary.standby("standby").start()
    yield primary, standby
    standby.remove()
    primary.remove()


def source_on(server: Cluster, **fields: Any) -> Source:
    return Source(
        name="shop", **{"host": server.host, "port": server.port, "database": "postgres", "username": "postgres",
                        "password": server.password, **fields},
    )  # fmt: skip


def test_a_standby_is_decoded(pair: tuple[Cluster, Cluster]) -> None:
    primary, standby = pair
    source = source_on(standby)
    with primary.logging_snapshots():
        changes.save(source)
    found = {finding.name: finding for finding in check(source)}
    assert found["standby"].ok and not [f for f in found.values() if f.blocking and not f.ok]
    with reading(source):
        primary.execute("INSERT INTO t VALUES (1), (2)")
        assert [row.record["id"] for row in await_messages(2)] == [1, 2]
    standby.restart()
    primary.execute("INSERT INTO t VALUES (3)")
    read_until(source, lambda: len(logged()) >= 3)
    assert gap(source) is None
    with standby.connect() as conn:
        conn.execute("SELECT pg_drop_replication_slot('sequin_slot')")


def test_a_publication_cannot_be_made_on_a_standby(pair: tuple[Cluster, Cluster]) -> None:
    from django.core.exceptions import ValidationError

    with pytest.raises(ValidationError, match="make it on the primary"):
        changes.save(source_on(pair[1], publication_name="another"))


def test_a_host_with_ipv6_only() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")

    class OnlyIpv6(Cluster):
        host = "::1"

    server = OnlyIpv6("six", listen_addresses="::1").start()
    try:
        server.execute("CREATE TABLE t (id int PRIMARY KEY)")
        server.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
        source = source_on(server)
        changes.save(source)
        server.execute("INSERT INTO t VALUES (1)")
        read_until(source, lambda: logged())
    finally:
        server.remove()


def test_events_and_recover_through_the_api(make_source: Any, source_database: Any, client: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    source_database.execute("INSERT INTO t VALUES (1)")
    read_until(source, lambda: logged())
    headers = {"HTTP_AUTHORIZATION": f"Bearer {create_token('t', 'manage')[1]}"}
    source_database.execute("SELECT pg_drop_replication_slot(%s)", [source.slot_name])
    source_database.execute("INSERT INTO t VALUES (2)")
    answer = client.post("/api/sources/shop/recover", **headers)
    assert answer.status_code == 200 and answer.json()["name"] == "shop"
    source_database.execute("INSERT INTO t VALUES (3)")
    read_until(source, lambda: len(logged()) >= 2)
    assert [row.record["id"] for row in logged()] == [1, 3] and logged()[1].epoch == 2
    told = client.get("/api/sources/shop/events", **headers).json()["data"]
    assert told[0]["kind"] == "gap" and told[0]["backfill"] and "are missing" in told[0]["text"]
    assert 'sequin_source_state{source="shop",state="gap"} 1' in client.get("/metrics").content.decode()
    assert client.post("/api/sources/shop/acknowledge_gap", **headers).json() == {"acknowledged": True}
    assert gap(source) is None and len(events(source)) == 1


def test_a_slot_still_held_by_a_dead_reader_of_ours_is_freed(make_source: Any, source_database: Any) -> None:
    """A server that has not noticed the death of its client keeps the slot until wal_sender_timeout; we need not wait."""
    from capture.reader import Reader
    from capture.stream import ReplicationStream, SlotActive
    from consumers.source_connection import conninfo
    from consumers.store.appender import Appender

    def try_to_read(source: Source) -> None:
        with Appender(source.pk) as appender:
            assert appender.wait_for_source(10)
            Reader(source, appender, stopping=lambda: False).run()

    source_database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    source_database.execute("INSERT INTO t VALUES (1)")
    held = ReplicationStream(conninfo(source, replication=True, application_name=f"sequin {source.pk}"))
    held.start(source.slot_name, source.publication_name, 0)
    with pytest.raises(SlotActive):
        try_to_read(source)
    wait_until(lambda: not _active(source_database, source), 10, "the slot to be free")
    read_until(source, lambda: logged())
    foreign = ReplicationStream(conninfo(source, replication=True, application_name="somebody else"))
    foreign.start(source.slot_name, source.publication_name, 0)
    with pytest.raises(SlotActive):
        try_to_read(source)
    assert _active(source_database, source), "a process that is not ours is left alone"
    foreign.close()
    held.close()


def _active(source_database: Any, source: Source) -> bool:
    try:
        return bool(source_database.execute("SELECT active FROM pg_replication_slots WHERE slot_name = %s", [source.slot_name])[0][0])
    except psycopg.Error:
        return True
