"""`POST /api/consumers/{c}/rewind`: the points it takes, what it refuses, and a delivery that begins at once."""
from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection

from consumers.models import Consumer
from consumers.store import claims
from consumers.store.connection import store_connection
from consumers.store.partitions import maintain
from tests.api.test_management import Api  # noqa: F401
from tests.store.test_claim_plans import fill
from tests.store.world import Log, fetch, keys, receipts, take
from tests.store.test_rewinds import append

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def api(transactional_db: None) -> Api:
    return Api("manage")


@pytest.fixture
def consumer(log: Log) -> Iterator[Consumer]:  # noqa: F811
    yield Consumer.objects.get(pk=log.consumer())


def test_every_kind_of_point(api: Api, log: Log, consumer: Consumer) -> None:  # noqa: F811
    ids = append(log, 1, 2, 3)
    fetch("UPDATE messages SET committed_at = now() + (id - %s) * interval '1 s' WHERE source = %s", ids[0], log.source.pk)
    moment, lsn = fetch("SELECT committed_at, ('0/0'::pg_lsn + commit_lsn)::text FROM messages WHERE id = %s", ids[1])[0]
    for to, wanted in (
        ({"table": "public.orders", "pk": ["2"]}, ["2", "3"]),
        ({"pk": ["2"]}, ["2", "3"]),
        ({"pk": ["2"], "occurrence": "last"}, ["2", "3"]),
        ({"time": moment.isoformat()}, ["2", "3"]),
        ({"lsn": lsn}, ["2", "3"]),
        ("beginning", ["1", "2", "3"]),
    ):
        claims.ack(consumer.pk, receipts(take(consumer.pk)))
        status, answer = api("POST", f"consumers/{consumer.name}/rewind", {"to": to})
        assert status == 200 and set(answer) == {"replay_id", "position", "messages_estimate", "first_commit_timestamp"}, answer
        assert answer["messages_estimate"] == len(wanted) and answer["first_commit_timestamp"] is not None
        claim = take(consumer.pk)
        assert keys(claim) == [f'["{key}"]' for key in wanted], to
        assert {str(message.replay_id) for message in claim.messages} == {answer["replay_id"]}
        listed = api("GET", f"consumers/{consumer.name}/messages?state=out")[1]["data"]
        assert {row["message"]["metadata"]["replay_id"] for row in listed} == {answer["replay_id"]}


@pytest.mark.parametrize(
    "body",
    [
        None, {}, {"to": None}, {"to": "end"}, {"to": {}}, {"to": {"time": "2026-01-01"}}, {"to": {"time": "2026-01-01T00:00:00"}},
        {"to": {"time": 5}}, {"to": {"lsn": "x"}}, {"to": {"lsn": 5}}, {"to": {"pk": "1"}}, {"to": {"pk": [1]}},
        {"to": {"pk": ["1"], "occurrence": "middle"}}, {"to": {"pk": ["1"], "table": "orders"}}, {"to": {"pk": ["\ud800"]}},
        {"to": {"pk": ["1"], "time": "2026-01-01T00:00:00Z"}}, {"to": "beginning", "more": 1}, {"to": {"table": "public.orders"}},
    ],
)  # fmt: skip
def test_what_is_no_point_is_refused(api: Api, log: Log, consumer: Consumer, body: Any) -> None:  # noqa: F811
    append(log, 1)
    before = fetch("SELECT * FROM consumer_position")
    status, answer = api("POST", f"consumers/{consumer.name}/rewind", body)
    assert status == 400 and answer["summary"], answer
    assert fetch("SELECT * FROM consumer_position") == before


