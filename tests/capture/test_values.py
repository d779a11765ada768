"""Every type arrives as the source's own to_json writes it, or as its text where the contract says so."""
from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

from capture import stream
from capture.encoder import text_to_json
from consumers import changes
from consumers.models import Source
from consumers.source_connection import conninfo
from tests.capture.world import ENCODINGS, await_messages, events, logged, read_until, reading
from tests.conftest import SourceDatabase, _drop_slots, database_on

pytestmark = pytest.mark.django_db(transaction=True)

NASTY = [
    "''", "'NULL'", "'null'", r"E'q\"uote\\back\nline\ttab\u0001ctl\u001F\u007F'", r"E'\u2028\u2029\u00e9e\u0301'", "'😀,{}\"'", "'  spaces  '",
    r"E'\u0301'", r"E'\b\f\r\x0b'", r"E'\\'", r"E'\\u0041 \'quoted\''",
]  # fmt: skip
DATES = ["'2026-11-23'", "'infinity'", "'-infinity'", "'4713-01-01 BC'", "'0001-12-31 BC'", "'12026-02-03'", "'5874897-12-31'"]
MOMENTS = ["2026-11-23 12:00:00.5", "infinity", "-infinity", "0044-03-15 00:00:00 BC", "12026-01-01 00:00:00", "1999-12-31 23:59:59.999999"]

