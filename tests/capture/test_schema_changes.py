"""Tables change while they are captured: values stay under the right names, and what was not sent is said."""
from __future__ import annotations

from typing import Any

import pytest

from consumers.models import Source
from tests.capture.world import await_messages, events, logged, read_until, reading
from tests.conftest import SourceDatabase

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def begin(source_database: SourceDatabase, make_source: Any) -> Any:
    def make(*statements: str, publication: str = "FOR ALL TABLES") -> Source:
        for statement in statements:
            source_database.execute(statement)
        with source_database.admin(source_database.name) as conn:
            conn.execute(f"CREATE PUBLICATION sequin_pub {publication}")
        return make_source()

    return make


def test_columns_come_go_and_change_between_two_rows_of_one_transaction(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY, a text, b text)")
    with reading(source):
        source_database.execute("INSERT INTO t VALUES (1, 'a1', 'b1')")
        await_messages(1)
        with source_database.connect() as conn, conn.transaction():
            conn.execute("INSERT INTO t VALUES (2, 'a2', 'b2')")
            conn.execute("ALTER TABLE t DROP a, ADD c int DEFAULT 7")
            conn.execute("INSERT INTO t VALUES (3, 'b3', 33)")
            conn.execute("ALTER TABLE t RENAME b TO a")
            conn.execute("INSERT INTO t VALUES (4, 'a4', 44)")
            conn.execute("ALTER TABLE t ALTER c TYPE text USING 'c' || c")
            conn.execute("INSERT INTO t VALUES (5, 'a5', 'c55')")
        found = await_messages(5)
    assert [row.record for row in found] == [
        {"id": 1, "a": "a1", "b": "b1"}, {"id": 2, "a": "a2", "b": "b2"}, {"id": 3, "b": "b3", "c": 33},
        {"id": 4, "a": "a4", "c": 44}, {"id": 5, "a": "a5", "c": "c55"},
    ]  # fmt: skip
    told = events(source)
    assert [(kind, table, backfill) for kind, table, _, backfill in told] == [
        ("columns", "public.t", True), ("columns", "public.t", False), ("type", "public.t", True)
    ]
    assert "existing rows got values in c" in told[0][2] and "type of c became text (was integer)" in told[2][2]


def test_a_restart_tells_nothing_twice(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)")
    source_database.execute("INSERT INTO t VALUES (1)")
    read_until(source, lambda: len(logged()) >= 1)
    source_database.execute("ALTER TABLE t ADD b int DEFAULT 1")
    source_database.execute("INSERT INTO t VALUES (2, 2)")
    for number in (2, 3):
        read_until(source, lambda: len(logged()) >= number)  # noqa: B023
        source_database.execute(f"INSERT INTO t VALUES ({number + 1}, 2)")
    assert len(events(source)) == 1


def test_a_table_renamed_moved_and_made_anew(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)", "CREATE SCHEMA other")
    with reading(source):
        with source_database.connect() as conn:
            conn.execute("INSERT INTO t VALUES (1)")
            conn.execute("ALTER TABLE t RENAME TO u")
            conn.execute("INSERT INTO u VALUES (2)")
            conn.execute("ALTER TABLE u SET SCHEMA other")
            conn.execute("INSERT INTO other.u VALUES (3)")
            conn.execute("CREATE TABLE t (id text PRIMARY KEY)")
            conn.execute("INSERT INTO t VALUES ('4')")
            conn.execute("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, more int)")
            conn.execute("INSERT INTO t VALUES (5, 55)")
        found = await_messages(5)
    assert [(row.table, row.record) for row in found] == [
        ("public.t", {"id": 1}), ("public.u", {"id": 2}), ("other.u", {"id": 3}), ("public.t", {"id": "4"}),
        ("public.t", {"id": 5, "more": 55}),
    ]  # fmt: skip
    assert ("recreated", "public.t") in [(kind, table) for kind, table, _, _ in events(source)]


