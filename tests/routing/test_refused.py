"""What may not stand in a `where` is refused on saving, with Postgres' words and the place, and never runs."""
from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import connection

from consumers.models import Consumer
from consumers.routing import check_where
from tests.routing.world import Shop, shop  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

TABLE = (
    "CREATE TABLE orders (id int PRIMARY KEY, status text, total numeric, at timestamptz, day date, tags text[], attrs jsonb, doc json,"
    " price money, mood mood, \"Kind\" text, flag bool)"
)
HOSTILE = [
    "id IN (SELECT id FROM users)", "EXISTS (SELECT 1)", "(SELECT true)", "id = (SELECT max(id) FROM messages)", "id = ANY (SELECT 1)",
    "true) OR (SELECT true", "true) UNION SELECT (1", "1 = 1) ORDER BY (id", "1 = 1) GROUP BY (id", "true) FOR UPDATE; --", "true; DROP TABLE messages",
    "true); DELETE FROM messages; SELECT (true", "true) INTO x --", "true LIMIT 1", "true -- ) OR\n) FROM pg_authid WHERE (true",
    "pg_sleep(10) IS NULL", "pg_read_file('/etc/passwd') = ''", "pg_ls_dir('/') = ''", "lo_import('/etc/passwd') = 1", "lo_get(1) = ''",
    "set_config('role', 'postgres', false) = ''", "current_setting('data_directory') = ''", "pg_terminate_backend(1)", "pg_cancel_backend(1)",
    "query_to_xml('select 1', true, true, '') IS NULL", "table_to_xml('messages', true, true, '') IS NULL", "xpath('/a', '<a/>') IS NULL",
    "dblink('x', 'select 1') = ''", "public.sequin_claim(id) IS NULL", "nextval('messages_id') > 0", "txid_current() > 0", "pg_notify('x', 'y') IS NULL",
    "pg_advisory_lock(1) IS NULL", "random() < 0.5", "now() > at", "clock_timestamp() > at", "statement_timestamp() > at", "timeofday() = ''",
    "current_timestamp > at", "current_date = day", "localtime IS NULL", "current_user = 'postgres'", "session_user = ''", "user = ''", "current_catalog = ''",
    "current_schema() = ''", "version() = ''", "inet_client_addr() IS NULL", "has_table_privilege('messages', 'select')", "gen_random_uuid() IS NULL",
    "to_regclass('messages') IS NULL", "'messages'::regclass = 1", "status::regclass IS NULL", "id::regtype = 'int'", "'postgres'::regrole = 1",
    "pg_typeof(id) = 'int'", "pg_get_userbyid(10) = ''", "obj_description(1) = ''", "count(*) > 1", "sum(id) > 1", "max(status) = ''", "row_number() OVER () = 1",
    "generate_series(1, 10) = 1", "unnest(tags) = 'a'", "jsonb_array_elements(attrs) = '1'", "regexp_split_to_table(status, ',') = ''",
    "repeat(status, 1000000000) = ''", "lpad(status, 1000000000) = ''", "rpad(status, id) = ''", "array_fill(1, ARRAY[1000000]) = '{}'",
    "status::varchar(100000000) = ''", "status::xml IS NOT NULL", "price > 5::money", "$1 = id", "status = $1", ":x = id",
    "orders.id = 1", "new.* IS NULL", "new IS NULL", "old = new", "nowhere = 1", "new.nowhere = 1", "message.nothing = 1", "other.id = 1", "a.b.c = 1",
    "id", "status", "1", "'yes'", "NULL", "", "   ", "id =", "= id", "id = 'x'", "status > 5", "tags = 5", "attrs > 'x'", "flag + 1 = 2",
    "at > 'today'", "day = 'tomorrow'", "at > 'now'", "'yesterday'::date = day", "day = ANY ('{today}')", "at <@ '[today,)'", "date 'now' = day",
    "age(at) > '1 day'", "to_tsvector(status) @@ 'x'", "concat(status, id) = ''", "format('%s', id) = ''", "to_number(status, '9') = 1", "'a' || id = 'a1'",
    "to_timestamp(status, 'YYYY') > at", "make_timestamptz(2020, 1, 1, 1, 1, 1) > at", "CAST(id AS oid)::regproc IS NULL", "status COLLATE public.x = ''",
    "id OPERATOR(public.=) 1", "public.lower(status) = ''", "overlay(status PLACING repeat('x', 10) FROM 1) = ''", "ROW(id, status) = ROW(1, 'a')",
    "(attrs).a = 1", "1 / 0 = 1", "'x' ~ '(' OR flag", "status IS JSON", "xmlexists('a' PASSING status)", "GROUPING(id) = 1", "id = DEFAULT",
    "status LIKE 'a' ESCAPE 'ab' OR 'x' LIKE 'a' ESCAPE 'ab'", "NOT " * 100 + "flag", "id = 1 AND " * 2000 + "flag", "status = 'a\x00'", "mood < 5", "f(x => 1)",
]  # fmt: skip
FINE = [
    "true", "flag", "status = 'today'", "attrs @> '{\"when\": \"now\"}'", "tags @> '{today}'", "status = 'it''s' -- a comment", "status = $$x$$ /* another */",
    "status = E'a\\\\b\\n'", "status ~ '\\d+\\\\'", "new.\"Kind\" = 'x' AND \"Kind\" IS NOT NULL", "price = '$5.00'", "price::text = ''", "at > '2026-01-01'", "at::date = day", "day::timestamptz < at",
    "to_char(at, 'YYYY') = '2026'", "date_trunc('day', at) = day", "extract(epoch FROM at) > 0", "date_part('year', at) = 1", "age(at, '2020-01-01') > '1 year'",
    "at + interval '1 hour' > day", "at::text LIKE '2026%'", "total::text = '1.0'", "status::int > 5", "status::timestamptz > at", "'2026-01-01'::date = day", "mood = 'ok'",
    "action IN ('insert', 'update') AND old.status IS NULL", "table_schema || '.' || table_name = 'public.orders'", "to_tsvector('english', status) @@ to_tsquery('english', 'cat')",
    "OR".join(f" id = {n} " for n in range(300)), "status\n=\n'x'", "id BETWEEN 1 AND 5 AND NOT flag", "attrs -> 'a' -> 'b' ->> 'c' = 'd'", "flag IS NOT UNKNOWN",
]  # fmt: skip