# type → values as SQL. Each also goes into an array and an array of arrays, with NULL among the elements.
SCALARS: dict[str, list[str]] = {
    "smallint": ["'-32768'", "32767", "0"],
    "integer": ["'-2147483648'", "2147483647"],
    "bigint": ["'-9223372036854775808'", "9223372036854775807", "9007199254740993"],
    "oid": ["0", "4294967295"],
    "numeric": ["repeat('9', 1000)::numeric", "('0.' || repeat('1', 900))::numeric", "'NaN'", "'Infinity'", "'-Infinity'", "-0.00", "1.50", "1e100", "-1e-20"],
    "numeric(3,-2)": ["12345", "-50"],
    "numeric(10,2)": ["1.5", "-99999999.99", "0"],
    "real": ["1.1", "'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "3.4028235e38", "1e-45"],
    "double precision": ["0.1", "'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "1e-300", "1.7976931348623157e308", "5e-324", "123456789012345680"],
    "boolean": ["true", "false"],
    "text": NASTY,
    "varchar": NASTY,
    "varchar(9)": ["'x'", "'123456789'"],
    "char(5)": ["'ab'", "''", "'abcde'"],
    '"char"': ["'c'", "''", "'\"'"],
    "name": ["'n'", "'Name with \"quotes\"'"],
    "bytea": [r"'\x'", r"'\x00ff'", "'\\xdeadbeef'"],
    "uuid": ["'6a63bbb1-6ac1-4adf-9562-f1094c72216f'"],
    "date": DATES,
    "time": ["'00:00'", "'24:00'", "'23:59:59.999999'"],
    "timetz": ["'10:00+02'", "'23:59:59.999999-15:59'", "'00:00+05:30'"],
    "timestamp": [f"'{moment}'" for moment in MOMENTS],
    "timestamp(0)": ["'2026-11-23 12:00:00.5'"],
    "timestamptz": [f"'{moment}'" if "infinity" in moment else f"'{moment.replace(' BC', '')}+05:30{' BC' if 'BC' in moment else ''}'" for moment in MOMENTS],
    "interval": ["'1 year 2 mons -3 days 04:05:06.7'", "'0'", "'-1 day'", "'178000000 years'", "'-1 mon +1 day -00:00:00.000001'"],
    "interval(2)": ["'1.239 seconds'"],
    "time(0)": ["'10:00:00.6'"],
    "json": ["'{\"a\": [1, 1e400], \"b\":\"\\u0000\"}'", "'{\"k\":1,\n \"k\":2}'", "'null'", "'  [ ]  '", "'\"text\"'"],
    "jsonb": ["('{\"n\": ' || repeat('7', 400) || '}')::jsonb", "'{\"z\": 1, \"a\": {\"b\": [null, \"NULL\", \"q\\\"\"]}}'", "'null'", "'\"x\"'"],
    "jsonpath": ["'$.a[*] ? (@ > 1)'"],
    "xml": ["'<a b=\"c\">d&amp;</a>'"],
    "inet": ["'10.0.0.1/8'", "'::1'"],
    "cidr": ["'10.0.0.0/8'", "'2001:db8::/32'"],
    "macaddr": ["'08:00:2b:01:02:03'"],
    "macaddr8": ["'08:00:2b:01:02:03:04:05'"],
    "bit(4)": ["B'1010'"],
    "varbit": ["B'101'", "B''"],
    "money": ["'12.34'", "'-1234567.89'"],
    "point": ["'(1,2.5)'"],
    "line": ["'{1,2,3}'"],
    "lseg": ["'[(1,2),(3,4)]'"],
    "box": ["'((1,1),(0,0))'"],
    "path": ["'[(1,2),(3,4)]'"],
    "polygon": ["'((0,0),(1,1),(1,0))'"],
    "circle": ["'<(1,2),3>'"],
    "tsvector": ["'fat:2 cat:3A'"],
    "tsquery": ["'fat & !rat'"],
    "pg_lsn": ["'16/B374D848'"],
    "xid8": ["'4294967301'"],
    "pg_snapshot": ["'10:20:10,14'"],
    "xid": ["'4294967295'"],
    "tid": ["'(1,2)'"],
    "regproc": ["'pg_catalog.now'"],
    "regprocedure": ["'pg_catalog.lower(text)'"],
    "regnamespace": ["'pg_catalog'"],
    "regrole": ["'pg_monitor'"],
    "aclitem": ["'pg_monitor=r/pg_monitor'"],
    "bit": ["B'1'"],
    "tsrange": ["'[2026-01-01 00:00,infinity]'"],
    "int8range": ["'[1,9223372036854775807)'"],
    "words": ["'[a,\"b,c\")'"],
    "tsmultirange": ["'{[2026-01-01 00:00,2026-01-02 00:00)}'"],
    "txid_snapshot": ["'10:20:10,14'"],
    "int4range": ["'[1,5)'", "'empty'", "'(,)'"],
    "numrange": ["'[1.5,NaN)'"],
    "tstzrange": ["'[2026-01-01 00:00+00,)'"],
    "daterange": ["'[2026-01-01,2026-02-01)'"],
    "int4multirange": ["'{[1,3),[5,8)}'", "'{}'"],
    "regclass": ["'pg_class'"],
    "regtype": ["'integer'"],
    "mood": ["'calm'", "'very calm'", "'a,b\"c'"],
    "percent": ["12.50", "100"],
    "label": NASTY[:3],
    "inner_percent": ["7.25"],
    "pair": ["'(1,\"x, y\")'", "'(,)'"],
    "boss": ["'(1,b)'"],
    "nested_pair": [r"ROW(ROW(1, 'q\"uote, ()'), ARRAY['x y', NULL, ''])"],
    "shout": ["'loud'"],
    "tags": ["'{a,\"b,c\"}'", "'{}'", "'{{a,NULL},{\"NULL\",\"\"}}'"],
    "inner_tags": ["'{a}'"],
    "boxes": ["'{(1,1),(0,0);NULL;(2,2),(1,1)}'"],
}  # fmt: skip
# Their own text, although to_json would take them apart or cast them.
AS_TEXT = {name + brackets for name in ("pair", "nested_pair", "boss", "shout", "hstore") for brackets in ("", "[]")}
PLAIN: dict[str, list[str]] = {
    "int2vector": ["'1 -2 3'", "''"], "oidvector": ["'1 4294967295'"], "int2vector[]": ["ARRAY['1 2', '3']::int2vector[]"],
    "oidvector[]": ["ARRAY['1 2', '3']::oidvector[]"], "counts": ["'1 2'"],
    "int[]": ["'[0:1]={5,6}'", "'{}'", "'[2:3][0:1]={{1,2},{3,4}}'"],
    "box[]": ["ARRAY['((1,1),(0,0))'::box, '((2,2),(1,1))'::box]"],
    "text[]": [r"ARRAY['a,b', 'c\"d', 'NULL', NULL, 'e\f', '', '{}', ' ', 'é']", "'{{a,b},{c,NULL}}'", "'{{{x}}}'"],
}  # fmt: skip
EXTENSIONS = {"hstore": ["'a=>1, \"b c\"=>NULL'", "''"], "citext": ["'ÄbC'", "'NULL'"], "ltree": ["'a.b.c'"], "vector": ["'[1,2.5,-3]'"]}
SETUP = [
    "CREATE TYPE mood AS ENUM ('calm', 'very calm', 'a,b\"c')", "CREATE DOMAIN percent AS numeric(5, 2)",
    "CREATE DOMAIN label AS text CHECK (VALUE <> 'forbidden')", "CREATE DOMAIN inner_percent AS percent", "CREATE DOMAIN tags AS text[]",
    "CREATE TYPE pair AS (a int, b text)", "CREATE TYPE nested_pair AS (p pair, ts text[])", "CREATE DOMAIN boss AS pair",
    "CREATE DOMAIN inner_tags AS tags", "CREATE DOMAIN boxes AS box[]", "CREATE DOMAIN counts AS int2vector",
    "CREATE TYPE words AS RANGE (subtype = text)", "CREATE TYPE shout AS ENUM ('loud')",
    "CREATE FUNCTION as_json(shout) RETURNS json IMMUTABLE RETURN '{\"shout\": true}'::json",
    "CREATE CAST (shout AS json) WITH FUNCTION as_json(shout)",
]  # fmt: skip


def exact(text: str) -> Any:
    """JSON with its numbers as they are written, and members in order, doubles included."""
    return json.loads(
        text, parse_int=lambda t: ("number", t), parse_float=lambda t: ("number", t), object_pairs_hook=lambda pairs: ("object", pairs)
    )


def everything(conn: psycopg.Connection[Any]) -> dict[str, list[str]]:
    """Each type this server has, with its values; scalars in arrays too."""
    scalars = dict(SCALARS)
    for name, values in EXTENSIONS.items():
        try:
            conn.execute(sql.SQL("CREATE EXTENSION {}").format(sql.Identifier(name)))
        except psycopg.Error:
            continue
        scalars[name] = values
    try:
        conn.execute("SELECT '<a/>'::xml")
    except psycopg.Error:
        del scalars["xml"]  # this server was built without libxml
    if conn.info.server_version < 150_000:
        del scalars["numeric(3,-2)"]  # negative scales came with 15
    types = {**scalars, **PLAIN}
    for name, values in scalars.items():
        typed = [f"{value}::{name}" for value in values]
        flat = f"ARRAY[{', '.join(typed)}, NULL]::{name}[]"
        types.setdefault(f"{name}[]", []).extend([flat, f"ARRAY[{flat}, {flat}]", f"'{{}}'::{name}[]"])
    return types


def test_values_are_what_to_json_gives(source_database: SourceDatabase, make_source: Any) -> None:
    for statement in SETUP:
        source_database.execute(statement)
    with source_database.admin(source_database.name) as conn:
        types = everything(conn)
    assert len(types) >= 170
    # Too many columns for one row's width at times: a table for each letter of the alphabet's worth of types.
    names = sorted(types)
    tables = [names[at : at + 40] for at in range(0, len(names), 40)]
    settings = "-c timezone=UTC -c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=1"
    expected: list[tuple[list[str], str]] = []
    source = None
    for number, chosen in enumerate(tables):
        columns = ", ".join(f"c{i} {kind}" for i, kind in enumerate(chosen))
        source_database.execute(f"CREATE TABLE v{number} (id int PRIMARY KEY, {columns})")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE " + ", ".join(f"v{n}" for n in range(len(tables))))
    source = make_source()
    with source_database.connect(options=settings) as conn:
        for number, chosen in enumerate(tables):
            most = max(len(types[kind]) for kind in chosen)
            for row in range(most + 1):  # the last is all NULL
                values = ", ".join(types[kind][row] if row < len(types[kind]) else "NULL" for kind in chosen)
                conn.execute(f"INSERT INTO v{number} VALUES ({row}, {values})")  # type: ignore[arg-type]
            shown = ", ".join(
                f"{f'c{i}::text' if kind in AS_TEXT and not kind.endswith('[]') else f'c{i}::text[]' if kind in AS_TEXT else f'c{i}'} AS c{i}"
                for i, kind in enumerate(chosen)
            )
            found = conn.execute(f"SELECT to_json(e)::text FROM (SELECT id, {shown} FROM v{number} ORDER BY id) e")  # type: ignore[arg-type]
            expected += [(chosen, text) for (text,) in found.fetchall()]
    read_until(source, lambda: raw_records() >= len(expected))
    for record, (chosen, text) in zip(raw(), expected, strict=True):
        mine, theirs = dict(exact(record)[1]), dict(exact(text)[1])
        for i, kind in enumerate(chosen):
            assert mine[f"c{i}"] == theirs[f"c{i}"], f"{kind}: {types[kind]}"


def raw() -> list[str]:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT record FROM messages ORDER BY id")
        return [row[0] for row in cursor.fetchall()]


def raw_records() -> int:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM messages")
        return int(cursor.fetchone()[0])


def test_an_enum_value_added_after_the_start(source_database: SourceDatabase, make_source: Any) -> None:
    source_database.execute("CREATE TYPE mood AS ENUM ('calm')")
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, m mood, ms mood[])")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    with reading(source):
        source_database.execute("INSERT INTO t VALUES (1, 'calm')")
        await_messages(1)
        source_database.execute("ALTER TYPE mood ADD VALUE 'wild'")
        source_database.execute("INSERT INTO t VALUES (2, 'wild', '{wild,calm}')")
        assert await_messages(2)[1].record == {"id": 2, "m": "wild", "ms": ["wild", "calm"]}


def test_settings_of_role_and_database_do_not_bend_values(source_database: SourceDatabase, make_source: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, d date, z timestamptz, i interval, f float8, b bytea, c regclass, r tstzrange)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    bent = {"DateStyle": "'SQL, DMY'", "TimeZone": "'Asia/Kolkata'", "IntervalStyle": "'iso_8601'", "extra_float_digits": "-10",
            "bytea_output": "'escape'", "search_path": "nowhere", "quote_all_identifiers": "on", "client_encoding": "LATIN1"}  # fmt: skip
    with source_database.admin() as conn:
        for name, value in bent.items():
            conn.execute(f"ALTER ROLE {source_database.name} SET {name} = {value}")  # type: ignore[arg-type]
            conn.execute(f"ALTER DATABASE {source_database.name} SET {name} = {value}")  # type: ignore[arg-type]
    source = make_source()
    source_database.execute(
        "INSERT INTO public.t VALUES (1, '2026-02-03', '2026-02-03 04:05:06+00', '1 day 2 hours', 0.1, '\\x00ff', 'public.t', '[2026-02-03 04:05:06+00,)')"
    )
    read_until(source, lambda: logged())
    assert logged()[0].record == {
        "id": 1, "d": "2026-02-03", "z": "2026-02-03T04:05:06+00:00", "i": "1 day 02:00:00", "f": 0.1, "b": "\\x00ff",
        "c": "public.t", "r": '["2026-02-03 04:05:06+00",)',
    }  # fmt: skip


@contextmanager
def database_in(server: Any, encoding: str) -> Iterator[tuple[psycopg.Connection[Any], Source]]:
    """A database of this encoding, a connection that sends and gets its bytes as they are, and a source for it."""
    with database_on(server) as database:
        name = f"{database.name}_e"
        with database.admin() as conn:
            provider = " LOCALE_PROVIDER libc" if conn.info.server_version >= 150_000 else ""
            conn.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'{provider}")  # type: ignore[arg-type]
        source = Source(
            name="other", host=database.host, port=database.port, database=name, username=database.server.user,
            password=database.server.password, slot_name=name,
        )  # fmt: skip
        try:
            with database.admin(name) as conn:
                conn.execute("SET client_encoding = 'SQL_ASCII'")
                yield conn, source
        finally:
            with database.admin() as conn:
                _drop_slots(conn, name)
                conn.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type]