def test_what_the_log_no_longer_has_is_answered_with_the_way_out(api: Api, log: Log, consumer: Consumer) -> None:  # noqa: F811
    append(log, 1)
    claims.ack(consumer.pk, receipts(take(consumer.pk)))
    with store_connection() as conn:
        assert [*maintain(conn, timedelta(microseconds=1)), *maintain(conn, timedelta(microseconds=1))]
    append(log, 2)
    for to in ({"pk": ["1"]}, {"time": "1999-01-01T00:00:00Z"}, {"lsn": "0/1"}):
        status, answer = api("POST", f"consumers/{consumer.name}/rewind", {"to": to})
        assert status == 409 and "it begins at" in answer["summary"], answer
        assert set(answer["oldest"]) == {"time", "lsn"}
        assert answer["backfills"] == [{"consumer": consumer.name, "table": "public.orders"}] or answer["backfills"] == []
    status, answer = api("POST", f"consumers/{consumer.name}/rewind", {"to": {"pk": ["1"], "table": "public.orders"}})
    assert answer["backfill"] == {"consumer": consumer.name, "table": "public.orders"}
    status, again = api("POST", f"consumers/{consumer.name}/rewind", {"to": {"lsn": answer["oldest"]["lsn"]}})
    assert status == 200, again


def test_the_table_must_be_named_when_there_are_several(api: Api, log: Log, consumer: Consumer) -> None:  # noqa: F811
    append(log, 1)
    Consumer.objects.filter(pk=consumer.pk).update(tables=["public.orders", "public.customers"])
    status, answer = api("POST", f"consumers/{consumer.name}/rewind", {"to": {"pk": ["1"]}})
    assert status == 400 and "to.table" in answer["summary"]


def test_another_table_is_not_one_to_go_back_to(api: Api, log: Log, consumer: Consumer) -> None:  # noqa: F811
    Consumer.objects.filter(pk=consumer.pk).update(tables=["public.orders", "sales.*"])
    for table, status in (("public.others", 400), ("public.orders", 409), ("sales.any", 409)):
        assert api("POST", f"consumers/{consumer.name}/rewind", {"to": {"pk": ["1"], "table": table}})[0] == status, table


def test_a_disabled_consumer_is_not_rewound(api: Api, log: Log, consumer: Consumer) -> None:  # noqa: F811
    Consumer.objects.filter(pk=consumer.pk).update(status="disabled")
    assert api("POST", f"consumers/{consumer.name}/rewind", {"to": "beginning"})[0] == 409
    assert api("POST", "consumers/nobody/rewind", {"to": "beginning"})[0] == 404


def test_a_token_of_others_does_not_reach_it(log: Log, consumer: Consumer) -> None:  # noqa: F811
    other = Consumer.objects.get(pk=log.consumer())
    assert Api("manage", [other])("POST", f"consumers/{consumer.name}/rewind", {"to": "beginning"})[0] == 404
    assert Api("pull", [consumer])("POST", f"consumers/{consumer.name}/rewind", {"to": "beginning"})[0] == 403


def test_a_long_way_back_begins_at_once(api: Api, log: Log, consumer: Consumer, long_run: bool) -> None:  # noqa: F811
    count = 1_000_000 if long_run else 50_000
    fill(log, count, keys=count)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE consumer_position SET position = (SELECT max(id) FROM messages) WHERE consumer = %s", [consumer.pk])
    for to in ({"pk": ["7"]}, "beginning", {"lsn": "0/1"}):
        if to == {"lsn": "0/1"}:
            fetch("UPDATE source_epoch SET begun_lsn = 0")
        began = time.monotonic()
        status, answer = api("POST", f"consumers/{consumer.name}/rewind", {"to": to})
        first = take(consumer.pk, 100)
        took = time.monotonic() - began
        assert status == 200 and len(first.messages) == 100
        print(f"rewind of {count} messages to {to}: first 100 after {took:.3f} s, estimated {answer['messages_estimate']}")  # noqa: T201
        assert abs(answer["messages_estimate"] - count) < count / 50
        with connection.cursor() as cursor:
            cursor.execute("UPDATE consumer_position SET position = (SELECT max(id) FROM messages) WHERE consumer = %s", [consumer.pk])
