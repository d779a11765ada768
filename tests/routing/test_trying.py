"""`POST /api/consumers/{c}/test`: what a filter and a function would do, on recent and on pasted messages."""
from __future__ import annotations

import json
from typing import Any

import pytest

from consumers.models import Consumer
from consumers.store.models import ConsumerPosition
from tests.api.test_management import Api
from tests.routing.world import Shop, shop, take  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

TRANSFORM = 'function transform(action, record, changes, metadata)\n  if record.id == 3 then error("no threes") end\n  if record.id == 2 then return nil end\n  return {id = record.id, at = metadata.table_name, big = record.big}\nend'


@pytest.fixture
def api(transactional_db: None) -> Api:
    return Api("manage")


def test_recent_messages_are_judged_and_transformed_and_nothing_changes(shop: Shop, api: Api) -> None:  # noqa: F811
    shop.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, big numeric)")
    consumer = shop.consumer("", tables=["public.orders"], name="orders")
    shop.execute("INSERT INTO orders VALUES (1, 'paid', 12345678901234567890.12345), (2, 'paid', 1), (3, 'paid', 1), (4, 'new', 1)", "UPDATE orders SET status = 'z' WHERE id = 4")
    shop.read()
    status, answer = api("POST", "consumers/orders/test", {"where": "status = 'paid' OR old.status = 'new'", "transform": TRANSFORM, "recent": 10})
    assert status == 200, answer
    rows = answer["data"]
    assert [row["matched"] for row in rows] == [True, True, True, False, True]
    assert [row["undecided"] for row in rows] == [False, False, False, False, True]
    assert rows[0]["payload"] == {"id": 1, "at": "orders", "big": 12345678901234567890.12345} and rows[0]["message"]["record"]["id"] == 1
    assert rows[1]["payload"] is None and rows[1]["error"] is None
    assert rows[2]["payload"] is None and rows[2]["error"]["line"] == 2 and "no threes" in rows[2]["error"]["message"]
    assert "REPLICA IDENTITY FULL" in answer["notices"][0]["sql"]
    consumer.refresh_from_db()
    position = ConsumerPosition.objects.get(pk=consumer.pk)
    assert consumer.where == consumer.transform == "" and position.position < position.position + 1 and len(take(consumer)) == 5


def test_pasted_messages_keep_their_digits(shop: Shop, api: Api) -> None:  # noqa: F811
    shop.execute("CREATE TABLE orders (id bigint PRIMARY KEY, big numeric, doc json)")
    shop.consumer("", tables=["public.orders"], name="orders")
    message = '{"record": {"id": 9007199254740993, "big": 0.1000000000000000055511151231257827, "doc": {"k": "\\u0000"}}, "action": "insert"}'
    raw = '{"where": "big = 0.1000000000000000055511151231257827 AND id = 9007199254740993", "messages": [' + message + "]}"
    status, answer = api("POST", "consumers/orders/test", raw=raw)
    assert status == 200 and answer["data"][0]["matched"] is True, answer
    client_answer = api.client.post(
        "/api/consumers/orders/test", raw.replace('"where"', '"transform": "function transform(a, r) return {b = r.big, i = r.id} end", "where"'),
        content_type="application/json", headers={"authorization": f"Bearer {api.plain}"},
    )  # fmt: skip
    assert b'"payload":{"b":0.1000000000000000055511151231257827,"i":9007199254740993}' in client_answer.content
    update = {"record": {"id": 1, "big": 5}, "changes": {"big": 4}, "action": "update", "metadata": {"table_schema": "public", "table_name": "orders"}}
    answers = api("POST", "consumers/orders/test", {"where": "old.big = 4 AND new.big = 5", "messages": [update, {**update, "changes": {}}]})[1]["data"]
    assert [row["matched"] for row in answers] == [True, False]
    unknown = {**update, "changes": {}, "metadata": {**update["metadata"], "old_values_known": False}}  # type: ignore[dict-item]
    answers = api("POST", "consumers/orders/test", {"where": "old.big = 4", "messages": [unknown]})[1]["data"]
    assert answers[0]["undecided"] is True and answers[0]["message"] == unknown
    assert answers[0]["payload"] == {**unknown, "metadata": {**unknown["metadata"], "where_undecided": True}}, "as it is delivered"  # type: ignore[dict-item]
    seen = api("POST", "consumers/orders/test", {"where": "old.big = 4", "transform": "function transform(a, r, c, m) return m.where_undecided end", "messages": [unknown]})
    assert seen[1]["data"][0]["payload"] is True


def test_a_filter_that_fails_says_so_of_its_message(shop: Shop, api: Api) -> None:  # noqa: F811
    shop.execute("CREATE TABLE orders (id int PRIMARY KEY, total int)")
    shop.consumer("", tables=["public.orders"], name="orders")
    messages = [{"record": {"id": 1, "total": 0}}, {"record": {"id": 2, "total": 1}}]
    rows = api("POST", "consumers/orders/test", {"where": "1 / total = 1", "messages": messages})[1]["data"]
    assert rows[0]["matched"] is None and rows[0]["error"] == {"message": "where: division by zero", "line": None} and rows[0]["payload"] is None
    assert rows[1]["matched"] is True and rows[1]["error"] is None


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"where": "totl > 1"}, 422, "no column 'totl'"), ({"transform": "function transform( end"}, 422, "line 1"), ({"where": 5}, 400, "expected a text"),
        ({"recent": 0}, 400, "from 1 to 100"), ({"recent": 101}, 400, "from 1 to 100"), ({"recent": True}, 400, "from 1 to 100"), ({"messages": {}}, 400, "expected a list"),
        ({"messages": [1]}, 422, "message 0"), ({"messages": [{}]}, 422, "message 0"), ({"messages": [{"record": {}, "action": "x"}]}, 422, "expected one of"),
        ({"messages": [{"record": {}}] * 101}, 400, "at most 100"), ({"colour": 1}, 400, "not a field"),
        ({"messages": [{"record": {}, "metadata": {"table_name": "nowhere"}}]}, 422, "no table public.nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried(shop: Shop, api: Api, body: Any, status: int, told: str) -> None:  # noqa: F811
    shop.execute("CREATE TABLE orders (id int PRIMARY KEY, total int)")
    shop.consumer("", tables=["public.orders"], name="orders")
    got, answer = api("POST", "consumers/orders/test", body)
    assert got == status and told in json.dumps(answer), answer


def test_only_who_may_manage_the_consumer_may_try(shop: Shop) -> None:  # noqa: F811
    shop.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    consumer = shop.consumer("", tables=["public.orders"], name="orders")
    assert Api("pull")("POST", "consumers/orders/test", {})[0] == 403
    assert Api("manage")("POST", "consumers/nowhere/test", {})[0] == 404
    other = shop.consumer("", tables=["public.orders"], name="other")
    assert Api("manage", [other])("POST", "consumers/orders/test", {})[0] == 404
    assert Consumer.objects.filter(pk=consumer.pk).exists() and Api("manage")("POST", "consumers/orders/test", {})[1] == {"data": [], "notices": []}