def send(conn: psycopg.Connection[Any], *statements: bytes) -> None:
    for statement in statements:
        result = conn.pgconn.exec_(statement)
        assert not result.error_message, result.error_message


@pytest.mark.parametrize("source_server", ["18"], indirect=True)
@pytest.mark.parametrize(("encoding", "stored", "expected"), ENCODINGS)
def test_databases_in_other_encodings(
    source_server: Any, transactional_db: None, encoding: str, stored: bytes, expected: str
) -> None:
    """Names, texts, arrays, json and keys in any encoding; what cannot be read arrives as \\x escapes, and stops nothing."""
    with database_in(source_server, encoding) as (conn, source):
        send(
            conn,
            b'CREATE TABLE "t%b" ("k%b" text PRIMARY KEY, j json, ts text[])' % (stored, stored),
            b"CREATE PUBLICATION sequin_pub FOR ALL TABLES",
        )
        changes.save(source)
        send(
            conn,
            b"INSERT INTO \"t%b\" VALUES ('plain', '{}', '{}')" % stored,
            b"SELECT pg_logical_emit_message(true, 'notes %b', '')" % stored,
            b"INSERT INTO \"t%b\" VALUES ('%b', '{\"a%b\": \"\\u00e9%b\"}', ARRAY['%b', 'x, \"%b\"'])" % ((stored,) * 6),
        )
        read_until(source, lambda: raw_records() >= 2)
    _, row = logged()
    assert row.table == f"public.t{expected}" and row.key == [expected]
    assert row.record == {f"k{expected}": expected, "j": {f"a{expected}": f"é{expected}"}, "ts": [expected, f'x, "{expected}"']}
    refused = "\\x" in expected and encoding != "SQL_ASCII"
    assert [kind for kind, *_ in events(source)] == ["encoding"] * refused


