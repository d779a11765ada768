"""Filtered claims: order and exactness with several receivers, errors that hold up one row only, edits, what is unknown, rows."""
from __future__ import annotations

import re
import threading
from typing import Any

import pytest
from django.db import connection

from consumers import changes
from consumers.filters import scouting
from consumers.models import Consumer
from consumers.store import claims, lifecycle
from consumers.store.models import ConsumerPosition
from tests.conftest import wait_until
from tests.routing.world import Shop, record, shop, take  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

ORDERS = "CREATE TABLE orders (id int PRIMARY KEY, status text, total int)"


def saved(consumer: Consumer, **fields: Any) -> None:
    consumer.refresh_from_db()
    for name, value in fields.items():
        setattr(consumer, name, value)
    changes.save(consumer)


def counts(consumer: Consumer) -> ConsumerPosition:
    return ConsumerPosition.objects.get(pk=consumer.pk)


def parked(consumer: Consumer) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT first_id, reason, deliver_count, last_error, not_before = 'infinity' FROM parked WHERE consumer = %s ORDER BY first_id",
            [consumer.pk],
        )
        return cursor.fetchall()


def make_due(consumer: Consumer) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE parked SET due_at = now() WHERE consumer = %s AND due_at IS NOT NULL", [consumer.pk])


