"""What is missing is said, and nothing is missing silently: publications, histories, transactions older than their publication."""
from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import connection

from capture import surroundings
from capture.reading import Reading
from capture.stream import StreamEnded
from consumers import changes
from consumers.models import Consumer, Source
from consumers.health import sources
from consumers.store import lifecycle
from consumers.store.appender import Appender
from tests.capture.test_servers import source_on
from tests.capture.backfill_world import begin, fetch, work_off
from tests.capture.world import ForkedReader, await_messages, gap, logged, read_until, reading
from tests.cluster import Cluster
from tests.conftest import SourceDatabase, wait_until
from tests.faults.rig import Proxy

pytestmark = pytest.mark.django_db(transaction=True)


class StopHere(Exception):
    """A reader's process dies."""


@pytest.fixture
def source(source_database: SourceDatabase, make_source: Any) -> Source:
    """One whose publication and slot are ours, with a table `t` and a consumer of it."""
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, n int)")
    made: Source = make_source()
    changes.save(Consumer(name="c", source=made, kind="pull", tables=["public.t"]))
    return made


@contextmanager
def living(source: Source) -> Iterator[None]:
    """A reader that connects again after whatever breaks, in a thread."""
    reading = Reading(source)

    def run() -> None:
        try:
            reading.run()
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        reading.stop()
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _signals(monkeypatch: Any) -> None:
    monkeypatch.setattr("capture.reading.signal.signal", lambda *_: None)  # only the main thread may