@pytest.mark.parametrize("source_server", ["18"], indirect=True)
def test_a_transaction_whose_last_value_is_refused_is_stored_once(source_server: Any, transactional_db: None) -> None:
    with database_in(source_server, "WIN1252") as (conn, source):
        conn.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        conn.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
        changes.save(source)
        send(conn, b"INSERT INTO t SELECT i, CASE i WHEN 9000 THEN '\x81' ELSE '\xe9' END FROM generate_series(1, 9000) i")
        read_until(source, lambda: raw_records() >= 9000)
    found = logged()
    assert [row.key for row in found] == [[str(i)] for i in range(1, 9001)]
    assert {row.record["v"] for row in found[:-1]} == {"é"} and found[-1].record["v"] == r"\x81"


def test_odd_names(source_database: SourceDatabase, make_source: Any) -> None:
    long = "n" * 63
    source_database.execute('CREATE SCHEMA "a""b.c"')
    source_database.execute(f'CREATE TABLE "a""b.c"."Sélect ✓.x" ("sel ect" int PRIMARY KEY, "é""\\" text, "{long}" text, "💥,{{}}" text[])')
    source_database.execute('CREATE PUBLICATION "pub""lic" FOR TABLE "a""b.c"."Sélect ✓.x"')
    source = make_source(publication_name='pub"lic')
    source_database.execute("INSERT INTO \"a\"\"b.c\".\"Sélect ✓.x\" VALUES (1, 'v', 'w', '{x}')")
    read_until(source, raw_records)
    (row,) = logged()
    assert row.table == 'a"b.c.Sélect ✓.x' and row.key == ["1"]
    assert row.record == {"sel ect": 1, 'é"\\': "v", long: "w", "💥,{}": ["x"]}


