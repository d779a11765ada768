"""Backfills beside changes: a row read before a change is never delivered after it, and none is lost.

No capture runs while pages are read, so they wait for the log; then the table is changed, and what waits meets the changes.
"""
from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from capture import backfilling
from consumers.models import Consumer
from consumers.store import backfill_work, claims
from tests.capture.backfill_world import begin, copy_of, counts, delivered, fetch, reads, records, stage_all, status, step_once, work_off
from tests.capture.conftest import EMBEDDED
from tests.capture.world import await_messages, logged, read_until, reading
from tests.conftest import SourceDatabase, wait_until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("quick_reader")]

ROWS = 40
MAKE = "CREATE TABLE t (id int PRIMARY KEY, v text, n int); INSERT INTO t SELECT g, 'before', g FROM generate_series(1, 40) g"


class Scene:
    """A table, a source whose capture has begun and stands still, and a consumer."""

    def __init__(self, database: SourceDatabase, make_source: Any, make_consumer: Any, table: str = MAKE, **consumer: Any) -> None:
        self.database = database
        database.execute(table)
        database.execute("CREATE TABLE other (id int)")
        database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
        self.source = make_source()
        self.catch_up()
        self.consumer: Consumer = make_consumer(self.source, **{"actions": ["insert", "update", "delete", "truncate"], **consumer})

    def catch_up(self) -> None:
        """Let capture run until it has all there is."""
        [(here,)] = self.database.execute("SELECT pg_current_wal_insert_lsn() - '0/0'")
        self.database.execute("INSERT INTO other VALUES (1)")
        read_until(self.source, lambda: fetch("SELECT 1 FROM capture_progress WHERE reached_lsn >= %s", here))

    def stage(self, **how: Any) -> Any:
        """A backfill whose pages are read and wait."""
        backfill = begin(self.consumer, **how)
        self.database.execute("INSERT INTO other VALUES (1)")
        assert stage_all(backfill) > 0
        return backfill

    def finish(self, backfill: Any) -> None:
        """First the log, so that it has the change which what was read is older than."""
        self.catch_up()
        with reading(self.source):
            assert work_off(backfill) == "completed", status(backfill)
        self.catch_up()

    def rows(self) -> dict[str, Any]:
        return {json.dumps([str(row["id"])]): row for (row,) in self.database.execute("SELECT to_json(t) FROM t")}


@pytest.fixture
def source_server(servers: dict[str, Any]) -> Any:
    """What meets what is decided in the store: one server will do."""
    return servers[EMBEDDED]


