"""What a filter delivers is what SELECT … WHERE gives on the source, for every expression and random rows."""
from __future__ import annotations

import random
from typing import Any

import pytest

from tests.routing.world import Shop, record, shop, take  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

COLUMNS = """
    id bigint PRIMARY KEY, status text, total numeric(10,2), big numeric, count int, small smallint, ratio float8, real_ratio real, flag bool,
    code char(5), name varchar(20), created timestamptz, local timestamp(3), day date, at time, tz timetz, took interval, attrs jsonb,
    doc json, tags text[], grid int[], moments timestamptz[], ident uuid, data bytea, bits bit(4), some_bits varbit, addr inet, net cidr,
    mac macaddr, span int4range, spans tstzrange, many nummultirange, place point, kind "char", mood mood, moods mood[], amount amount,
    short short, "Ship To" text, "new" int, action text, words tsvector
"""
TYPES = (
    "CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy')",
    "CREATE DOMAIN amount AS numeric(12,3) CHECK (value > -1000000)",
    "CREATE DOMAIN short AS varchar(3)",
)
EXPRESSIONS = [
    "status = 'paid'", "status <> 'paid'", "status IN ('paid', 'new', 'É')", "status NOT IN ('paid')", "status = ANY ('{paid,new}')",
    "status ILIKE 'É%'", "status LIKE '%a_d%'", "status LIKE '50!%%' ESCAPE '!'", "status ~ '^[pn]'", "status ~* 'É|ß'", "status ~ '\\w+'",
    "status SIMILAR TO '(paid|new)'", "upper(status) = 'PAID'", "length(status) > 3", "status || 'x' = 'paidx'", "left(status, 2) = 'pa'",
    "status IS NULL", "status IS NOT NULL AND status <> ''", "coalesce(status, 'none') = 'none'", "nullif(status, 'paid') IS NULL",
    "total > 100", "total BETWEEN -5 AND 50.5", "total = 0.1 + 0.2", "total % 2 = 1", "round(total) = 3", "big > 1e30", "big = 'NaN'",
    "abs(big) < 1", "count > 5 OR small < 0", "count / 2 = 3", "count & 1 = 1", "NOT (count > 5)", "count IS DISTINCT FROM small",
    "ratio = 'Infinity'", "ratio > 0.1", "ratio = 0.1", "real_ratio = 0.1::real", "flag", "NOT flag", "flag IS NOT TRUE", "flag IS UNKNOWN",
    "code = 'ab'", "code < 'b' COLLATE \"C\"", "name = 'straße'", "name::text = 'ab'", "created >= '2026-01-01'", "created < '2026-01-01 06:00+05'",
    "created = 'infinity'", "created::date = '2026-01-01'", "extract(year FROM created) = 2026", "date_trunc('hour', created) = '2026-01-01 04:00+00'",
    "created AT TIME ZONE 'Asia/Tokyo' > '2026-01-01 12:00'", "to_char(created, 'YYYY-MM-DD') = '2026-01-01'", "created > day", "created > local",
    "created + interval '1 day' > '2026-01-02'", "age(created, '2020-01-01') > interval '5 years'", "local > '2026-01-01'", "local::date = day",
    "day > '2000-01-01'", "day = '0044-03-15 BC'", "day - 1 < '2026-01-01'", "at > '12:00'", "tz = '12:00+02'", "took > '1 hour'", "took = '01:00:00'",
    "attrs @> '{\"vip\": true}'", "attrs ? 'a'", "attrs ->> 'a' = '1'", "(attrs ->> 'n')::numeric > 1", "attrs['a'] = '1'", "attrs #>> '{b,0}' = 'x'",
    "attrs @? '$.b[*] ? (@ == \"x\")'", "jsonb_typeof(attrs) = 'object'", "jsonb_array_length(attrs -> 'b') > 1", "doc ->> 'k' = 'é'",
    "doc #>> '{deep,0}' = '1'", "tags && ARRAY['a']", "'a' = ANY (tags)", "tags @> '{a,b}'", "array_length(tags, 1) = 2", "tags[1] = 'a'",
    "tags[1:2] = '{a,b}'", "cardinality(tags) = 0", "grid[2][1] = 3", "5 = ANY (grid)", "'2026-01-01 04:30+00' = ANY (moments)",
    "ident = '6f9619ff-8b86-d011-b42d-00c04fc964ff'", "data = '\\x00ff'", "length(data) = 2", "bits = B'1010'", "(bits & B'1000') = B'1000'",
    "some_bits = B'1'", "addr << '10.0.0.0/8'", "addr = '::1'", "net >>= '10.1.1.1'", "mac = '08:00:2b:01:02:03'", "span @> 5", "isempty(span)",
    "spans && '[2026-01-01,2026-02-01)'", "many @> 1.5", "place <-> point '(0,0)' < 2", "kind = 'x'", "mood = 'happy'", "mood IN ('sad', 'ok')",
    "moods && ARRAY['ok']", "amount > 10", "short = 'abc'", "\"Ship To\" = 'x'", "new.\"new\" > 3", "\"new\" > 3", "action = 'go'",
    "message.action = 'insert' AND new.action IS NOT NULL", "table_name = 'things' AND table_schema = 'public'", "words @@ 'cat'::tsquery",
    "CASE WHEN flag THEN count > 3 ELSE status = 'paid' END", "CASE status WHEN 'paid' THEN true WHEN NULL THEN false END",
    "greatest(count, small) > 5", "least(count, 3) = 3", "num_nulls(status, count) = 1", "status = 'paid' AND total > 10 OR flag AND NOT count < 3",
    "md5(status) < '8'", "starts_with(status, 'p')", "regexp_replace(status, '[aeiou]', '', 'g') = 'pd'", "strpos(status, 'a') = 2",
    "(status = 'paid') = flag", "count BETWEEN SYMMETRIC 9 AND 2", "status COLLATE \"C\" > 'n'",
]  # fmt: skip
MOMENTS = ["2026-01-01 04:30+00", "2026-01-01 00:59:59.999999+00", "2020-02-29 12:00+00", "infinity", "0044-03-15 00:00+00 BC", None]
VALUES: dict[str, list[Any]] = {
    "status": ["paid", "new", "", "É", "élan", "NULL", "50% off", "straße", "ß", "a\\b\n\"c\"", "🙂", None],
    "total": ["0.30", "3", "101.5", "-5", "50.50", "NaN", None], "big": ["NaN", "1" + "0" * 40, "0.5", "-0.25", None],
    "count": [0, 3, 6, 7, 2147483647, None], "small": [-1, 3, 7, None], "ratio": ["Infinity", "NaN", "0.1", "-0", "1e300", None],
    "real_ratio": ["0.1", "3.4e38", None], "flag": [True, False, None], "code": ["ab", "ab   ", "b", "", None], "name": ["straße", "ab", None],
    "created": MOMENTS, "local": ["2026-01-01 04:30:00.123", "infinity", "2020-02-29", None], "day": ["2026-01-01", "0044-03-15 BC", "infinity", "12026-01-01", None],
    "at": ["12:00", "23:59:59.999999", None], "tz": ["12:00+02", "10:00+00", None], "took": ["01:00:00", "60 minutes", "1 mon -1 day", None],
    "attrs": ['{"vip": true, "a": 1}', '{"a": "1", "b": ["x", 2], "n": "7.5"}', "[1, 2]", '"text"', '{"n": 1e400}', None],
    "doc": ['{"k": "\\u00e9"}', '{"k": "\\u0000", "k": "é"}', '{"deep": [1]}', '{"k": "\\ud83d"}', None], "tags": ["{}", "{a,b}", "{a,NULL}", '{"a,b"}', None],
    "grid": ["{{1,2},{3,4}}", "{5}", "{}", None], "moments": ["{2026-01-01 04:30+00,infinity}", "{}", None],
    "ident": ["6f9619ff-8b86-d011-b42d-00c04fc964ff", None], "data": ["\\x00ff", "\\x", None], "bits": ["1010", "0000", None], "some_bits": ["1", "101", "", None],
    "addr": ["10.1.2.3", "::1", "192.168.0.0/16", None], "net": ["10.0.0.0/8", "2001:db8::/32", None], "mac": ["08:00:2b:01:02:03", None],
    "span": ["[1,10)", "empty", "(,5]", None], "spans": ["[2026-01-15,)", None], "many": ["{[1,2),[5,6)}", "{}", None], "place": ["(1,1)", "(5,5)", None],
    "kind": ["x", "y", None], "mood": ["sad", "happy", None], "moods": ["{ok,sad}", "{}", None], "amount": ["10.001", "5", None], "short": ["abc", "é", None],
    '"Ship To"': ["x", "y", None], '"new"': [1, 9, None], "action": ["go", "insert", None], "words": ["a fat cat", "dog", None],
}  # fmt: skip
ROWS = 300