def test_as_many_columns_as_there_can_be(source_database: SourceDatabase, make_source: Any) -> None:
    names = [f"c{number}" for number in range(1600)]
    columns = ", ".join(f"{name} {'int' if name == 'c1599' else 'bool'}" for name in names)
    source_database.execute(f"CREATE TABLE t ({columns}, PRIMARY KEY (c1599))")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    with source_database.connect() as conn:
        conn.execute(f"INSERT INTO t VALUES ({', '.join('NULL' if n % 3 else 'true' for n in range(1599))}, 7)")  # type: ignore[arg-type]
        conn.execute("UPDATE t SET c1598 = false")
    read_until(source, lambda: raw_records() >= 2)
    inserted, updated = logged()
    assert inserted.record == {**{f"c{n}": None if n % 3 else True for n in range(1599)}, "c1599": 7}
    assert updated.record == {**inserted.record, "c1598": False} and updated.key == ["7"]


@pytest.mark.parametrize("source_server", ["18"], indirect=True)
def test_huge_values(source_database: SourceDatabase, make_source: Any) -> None:
    """A text of 100 MB, and a bytea of 60 MB, whose text is twice as long."""
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, v text, b bytea)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    source_database.execute("INSERT INTO t VALUES (1, repeat('x', 100000000)), (2, NULL)")
    source_database.execute("UPDATE t SET b = convert_to(repeat('y', 60000000), 'UTF8') WHERE id = 2")
    read_until(source, lambda: raw_records() >= 3, timeout=60)
    text, _, binary = raw()
    assert text == '{"id":1,"v":"' + "x" * 100_000_000 + '","b":null}'
    assert binary == '{"id":2,"v":null,"b":"\\\\x' + "79" * 60_000_000 + '"}'


