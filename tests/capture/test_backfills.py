"""Backfills: rows of every kind of table arrive as read messages, the same as the stream would bring them."""
from __future__ import annotations

import json
from typing import Any

import pytest

from consumers import changes
from consumers.models import Consumer
from consumers.store import backfills, lifecycle
from tests.capture.backfill_world import begin, counts, fetch, reads, records, status, step_once, work_off
from tests.capture.test_values import EXTENSIONS, SETUP, database_in, everything, send
from tests.capture.world import ENCODINGS, logged, read_until, reading
from tests.conftest import SourceDatabase, wait_until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("quick_reader")]


def test_a_table_arrives_as_read_messages(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    source_database.execute("INSERT INTO t SELECT g, 'row ' || g FROM generate_series(1, 1234) g")
    source = make_source()
    consumer = make_consumer(source, tables=["public.t"])
    backfill = begin(consumer)
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    assert [row.record for row in reads()] == [{"id": i, "v": f"row {i}"} for i in range(1, 1235)]
    assert {tuple(row) for row in fetch("SELECT consumer, backfill, replay FROM messages")} == {(consumer.pk, backfill, None)}
    assert fetch("SELECT commit_idx FROM messages ORDER BY id") == [(i,) for i in range(1234)]
    assert fetch("SELECT rows_done, rows_left_out, rows_estimated > 0, rate > 0, ended_at IS NOT NULL FROM backfills") == [(1234, 0, True, True, True)]
    assert fetch("SELECT count(*) FROM backfill_chunks") == [(0,)]


def test_values_are_those_of_the_stream(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    for statement in SETUP:
        source_database.execute(statement)
    with source_database.admin(source_database.name) as conn:
        types = everything(conn)
    names = sorted(types)
    tables = [names[at : at + 40] for at in range(0, len(names), 40)]
    for number, chosen in enumerate(tables):
        source_database.execute(f"CREATE TABLE v{number} (id int PRIMARY KEY, {', '.join(f'c{i} {kind}' for i, kind in enumerate(chosen))})")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE " + ", ".join(f"v{n}" for n in range(len(tables))))
    source = make_source()
    consumer = make_consumer(source)
    total = 0
    for number, chosen in enumerate(tables):
        for row in range(max(len(types[kind]) for kind in chosen) + 1):
            values = ", ".join(types[kind][row] if row < len(types[kind]) else "NULL" for kind in chosen)
            source_database.execute(f"INSERT INTO v{number} VALUES ({row}, {values})")
            total += 1
    made = [begin(consumer, f"public.v{number}") for number in range(len(tables))]
    read_until(source, lambda: len(records()) >= total)
    with reading(source):
        assert [work_off(backfill) for backfill in made] == ["completed"] * len(made), [status(backfill) for backfill in made]
    found = fetch("SELECT action::text, relation, record FROM messages ORDER BY id")
    live, read = [row[1:] for row in found if row[0] == "I"], [row[1:] for row in found if row[0] == "R"]
    assert len(live) == total and sorted(read) == sorted(live), "the same bytes, under the same shape of the table"


@pytest.mark.parametrize("source_server", ["18"], indirect=True)
@pytest.mark.parametrize(("encoding", "stored", "expected"), ENCODINGS)
def test_databases_in_other_encodings(
    source_server: Any, transactional_db: None, encoding: str, stored: bytes, expected: str
) -> None:
    with database_in(source_server, encoding) as (conn, source):
        send(
            conn,
            b'CREATE TABLE "t%b" ("k%b" text, n int, j json, ts text[], PRIMARY KEY ("k%b", n))' % (stored, stored, stored),
            b"CREATE PUBLICATION sequin_pub FOR ALL TABLES",
        )
        changes.save(source)
        consumer = Consumer.objects.create(name="orders", source=source, kind="pull")
        lifecycle.create_position(consumer.pk, source.pk, 0)
        send(
            conn,
            b"INSERT INTO \"t%b\" SELECT '%b' || g / 5, g, '{\"a%b\": \"\\u00e9%b\"}', ARRAY['%b', 'x, \"%b\"'] FROM generate_series(1, 30) g"
            % ((stored,) * 6),
        )
        read_until(source, lambda: len(records()) >= 30)
        name = logged()[0].table
        backfill = begin(consumer, name, page_rows=10)
        if encoding in ("LATIN1",):
            assert name == f"public.t{expected}"
            with reading(source):
                assert work_off(backfill) == "completed", status(backfill)
        else:
            # The name cannot be given as a text of UTF-8 that the server knows: told by its oid instead.
            fetch("UPDATE backfills SET parts = %s", json.dumps([{"oid": fetch("SELECT table_oid FROM messages LIMIT 1")[0][0], "table": name}]))
            with reading(source):
                assert work_off(backfill) == "completed", status(backfill)
    found = records()
    assert sorted(row[1:] for row in found if row[0] == "R") == sorted(row[1:] for row in found if row[0] == "I") and len(found) == 60
    assert expected in json.loads(found[-1][1])[0]


KEYS = {
    "serial": ("id int PRIMARY KEY", "SELECT g FROM generate_series(1, 300) g"),
    "bigint with gaps and negatives": ("id bigint PRIMARY KEY", "SELECT (g - 150) * 10000000000 FROM generate_series(1, 300) g"),
    "uuid": ("id uuid PRIMARY KEY", "SELECT md5(g::text)::uuid FROM generate_series(1, 300) g"),
    "text": ("id text PRIMARY KEY", "SELECT chr(65 + g % 57) || chr(160 + g) || repeat('é\"\\', g % 3) || g FROM generate_series(1, 300) g"),
    "text in another collation": ('id text COLLATE "{collation}" PRIMARY KEY', "SELECT chr(65 + g % 57) || g FROM generate_series(1, 300) g"),
    "char": ("id char(8) PRIMARY KEY", "SELECT 'k' || g FROM generate_series(1, 300) g"),
    "varchar": ("id varchar(20) PRIMARY KEY", "SELECT g || E'\\t\\n\\\\N' FROM generate_series(1, 300) g"),
    "enum": ("e {enum}, n int, PRIMARY KEY (e, n)", "SELECT (ARRAY['zebra', 'ape', 'middle one'])[1 + g % 3]::{enum}, g FROM generate_series(1, 300) g"),
    "composite key": ("a text, b int, c date, PRIMARY KEY (c, a, b)", "SELECT 'x' || g % 7, g % 11, date '2026-01-01' + g FROM generate_series(1, 300) g"),
    "key in another order of columns": ("a int, b int, c int, PRIMARY KEY (c, a)", "SELECT g, -g, g % 5 FROM generate_series(1, 300) g"),
    "numeric": ("id numeric PRIMARY KEY", "SELECT g * 1.000000000000000000001 - 100 FROM generate_series(1, 300) g UNION ALL SELECT 'NaN'"),
    "float": ("id float8 PRIMARY KEY", "SELECT g / 3.0 - 50 FROM generate_series(1, 300) g UNION ALL VALUES ('NaN'::float8), ('Infinity'), ('-Infinity')"),
    "timestamptz": ("id timestamptz PRIMARY KEY", "SELECT timestamptz 'epoch' + g * interval '1.000001 s' FROM generate_series(1, 300) g UNION ALL VALUES ('infinity'::timestamptz), ('0044-03-15 00:00+00 BC')"),
    "bytea": ("id bytea PRIMARY KEY", "SELECT decode(md5(g::text), 'hex') FROM generate_series(1, 300) g"),
    "bit": ("id bit(12) PRIMARY KEY", "SELECT g::bit(12) FROM generate_series(1, 300) g"),
    "array": ("id int[] PRIMARY KEY", "SELECT ARRAY[g % 5, g] FROM generate_series(1, 300) g"),
    "composite type": ("id {pair} PRIMARY KEY", "SELECT ROW(g % 5, 'x, \"' || g)::{pair} FROM generate_series(1, 300) g"),
    "domain": ("id {domain} PRIMARY KEY", "SELECT 'd' || g FROM generate_series(1, 300) g"),
    "range": ("id int4range PRIMARY KEY", "SELECT int4range(g, g + 5) FROM generate_series(1, 300) g"),
    "jsonb": ("id jsonb PRIMARY KEY", "SELECT jsonb_build_object('a', g, 'b', ARRAY[g]) FROM generate_series(1, 300) g"),
    "boolean and inet": ("a boolean, b inet, PRIMARY KEY (a, b)", "SELECT g % 2 = 0, '10.0.0.0'::inet + g FROM generate_series(1, 300) g"),
    "citext": ("id {citext} PRIMARY KEY", "SELECT (CASE g % 2 WHEN 0 THEN 'Ab' ELSE 'aB' END || g)::{citext} FROM generate_series(1, 300) g"),
    "none": ("a int, b text", "SELECT g, 'x' FROM generate_series(1, 300) g"),
    "none, all the same": ("a int", "SELECT 1 FROM generate_series(1, 300) g"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_every_kind_of_key(source_database: SourceDatabase, make_source: Any, make_consumer: Any, kind: str) -> None:
    columns, rows = KEYS[kind]
    if "{citext}" in columns:
        assert "citext" in EXTENSIONS
        with source_database.admin(source_database.name) as conn:
            conn.execute(f"CREATE SCHEMA odd; GRANT USAGE ON SCHEMA odd TO {source_database.name}; CREATE EXTENSION citext SCHEMA odd")  # type: ignore[arg-type]
    source_database.execute('CREATE SCHEMA "o.d"')
    source_database.execute("CREATE TYPE \"o.d\".animal AS ENUM ('zebra', 'middle one', 'ape'); CREATE TYPE \"o.d\".pair AS (a int, b text);"
                            'CREATE DOMAIN "o.d".label AS text')  # fmt: skip
    [(collation,)] = source_database.execute(
        "SELECT collname FROM pg_collation WHERE collname = ANY (%(known)s) ORDER BY array_position(%(known)s, collname::text) LIMIT 1",
        {"known": ["pg_unicode_fast", "en-x-icu", "C.utf8", "POSIX"]},
    )
    named = {"enum": '"o.d".animal', "pair": '"o.d".pair', "domain": '"o.d".label', "citext": "odd.citext", "collation": collation}
    source_database.execute(f"CREATE TABLE t ({columns.format(**named)}, filler text DEFAULT 'f')")
    inserted = ", ".join(row[0] for row in source_database.execute(
        "SELECT quote_ident(attname) FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum > 0 AND attname <> 'filler' ORDER BY attnum"
    ))  # fmt: skip
    source_database.execute(f"INSERT INTO t ({inserted}) {rows.format(**named)}")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    consumer = make_consumer(source)
    backfill = begin(consumer, page_rows=10)
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    expected = [row[0] for row in source_database.execute("SELECT to_json(t)::text FROM (SELECT * FROM t) t")]
    found = reads()
    assert len(found) == len(expected) == counts(backfill)[0]
    if not kind.startswith("none"):
        assert len({str(row.key) for row in found}) == len(expected), "each row once"
    if kind not in ("composite type", "float", "numeric"):  # whose to_json is another text
        assert sorted(json.dumps(row.record, sort_keys=True) for row in found) == sorted(
            json.dumps(json.loads(text), sort_keys=True) for text in expected
        )


def test_a_page_grows_and_shrinks_with_what_rows_weigh(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    source_database.execute("ALTER TABLE t ALTER v SET STORAGE EXTERNAL")
    source_database.execute("INSERT INTO t SELECT g, 'x' FROM generate_series(1, 3000) g")
    source_database.execute("INSERT INTO t SELECT g, repeat('y', 3000000) FROM generate_series(3001, 3012) g")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    backfill = begin(make_consumer(source))
    rows = []

    def ended() -> bool:
        step_once()
        rows.append(fetch("SELECT max(cardinality(keys)), coalesce(max(octet_length(records::text)), 0) FROM backfill_chunks")[0])
        return status(backfill)[0] != "running"

    with reading(source):
        wait_until(ended, 30, "the backfill")
    assert status(backfill)[0] == "completed"
    assert len(reads()) == 3012 and max(size for _, size in rows) < 8_000_000, "never many large rows at once"
    assert fetch("SELECT page_rows < 100 FROM backfills") == [(True,)]


def test_part_of_a_table_by_another_column(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, day date, v int)")
    source_database.execute("INSERT INTO t SELECT g, CASE WHEN g % 10 > 0 THEN date '2026-01-01' + g % 7 END, g FROM generate_series(1, 200) g")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    consumer = make_consumer(source)
    everything_by_day = begin(consumer, sort_column="day", page_rows=10)
    from_a_day = begin(consumer, sort_column="day", start_value="2026-01-05", page_rows=10)
    from_a_key = begin(consumer, start_value="150", page_rows=10)
    with reading(source):
        for backfill in (everything_by_day, from_a_day, from_a_key):
            assert work_off(backfill) == "completed", status(backfill)
    expected = {
        everything_by_day: source_database.execute("SELECT id FROM t ORDER BY day NULLS LAST, id"),
        from_a_day: source_database.execute("SELECT id FROM t WHERE day >= '2026-01-05' ORDER BY day, id"),
        from_a_key: source_database.execute("SELECT id FROM t WHERE id >= 150 ORDER BY id"),
    }
    for backfill, ids in expected.items():
        assert fetch("SELECT (record::json->>'id')::int FROM messages WHERE backfill = %s ORDER BY id", backfill) == ids and ids


def test_part_of_a_table_by_a_condition(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute("CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy')")
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, m mood, v text, j jsonb, \"C d\" date)")
    source_database.execute(
        "INSERT INTO t SELECT g, (ARRAY['sad', 'ok', 'happy', NULL])[1 + g % 4]::mood, 'row ' || g, jsonb_build_object('n', g), date '2026-01-01' + g"
        " FROM generate_series(1, 300) g"
    )
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    consumer = make_consumer(source)
    conditions = {
        "v LIKE '%7' AND id > 100": "v LIKE '%7' AND id > 100", "m = 'happy'": "m = 'happy'", "m IS NULL": "m IS NULL",
        "j @> '{\"n\": 299}'": "id = 299", "old.v IS NULL AND action = 'read' AND table_name = 't'": "true",
        "new.\"C d\" < '2026-02-01'": '"C d" < \'2026-02-01\'', "m = 'sad' OR NULL": "m = 'sad'", "id < 0": "false",
    }  # fmt: skip
    made = {begin(consumer, where=text, page_rows=10): same for text, same in conditions.items()}
    failing = begin(consumer, where="1 / (id - 200) > 5", page_rows=10)
    with reading(source):
        for backfill, same in made.items():
            assert work_off(backfill) == "completed", status(backfill)
            expected = source_database.execute(f"SELECT id FROM t WHERE {same} ORDER BY id")
            assert fetch("SELECT (record::json->>'id')::int FROM messages WHERE backfill = %s ORDER BY id", backfill) == expected
            assert counts(backfill)[0] == len(expected)
        assert work_off(failing) == "failed" and "division by zero" in status(failing)[1]


def test_a_sort_column_of_a_table_without_a_key(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute("CREATE TABLE t (day date, v int)")
    source_database.execute("INSERT INTO t SELECT CASE WHEN g % 10 > 0 THEN date '2026-01-01' + g % 3 END, g FROM generate_series(1, 100) g")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    backfill = begin(make_consumer(source), sort_column="day", page_rows=10)
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    assert sorted(row.record["v"] for row in reads()) == list(range(1, 101))
    days = [row.record["day"] for row in reads()]
    assert days == sorted(days, key=lambda day: day or "9")


def test_exactly_what_the_publication_publishes(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    if source_database.version < 15:
        pytest.skip("column lists and row filters came with Postgres 15")
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, secret text, v int, g int GENERATED ALWAYS AS (v * 2) STORED)")
    source_database.execute("INSERT INTO t (id, secret, v) SELECT g, 's', g FROM generate_series(1, 500) g")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t (v, id) WHERE (id % 3 = 0)")
    with source_database.admin(source_database.name) as conn:  # a role that may read just that
        conn.execute("CREATE ROLE reader_of_few LOGIN REPLICATION PASSWORD 'few'")
        conn.execute("GRANT SELECT (id, v) ON t TO reader_of_few")
    try:
        source = make_source(username="reader_of_few", password="few")
        backfill = begin(make_consumer(source), page_rows=10)
        source_database.execute("INSERT INTO t (id, secret, v) VALUES (999, 's', 5), (1000, 's', 5)")
        with reading(source):
            assert work_off(backfill) == "completed", status(backfill)
        assert [row.record for row in reads()] == [{"id": i, "v": 5 if i > 500 else i} for i in [*range(3, 501, 3), 999]]
        live = [row for row in logged() if row.action == "I"]
        assert [row.record for row in live] == [{"id": 999, "v": 5}]
    finally:
        with source_database.admin(source_database.name) as conn:
            conn.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active AND database = current_database()")
            conn.execute("DROP OWNED BY reader_of_few; DROP ROLE reader_of_few")


def test_generated_columns_come_when_they_are_published(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    if source_database.version < 18:
        pytest.skip("publish_generated_columns came with Postgres 18")
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (v * 2) STORED, w int GENERATED ALWAYS AS (v * 3) VIRTUAL)")
    source_database.execute("INSERT INTO t (id, v) VALUES (1, 5)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t WITH (publish_generated_columns = stored)")
    source = make_source()
    backfill = begin(make_consumer(source))
    source_database.execute("INSERT INTO t (id, v) VALUES (2, 6)")
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    assert [row.record for row in reads()] == [{"id": 1, "v": 5, "g": 10}, {"id": 2, "v": 6, "g": 12}]
    assert [row.record for row in logged() if row.action == "I"] == [{"id": 2, "v": 6, "g": 12}]


def test_row_security_is_refused_and_not_obeyed(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    with source_database.admin(source_database.name) as conn:
        conn.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1), (2); ALTER TABLE t ENABLE ROW LEVEL SECURITY")
        conn.execute("CREATE POLICY p ON t USING (id = 1); CREATE PUBLICATION sequin_pub FOR TABLE t")
        conn.execute(f"GRANT SELECT ON t TO {source_database.name}")  # type: ignore[arg-type]
    source = make_source()
    backfill = begin(make_consumer(source))
    with reading(source):
        assert work_off(backfill) == "failed"
        assert f'ALTER ROLE "{source_database.name}" BYPASSRLS' in status(backfill)[1]
        with source_database.admin() as conn:
            conn.execute(f"ALTER ROLE {source_database.name} BYPASSRLS")  # type: ignore[arg-type]
        assert backfills.resume(backfill) and work_off(backfill) == "completed", status(backfill)
    assert [row.record for row in reads()] == [{"id": 1}, {"id": 2}]


def test_a_table_that_may_not_be_read(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    with source_database.admin(source_database.name) as conn:
        conn.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION sequin_pub FOR TABLE t")
    backfill = begin(make_consumer(make_source()))
    read_until(make_source.__self__ if False else backfill_source(backfill), lambda: fetch("SELECT 1 FROM capture_progress"))
    assert work_off(backfill) == "failed"
    assert "permission denied" in status(backfill)[1] and "GRANT SELECT ON public.t" in status(backfill)[1]


def backfill_source(backfill: Any) -> Any:
    from consumers.models import Source

    return Source.objects.get(pk=fetch("SELECT source FROM backfills WHERE id = %s", backfill)[0][0])


@pytest.mark.parametrize("via_root", [True, False])
def test_partitioned_tables(source_database: SourceDatabase, make_source: Any, make_consumer: Any, via_root: bool) -> None:
    source_database.execute(
        "CREATE TABLE t (id int, at date, v int, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);"
        "CREATE TABLE t_new PARTITION OF t FOR VALUES FROM ('2026-01-01') TO ('2027-01-01') PARTITION BY LIST (id);"
        "CREATE TABLE t_new_rest PARTITION OF t_new DEFAULT;"
        "CREATE TABLE t_old (v int, at date NOT NULL, id int NOT NULL, PRIMARY KEY (id, at));"
        "ALTER TABLE t ATTACH PARTITION t_old FOR VALUES FROM ('2020-01-01') TO ('2026-01-01')"
    )
    source_database.execute("INSERT INTO t SELECT g, date '2025-12-01' + g, g FROM generate_series(1, 100) g")
    source_database.execute(f"CREATE PUBLICATION sequin_pub FOR TABLE t WITH (publish_via_partition_root = {str(via_root).lower()})")
    source = make_source()
    backfill = begin(make_consumer(source), page_rows=10)
    source_database.execute("INSERT INTO t VALUES (101, '2025-01-01', 1), (102, '2026-12-01', 1)")
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    found = reads()
    assert sorted(row.record["id"] for row in found) == list(range(1, 103))
    tables = {"public.t"} if via_root else {"public.t_old", "public.t_new_rest"}
    assert {row.table for row in found} == {row.table for row in logged() if row.action == "I"} == tables
    live = {row.record["id"]: row.record for row in logged() if row.action == "I"}
    assert {id_: list(row) for id_, row in live.items()} == {row.record["id"]: list(row.record) for row in found if row.record["id"] in live}


def test_inherited_rows_are_the_childs(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (t)")
    source_database.execute("INSERT INTO t VALUES (1); INSERT INTO child VALUES (2)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE ONLY t")
    source = make_source()
    backfill = begin(make_consumer(source))
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    assert [row.record for row in reads()] == [{"id": 1}]


def test_an_empty_table(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE k (v int); CREATE PUBLICATION sequin_pub FOR TABLE t, k")
    source = make_source()
    consumer = make_consumer(source)
    with reading(source):
        assert [work_off(begin(consumer, table)) for table in ("public.t", "public.k")] == ["completed"] * 2
    assert logged() == []


def test_a_table_that_is_not_published_or_gone(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    consumer = make_consumer(source)
    with reading(source):
        other = begin(consumer, "public.u")
        assert work_off(other) == "failed" and "is not published by sequin_pub" in status(other)[1]
        backfill = begin(consumer)
        fetch("UPDATE backfills SET parts = '[{\"oid\": 1, \"table\": \"public.t\"}]' WHERE id = %s", backfill)
        assert work_off(backfill) == "failed" and "dropped or made anew" in status(backfill)[1]
        third = begin(consumer, sort_column="nothing")
        assert work_off(third) == "failed" and "no column nothing" in status(third)[1]


def test_odd_names(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute('CREATE SCHEMA "a""b.c"')
    source_database.execute('CREATE TABLE "a""b.c"."Sélect ✓.x" ("sel ect" int PRIMARY KEY, "é""\\" text, wanted bool, c0 int, s0 int, t int)')
    source_database.execute("INSERT INTO \"a\"\"b.c\".\"Sélect ✓.x\" VALUES (1, 'v', false, 3, 4, 5)")
    where = " WHERE (wanted = false AND c0 = 3 AND s0 = 4 AND t = 5 AND \"sel ect\" = 1)" if source_database.version >= 15 else ""
    source_database.execute('ALTER TABLE "a""b.c"."Sélect ✓.x" REPLICA IDENTITY FULL')
    source_database.execute(f'CREATE PUBLICATION "pub""lic" FOR TABLE "a""b.c"."Sélect ✓.x"{where}')
    source = make_source(publication_name='pub"lic')
    backfill = begin(make_consumer(source), 'a"b.c.Sélect ✓.x')
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    assert [row.record for row in reads()] == [{"sel ect": 1, 'é"\\': "v", "wanted": False, "c0": 3, "s0": 4, "t": 5}]


def test_as_many_columns_as_there_can_be(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    columns = ", ".join(f"c{number} {'int' if number == 1599 else 'bool'}" for number in range(1600))
    source_database.execute(f"CREATE TABLE t ({columns}, PRIMARY KEY (c1599)); INSERT INTO t (c1599) VALUES (7)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    backfill = begin(make_consumer(source))
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    (row,) = reads()
    assert row.record["c1599"] == 7 and len(row.record) == 1600


def test_the_roles_settings_do_not_bend_values(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
    source_database.execute("CREATE TABLE t (id text PRIMARY KEY, z timestamptz, f float8, b bytea)")
    source_database.execute(r"INSERT INTO t SELECT E'\\' || g, '2026-02-03 04:05:06+00', 0.1, '\x00ff' FROM generate_series(1, 30) g")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    bent = {
        "DateStyle": "'SQL, DMY'", "TimeZone": "'Asia/Kolkata'", "extra_float_digits": "-10", "bytea_output": "'escape'",
        "default_transaction_read_only": "on", "default_transaction_isolation": "'read committed'",
    }  # fmt: skip
    if source_database.version < 19:
        bent["standard_conforming_strings"] = "off"
    source = make_source()
    consumer = make_consumer(source)
    with source_database.admin() as conn:
        for name, value in bent.items():
            conn.execute(f"ALTER ROLE {source_database.name} SET {name} = {value}")  # type: ignore[arg-type]
    backfill = begin(consumer, page_rows=10)
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    assert len(reads()) == 30 and reads()[0].record == {"id": "\\1", "z": "2026-02-03T04:05:06+00:00", "f": 0.1, "b": "\\x00ff"}
