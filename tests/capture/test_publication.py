"""What is published, under which name it arrives, and what is said when that changes between two looks."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from django.core.exceptions import ValidationError

from consumers import changes
from consumers.models import Consumer, Source
from consumers.preflight import check, findings
from consumers.preflight_tables import complaints
from consumers.store.models import SourceStatus
from capture.reading import Reading
from tests.capture.world import await_messages, events, logged, read_until, reading
from tests.conftest import SourceDatabase

pytestmark = pytest.mark.django_db(transaction=True)

PARTITIONED = ["CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id)", "CREATE TABLE p0 PARTITION OF p FOR VALUES FROM (0) TO (10)"]


def consume(source: Source, *tables: str, name: str = "c") -> Consumer:
    consumer = Consumer(name=name, source=source, kind="pull", tables=list(tables))
    changes.save(consumer)
    return consumer


@pytest.fixture
def begin(source_database: SourceDatabase, make_source: Any, monkeypatch: Any) -> Callable[..., Source]:
    """Tables, a source whose publication is ours, and looks at it all the time."""
    monkeypatch.setattr("capture.reader.LOOK_AT_TABLES_EVERY_S", 0)
    monkeypatch.setattr("capture.reader.LOOK_EVERY_S", 0)
    monkeypatch.setattr("capture.reader.IDLE_WAIT_S", 0.02)

    def make(*statements: str) -> Source:
        for statement in statements:
            source_database.execute(statement)
        return make_source()  # type: ignore[no-any-return]

    return make


def told(source: Source) -> list[tuple[str, str | None, bool]]:
    return [(kind, table, backfill) for kind, table, _, backfill in events(source)]


def after(source: Source, database: SourceDatabase, *statements: str) -> list[tuple[str, str | None, bool]]:
    """What is said of these statements, all of them between two looks."""
    read_until(source, lambda: True)
    before = len(told(source))
    with database.admin(database.name) as conn:
        for statement in statements:
            conn.execute(statement)  # type: ignore[arg-type]
    read_until(source, lambda: True)
    return told(source)[before:]


def test_a_partitioned_table_arrives_under_its_own_name(begin: Any, source_database: SourceDatabase) -> None:
    source = begin(*PARTITIONED)
    consume(source, "public.p")
    consume(source, "public.p", name="another")
    with reading(source):
        source_database.execute("INSERT INTO p VALUES (1, 'x')")
        source_database.execute("CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (10) TO (20)")
        source_database.execute("UPDATE p0 SET v = 'y'; INSERT INTO p1 VALUES (11, 'z')")
        found = await_messages(3)
    assert [(row.table, row.action, row.key) for row in found] == [
        ("public.p", "I", ["1"]), ("public.p", "U", ["1"]), ("public.p", "I", ["11"])
    ]  # fmt: skip
    with pytest.raises(ValidationError, match=r"the changes of public.p0 arrive as public.p: name that table"):
        consume(source, "public.p0", name="third")


def test_partitions_published_under_their_own_names_are_said(begin: Any, source_database: SourceDatabase) -> None:
    source = begin(*PARTITIONED, "CREATE PUBLICATION sequin_pub FOR TABLE p")
    with pytest.raises(ValidationError, match="its changes arrive under their names") as refused:
        consume(source, "public.p")
    consume(source, "public.p0")
    source_database.execute(str(refused.value).split("Run on the source: ")[1].split(";")[0])
    consume(source, "public.p", name="another")
    (finding,) = [finding for finding in check(source) if finding.name == "consumer_tables"]
    assert not finding.ok and finding.text.startswith("c asks for public.p0: the changes of public.p0 arrive as public.p")


def test_partitions_whose_updates_would_fail_are_refused(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE p (id int, v text) PARTITION BY RANGE (id)", "CREATE TABLE p0 PARTITION OF p FOR VALUES FROM (0) TO (10)",
                   "INSERT INTO p VALUES (1, 'x')")  # fmt: skip
    with pytest.raises(ValidationError, match=r"public.p0 has neither a primary key") as refused:
        consume(source, "public.p")
    source_database.execute(str(refused.value).split("Run on the source: ")[1].split(";")[0])
    consume(source, "public.p")
    source_database.execute("UPDATE p SET v = 'y'")
    source_database.execute("CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (10) TO (20)")
    (finding,) = [finding for finding in check(source) if finding.name == "replica_identity"]
    assert finding.text.startswith("public.p1 has neither a primary key nor")


@pytest.mark.parametrize(
    ("table", "identity"),
    [
        ("CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, n int)", "DEFAULT"),
        ("CREATE TABLE t (id int PRIMARY KEY, n int, g int GENERATED ALWAYS AS (id * 2) STORED)", "FULL"),
        ("CREATE TABLE t (id int, n int, g int GENERATED ALWAYS AS (id * 2) STORED PRIMARY KEY)", "DEFAULT"),
        ("CREATE TABLE t (id int PRIMARY KEY, n int, g int GENERATED ALWAYS AS (id * 2) VIRTUAL)", "FULL"),
    ],
    ids=["deferrable key", "stored, FULL", "stored, in the key", "virtual, FULL"],
)  # fmt: skip
def test_tables_whose_updates_would_fail_are_refused_with_what_mends_it(
    begin: Any, source_database: SourceDatabase, table: str, identity: str
) -> None:
    """Generated columns in a replica identity make updates fail from Postgres 18 on, where the publication does not send them."""
    if source_database.version < 18 and "VIRTUAL" in table:
        pytest.skip("Postgres 18 brought virtual generated columns")
    source = begin(table, f"ALTER TABLE t REPLICA IDENTITY {identity}", "INSERT INTO t (id) VALUES (1)", "CREATE PUBLICATION sequin_pub FOR TABLE t")
    try:
        source_database.execute("UPDATE t SET n = 1")
        fails = False
    except psycopg.Error:
        fails = True
    found = [finding for finding in check(source) if finding.name == "replica_identity"]
    assert len(found) == fails
    if fails:
        source_database.execute("DROP PUBLICATION sequin_pub; CREATE PUBLICATION sequin_pub")
        Source.objects.update(publication_created=True)
        source.refresh_from_db()
        source_database.execute("ALTER PUBLICATION sequin_pub SET (publish_via_partition_root = true)")
        with pytest.raises(ValidationError, match="publishing would make UPDATEs and DELETEs there fail"):
            consume(source, "public.t")
        source_database.execute(found[0].sql)
        consume(source, "public.t")
        source_database.execute("UPDATE t SET n = 1")


def test_a_publication_of_ours_sends_stored_generated_columns_where_it_can(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id * 2) STORED)", "ALTER TABLE t REPLICA IDENTITY FULL")
    consume(source, "public.t")
    source_database.execute("INSERT INTO t VALUES (1); UPDATE t SET id = 2")
    read_until(source, lambda: len(logged()) >= 2)
    newest = source_database.version >= 18
    assert logged()[1].record == ({"id": 2, "g": 4} if newest else {"id": 2})
    assert logged()[1].changes == ({"id": 1, "g": 2} if newest else {"id": 1})


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("CREATE VIEW x AS SELECT 1", "public.x is a view: its changes are not in the WAL"),
        ("CREATE UNLOGGED TABLE x (id int PRIMARY KEY)", 'an unlogged table.*ALTER TABLE "public"."x" SET LOGGED'),
        ("SELECT 1", "there is no table public.x"),
    ],
)
def test_what_cannot_be_published_is_refused_with_the_reason(begin: Any, statement: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        consume(begin(statement), "public.x")


def test_a_consumer_whose_table_no_longer_arrives_is_named(begin: Any, source_database: SourceDatabase, monkeypatch: Any) -> None:
    monkeypatch.setattr("capture.reading.signal.signal", lambda *_: None)
    source = begin("CREATE TABLE t (id int PRIMARY KEY)", "CREATE TABLE u (id int PRIMARY KEY)")
    consume(source, "public.t", "public.u")
    source_database.execute("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE u RENAME TO v")
    reading = Reading(source)

    def seen() -> bool:
        if SourceStatus.objects.filter(pk=source.pk, state="active").exists():
            reading.stop()
        return reading.stopping

    monkeypatch.setattr(reading, "_alive", seen)
    reading.run()
    assert sorted(SourceStatus.objects.get(pk=source.pk).reasons) == [
        "c asks for public.t: the publication sequin_pub does not publish public.t", "c asks for public.u: there is no table public.u"
    ]


def test_a_locked_table_stops_nothing(begin: Any, source_database: SourceDatabase, monkeypatch: Any) -> None:
    """An ALTER TABLE that takes hours holds a lock that every look at the table waits for."""
    monkeypatch.setattr("capture.reader.LOCK_WITHIN_MS", 50)
    monkeypatch.setattr("consumers.preflight.LOCK_WITHIN_MS", 50)
    source = begin(*PARTITIONED, "CREATE TABLE t (id int PRIMARY KEY)")
    consume(source, "public.p", "public.t")
    with source_database.connect(autocommit=False) as busy:
        busy.execute("LOCK TABLE p, t IN ACCESS EXCLUSIVE MODE")
        busy.execute("INSERT INTO t VALUES (1)")
        with reading(source):
            source_database.execute("CREATE TABLE u (id int PRIMARY KEY)")
            source_database.execute("ALTER PUBLICATION sequin_pub ADD TABLE u")
            for number in range(3):
                source_database.execute("INSERT INTO u VALUES (%s)", [number])
                await_messages(number + 1, timeout=20)
            assert [finding.name for finding in findings(source) if not finding.ok] == ["checked"]
            busy.commit()
            await_messages(4)


def test_updates_that_begin_to_fail_are_said_in_the_sources_health(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)")
    consume(source, "public.t")
    source_database.execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
    with source_database.connect() as conn:
        assert complaints(conn, source) == [
            "public.t has neither a primary key nor another replica identity (a deferrable key is none): its UPDATEs and DELETEs fail"
            " while it is published"
        ]


def test_a_table_that_left_and_came_back_between_two_looks(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)")
    consume(source, "public.t")
    assert after(
        source, source_database, "ALTER PUBLICATION sequin_pub DROP TABLE t", "INSERT INTO t VALUES (1)", "ALTER PUBLICATION sequin_pub ADD TABLE t"
    ) == [("published", "public.t", True)]


def test_a_publication_that_leaves_actions_out_for_a_while(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)")
    assert after(source, source_database, "ALTER PUBLICATION sequin_pub SET (publish = 'insert')") == [("publication", None, False)]
    assert "no longer sends updates, deletes, truncates" in events(source)[-1][2]
    assert after(source, source_database, "ALTER PUBLICATION sequin_pub SET (publish = 'insert, update, delete, truncate')") == [
        ("publication", None, True)
    ]
    assert after(
        source, source_database, "ALTER PUBLICATION sequin_pub SET (publish = 'insert')",
        "ALTER PUBLICATION sequin_pub SET (publish = 'insert, update, delete, truncate')",
    ) == [("publication", None, False)]  # fmt: skip
    assert "what it left out in between, if anything, is missing" in events(source)[-1][2]


def test_rows_rewritten_within_their_type_are_told(begin: Any, source_database: SourceDatabase) -> None:
    """No Relation message tells of it: the columns have the names and types they had."""
    source = begin("CREATE TABLE t (id int PRIMARY KEY, n int)", "INSERT INTO t VALUES (1, 1)")
    consume(source, "public.t")
    assert after(source, source_database, "ALTER TABLE t ALTER n TYPE int USING n + 1") == [("rewritten", "public.t", True)]
    assert after(source, source_database, "VACUUM FULL t", "ANALYZE t") == [], "the same rows in another file"
    assert after(source, source_database, "ALTER TABLE t ALTER n SET STATISTICS 10", "ALTER TABLE t ALTER n SET DEFAULT 5") == []
    assert after(source, source_database, "TRUNCATE t") == [], "which is sent"
    if source_database.version >= 17:
        source_database.execute("ALTER TABLE t ADD g int GENERATED ALWAYS AS (n * 2) STORED; INSERT INTO t VALUES (3, 3)")
        assert after(source, source_database, "ALTER TABLE t ALTER g SET EXPRESSION AS (n * 3)") == [("rewritten", "public.t", True)]


def test_what_happens_to_partitions_without_a_message_is_told(begin: Any, source_database: SourceDatabase) -> None:
    more = [f"CREATE TABLE p{n} PARTITION OF p FOR VALUES FROM ({n}0) TO ({n + 1}0)" for n in (1, 2, 3)]
    source = begin(*PARTITIONED, *more, "INSERT INTO p SELECT generate_series(0, 29)")
    consume(source, "public.p")
    assert after(source, source_database, "TRUNCATE p0") == [("truncated", "public.p0", False)]
    assert "does not send under publish_via_partition_root" in events(source)[-1][2]
    assert after(source, source_database, "DROP TABLE p1", "ALTER TABLE p DETACH PARTITION p2", "ALTER TABLE p DETACH PARTITION p3") == [
        ("unpublished", "public.p1", False), ("unpublished", "public.p2", False), ("unpublished", "public.p3", False)
    ]
    texts = [text for _, _, text, _ in events(source)][-3:]
    assert texts[0] == "was dropped; no deletes were sent for the rows it had"
    assert texts[1].endswith("no deletes were sent for the rows it has") and texts[2].endswith("its changes do not arrive")
    assert after(source, source_database, "ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (20) TO (30)") == [("published", "public.p2", True)]
    assert after(source, source_database, "ALTER TABLE p0 RENAME TO q0") == [], "its changes arrive as those of p"


def test_a_renamed_table_is_told(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)", "CREATE SCHEMA s")
    consume(source, "public.t")
    assert after(source, source_database, "ALTER TABLE t RENAME TO u", "ALTER TABLE u SET SCHEMA s") == [("renamed", "s.u", False)]
    assert "was public.t until now" in events(source)[-1][2]


def test_a_table_made_filled_and_published_between_two_looks(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)")
    assert after(
        source, source_database, "CREATE TABLE n (id int PRIMARY KEY)", "INSERT INTO n VALUES (1)", "ALTER PUBLICATION sequin_pub ADD TABLE n"
    ) == [("published", "public.n", True)]


def test_a_slot_that_nobody_reads_is_named(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)")
    old = source.slot_name
    source.slot_name = f"{old[:50]}_new"
    changes.save(source)
    (finding,) = [finding for finding in check(source) if finding.name == "other_slot"]
    assert old in finding.text and not finding.blocking
    assert events(source)[-1][0] == "slot_left" and old in events(source)[-1][2]
    source_database.execute(finding.sql)
    assert not [finding for finding in check(source) if finding.name == "other_slot"]


# Keys of then, not of now -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_a_key_renamed_before_its_rows_are_read(begin: Any, source_database: SourceDatabase, identity: str) -> None:
    source = begin("CREATE TABLE t (a int, id int, v text, PRIMARY KEY (id, a))", f"ALTER TABLE t REPLICA IDENTITY {identity}")
    consume(source, "public.t")
    with source_database.connect() as conn:
        conn.execute("INSERT INTO t VALUES (10, 1, 'x')")
        conn.execute("ALTER TABLE t RENAME id TO number")
        conn.execute("UPDATE t SET v = 'y'")
        conn.execute("DELETE FROM t")
    read_until(source, lambda: len(logged()) >= 3)
    assert [row.key for row in logged()] == [["1", "10"]] * 3


def test_a_key_that_became_another_before_its_rows_are_read(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY, code text NOT NULL)")
    consume(source, "public.t")
    with source_database.connect() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'a')")
        conn.execute("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (code, id)")
        conn.execute("INSERT INTO t VALUES (2, 'b')")
    read_until(source, lambda: len(logged()) >= 2)
    assert [row.key for row in logged()] == [["1"], ["b", "2"]]


def test_a_table_and_a_domain_dropped_before_their_rows_are_read(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE DOMAIN numbers AS int[]", "CREATE TYPE mood AS ENUM ('calm')", "CREATE TABLE t (id int PRIMARY KEY, ns numbers, ms mood[])")
    consume(source, "public.t")
    source_database.execute("INSERT INTO t VALUES (1, '{1,2}', '{calm}')")
    source_database.execute("DROP TABLE t; DROP DOMAIN numbers; DROP TYPE mood")
    read_until(source, lambda: logged())
    assert logged()[0].record == {"id": 1, "ns": [1, 2], "ms": ["calm"]} and logged()[0].key == ["1"]


def test_a_row_too_large_for_a_message_is_stored_without_its_largest_value(
    begin: Any, source_database: SourceDatabase, monkeypatch: Any
) -> None:
    monkeypatch.setattr("capture.tables.MAX_ROW_BYTES", 60_000)
    source = begin("CREATE TABLE t (id int PRIMARY KEY, v text, w text)", "ALTER TABLE t REPLICA IDENTITY FULL")
    consume(source, "public.t")
    with source_database.connect() as conn:
        conn.execute("INSERT INTO t VALUES (1, repeat('x', 70000), 'small')")
        conn.execute("UPDATE t SET w = 'other'")
        conn.execute("DELETE FROM t")
        conn.execute("INSERT INTO t VALUES (2, repeat('x', 50000), 'fits')")
    with reading(source):
        found = await_messages(4)
    assert [row.record for row in found[:3]] == [{"id": 1, "w": "small"}, {"id": 1, "w": "other"}, {"id": 1, "w": "other"}]
    assert found[1].changes == {"w": "small"} and len(found[3].record["v"]) == 50_000
    assert [(kind, table) for kind, table, *_ in events(source) if kind == "too_large"] == [("too_large", "public.t")]