@pytest.fixture
def scene(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> Callable[..., Scene]:
    def make(table: str = MAKE, **consumer: Any) -> Scene:
        return Scene(source_database, make_source, make_consumer, table, **consumer)

    return make


CHANGES = {
    "update": ("UPDATE t SET v = 'after', n = 1000 WHERE id IN (3, 30)", 2),
    "delete": ("DELETE FROM t WHERE id = 3", 1),
    "delete and insert again": ("DELETE FROM t WHERE id = 3; INSERT INTO t VALUES (3, 'again', 1000)", 1),
    "insert": ("INSERT INTO t VALUES (100, 'new', 1000)", 0),
    "key moved": ("UPDATE t SET id = 100, n = 1000 WHERE id = 3", 1),
    "key moved onto a deleted one": ("BEGIN; DELETE FROM t WHERE id = 4; UPDATE t SET id = 4, n = 1000 WHERE id = 3; COMMIT", 2),
    "keys swapped": ("BEGIN; UPDATE t SET id = -1 WHERE id = 3; UPDATE t SET id = 3, n = 1000 WHERE id = 4; UPDATE t SET id = 4, n = 1001 WHERE id = -1; COMMIT", 2),
    "all of it": ("UPDATE t SET n = n + 1000", ROWS),
    "rolled back": ("BEGIN; UPDATE t SET n = n + 1000; ROLLBACK", 0),
    "in a savepoint": ("BEGIN; SAVEPOINT s; UPDATE t SET n = 1000 WHERE id = 3; RELEASE s; SAVEPOINT s; UPDATE t SET n = 0 WHERE id = 4; ROLLBACK TO s; COMMIT", 1),
}  # fmt: skip


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_row_changed_while_it_waits_is_left_out(scene: Callable[..., Scene], change: str) -> None:
    on = scene()
    backfill = on.stage()
    statement, left_out = CHANGES[change]
    on.database.execute(statement)
    on.finish(backfill)
    assert counts(backfill) == (ROWS, left_out)
    assert copy_of(on.consumer) == on.rows()


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_row_changed_before_it_is_read_comes_as_it_is_now(scene: Callable[..., Scene], change: str) -> None:
    on = scene()
    on.database.execute(CHANGES[change][0])
    backfill = on.stage()
    on.finish(backfill)
    assert counts(backfill) == (len(on.rows()), 0) and copy_of(on.consumer) == on.rows()


@pytest.mark.parametrize("rows", [0, 5])
def test_a_truncated_table_is_read_again(scene: Callable[..., Scene], rows: int) -> None:
    on = scene()
    backfill = on.stage()
    on.database.execute(f"TRUNCATE t; INSERT INTO t SELECT g, 'fresh', 1000 + g FROM generate_series(1, {rows}) g")
    on.finish(backfill)
    assert copy_of(on.consumer) == on.rows() and len(on.rows()) == rows


def test_a_change_that_the_consumer_does_not_take_leaves_the_row_in(scene: Callable[..., Scene]) -> None:
    on = scene(actions=["insert"])
    backfill = on.stage()
    on.database.execute("UPDATE t SET n = 1000 WHERE id = 3; DELETE FROM t WHERE id = 4; INSERT INTO t VALUES (4, 'again', 1001)")
    on.finish(backfill)
    assert counts(backfill) == (ROWS, 1), "only what is inserted again comes as such"
    assert {key for _, key, *_ in delivered(on.consumer)} == {f'["{i}"]' for i in range(1, ROWS + 1)}


def test_changes_of_other_tables_and_to_others_do_not_matter(scene: Callable[..., Scene]) -> None:
    on = scene("CREATE TABLE u (id int PRIMARY KEY, v text, n int);" + MAKE)
    on.database.execute("ALTER PUBLICATION sequin_pub ADD TABLE u")
    backfill = on.stage()
    on.database.execute("INSERT INTO u SELECT g, '', g FROM generate_series(1, 40) g")
    on.finish(backfill)
    assert counts(backfill) == (ROWS, 0)


def test_a_change_stored_in_part_counts(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge transaction is stored in pieces; a row may get between them, and must not when it is one of its rows."""
    from capture import reader

    on = scene()
    backfill = on.stage()
    monkeypatch.setattr(reader, "BATCH_ROWS", 10)
    on.database.execute("BEGIN; UPDATE t SET n = n + 1000; UPDATE t SET n = n + 1000; COMMIT")
    on.finish(backfill)
    assert counts(backfill) == (ROWS, ROWS) and copy_of(on.consumer) == on.rows()


def test_a_search_of_much_of_the_log_is_done_without_the_lock(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfill_work, "LOOK_FIRST", 5)
    monkeypatch.setattr(backfilling, "MOST_ROWS", 10)
    on = scene()
    backfill = on.stage(page_rows=10)
    assert fetch("SELECT count(*) FROM backfill_chunks") == [(4,)]
    on.database.execute("UPDATE t SET n = n + 1000 WHERE id % 3 = 0")
    on.catch_up()
    step_once()
    assert fetch("SELECT 1 FROM backfills WHERE rows_done > 0")
    on.finish(backfill)
    assert counts(backfill) == (ROWS, 13) and copy_of(on.consumer) == on.rows()


def test_what_is_far_behind_is_found_anew(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfill_work, "FAR_BEHIND", 5)
    on = scene()
    backfill = begin(on.consumer, page_rows=10)
    for number in range(1, 25):
        on.database.execute("UPDATE t SET n = n + 1000 WHERE id %% 20 = %s", [number % 20])
        if number % 3 == 0:
            on.catch_up()
        step_once()
    on.finish(backfill)
    assert copy_of(on.consumer) == on.rows() and counts(backfill)[0] >= ROWS


def test_rows_without_a_key_are_known_by_what_is_in_them(scene: Callable[..., Scene]) -> None:
    on = scene(
        "CREATE TABLE t (a int, b text, c numeric); ALTER TABLE t REPLICA IDENTITY FULL;"
        "INSERT INTO t SELECT g % 4, E'q\"\\\\ é\\n' || g % 2, 1.50 FROM generate_series(1, 40) g"
    )
    backfill = on.stage()
    one = "(SELECT ctid FROM t WHERE a = %s LIMIT 1)"
    on.database.execute(f"UPDATE t SET c = 2.50 WHERE ctid = {one % 1}; DELETE FROM t WHERE ctid = {one % 2}; INSERT INTO t VALUES (9, 'x', 1)")
    on.finish(backfill)
    assert counts(backfill) == (40, 2)
    mine: list[str] = []
    for action, _, record, _ in delivered(on.consumer):
        row = json.dumps(json.loads(record))
        if action == "D":
            continue  # what it was is left out already
        mine.append(row)
    assert sorted(mine) == sorted(json.dumps(row) for (row,) in on.database.execute("SELECT to_json(t) FROM t"))


def test_columns_added_and_types_changed_while_rows_wait(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfilling, "MOST_ROWS", 10)
    on = scene()
    backfill = on.stage(page_rows=10)
    assert fetch("SELECT count(*) FROM backfill_chunks") == [(4,)]
    fetch("DELETE FROM backfill_chunks WHERE number > 2")
    fetch("UPDATE backfill_chunks SET is_last = false, part = 0")
    on.database.execute("ALTER TABLE t ADD more int DEFAULT 7, ALTER v TYPE varchar(20), ALTER n TYPE bigint")
    on.database.execute("UPDATE t SET n = 1000 WHERE id IN (2, 39)")
    on.finish(backfill)
    found = copy_of(on.consumer)
    assert {key: row["n"] for key, row in found.items()} == {key: row["n"] for key, row in on.rows().items()}
    assert [("more" in row.record) for row in reads()] == [False] * 19 + [True] * 20


@pytest.mark.parametrize(
    ("table", "alter"),
    [
        (MAKE, "ALTER TABLE t ALTER id TYPE numeric(10, 2)"),
        (MAKE, "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (id, v)"),
        (MAKE.replace(" PRIMARY KEY", "") + "; ALTER TABLE t REPLICA IDENTITY FULL", "ALTER TABLE t ADD PRIMARY KEY (id)"),
        (MAKE.replace(" PRIMARY KEY", "") + "; ALTER TABLE t REPLICA IDENTITY FULL", "ALTER TABLE t ADD more int"),
        (MAKE, "ALTER TABLE t REPLICA IDENTITY FULL; ALTER TABLE t DROP CONSTRAINT t_pkey"),
    ],
    ids=["type of the key", "another key", "a key at last", "no key and a new column", "no key any more"],
)
def test_what_tells_rows_apart_changes_while_they_wait(scene: Callable[..., Scene], table: str, alter: str) -> None:
    on = scene(table)
    backfill = on.stage()
    on.database.execute(alter)
    on.database.execute("UPDATE t SET n = 1000 WHERE id = 3; DELETE FROM t WHERE id = 4")
    on.catch_up()
    on.finish(backfill)
    last: dict[float, int] = {}
    for action, _, record, _ in delivered(on.consumer):
        row = json.loads(record)
        last[float(row["id"])] = 0 if action == "D" else row["n"]
    assert last == {float(number): {3: 1000, 4: 0}.get(number, number) for number in range(1, ROWS + 1)}


def test_a_table_rewritten_while_a_page_is_read_is_read_again(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the snapshot and the reading: to the snapshot the table looks empty, as if all had been read."""
    from capture.pages import SourcePages

    on = scene()
    before = SourcePages._bounds
    rewritten = iter(["ALTER TABLE t ALTER n TYPE bigint USING n + 0", "ALTER TABLE t ALTER n TYPE int USING n + 0"])

    def bounds(self: SourcePages, *given: Any) -> Any:
        for statement in rewritten:
            on.database.execute(statement)
            break
        return before(self, *given)

    monkeypatch.setattr(SourcePages, "_bounds", bounds)
    backfill = begin(on.consumer, page_rows=15)
    on.finish(backfill)
    assert counts(backfill) == (ROWS, 0) and copy_of(on.consumer) == on.rows()


@pytest.mark.parametrize("stays_open", [False, True], ids=["commits at once", "stays open while the table is looked at"])
def test_an_alter_table_that_waits_for_a_page_is_not_held_up_by_the_look_at_the_table(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, stays_open: bool
) -> None:
    """The page it waited for was read before it, and may be kept: its rows have no more in them than the table had."""
    from capture.pages import LOCKED, SourcePages

    monkeypatch.setattr("capture.pages.LOCK_MS", 60_000)
    on = scene()
    before = SourcePages._copy
    waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 't'::regclass"

    def alter() -> None:
        with on.database.connect() as conn, conn.transaction():
            conn.execute("ALTER TABLE t ADD COLUMN more int")
            if stays_open:
                wait_until(lambda: on.database.execute(waits), 10, "the next page to wait for it")

    altering = [threading.Thread(target=alter)]
    begun = altering[0]

    def copy(self: SourcePages, *given: Any) -> Any:
        done = before(self, *given)
        while altering:
            altering.pop().start()
            wait_until(lambda: on.database.execute(waits), 10)
        return done

    monkeypatch.setattr(SourcePages, "_copy", copy)
    backfill = begin(on.consumer, page_rows=15)
    backfilling.step(slice_s=10)  # long enough for two pages; it ends when the second is found changed
    begun.join(60)
    assert "changed while it was read" in status(backfill)[1] and LOCKED not in status(backfill)[1]
    on.finish(backfill)
    copied = copy_of(on.consumer)
    assert counts(backfill) == (ROWS, 0) and {key: {**row, "more": None} for key, row in copied.items()} == on.rows()
    assert {key for key, row in copied.items() if "more" not in row} <= {f'["{number}"]' for number in range(1, 16)}
    assert not stays_open or "more" not in copied['["1"]']


def test_two_backfills_of_one_table_for_two_consumers(scene: Callable[..., Scene], make_consumer: Any) -> None:
    on = scene()
    other = make_consumer(on.source, "other", actions=["insert"])
    first, second = on.stage(page_rows=10), begin(other, page_rows=10)
    on.database.execute("UPDATE t SET n = n + 1000 WHERE id < 10")
    with reading(on.source):
        assert work_off(first) == work_off(second) == "completed"
    on.catch_up()
    assert copy_of(on.consumer) == on.rows()
    assert len([row for row in delivered(other) if row[0] == "R"]) == ROWS


def test_transactions_open_when_the_table_was_published_end_first(scene: Callable[..., Scene]) -> None:
    """What they wrote before is in neither the stream nor an earlier snapshot."""
    on = scene("CREATE TABLE u (id int PRIMARY KEY, n int);" + MAKE)
    with on.database.connect(autocommit=False) as writer:
        writer.execute("INSERT INTO u VALUES (1, 1)")
        on.database.execute("ALTER PUBLICATION sequin_pub ADD TABLE u")
        [(xmax,)] = on.database.execute("SELECT txid_snapshot_xmax(txid_current_snapshot())")
        backfill = begin(on.consumer, "public.u", barrier_xid=xmax)
        for _ in range(3):
            step_once()
        assert status(backfill) == ("running", "waits for transactions to end that were open when the table was published")
        writer.commit()
    on.finish(backfill)
    assert [row.record for row in reads("public.u")] == [{"id": 1, "n": 1}]


def test_what_waited_too_long_is_read_again(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfill_work, "LOOK_FIRST", 5)
    on = scene()
    backfill = on.stage()
    fetch("UPDATE backfill_chunks SET staged_at = staged_at - interval '1 hour'")
    on.database.execute("INSERT INTO t SELECT g, '', g FROM generate_series(101, 110) g")
    on.catch_up()
    step_once()
    assert status(backfill)[1].startswith("reads again") and fetch("SELECT count(*) FROM backfill_chunks") == [(0,)]
    on.finish(backfill)
    assert counts(backfill) == (ROWS + 10, 0)


def test_another_history_of_the_source_lets_everything_be_read_again(scene: Callable[..., Scene]) -> None:
    on = scene()
    backfill = on.stage()
    fetch("UPDATE capture_progress SET epoch = 2")
    step_once()
    assert status(backfill) == ("running", "reads again: the source has begun another history")
    on.database.execute("UPDATE t SET n = 1000 WHERE id = 5")
    on.finish(backfill)
    assert copy_of(on.consumer) == on.rows() and {row[0] for row in fetch("SELECT epoch FROM messages")} == {2}


def test_a_read_row_lies_between_the_commits_it_saw_and_those_to_come(scene: Callable[..., Scene]) -> None:
    """Whoever sorts by commit_lsn instead of the order of arrival gets the same."""
    on = scene()
    on.database.execute("UPDATE t SET n = 500 WHERE id = 3")
    backfill = on.stage()
    on.database.execute("UPDATE t SET n = 1000 WHERE id = 4")
    on.finish(backfill)
    on.database.execute("UPDATE t SET n = 2000 WHERE id IN (3, 4)")
    on.catch_up()
    rows: dict[str, Any] = {}
    for key, record in fetch("SELECT key, record FROM messages ORDER BY commit_lsn, commit_idx"):
        rows[key] = json.loads(record)
    assert rows == on.rows()


def test_a_snapshot_and_a_log_of_more_than_four_billion_transactions(tmp_path: Any, transactional_db: None, make_consumer: Any) -> None:
    """The stream has 32 bits of a transaction id, a snapshot 64."""
    import subprocess

    from consumers import changes
    from consumers.models import Source
    from tests.cluster import Cluster

    server = Cluster("epoch")
    server.start()
    server.stop()
    subprocess.run([server.binaries / "pg_resetwal", "-e", "3", "-D", server.data], check=True, capture_output=True, cwd="/", **server._identity())
    server.start()
    try:
        server.execute(MAKE)
        server.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
        source = Source(name="old", host=server.host, port=server.port, database="postgres", username="postgres", password=server.password)
        changes.save(source)
        consumer = make_consumer(source)
        server.execute("UPDATE t SET n = 100 WHERE id = 1")
        read_until(source, lambda: logged())
        assert server.execute("SELECT txid_snapshot_xmax(txid_current_snapshot()) > 3::bigint << 32") == [(True,)]
        backfill = begin(consumer)
        server.execute("INSERT INTO t VALUES (1000, 'x', 1000)")
        assert stage_all(backfill) == ROWS + 1
        server.execute("UPDATE t SET n = 1000 WHERE id = 2")
        read_until(source, lambda: len(logged()) >= 3)
        with reading(source):
            assert work_off(backfill) == "completed", status(backfill)
        assert counts(backfill) == (ROWS + 1, 1)
    finally:
        server.remove()


def test_nothing_but_reading_happens_on_an_idle_source(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    """No write follows that would flush the WAL which reading itself causes; the backfill gets on all the same."""
    source_database.execute(MAKE.replace("40", "20000"))
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    backfill = begin(make_consumer(source))
    with reading(source):
        assert work_off(backfill, 20) == "completed", status(backfill)
    assert len(records()) == 20_000
    assert source_database.execute("SELECT count(*) FROM pg_stat_all_tables WHERE schemaname = 'public' AND n_tup_ins > 20000") == [(0,)]


def test_a_consumer_with_enough_to_do_is_given_no_more(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfill_work, "BACKLOG_MESSAGES", 15)
    monkeypatch.setattr(backfilling, "MOST_ROWS", 10)
    on = scene(MAKE.replace("40", "400"))
    backfill = begin(on.consumer, page_rows=10)
    with reading(on.source):
        wait_until(lambda: step_once() or "lie before it" in status(backfill)[1], 20)
        brought = len(reads())
        assert 10 <= brought < 100
        for _ in range(5):
            step_once()
        assert len(reads()) < 100 and status(backfill)[0] == "running"

        def take_and_go_on() -> bool:
            claim = claims.claim(on.consumer.pk, 100, lease_ms=60_000)
            claims.ack(on.consumer.pk, [(claim.token, message.id) for message in claim.messages] if claim.token else [])
            step_once()
            return status(backfill)[0] != "running"

        wait_until(take_and_go_on, 20, "the rest")
    assert len(reads()) == 400


def test_a_consumer_near_its_limit_is_given_no_more(scene: Callable[..., Scene]) -> None:
    on = scene(max_backlog_bytes=1_000_000)
    backfill = begin(on.consumer, page_rows=10)
    fetch("UPDATE consumers_consumer SET max_backlog_bytes = 1")
    on.database.execute("INSERT INTO t VALUES (1000, '', 1)")
    with reading(on.source):
        await_messages(1)
        wait_until(lambda: step_once() or "max_backlog_bytes" in status(backfill)[1], 20)
        fetch("UPDATE consumers_consumer SET max_backlog_bytes = NULL")
        assert work_off(backfill) == "completed"