@pytest.fixture
def consumer(shop: Shop) -> Any:  # noqa: F811
    shop.execute("CREATE TYPE mood AS ENUM ('ok')", TABLE)

    def made(where: str, **fields: Any) -> Consumer:
        return Consumer(name="c", source=shop.source, kind="pull", tables=["public.orders"], where=where, **fields)

    return made


def refusal(consumer: Consumer) -> str:
    """What saving says, or nothing."""
    try:
        consumer.full_clean()
        check_where(consumer)
    except ValidationError as error:
        assert set(error.message_dict) == {"where"}, error
        return error.message_dict["where"][0]
    return ""


def test_the_hostile_and_the_wrong_are_refused(consumer: Any) -> None:
    assert len(set(HOSTILE)) >= 100
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        locks = cursor.fetchone()
        for where in HOSTILE:
            if not where.strip():
                made = consumer(where)
                made.full_clean()
                assert made.where == ""  # no filter
                continue
            assert refusal(consumer(where)), f"accepted: {where}"
        cursor.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        assert cursor.fetchone() == locks


def test_what_is_allowed_is_accepted(consumer: Any) -> None:
    for where in FINE:
        assert refusal(consumer(where)) == "", where


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("status = 'paid' AND\n  totl > 5", "line 2, column 3: public.orders has no column 'totl'"),
        ("status = 'paid' AND kind = 'x'", 'column 21: public.orders has no column \'kind\'; it has "Kind", which needs the quotes'),
        ("id = 1 AND\nstatus = = 'x'", 'line 2, column 10: syntax error at or near "="'),
        ("é IS NULL OR status + 1 = 2", "line 1, column 1: public.orders has no column 'é'"),
        ("\"Kind\" = 'é' OR new.status + 1 = 2", "line 1, column 28: operator does not exist: text + integer"),
        ("id = 1 AND lower(new.id) = 'x'", "line 1, column 12: function lower(integer) does not exist"),
        ("id = 'x'", 'line 1, column 6: invalid input syntax for type integer: "x"'),
        ("id + 1", "expected an expression that is true or false, got one of type integer"),
        ("random() < 1", "random() is volatile"), ("now() < at", "now() is not immutable"), ("'a' || id = 'a1'", "the operator ||"),
        ("at > 'today'", "line 1, column 6: 'today' means another moment"), ("1 / 0 = 1", "fails for every row: division by zero"),
        ("id IN (SELECT 1)", "line 1, column 4: a subquery is not allowed"), ("current_date = day", "column 1: what depends on when"),
        ("(id = 1", "the expression ends too early"),
    ],
)  # fmt: skip
def test_the_reason_and_the_place_are_told(consumer: Any, where: str, told: str) -> None:
    assert told in refusal(consumer(where))