def test_large_values_are_read_few_at_a_time(
    source_database: SourceDatabase, make_source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    source_database.execute("INSERT INTO t SELECT i, repeat('x', 200000) FROM generate_series(1, 50) i")
    monkeypatch.setattr(stream, "READ_BYTES", 1_000_000)
    sizes = []
    with stream.ReplicationStream(conninfo(source, replication=True)) as opened:
        opened.start(source.slot_name, source.publication_name, 0)
        deadline = time.monotonic() + 60
        for batch in opened.batches(4000, 1.0):
            sizes.append(sum(map(len, batch)))
            if sum(sizes) > 50 * 200_000 or time.monotonic() > deadline:
                break
        opened.finish()
    assert sum(sizes) > 50 * 200_000
    assert max(sizes) < 1_000_000 + 250_000


IDENTITY = "CREATE TABLE t (id int PRIMARY KEY, code text NOT NULL UNIQUE, big text, n int); ALTER TABLE t ALTER big SET STORAGE EXTERNAL"


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL", "USING INDEX t_code_key"])
def test_updates_deletes_and_toast_under_each_identity(source_database: SourceDatabase, make_source: Any, identity: str) -> None:
    source_database.execute(IDENTITY)
    source_database.execute(f"ALTER TABLE t REPLICA IDENTITY {identity}")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    big = "b" * 9000
    with source_database.connect() as conn:
        conn.execute("INSERT INTO t VALUES (1, 'c1', repeat('b', 9000), NULL)")
        conn.execute("UPDATE t SET n = 5")
        conn.execute("UPDATE t SET id = 2, code = 'c2'")
        conn.execute("DELETE FROM t")
    read_until(source, lambda: raw_records() >= 4)
    _, touched, moved, gone = logged()
    whole = {"id": 1, "code": "c1", "big": big, "n": 5}
    if identity == "FULL":
        assert touched.record == whole and touched.changes == {"n": None}
        assert moved.record == {**whole, "id": 2, "code": "c2"} and moved.changes == {"id": 1, "code": "c1"}
        assert gone.record == moved.record and gone.key == ["2"]
    else:
        sent = {name: value for name, value in whole.items() if name != "big"}
        assert touched.record == sent and touched.changes == {}
        assert moved.record == {**sent, "id": 2, "code": "c2"}
        assert moved.changes == ({"id": 1} if identity == "DEFAULT" else {"code": "c1"})
        assert gone.record == ({"id": 2} if identity == "DEFAULT" else {"code": "c2"})
        assert gone.key == (["2"] if identity == "DEFAULT" else [None])
    assert touched.key == ["1"] and moved.key == ["2"]


def test_a_large_key_comes_with_the_old_row(source_database: SourceDatabase, make_source: Any) -> None:
    """A TOASTed key that an update leaves alone is not in the new row; the server sends it as the old key instead."""
    source_database.execute("CREATE TABLE t (id text PRIMARY KEY, code int NOT NULL UNIQUE, n int); ALTER TABLE t ALTER id SET STORAGE EXTERNAL")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    first, second = "k" * 2500, "l" * 2500
    with source_database.connect() as conn:
        conn.execute("INSERT INTO t VALUES (repeat('k', 2500), 1, 1)")
        conn.execute("UPDATE t SET n = 2")
        conn.execute("UPDATE t SET id = repeat('l', 2500)")
        conn.execute("ALTER TABLE t REPLICA IDENTITY FULL")
        conn.execute("UPDATE t SET n = 3")
        conn.execute("DELETE FROM t")
    read_until(source, lambda: raw_records() >= 5)
    inserted, touched, moved, full, gone = logged()
    assert inserted.key == touched.key == [first] and moved.key == full.key == gone.key == [second]
    assert touched.record == {"id": first, "code": 1, "n": 2} and touched.changes == {}
    assert moved.changes == {"id": first} and full.changes == {"n": 2} and gone.record == {"id": second, "code": 1, "n": 3}
    assert not [kind for kind, *_ in events(source) if kind == "key_not_sent"]


def test_a_key_that_was_not_sent_is_never_guessed(source_database: SourceDatabase, make_source: Any) -> None:
    source_database.execute(
        "CREATE TABLE t (id text PRIMARY KEY, code text NOT NULL UNIQUE, n int);"
        "ALTER TABLE t ALTER id SET STORAGE EXTERNAL, ALTER code SET STORAGE EXTERNAL, REPLICA IDENTITY USING INDEX t_code_key"
    )
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    first, code = "k" * 2500, "c" * 2500
    with source_database.connect() as conn:
        conn.execute("INSERT INTO t VALUES (repeat('k', 2500), repeat('c', 2500), 1)")
        conn.execute("UPDATE t SET n = 2")
        conn.execute("UPDATE t SET id = 'new'")
        conn.execute("DELETE FROM t")
    read_until(source, lambda: raw_records() >= 4)
    inserted, keyless, moved, gone = logged()
    assert inserted.key == [first] and moved.key == ["new"]
    assert keyless.key == gone.key == [None]
    assert keyless.record == {"code": code, "n": 2} and gone.record == {"code": code}
    kind, table, text, _ = events(source)[0]
    assert (kind, table) == ("key_not_sent", "public.t") and "REPLICA IDENTITY FULL" in text


def test_tables_without_an_identity(source_database: SourceDatabase, make_source: Any) -> None:
    """The source itself refuses what it could not send; what is published of such tables arrives, keys from the catalog."""
    source_database.execute("CREATE TABLE nothing (id int PRIMARY KEY, n int); ALTER TABLE nothing REPLICA IDENTITY NOTHING")
    source_database.execute("CREATE TABLE keyless (id int, n int)")
    source_database.execute("CREATE TABLE logbook (id int, n int); ALTER TABLE logbook REPLICA IDENTITY FULL")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE nothing, keyless, logbook")
    source = make_source()
    with source_database.connect() as conn:
        for table in ("nothing", "keyless", "logbook"):
            conn.execute(f"INSERT INTO {table} VALUES (1, 1)")  # type: ignore[arg-type]
        for table in ("nothing", "keyless"):
            for statement in (f"UPDATE {table} SET n = 2", f"DELETE FROM {table}"):
                with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="replica identity"):
                    conn.execute(statement)  # type: ignore[arg-type]
        conn.execute("UPDATE logbook SET n = NULL")
        conn.execute("DELETE FROM logbook")
    read_until(source, lambda: raw_records() >= 5)
    found = [(row.table, row.action, row.record, row.changes, row.key) for row in logged()]
    assert found == [
        ("public.nothing", "I", {"id": 1, "n": 1}, None, ["1"]), ("public.keyless", "I", {"id": 1, "n": 1}, None, []),
        ("public.logbook", "I", {"id": 1, "n": 1}, None, []), ("public.logbook", "U", {"id": 1, "n": None}, {"n": 1}, []),
        ("public.logbook", "D", {"id": 1, "n": None}, None, []),
    ]  # fmt: skip