@pytest.mark.parametrize("via_root", [False, True])
def test_partitions(begin: Any, source_database: SourceDatabase, via_root: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr("capture.reader.LOOK_AT_TABLES_EVERY_S", 0)
    monkeypatch.setattr("capture.reader.LOOK_EVERY_S", 0)
    source = begin(
        "CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id)",
        "CREATE TABLE p0 PARTITION OF p FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE p1 (v text, id int PRIMARY KEY)",  # columns in another order
        "INSERT INTO p1 VALUES ('before', 15)",
        publication=f"FOR TABLE p WITH (publish_via_partition_root = {via_root})",
    )
    with reading(source):
        with source_database.connect() as conn:
            conn.execute("INSERT INTO p VALUES (1, 'x')")
            await_messages(1)
            conn.execute("ALTER TABLE p ATTACH PARTITION p1 FOR VALUES FROM (10) TO (20)")
            conn.execute("INSERT INTO p VALUES (11, 'y')")
            conn.execute("UPDATE p SET id = 12 WHERE id = 1")
            conn.execute("ALTER TABLE p DETACH PARTITION p1")
            conn.execute("INSERT INTO p VALUES (2, 'z')")
        found = await_messages(5)
    root = ("public.p", "public.p") if via_root else ("public.p0", "public.p1")
    moved = [(row.table, row.action, row.record.get("id")) for row in found]
    assert moved[:2] == [(root[0], "I", 1), (root[1], "I", 11)]
    assert (root[0], "D", 1) in moved[2:4] and (root[1], "I", 12) in moved[2:4], "a row that moves is a delete and an insert"
    assert moved[4] == (root[0], "I", 2)
    assert found[1].record == {"id": 11, "v": "y"}


def test_a_partition_attached_with_rows_in_it_is_told(begin: Any, source_database: SourceDatabase, monkeypatch: Any) -> None:
    monkeypatch.setattr("capture.reader.LOOK_AT_TABLES_EVERY_S", 0)
    monkeypatch.setattr("capture.reader.LOOK_EVERY_S", 0)
    source = begin(
        "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE p1 (id int PRIMARY KEY)", "INSERT INTO p1 VALUES (15)", "CREATE TABLE empty (id int PRIMARY KEY)",
        publication="FOR TABLE p",
    )  # fmt: skip
    read_until(source, lambda: True)
    source_database.execute("ALTER TABLE p ATTACH PARTITION p1 FOR VALUES FROM (10) TO (20)")
    with source_database.admin(source_database.name) as conn:
        conn.execute("ALTER PUBLICATION sequin_pub ADD TABLE empty")
    read_until(source, lambda: len(events(source)) >= 2)
    assert sorted((kind, table, backfill) for kind, table, _, backfill in events(source)) == [
        ("published", "public.empty", False), ("published", "public.p1", True)
    ]
    with source_database.admin(source_database.name) as conn:
        conn.execute("ALTER PUBLICATION sequin_pub DROP TABLE p")
    read_until(source, lambda: len(events(source)) >= 3)
    assert events(source)[-1][:2] == ("unpublished", "public.p1")


def test_column_lists_row_filters_and_generated_columns(begin: Any, source_database: SourceDatabase) -> None:
    if source_database.version < 15:
        pytest.skip("Postgres 15 brought column lists and row filters")
    source = begin(
        "CREATE TABLE t (id int PRIMARY KEY, secret text, v int, doubled int GENERATED ALWAYS AS (id * 2) STORED)",
        "CREATE TABLE f (id int PRIMARY KEY, v int)",
        publication="FOR TABLE t (id, v), f WHERE (id > 10)",
    )
    with reading(source):
        with source_database.connect() as conn:
            conn.execute("INSERT INTO t (id, secret, v) VALUES (1, 'hidden', 5)")
            conn.execute("UPDATE t SET v = 6")
            conn.execute("INSERT INTO f VALUES (1, 1), (11, 1)")
            conn.execute("UPDATE f SET id = 12 WHERE id = 1")  # comes into view
            conn.execute("UPDATE f SET id = 2 WHERE id = 11")  # goes out of view
        found = await_messages(5)
    assert [(row.table, row.action, row.record) for row in found] == [
        ("public.t", "I", {"id": 1, "v": 5}), ("public.t", "U", {"id": 1, "v": 6}), ("public.f", "I", {"id": 11, "v": 1}),
        ("public.f", "I", {"id": 12, "v": 1}), ("public.f", "D", {"id": 11}),
    ]  # fmt: skip


def test_replica_identity_changes_are_told(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY, a text)")
    with reading(source):
        with source_database.connect() as conn:
            conn.execute("INSERT INTO t VALUES (1, 'a')")
            await_messages(1)
            conn.execute("ALTER TABLE t REPLICA IDENTITY FULL")
            conn.execute("UPDATE t SET a = 'b'")
        found = await_messages(2)
    assert found[1].changes == {"a": "a"}
    assert events(source)[0][:3] == ("replica_identity", "public.t", "the replica identity is FULL")


def test_annotations_follow_their_transaction(begin: Any, source_database: SourceDatabase) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)")
    emit = "SELECT pg_logical_emit_message({}, 'sequin:transaction_annotations.{}', '{}')"
    with reading(source):
        with source_database.connect() as conn:
            with conn.transaction():
                conn.execute("INSERT INTO t VALUES (1)")
                conn.execute(emit.format("true", "set", '{"user": "Zoë", "n": 1}'))
                conn.execute("INSERT INTO t VALUES (2)")
                conn.execute(emit.format("true", "set", '{"n": 2}'))
                conn.execute("INSERT INTO t VALUES (3)")
                conn.execute(emit.format("true", "clear", ""))
                conn.execute("INSERT INTO t VALUES (4)")
                conn.execute(emit.format("true", "set", '{"n": 5}'))
                conn.execute(emit.format("false", "clear", ""))  # not of the transaction
                conn.execute("SELECT pg_logical_emit_message(true, 'another', 'x')")
                conn.execute("INSERT INTO t VALUES (5)")
            conn.execute("INSERT INTO t VALUES (6)")
            with conn.transaction():
                conn.execute(emit.format("true", "set", "[1]"))
                conn.execute(emit.format("true", "set", "{not json"))
                conn.execute("INSERT INTO t VALUES (7)")
        found = await_messages(7)
    assert [row.annotations for row in found] == [None, {"user": "Zoë", "n": 1}, {"n": 2}, None, {"n": 5}, None, None]
    assert [kind for kind, _, _, _ in events(source)] == ["annotations", "annotations"]