def test_the_table_that_lacks_the_column_is_named(shop: Shop, consumer: Any) -> None:  # noqa: F811
    shop.execute("CREATE TABLE customers (id int PRIMARY KEY, name text)", "CREATE SCHEMA s", "CREATE TABLE s.orders (id int PRIMARY KEY, status int)")
    made = consumer("status = 'paid'")
    made.tables = ["public.orders", "public.customers"]
    assert "public.customers has no column 'status'" in refusal(made)
    made.tables = ["public.orders", "s.*"]
    assert refusal(made).startswith("line 1, column 10: s.orders: invalid input syntax for type integer")


def test_saving_tells_where_a_filter_is_not_exact(shop: Shop, consumer: Any) -> None:  # noqa: F811
    notices = check_where(consumer("mood > 'ok' AND old.status = 'x'"))
    assert "mood compares as text" in notices[0].text
    assert "updates" in notices[1].text and "deletes" in notices[1].text
    assert notices[1].sql == 'ALTER TABLE "public"."orders" REPLICA IDENTITY FULL;'
    large = [notice.text for notice in check_where(consumer("status = 'x' AND id = 1 AND flag", actions=["insert", "update", "truncate"]))]
    assert "a truncate carries no row" in large[0] and "a large (TOASTed) value of status as it is" in large[1] and len(large) == 2
    shop.execute(notices[1].sql)
    assert [notice.text for notice in check_where(consumer("old.status = 'x'"))] == []
    assert check_where(consumer("id = 1", actions=["insert"])) == []


def test_filters_run_under_a_role_that_can_only_read_messages(shop: Shop) -> None:  # noqa: F811
    from consumers.filters.filtering import filtering

    with filtering() as cursor:
        assert cursor.execute("SELECT current_user::text, current_setting('statement_timeout')").fetchone() == ("sequin_filter", "500ms")
        cursor.execute("SELECT count(*) FROM public.messages")
        for statement in ("SELECT * FROM public.consumers_source", "DELETE FROM public.messages", "CREATE TABLE public.x (n int)", "SELECT pg_read_file('/etc/passwd')"):
            with pytest.raises(Exception, match="permission denied|read-only"):
                cursor.execute(statement)


def test_the_api_answers_with_what_is_not_exact(shop: Shop) -> None:  # noqa: F811
    from tests.api.test_management import Api

    shop.execute("CREATE TABLE orders (id int PRIMARY KEY, status text)")
    api = Api("manage")
    body = {"name": "c", "source": "shop", "kind": "pull", "tables": ["public.orders"], "where": "old.status = 'x'"}
    status, answer = api("POST", "consumers", body)
    assert status == 201 and answer["notices"][0]["sql"] == 'ALTER TABLE "public"."orders" REPLICA IDENTITY FULL;', answer
    status, answer = api("PATCH", "consumers/c", {"where": "id = 1", "actions": ["insert"]})
    assert status == 200 and answer["notices"] == [] and answer["where"] == "id = 1"
    status, answer = api("PATCH", "consumers/c", {"where": "id = "})
    assert status == 422 and "ends too early" in answer["validation_errors"]["where"][0]
    assert api("PATCH", "consumers/c", {"where": None})[1]["where"] is None