def test_generated_columns(source_database: SourceDatabase, make_source: Any) -> None:
    """Stored ones arrive where the publication says so (Postgres 18); virtual ones are in no WAL."""
    newest = source_database.version >= 18
    virtual = ", w int GENERATED ALWAYS AS (n + 1) VIRTUAL" if newest else ""
    source_database.execute(
        f"CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int, g text GENERATED ALWAYS AS (n || '!') STORED{virtual}, z int)"
    )
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    source_database.execute("INSERT INTO t (n, z) VALUES (1, 9)")
    if newest:
        source_database.execute("ALTER PUBLICATION sequin_pub SET (publish_generated_columns = stored)")
    source_database.execute("UPDATE t SET n = 2")
    source_database.execute("DELETE FROM t")
    read_until(source, lambda: raw_records() >= 3)
    inserted, updated, gone = logged()
    assert inserted.record == {"id": 1, "n": 1, "z": 9} and gone.record == {"id": 1}
    assert updated.record == {"id": 1, "n": 2, **({"g": "2!"} if newest else {}), "z": 9}


def test_an_output_that_is_no_utf8_is_shown_escaped() -> None:
    """Some types' output functions mind no encoding: "char" before Postgres 15, for one."""
    assert text_to_json(b'a"\xff') == b'"a\\"\\\\xff"'