@pytest.mark.parametrize(
    "content", [b'{\0"\0a\0"\0:\0001\0}\0', b'{"a":"\xed\xa0\x80"}', b'\xef\xbb\xbf{}', b'{"a":NaN}', b'{"a":"\0"}', b"\xff"],
    ids=["UTF-16", "half a surrogate pair", "byte order mark", "NaN", "NUL", "no UTF-8"],
)  # fmt: skip
def test_annotations_that_the_store_could_not_take_stop_nothing(begin: Any, source_database: SourceDatabase, content: bytes) -> None:
    source = begin("CREATE TABLE t (id int PRIMARY KEY)")
    with reading(source):
        with source_database.connect() as conn, conn.transaction():
            conn.execute("SELECT pg_logical_emit_message(true, 'sequin:transaction_annotations.set', %s::bytea)", [content])
            conn.execute("INSERT INTO t VALUES (1)")
        (row,) = await_messages(1)
    assert row.annotations is None
    assert [kind for kind, _, _, _ in events(source)] == ["annotations"]


def test_many_tables_and_partitions_and_the_widest_row(begin: Any, source_database: SourceDatabase) -> None:
    columns = ", ".join(f"c{number} int" for number in range(1599))
    source = begin(
        "DO $$ BEGIN FOR i IN 1..500 LOOP EXECUTE format('CREATE TABLE t%s (id int PRIMARY KEY)', i); END LOOP; END $$",
        "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "DO $$ BEGIN FOR i IN 0..199 LOOP EXECUTE format('CREATE TABLE p%s PARTITION OF p FOR VALUES FROM (%s) TO (%s)', i, i*10,"
        " i*10+10); END LOOP; END $$",
        f"CREATE TABLE wide (id int PRIMARY KEY, {columns})",
    )
    with reading(source):
        with source_database.connect() as conn:
            conn.execute("DO $$ BEGIN FOR i IN 1..500 LOOP EXECUTE format('INSERT INTO t%s VALUES (%s)', i, i); END LOOP; END $$")
            conn.execute("INSERT INTO p SELECT g * 10 FROM generate_series(0, 199) g")
            conn.execute("INSERT INTO wide (id, c1598) VALUES (1, 7)")
        found = await_messages(701, timeout=40)
    assert {(row.table, row.record["id"]) for row in found[:500]} == {(f"public.t{i}", i) for i in range(1, 501)}
    assert {(row.table, row.record["id"]) for row in found[500:700]} == {(f"public.p{i}", i * 10) for i in range(200)}
    assert len(found[700].record) == 1600 and found[700].record["c1598"] == 7 and found[700].record["c0"] is None


def test_a_source_read_by_an_ordinary_role_sees_what_is_published_and_needs_no_more(begin: Any, source_database: SourceDatabase) -> None:
    """The publication decides, not SELECT grants: docs/capture.md says so and suggests column lists."""
    source = begin("CREATE TABLE t (id int PRIMARY KEY)", "REVOKE ALL ON t FROM PUBLIC")
    with source_database.admin() as conn:
        conn.execute(f"CREATE ROLE {source_database.name}_reader LOGIN REPLICATION PASSWORD 'p'")
    try:
        Source.objects.filter(pk=source.pk).update(username=f"{source_database.name}_reader")
        source.refresh_from_db()
        source.password = "p"
        source_database.execute("INSERT INTO t VALUES (1)")
        read_until(source, lambda: len(logged()) >= 1)
    finally:
        with source_database.admin() as conn:
            conn.execute(f"DROP ROLE {source_database.name}_reader")