def test_what_is_delivered_is_what_the_source_selects(shop: Shop) -> None:  # noqa: F811
    chance = random.Random(20261124)
    shop.execute(*TYPES, f"CREATE TABLE things ({COLUMNS})")
    consumers = {where: shop.consumer(where, tables=["public.things"]) for where in EXPRESSIONS}
    assert len(consumers) >= 100
    with shop.database.connect() as conn, conn.transaction():
        for number in range(ROWS):
            values = {column: chance.choice(choices) for column, choices in VALUES.items()}
            if values["doc"] is not None and "\\u0000" in values["doc"] or values["doc"] == '{"k": "\\ud83d"}':
                values["doc"] = None if chance.random() < 0.9 else values["doc"]
            conn.execute(
                f"INSERT INTO things (id, {', '.join(values)}) VALUES (%s, {', '.join(['%s'] * len(values))})",  # type: ignore[arg-type]
                [number, *values.values()],
            )
    shop.read()
    with shop.database.connect(options="-c timezone=UTC -c datestyle=ISO") as conn:
        for where, consumer in consumers.items():
            on_source = where.replace("new.", "").replace("message.action", "'insert'").replace("table_name", "'things'").replace("table_schema", "'public'")
            if where.startswith("moods"):
                on_source = "moods::text[] && ARRAY['ok']"  # compared as text, as saving says
            readable = "doc IS NULL OR doc::text !~ '\\\\u(0000|d83d)'"  # of the others the source itself can tell nothing
            if "doc" not in where:
                readable = "true"
            expected = {row[0] for row in conn.execute(f"SELECT id FROM things WHERE CASE WHEN {readable} THEN {on_source} END").fetchall()}  # type: ignore[arg-type]
            unreadable = {row[0] for row in conn.execute(f"SELECT id FROM things WHERE NOT ({readable})").fetchall()}  # type: ignore[arg-type]
            delivered = [record(message)["id"] for message in take(consumer)]
            assert len(delivered) == len(set(delivered))
            assert set(delivered) - unreadable == expected, f"{where}: {sorted(set(delivered) ^ expected)[:5]}"
            assert not any(message.where_undecided for message in take(consumer))