def test_a_publication_dropped_and_made_anew_is_a_gap_or_a_lost_slot(source: Source, source_database: SourceDatabase) -> None:
    """Postgres 18 skips what was written meanwhile, without a word; older servers cannot decode it at all."""
    source_database.execute("INSERT INTO t VALUES (1)")
    read_until(source, lambda: logged())
    source_database.execute("DROP PUBLICATION sequin_pub")
    source_database.execute("INSERT INTO t VALUES (2)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source_database.execute("INSERT INTO t VALUES (3)")
    if source_database.version < 18:
        with living(source):
            wait_until(lambda: lifecycle.source_state(source.pk) == "slot_lost", 20, "the lost slot to be named")
        changes.recover(source)
        source_database.execute("INSERT INTO t VALUES (4)")
    read_until(source, lambda: len(logged()) >= 2)
    assert "missing" in str(gap(source))
    assert [row.record["id"] for row in logged()] == ([1, 3] if source_database.version >= 18 else [1, 4])


def test_recover_makes_a_dropped_publication_of_ours_anew(source: Source, source_database: SourceDatabase) -> None:
    source_database.execute("INSERT INTO t VALUES (1)")
    with living(source):
        await_messages(1)
        source_database.execute("DROP PUBLICATION sequin_pub")
        source_database.execute("INSERT INTO t VALUES (2)")
        source.refresh_from_db()
    with living(source):
        wait_until(lambda: lifecycle.source_state(source.pk) in ("publication_missing", "slot_lost"), 20, "it to be named")
    changes.recover(source)
    with living(source):
        source_database.execute("INSERT INTO t VALUES (3)")
        await_messages(2)
        assert "missing" in str(gap(source)) and [row.record["id"] for row in logged()] == [1, 3]


def test_a_publication_of_somebody_else_is_left_to_them(source_database: SourceDatabase, make_source: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    changes.save(Consumer(name="c", source=source, kind="pull", tables=["public.t"]))
    source_database.execute("DROP PUBLICATION sequin_pub")
    with pytest.raises(ValidationError, match=r'CREATE PUBLICATION "sequin_pub" FOR TABLE "public"."t"'):
        changes.recover(source)
    assert source_database.execute("SELECT count(*) FROM pg_publication") == [(0,)]


def test_what_an_older_transaction_wrote_before_its_table_was_published_arrives(
    source_database: SourceDatabase, make_source: Any
) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    source = make_source()
    answered = threading.Event()

    def make_consumer() -> None:
        changes.save(Consumer(name="c", source=source, kind="pull", tables=["public.t"]))
        answered.set()
        connection.close()

    thread = threading.Thread(target=make_consumer)
    with source_database.connect(autocommit=False) as older:
        older.execute("INSERT INTO t VALUES (1)")
        thread.start()
        wait_until(lambda: source_database.execute("SELECT count(*) FROM pg_publication_tables") == [(1,)], 10, "the table to be published")
        assert not answered.is_set(), "the older transaction is waited for"
        source_database.execute("INSERT INTO t VALUES (2)")  # who comes later is not
        assert not answered.wait(0.3)
        older.commit()
    thread.join(60)
    assert answered.is_set()
    source_database.execute("INSERT INTO t VALUES (3)")
    read_until(source, lambda: 3 in [row.record["id"] for row in logged()])
    position = lifecycle._fetch("SELECT start_lsn FROM consumer_position")[0][0]
    first = lifecycle._fetch("SELECT min(commit_lsn) FROM messages WHERE commit_lsn >= %s", [position])[0][0]
    delivered = lifecycle._fetch("SELECT key FROM messages WHERE commit_lsn >= %s ORDER BY id", [first])
    assert delivered == [('["3"]',)], "the consumer begins with what is committed after it was answered"


def test_an_older_transaction_that_stays_open_is_named_and_the_table_not_published(
    source_database: SourceDatabase, make_source: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("consumers.publishing.WRITERS_WITHIN_S", 0.3)
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    source_database.execute("CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (10)")
    source = make_source()
    with source_database.connect(autocommit=False) as older:
        older.execute("INSERT INTO t1 VALUES (1)")
        with pytest.raises(ValidationError, match=rf"has been open all the time \(process {older.info.backend_pid}, open for"):
            changes.save(Consumer(name="c", source=source, kind="pull", tables=["public.t"]))
        older.rollback()
    assert source_database.execute("SELECT count(*) FROM pg_publication_tables") == [(0,)]
    changes.save(Consumer(name="c", source=source, kind="pull", tables=["public.t"]))


def test_a_table_that_somebody_publishes_by_hand_is_published_when_the_older_writers_have_ended(
    source_database: SourceDatabase, make_source: Any, monkeypatch: Any
) -> None:
    """What we ask for where the publication is not ours; or it was us, and the process died at once."""
    monkeypatch.setattr("consumers.publishing.WRITERS_WITHIN_S", 0.3)
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE u")
    source = make_source()
    with source_database.connect(autocommit=False) as older, source_database.connect(autocommit=False) as younger:
        older.execute("INSERT INTO t VALUES (1)")
        source_database.execute("ALTER PUBLICATION sequin_pub ADD TABLE t")
        younger.execute("INSERT INTO t VALUES (2)")
        for tables in (["public.t"], ["public.*"], []):
            with pytest.raises(ValidationError, match=rf"has been open all the time \(process {older.info.backend_pid}, open for [^;]*$"):
                changes.save(Consumer(name="c", source=source, kind="pull", tables=tables))
        older.rollback()
        changes.save(Consumer(name="c", source=source, kind="pull", tables=["public.t"]))
    read_until(source, lambda: logged())
    assert source_database.execute("SELECT count(*) FROM pg_publication_tables") == [(2,)]
    assert [row.record["id"] for row in logged()] == [2]


@pytest.mark.parametrize("stored", [3, 5], ids=["half of it", "all but its commit"])
def test_a_transaction_stored_in_part_is_completed_under_the_publication_it_began_with(
    source_database: SourceDatabase, make_source: Any, monkeypatch: Any, stored: int
) -> None:
    """How much of it is stored is counted in what that publication sends; the source is edited meanwhile."""
    monkeypatch.setattr("capture.reader.BATCH_ROWS", stored)
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t; CREATE PUBLICATION another FOR TABLE t, u")
    source = make_source()
    read_until(source, lambda: True)
    with source_database.connect(autocommit=False) as writer:
        for number in range(5):
            writer.execute(f"INSERT INTO u VALUES ({number}); INSERT INTO t VALUES ({number})")
    source_database.execute("INSERT INTO u VALUES (100)")
    append = Appender.append

    def stored_in_part(self: Appender, *given: Any) -> Any:
        done = append(self, *given)
        if given[0]:
            raise StopHere
        return done

    with monkeypatch.context() as patch, pytest.raises(StopHere):
        patch.setattr(Appender, "append", stored_in_part)
        read_until(source, lambda: False)
    assert len(logged()) == stored
    source.publication_name = "another"
    changes.save(source)
    with pytest.raises(StreamEnded, match="complete"):
        read_until(source, lambda: len(logged()) > 5)
    read_until(source, lambda: len(logged()) > 5)
    assert [(row.table, row.record["id"]) for row in logged()] == [*(("public.t", number) for number in range(5)), ("public.u", 100)]
    assert gap(source) is None


def test_two_consumers_that_name_a_table_for_the_first_time_at_once(
    source_database: SourceDatabase, make_source: Any, monkeypatch: Any
) -> None:
    """The first one is refused in the end, and its table unpublished again: the second must not have relied on it."""
    monkeypatch.setattr("consumers.publishing.WRITERS_WITHIN_S", 2.0)
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    source = make_source()
    ended: dict[str, str] = {}

    def make_consumer(name: str) -> None:
        try:
            changes.save(Consumer(name=name, source=source, kind="pull", tables=["public.t"]))
            ended[name] = "made"
        except ValidationError as error:
            ended[name] = str(error)
        finally:
            connection.close()

    def published() -> bool:
        return source_database.execute("SELECT count(*) FROM pg_publication_tables") == [(1,)]

    first, second = (threading.Thread(target=make_consumer, args=[name]) for name in ("first", "second"))
    with source_database.connect(autocommit=False) as older:
        older.execute("INSERT INTO t VALUES (1)")
        first.start()
        wait_until(published, 10, "the table to be published")
        second.start()
        wait_until(lambda: ended or source_database.execute(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND query LIKE %s", ["%pg_try_advisory_lock%"]
        ), 10, "the second to come")  # fmt: skip
        first.join(60)
        older.commit()
    second.join(60)
    assert published() == (ended["second"] == "made"), ended


@pytest.fixture
def server() -> Iterator[Cluster]:
    made = Cluster("put-back").start()
    made.execute("CREATE TABLE t (id int PRIMARY KEY)")
    made.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    yield made
    made.remove()


def copied(server: Cluster) -> None:
    server.stop()
    subprocess.run(["cp", "-a", server.data, server.directory / "copy"], check=True)
    server.start()


def put_back(server: Cluster) -> None:
    server.stop()
    shutil.rmtree(server.data)
    (server.directory / "copy").rename(server.data)
    server.start()


@pytest.mark.parametrize("grown", [False, True], ids=["behind the log", "beyond the log"])
def test_a_server_put_back_from_a_copy_is_recognised(server: Cluster, transactional_db: None, grown: bool) -> None:
    """Same system, same timeline. Where it has grown past our position only its transactions tell."""
    source = source_on(server)
    changes.save(source)
    server.execute("INSERT INTO t VALUES (1)")
    read_until(source, lambda: logged())
    copied(server)
    server.execute("INSERT INTO t VALUES (2)")
    read_until(source, lambda: len(logged()) >= 2)
    put_back(server)
    server.execute("INSERT INTO t VALUES (3)")
    if grown:
        server.execute("SELECT pg_logical_emit_message(false, 'x', repeat('x', 100000))")
        server.execute("INSERT INTO t VALUES (4)")
    with living(source):
        wait_until(lambda: 3 in [row.record["id"] for row in logged()], 20, "what the copy wrote")
        assert "copy" in str(gap(source)) or "backup" in str(gap(source))
        wait_until(lambda: not grown or logged()[-1].record["id"] == 4, 20, "the rest")
    assert logged()[-1].epoch == 2


def test_an_ordinary_crash_of_the_server_is_no_gap(server: Cluster, transactional_db: None) -> None:
    """A crash takes the slot's position back; what is sent again is recognised, the newest transaction proves the history."""
    source = source_on(server)
    changes.save(source)
    for number in range(3):
        server.execute("INSERT INTO t SELECT generate_series(%s::int, %s::int)", [10 * number, 10 * number + 2])
        read_until(source, lambda: len(logged()) >= 3 * number + 3)  # noqa: B023
        server.restart("immediate")
    server.execute("INSERT INTO t VALUES (99)")
    read_until(source, lambda: len(logged()) >= 10)
    assert gap(source) is None and len(logged()) == 10 and {row.epoch for row in logged()} == {1}


def test_a_standby_that_is_promoted_while_it_is_read_is_no_gap(transactional_db: None, monkeypatch: Any) -> None:
    monkeypatch.setattr("capture.reader.LOOK_EVERY_S", 0.05)
    primary = Cluster("primary").start()
    primary.execute("CREATE TABLE t (id int PRIMARY KEY)")
    primary.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    standby = primary.standby("standby").start()
    source = source_on(standby)
    with primary.logging_snapshots():
        changes.save(source)
    try:
        with reading(source):
            primary.execute("INSERT INTO t VALUES (1), (2)")
            await_messages(2)
            primary.stop()
            standby.promote()
            standby.execute("INSERT INTO t VALUES (3)")
            await_messages(3)
            wait_until(lambda: lifecycle._fetch("SELECT timeline FROM capture_progress") == [(2,)], 20, "the new timeline")
            standby.execute("INSERT INTO t VALUES (4)")
            await_messages(4)
        standby.execute("INSERT INTO t VALUES (5)")
        read_until(source, lambda: len(logged()) >= 5)
        assert gap(source) is None and [row.record["id"] for row in logged()] == [1, 2, 3, 4, 5]
    finally:
        standby.remove()
        primary.remove()


def test_a_mistake_of_ours_has_a_state_and_is_tried_again(source: Source, source_database: SourceDatabase, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("unforeseen")

    source_database.execute("INSERT INTO t VALUES (1)")
    with monkeypatch.context() as patched:
        patched.setattr("capture.tables.Tables.register", broken)
        with living(source):
            wait_until(lambda: lifecycle.source_state(source.pk) == "broken", 20, "the state")
            patched.undo()
            await_messages(1)


def test_what_the_server_cannot_decode_at_all_is_a_lost_slot_with_a_way_back(
    source: Source, source_database: SourceDatabase, monkeypatch: Any
) -> None:
    """A row beyond what a protocol message can hold: the server fails at it each time, for ever."""
    from capture.stream import DecodingFailed, ReplicationStream

    def fails(*_: Any) -> Any:
        raise DecodingFailed("ERROR: invalid memory alloc request size 1073741824")
        yield

    source_database.execute("INSERT INTO t VALUES (0)")
    read_until(source, lambda: logged())
    source_database.execute("INSERT INTO t VALUES (1)")
    with monkeypatch.context() as patched:
        patched.setattr(ReplicationStream, "batches", fails)
        with living(source):
            wait_until(lambda: lifecycle.source_state(source.pk) == "slot_lost", 20, "the state")
    changes.recover(source)
    source_database.execute("INSERT INTO t VALUES (2)")
    read_until(source, lambda: len(logged()) >= 2)
    assert [row.record["id"] for row in logged()] == [0, 2] and "are missing" in str(gap(source))


def test_a_paused_source_is_watched(source: Source, source_database: SourceDatabase, monkeypatch: Any) -> None:
    """What its slot keeps is shown, past the alarm it is said, and a slot that is lost or gone is never healthy."""
    monkeypatch.setattr("capture.reading.WATCH_EVERY_S", 1)
    source_database.execute("INSERT INTO t VALUES (1)")
    read_until(source, lambda: logged())
    source.status = "paused"
    changes.save(source)
    monkeypatch.setattr("capture.surroundings.RETAINED_ALARM_BYTES", 1_000_000)
    with living(source):
        judged = lambda: sources()[0]  # noqa: E731
        wait_until(lambda: judged().reasons, 20, "the pause to be judged")
        assert judged().status == "paused" and "keeps WAL" in judged().reasons[0]
        source_database.execute("SELECT pg_logical_emit_message(false, 'x', repeat('x', 3000000))")
        wait_until(lambda: judged().status == "degraded", 20, "the alarm")
        assert "holds back" in judged().reasons[1]
        source_database.execute("SELECT pg_drop_replication_slot(%s)", [source.slot_name])
        wait_until(lambda: judged().status == "failing", 20, "the lost slot")
    assert len(logged()) == 1, "nothing is read"


def test_wal_that_an_open_transaction_keeps_is_laid_to_it(source: Source, source_database: SourceDatabase, monkeypatch: Any) -> None:
    monkeypatch.setattr("capture.surroundings.RETAINED_ALARM_BYTES", 1_000_000)
    with source_database.connect(autocommit=False) as older, source_database.connect() as control:
        older.execute("INSERT INTO t VALUES (1)")
        source_database.execute("SELECT pg_logical_emit_message(false, 'x', repeat('x', 3000000))")
        source_database.execute("INSERT INTO t VALUES (2)")
        with reading(source):
            def caught_up() -> bool:
                slot = surroundings.look_at_slot(control, source)
                return bool(slot.warnings) and slot.source_lsn - slot.confirmed_lsn < 100_000

            await_messages(1)
            wait_until(caught_up, 20, "all to be confirmed, and kept")
            (warning,) = surroundings.look_at_slot(control, source).warnings
        assert f"A transaction of process {older.info.backend_pid} has been open for" in warning
        older.rollback()


def test_connections_outlive_an_idle_session_timeout(source: Source, source_database: SourceDatabase, monkeypatch: Any) -> None:
    if source_database.version < 14:
        pytest.skip("Postgres 14 brought it")
    with source_database.admin() as conn:
        conn.execute(f"ALTER ROLE {source_database.name} SET idle_session_timeout = '1s'")  # type: ignore[arg-type]
    with reading(source):
        source_database.execute("INSERT INTO t VALUES (1)")
        await_messages(1)
        idle = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sequin' AND now() - state_change > interval '1500 ms'"
        wait_until(lambda: source_database.admin().execute(idle).fetchone() == (1,), 10, "our connection to be idle for longer")
        source_database.execute("INSERT INTO t VALUES (2)")
        await_messages(2)


def test_two_servers_behind_one_address_are_not_taken_for_one(server: Cluster, transactional_db: None) -> None:
    """What one of them says of the slot means nothing for the other: a failover between two connections, or a balancer of reads."""
    source = source_on(server)
    changes.save(source)
    server.execute("INSERT INTO t VALUES (1)")
    server.stop()
    other = Cluster("twin")
    shutil.copytree(server.data, other.data, copy_function=shutil.copy2)
    subprocess.run(["chown", "-R", "--reference", server.data, other.data], check=True)
    server.start()
    other.start()
    between = Alternating(server.port, other.port)
    reader = ForkedReader(source)
    try:
        Source.objects.filter(pk=source.pk).update(port=between.port)
        source.refresh_from_db()
        reader.start()
        said = "SELECT array_to_string(reasons, '') FROM source_status"
        wait_until(lambda: "two servers answered" in str(lifecycle._fetch(said)), 20, "it to be said")
        assert not logged()
        between.targets = [server.port]
        await_messages(1)
    finally:
        reader.kill()
        between.close()
        other.remove()


class Alternating(Proxy):
    """Every other connection goes to another server."""

    def __init__(self, *targets: int) -> None:
        self.targets = list(targets)
        self._turn = 0
        super().__init__(targets[0])

    @property
    def target(self) -> int:
        self._turn += 1
        return self.targets[self._turn % len(self.targets)]

    @target.setter
    def target(self, port: int) -> None:
        pass


def test_backfills_of_every_table_of_every_consumer_close_a_gap(source_database: SourceDatabase, source: Source) -> None:
    source_database.execute("CREATE TABLE u (id int PRIMARY KEY); INSERT INTO t VALUES (1, 1); INSERT INTO u VALUES (1)")
    both = Consumer(name="both", source=source, kind="pull", tables=["public.t", "public.u"])
    every = Consumer(name="all", source=source, kind="pull", tables=["public.*"])
    idle = Consumer(name="idle", source=source, kind="pull", tables=["public.u"], status="disabled")
    for consumer in (both, every, idle):
        changes.save(consumer)
    one = Consumer.objects.get(name="c")
    with reading(source):
        assert work_off(begin(both, "public.u")) == "completed"
    with Appender(source.pk) as appender:
        assert appender.wait_for_source(10)
        appender.note_gap("the slot was made anew")
    changes.save(Consumer(name="later", source=source, kind="pull", tables=["public.t"]))
    with reading(source):
        for consumer, table in ((one, "public.t"), (both, "public.t"), (every, "public.t"), (every, "public.u")):
            assert work_off(begin(consumer, table)) == "completed"
        assert work_off(begin(both, "public.u", where="id = 1")) == "completed"
        assert gap(source), "what came before the gap does not count, nor does a part"
        assert "Backfill all tables" in sources()[0].reasons[0]
        assert work_off(begin(both, "public.u")) == "completed"
        assert gap(source) is None
    assert fetch("SELECT kind, text FROM source_events ORDER BY id DESC LIMIT 1") == [("gap_closed", "every table of every consumer was backfilled since")]