def test_several_receivers_get_every_match_once_and_in_order(shop: Shop) -> None:  # noqa: F811
    shop.execute(ORDERS)
    consumer = shop.consumer("total % 3 = 0", tables=["public.orders"])
    for n in range(20):
        shop.execute(f"INSERT INTO orders SELECT g, 'x', g FROM generate_series({n * 100}, {n * 100 + 99}) g")
    shop.execute("UPDATE orders SET total = total + 3")
    shop.read()
    got: list[tuple[int, int]] = []
    lock = threading.Lock()

    def receive(size: int) -> None:
        try:
            for _ in range(3000):
                claim = claims.claim(consumer.pk, size, lease_ms=60_000)
                if claim.token is None:
                    if claim.at_end and not counts(consumer).out_count:
                        return
                    continue
                with lock:
                    got.extend((record(message)["id"], message.id) for message in claim.messages)
                claims.ack(consumer.pk, [(claim.token, message.id) for message in claim.messages])
        finally:
            connection.close()

    threads = [threading.Thread(target=receive, args=(size,)) for size in (1, 7, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    matching = {n for n in range(2000) if n % 3 == 0}
    assert sorted(key for key, _ in got) == sorted([*matching, *matching])
    for key in matching:
        assert [number for k, number in got if k == key] == sorted(number for k, number in got if k == key)
    found = counts(consumer)
    assert (found.acked_count, found.filtered_count, found.parked_count) == (2 * len(matching), 4000 - 2 * len(matching), 0)


def test_an_error_parks_its_message_and_holds_up_its_row_only(shop: Shop) -> None:  # noqa: F811
    shop.execute(ORDERS)
    consumer = shop.consumer("100 / total > 1", tables=["public.orders"])
    shop.execute(
        "INSERT INTO orders SELECT g, 'x', CASE WHEN g IN (7, 500, 501) THEN 0 ELSE 10 END FROM generate_series(1, 1000) g",
        "UPDATE orders SET total = 20 WHERE id IN (7, 8)",
    )
    shop.read()
    delivered = [record(message) for message in take(consumer, 10)]
    assert [row["id"] for row in delivered] == [n for n in range(1, 1001) if n not in (7, 500, 501)] + [8]
    rows = parked(consumer)
    assert [(reason, tries > 0) for _, reason, tries, _, _ in rows] == [("error", True)] * 3 + [("blocked", False)]
    assert rows[0][3] == "where: division by zero"
    make_due(consumer)
    assert take(consumer) == [] and [row[2] >= 2 for row in parked(consumer)] == [True] * 3 + [False]
    saved(consumer, where="total = 20 OR total = 0")
    assert [record(message) for message in take(consumer)] == [
        {"id": 7, "status": "x", "total": 0}, {"id": 500, "status": "x", "total": 0}, {"id": 501, "status": "x", "total": 0},
        {"id": 7, "status": "x", "total": 20},
    ]  # fmt: skip
    assert parked(consumer) == []


def test_errors_end_as_dead_letters(shop: Shop) -> None:  # noqa: F811
    shop.execute(ORDERS)
    twice, once = (shop.consumer("1 / total = 1", tables=["public.orders"], max_deliver=most) for most in (2, 1))
    shop.execute("INSERT INTO orders VALUES (1, 'x', 0)", "UPDATE orders SET total = 1")
    shop.read()
    assert [record(message)["total"] for message in take(once)] == [1] and parked(once)[0][1] == "dead"
    assert take(twice) == []
    make_due(twice)
    assert [record(message)["total"] for message in take(twice)] == [1]
    assert [row[1] for row in parked(twice)] == ["dead"] and lifecycle.backlog(twice.pk).dead == 1


def test_a_filter_that_takes_too_long_parks_what_took_it(shop: Shop) -> None:  # noqa: F811
    shop.execute("CREATE TABLE texts (id int PRIMARY KEY, body text)")
    consumer = shop.consumer("body !~ '^(.*)(.*)(.*)(.*)\\4\\3\\2\\1z'", tables=["public.texts"])
    shop.execute("INSERT INTO texts SELECT g, CASE WHEN g = 50 THEN repeat('ab', 60) || 'cz' ELSE 'b' END FROM generate_series(1, 100) g")
    shop.read()
    assert [record(message)["id"] for message in take(consumer)] == [n for n in range(1, 101) if n != 50]
    assert parked(consumer)[0][3] == "where took longer than 500 ms"


def test_a_table_that_lacks_a_column_is_held_and_others_flow(shop: Shop) -> None:  # noqa: F811
    shop.execute(ORDERS, "CREATE TABLE other (id int PRIMARY KEY, status text)")
    shop.execute("DROP TABLE mark")
    shop.execute("CREATE TABLE public.mark (n int PRIMARY KEY, status text)")
    with shop.database.connect() as conn:
        conn.execute(f'ALTER PUBLICATION "{shop.source.publication_name}" ADD TABLE public.mark, public.other')  # type: ignore[arg-type]
    consumer = shop.consumer("status = 'paid'", tables=["public.*"])
    shop.execute("INSERT INTO orders VALUES (1, 'paid', 1)", "INSERT INTO other VALUES (1, 'paid')")
    shop.execute("ALTER TABLE other RENAME status TO state", "INSERT INTO other VALUES (2, 'paid')")
    shop.execute("CREATE TABLE newer (id int PRIMARY KEY, n int)")
    with shop.database.connect() as conn:
        conn.execute(f'ALTER PUBLICATION "{shop.source.publication_name}" ADD TABLE public.newer')  # type: ignore[arg-type]
    shop.execute("INSERT INTO newer VALUES (1, 1)", "INSERT INTO orders VALUES (2, 'paid', 1)")
    shop.read()
    assert [(message.table, record(message)["id"]) for message in take(consumer)] == [("orders", 1), ("other", 1), ("orders", 2)]
    rows = parked(consumer)
    assert [row[4] for row in rows] == [True, True]
    assert "public.other has no column 'status'" in rows[0][3] and "public.newer has no column 'status'" in rows[1][3]
    assert take(consumer) == []
    with connection.cursor() as cursor:
        cursor.execute("UPDATE consumers_consumer SET \"where\" = 'true', updated_at = now()")
    lifecycle.mended(consumer.pk)
    assert [message.table for message in take(consumer)] == ["other", "newer"]


def test_an_edit_counts_for_everything_not_handed_out(shop: Shop) -> None:  # noqa: F811
    shop.execute(ORDERS)
    consumer = shop.consumer("total < 10", tables=["public.orders"])
    shop.execute("INSERT INTO orders VALUES (1, 'a', 1), (2, 'a', 2), (3, 'b', 30)", "UPDATE orders SET total = 3", "UPDATE orders SET status = 'z', total = 4")
    shop.read()
    first = claims.claim(consumer.pk, 1, lease_ms=60_000)
    assert [record(message)["id"] for message in first.messages] == [1]
    rest = claims.claim(consumer.pk, 100, lease_ms=60_000)  # the later ones of row 1 are parked behind
    assert first.token and rest.token
    claims.ack(consumer.pk, [(rest.token, message.id) for message in rest.messages])
    saved(consumer, where="status <> 'z'")
    claims.ack(consumer.pk, [(first.token, message.id) for message in first.messages])
    assert [(record(m)["id"], record(m)["status"]) for m in take(consumer)] == [(1, "a")]
    saved(consumer, where="")
    shop.execute("UPDATE orders SET status = 'z'")
    shop.read()
    assert len(take(consumer)) == 3
    saved(consumer, where="id = 2")
    shop.execute("UPDATE orders SET status = 'y'")
    shop.read()
    assert [record(message)["id"] for message in take(consumer)] == [2]


def test_what_is_handed_out_follows_an_edit_at_once(shop: Shop) -> None:  # noqa: F811
    """Verdicts of before the edit are not used, in whatever process they were made."""
    shop.execute(ORDERS)
    consumer = shop.consumer("total > 0", tables=["public.orders"])
    shop.execute("INSERT INTO orders SELECT g, 'x', g FROM generate_series(1, 100) g")
    shop.read()
    old = scouting.scouts.of(consumer.pk)
    claims.claim(consumer.pk, 1, lease_ms=60_000)
    saved(consumer, where="total = 77")
    assert scouting.scouts.of(consumer.pk) is old  # as in a process that has not heard of it
    assert [record(message)["id"] for message in claims.claim(consumer.pk, 10, lease_ms=60_000).messages] == [77]
    saved(consumer, where="")
    assert take(consumer) == []
    plain = shop.consumer("", tables=["public.orders"], name="plain")
    shop.execute("UPDATE orders SET total = 1000 + id")
    shop.read()
    assert len(claims.claim(plain.pk, 1, lease_ms=60_000).messages) == 1
    saved(plain, where="total = 1050")
    assert [record(message)["total"] for message in take(plain)] == [1050]


@pytest.mark.parametrize("full", [False, True])
def test_what_is_not_carried_is_unknown_and_not_null(shop: Shop, full: bool) -> None:  # noqa: F811
    shop.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, total int, body text)", "ALTER TABLE orders ALTER body SET STORAGE EXTERNAL")
    if full:
        shop.execute("ALTER TABLE orders REPLICA IDENTITY FULL")
    wheres = [
        "new.status IS DISTINCT FROM old.status", "old.status IS NULL", "old.status = 'new'", "old.status IS NOT NULL AND total > 100",
        "coalesce(old.status, 'x') = 'x'", "total > 100", "total > 100 AND id = 1", "body = 'y'", "body IS NULL", "length(body) > 10 OR total = 5",
        "CASE WHEN total > 100 THEN old.status = 'new' ELSE false END", "old.id = 1", "new.id <> old.id", "action = 'delete' AND total IS NULL",
        "num_nulls(old.status, total) = 2", "old.status IN ('new', 'paid') IS NOT TRUE", "NOT (old.total > 1)", "id = 1 OR old.total = 1",
    ]  # fmt: skip
    consumers = {where: shop.consumer(where, tables=["public.orders"]) for where in wheres}
    shop.execute(
        "INSERT INTO orders VALUES (1, 'new', 150, repeat('x', 5000))", "UPDATE orders SET status = 'paid', total = 200", "UPDATE orders SET total = 5",
        "UPDATE orders SET id = 2", "DELETE FROM orders",
    )  # fmt: skip
    shop.read()
    states = [
        ("insert", None, {"id": 1, "status": "new", "total": 150}), ("update", {"id": 1, "status": "new", "total": 150}, {"id": 1, "status": "paid", "total": 200}),
        ("update", {"id": 1, "status": "paid", "total": 200}, {"id": 1, "status": "paid", "total": 5}),
        ("update", {"id": 1, "status": "paid", "total": 5}, {"id": 2, "status": "paid", "total": 5}),
        ("delete", {"id": 2, "status": "paid", "total": 5}, {"id": 2, "status": "paid", "total": 5}),
    ]  # fmt: skip
    with shop.database.connect() as conn:
        for where, consumer in consumers.items():
            got = {n: message.where_undecided for n, message in _numbered(take(consumer))}
            for number, (action, old, new) in enumerate(states):
                matches = _truth(conn, where, action, old, new)
                if full:
                    assert got.get(number) == (False if matches else None), (where, number, got)
                else:
                    # Never silently lost; and where it is known, exact.
                    assert number in got or not matches, (where, number)
                    assert number not in got or got[number] or matches, (where, number)
            if not full and where in ("new.status IS DISTINCT FROM old.status", "old.status = 'new'", "old.status IS NULL"):
                assert got[1] and got[2] and got[4], where


def _truth(conn: Any, where: str, action: str, old: Any, new: Any) -> bool:
    row = {**new, "action": action, "body": "x" * 5000}
    before = {**(old or dict.fromkeys(new)), "body": None if old is None else "x" * 5000}
    types = {"id": "int", "status": "text", "total": "int", "body": "text", "action": "text"}
    columns = [f"{_literal(row[name])}::{types[name]} AS {name}" for name in row]
    befores = [f"{_literal(before[name])}::{types[name]} AS {name}" for name in before]
    text = where.replace("new.", "n.").replace("old.", "o.")
    for name in ("status", "total", "body", "id", "action"):
        text = _bare(text, name)
    found = conn.execute(f"SELECT {text} FROM (SELECT {', '.join(columns)}) n, (SELECT {', '.join(befores)}) o").fetchone()
    return bool(found[0])


def _bare(text: str, name: str) -> str:
    return re.sub(rf"(?<![\w.'])({name})\b", r"n.\1", text)


def _literal(value: Any) -> str:
    return "NULL" if value is None else f"'{value}'"


def _numbered(messages: list[Any]) -> list[tuple[int, Any]]:
    """By their place among the five changes."""
    places = {"insert": 0, "delete": 4}
    found = []
    for message in messages:
        row = record(message)
        number = places.get(message.action)
        if number is None:
            number = 3 if row["id"] == 2 else 1 if row["total"] == 200 else 2
        found.append((number, message))
    return found


def test_undecided_messages_are_counted_and_stay_flagged(shop: Shop) -> None:  # noqa: F811
    shop.execute(ORDERS)
    consumer = shop.consumer("old.status = 'new'", tables=["public.orders"])
    shop.execute("INSERT INTO orders VALUES (1, 'new', 1), (2, 'x', 1)", "UPDATE orders SET total = 2")
    shop.read()
    claim = claims.claim(consumer.pk, 10, lease_ms=60_000)
    assert [message.where_undecided for message in claim.messages] == [True, True] and claim.token
    claims.nack(consumer.pk, [(claim.token, message.id) for message in claim.messages])
    assert [message.where_undecided for message in take(consumer)] == [True, True]
    assert counts(consumer).undecided_count == 2


def test_a_column_added_later_is_known_to_the_filter(shop: Shop) -> None:  # noqa: F811
    shop.execute(ORDERS)
    consumer = shop.consumer("total > 1", tables=["public.orders"])
    shop.execute("INSERT INTO orders VALUES (1, 'x', 5)", "ALTER TABLE orders ADD note text DEFAULT 'n'", "INSERT INTO orders VALUES (2, 'x', 5, 'm')")
    shop.execute("ALTER TABLE orders ALTER total TYPE numeric USING total / 10.0", "INSERT INTO orders VALUES (3, 'x', 0.5), (4, 'x', 1.5)")
    shop.read()
    assert [record(message)["id"] for message in take(consumer)] == [1, 2, 4]
    saved(consumer, where="note IS NOT NULL")
    shop.execute("UPDATE orders SET note = 'z' WHERE id = 1")
    shop.read()
    assert [record(message)["note"] for message in take(consumer)] == ["z"]


@pytest.mark.parametrize("where", ["total > 1", "total > 1 AND old.total IS NULL", "total > 1 AND table_name <> 't3'"])
def test_tables_that_look_alike_have_one_verdict(shop: Shop, where: str) -> None:  # noqa: F811
    """Hundreds of tables, one for each tenant, and of each the shapes it has had: the statement stays small."""
    shop.execute(*[f"CREATE TABLE t{n} (id int PRIMARY KEY, total {'int' if n < 6 else 'numeric'})" for n in range(8)])
    consumer = shop.consumer(where, tables=[f"public.t{n}" for n in range(8)])
    expected, texts = [], []
    for n in range(8):
        shop.execute(f"INSERT INTO t{n} VALUES (1, 1), (2, 2); ALTER TABLE t{n} ADD more int; INSERT INTO t{n} VALUES (3, 3)")
        expected += [] if n == 3 and "table_name" in where else [(f"t{n}", 2), (f"t{n}", 3)]
        shop.read()
        claim = claims.claim(consumer.pk, 100, lease_ms=60_000)
        texts.append((scouting.scouts.of(consumer.pk).plan.stretch, [(message.table, record(message)["id"]) for message in claim.messages]))
    assert [one for _, got in texts for one in got] == expected
    verdicts = [text.count("WHEN w.relation = ANY") for text, _ in texts]
    assert verdicts == ([*range(1, 9)] if "table_name" in where else [1] * 6 + [2] * 2)


def test_rows_are_delivered_in_their_latest_state_only(shop: Shop) -> None:  # noqa: F811
    shop.execute(ORDERS)
    rows, some = shop.consumer(tables=["public.orders"], stream="rows"), shop.consumer("total % 2 = 0", tables=["public.orders"], stream="rows")
    shop.execute("INSERT INTO orders SELECT g, 'x', 0 FROM generate_series(1, 50) g")
    for n in range(1, 6):
        shop.execute(f"UPDATE orders SET total = {n}")
    shop.execute("DELETE FROM orders WHERE id = 50")
    shop.read()
    assert sorted((record(message)["id"], record(message)["total"]) for message in take(rows, 7)) == [(n, 5) for n in range(1, 51)]
    assert {record(message)["total"] for message in take(some)} == {4}
    # What waits behind a failing one is replaced as well.
    shop.execute("UPDATE orders SET total = 10 WHERE id = 1")
    shop.read()
    claim = claims.claim(rows.pk, 1, lease_ms=60_000)
    assert claim.token
    for n in (11, 12, 13):
        shop.execute(f"UPDATE orders SET total = {n} WHERE id = 1")
        shop.read()
        claims.claim(rows.pk, 100, lease_ms=60_000)
    claims.nack(rows.pk, [(claim.token, message.id) for message in claim.messages])
    assert [record(message)["total"] for message in take(rows)] == [13]
    found = counts(rows)
    assert (found.parked_count, found.out_count) == (0, 0)


def test_a_paused_consumer_gets_nothing_and_later_everything(shop: Shop) -> None:  # noqa: F811
    shop.execute(ORDERS)
    consumer = shop.consumer("total > 1", tables=["public.orders"])
    saved(consumer, status="paused")
    shop.execute("INSERT INTO orders VALUES (1, 'x', 5), (2, 'x', 0)")
    shop.read()
    assert take(consumer) == []
    saved(consumer, status="active")
    wait_until(lambda: [record(message)["id"] for message in take(consumer)] == [1], 5)


def test_groups_of_several_columns_and_nul_in_json(shop: Shop) -> None:  # noqa: F811
    shop.execute("CREATE TABLE docs (id int PRIMARY KEY, team text, doc json)")
    consumer = shop.consumer("doc ->> 'k' = '\\u0000 is text'", tables=["public.docs"], group_columns=["team"])
    shop.execute(
        """INSERT INTO docs VALUES (1, 'a', '{"k": "\\\\u0000 is text"}'), (2, 'a', '{"k": "x\\u0000"}'), (3, 'b', '{"k": "\\ud800", "k": "\\\\u0000 is text"}')"""
    )
    shop.read()
    claim = claims.claim(consumer.pk, 10, lease_ms=60_000)
    assert [record(message)["id"] for message in claim.messages] == [1, 3]
    assert len({message.group for message in claim.messages}) == 2


def test_a_position_that_was_moved_is_gone_on_from(shop: Shop) -> None:  # noqa: F811
    """Back or forth: verdicts on another stretch say nothing of what comes now."""
    shop.execute(ORDERS)
    consumer = shop.consumer("total > 0", tables=["public.orders"])
    shop.execute("INSERT INTO orders SELECT g, 'x', g FROM generate_series(1, 30) g")
    shop.read()
    assert len(take(consumer)) == 30
    with connection.cursor() as cursor:
        cursor.execute("UPDATE consumer_position SET position = 0")
    assert len(take(consumer)) == 30
    with connection.cursor() as cursor:
        cursor.execute("UPDATE consumer_position SET position = (SELECT id FROM messages WHERE key = '[\"20\"]')")
    assert [record(message)["id"] for message in take(consumer)] == list(range(21, 31))
