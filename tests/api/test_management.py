"""The management API: what it takes, what it refuses, and with which words and status."""
from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from django.test import Client

from consumers.models import ApiToken, Consumer, HttpEndpoint, Source
from consumers.store import claims, lifecycle
from consumers.store.types import Failure
from consumers.tokens import create_token
from tests.conftest import SourceDatabase
from tests.store.world import Log

pytestmark = pytest.mark.django_db(transaction=True)


class Api:
    """Calls the API with a token of one scope."""

    def __init__(self, scope: str = "admin", consumers: Any = None) -> None:
        self.client = Client(raise_request_exception=False)
        self.plain = create_token(f"t-{uuid4().hex[:8]}", scope, consumers)[1]

    def __call__(self, method: str, path: str, body: Any = None, raw: Any = None) -> tuple[int, Any]:
        data = raw if raw is not None else ("" if body is None else json.dumps(body))
        answer = self.client.generic(
            method, f"/api/{path}", data, content_type="application/json", headers={"authorization": f"Bearer {self.plain}"}
        )
        text = answer.content
        return answer.status_code, json.loads(text) if text else None


@pytest.fixture
def api(transactional_db: None) -> Api:
    return Api()


@pytest.fixture
def log(transactional_db: None) -> Any:
    made = Log()
    yield made
    made.appender.close()


def source_body(database: SourceDatabase, **more: Any) -> dict[str, Any]:
    return {
        "name": "shop", "host": database.host, "port": database.port, "database": database.name, "username": database.user,
        "password": database.password, "slot_name": database.name, **more,
    }  # fmt: skip


def test_a_source_an_endpoint_and_consumers_from_nothing(api: Api, source_database: SourceDatabase) -> None:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text)")
    status, source = api("POST", "sources", source_body(source_database))
    assert status == 201 and source["password"] == "********" and source["name"] == "shop", source
    assert source_database.execute("SELECT plugin FROM pg_replication_slots WHERE slot_name = %s", [source_database.name]) == [("pgoutput",)]
    assert source_database.execute("SELECT count(*) FROM pg_publication WHERE pubname = 'sequin_pub' AND NOT puballtables") == [(1,)]
    status, endpoint = api("POST", "http_endpoints", {"name": "hooks", "url": "https://example.com/hooks", "secret_headers": {"x-key": "s"}})
    assert status == 201 and endpoint["signing_secret"] == "********" and "s" not in str(endpoint["secret_headers"])[1:-1].split(":")
    status, consumer = api("POST", "consumers", {"name": "orders", "source": "shop", "kind": "push", "tables": ["public.orders"], "endpoint": "hooks"})
    assert status == 201 and consumer["source"] == "shop" and consumer["source_id"] == source["id"], consumer
    assert source_database.execute("SELECT tablename FROM pg_publication_tables WHERE pubname = 'sequin_pub'") == [("orders",)]
    for path in ("sources/shop", f"sources/{source['id']}", "consumers/orders", f"http_endpoints/{endpoint['id']}"):
        assert api("GET", path)[0] == 200
    assert api("GET", "sources/shop/tables")[1]["data"][0]["name"] == "public.orders"
    assert api("POST", "sources/shop/check")[0] == 200


def test_an_existing_publication_is_used_and_not_changed(api: Api, source_database: SourceDatabase) -> None:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY); CREATE TABLE notes (id int PRIMARY KEY)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE orders")
    assert api("POST", "sources", source_body(source_database))[0] == 201
    status, answer = api("POST", "consumers", {"name": "c", "source": "shop", "kind": "pull", "tables": ["public.notes"]})
    assert status == 422 and 'ALTER PUBLICATION "sequin_pub" ADD TABLE "public"."notes"' in answer["validation_errors"]["tables"][0]


def test_a_table_whose_updates_would_fail_is_refused(api: Api, source_database: SourceDatabase) -> None:
    source_database.execute("CREATE TABLE keyless (a int)")
    api("POST", "sources", source_body(source_database))
    status, answer = api("POST", "consumers", {"name": "c", "source": "shop", "kind": "pull", "tables": ["public.keyless"]})
    assert status == 422 and "REPLICA IDENTITY FULL" in answer["validation_errors"]["tables"][0]


def test_a_source_that_does_not_answer_is_one_line(api: Api, source_database: SourceDatabase, free_port: int) -> None:
    for change in ({"port": free_port}, {"password": "wrong-pass"}, {"database": "nowhere"}):
        status, answer = api("POST", "sources", {**source_body(source_database), **change})
        assert status == 422 and "cannot connect" in answer["validation_errors"]["host"][0], answer
        assert "wrong-pass" not in json.dumps(answer) and "\n" not in answer["summary"]
    assert not Source.objects.exists()



BAD = [
    ("sources", {"name": "a b"}, "name"), ("sources", {"name": "00000000-0000-4000-8000-000000000000"}, "name"), ("sources", {"port": 0}, "port"),
    ("sources", {"port": "x"}, "port"), ("sources", {"host": "db.example.com", "sslmode": "disable"}, "sslmode"),
    ("sources", {"sslmode": "perhaps"}, "sslmode"), ("sources", {"slot_name": "A-b"}, "slot_name"), ("sources", {"colour": "red"}, "colour"),
    ("http_endpoints", {"url": "ftp://x"}, "url"), ("http_endpoints", {"url": "https://u:p@example.com"}, "url"),
    ("http_endpoints", {"headers": {"Host": "x"}}, "headers"), ("http_endpoints", {"headers": {"webhook-id": "x"}}, "headers"),
    ("http_endpoints", {"headers": {"a": "b\r\nc: d"}}, "headers"), ("http_endpoints", {"headers": []}, "headers"),
    ("http_endpoints", {"secret_headers": {"content-type": "x"}}, "secret_headers"), ("http_endpoints", {"timeout_ms": -1}, "timeout_ms"),
    ("http_endpoints", {"signing_secret": "short"}, "signing_secret"), ("consumers", {"kind": "fax"}, "kind"),
    ("consumers", {"tables": ["orders"]}, "tables"), ("consumers", {"tables": "public.orders"}, "tables"), ("consumers", {"actions": ["insert", "explode"]}, "actions"),
    ("consumers", {"ack_wait_ms": 1}, "ack_wait_ms"), ("consumers", {"batch_size": 1001}, "batch_size"), ("consumers", {"source": "nowhere"}, "source"),
    ("consumers", {"max_deliver": 0}, "max_deliver"), ("consumers", {"kind": "push"}, "endpoint"), ("consumers", {"group_columns": [1]}, "group_columns"),
    ("consumers", {"name": None}, "name"), ("consumers", {"status": "asleep"}, "status"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "change", "field"), BAD, ids=[f"{p}-{json.dumps(c)[:50]}" for p, c, _ in BAD])
def test_a_bad_value_is_named(api: Api, log: Log, path: str, change: dict[str, Any], field: str) -> None:
    good = {
        "sources": {"name": "n", "host": "127.0.0.1", "port": 1, "database": "d", "username": "u", "status": "paused"},
        "http_endpoints": {"name": "n", "url": "https://example.com/"},
        "consumers": {"name": "n", "source": log.source.name, "kind": "pull"},
    }
    status, answer = api("POST", path, {**good[path], **change})
    assert status == 422 and field in answer["validation_errors"], answer


@pytest.mark.parametrize("path, field, says", [
    ("sources", "sslmode", "expected one of disable, allow, prefer, require, verify-ca, verify-full, got 'perhaps'"),
    ("sources", "status", "expected one of active, paused, got 'perhaps'"), ("consumers", "kind", "expected one of push, pull, got 'perhaps'"),
    ("consumers", "on_full", "expected one of hold, pause, drop_oldest, got 'perhaps'"),
])  # fmt: skip
def test_what_is_no_choice_is_told_the_choices(api: Api, path: str, field: str, says: str) -> None:
    status, answer = api("POST", path, {"name": "n", field: "perhaps"})
    assert status == 422 and says in answer["validation_errors"][field], answer


def test_bad_requests(api: Api) -> None:
    assert api("POST", "sources", raw="{nonsense")[0] == 400
    assert api("POST", "sources", raw="[1]") == (400, {"summary": "expected a JSON object, got a list"})
    assert api("POST", "sources", raw="null") == (400, {"summary": "expected a JSON object, got null"})
    assert api("POST", "sources", raw="[" * 100_000) == (400, {"summary": "the body is nested too deeply"})
    assert api("POST", "sources", raw=b"\xff\xfe")[0] == 400
    assert api("POST", "sources", raw='{"name": "' + "x" * 1_100_000 + '"}')[0] == 413
    assert api("GET", "sources/nowhere")[0] == 404
    assert api("GET", "nothing")[0] == 404
    assert api("GET", "consumers?limit=many")[0] == 400
    assert api("GET", "consumers?cursor=junk")[0] == 400


def test_scopes_and_tokens(api: Api, log: Log) -> None:
    mine, other = log.consumer(), log.consumer()
    limited = Api("pull", [Consumer.objects.get(pk=mine)])
    assert limited("GET", "consumers")[0] == 403
    assert limited("GET", f"http_pull_consumers/{mine}/receive")[0] == 200
    assert limited("GET", f"http_pull_consumers/{other}/receive")[0] == 404
    assert Client().get("/api/consumers").status_code == 401
    stranger = Api()
    stranger.plain = "sqn_unknown"
    assert stranger("GET", "consumers")[0] == 401
    ApiToken.objects.filter(prefix=api.plain[:10]).get().delete()
    from consumers import tokens

    tokens.forget()  # as every process does on hearing of the change
    assert api("GET", "consumers")[0] == 401


def test_what_is_fixed_stays_and_the_rest_is_edited(api: Api, log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2))
    assert api("PATCH", f"consumers/{consumer}", {"kind": "push"})[0] == 422
    status, answer = api("PATCH", f"consumers/{consumer}", {"name": "renamed", "max_deliver": 3})
    assert status == 200 and (answer["id"], answer["name"], answer["max_deliver"]) == (str(consumer), "renamed", 3)
    claims.claim(consumer, 1, lease_ms=10_000)
    assert api("PATCH", f"consumers/{consumer}", {"group_columns": ["status"]})[0] == 409


def test_group_columns_are_columns_of_the_tables(api: Api, source_database: SourceDatabase) -> None:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY, team int); CREATE TABLE notes (id int PRIMARY KEY)")
    assert api("POST", "sources", source_body(source_database))[0] == 201
    body = {"name": "c", "source": "shop", "kind": "pull", "tables": ["public.orders"]}
    status, answer = api("POST", "consumers", {**body, "group_columns": ["taem"]})
    assert status == 422 and "public.orders has no column 'taem'" in answer["validation_errors"]["group_columns"][0]
    assert api("POST", "consumers", {**body, "tables": ["public.*"], "group_columns": ["team"]})[0] == 201
    status, answer = api("PATCH", "consumers/c", {"group_columns": ["team", "none"]})
    assert status == 422 and "none of the tables has a column 'none'" in answer["validation_errors"]["group_columns"][0]


def test_in_use_and_undelivered_are_409(api: Api, log: Log) -> None:
    consumer = log.consumer()
    status, answer = api("DELETE", f"sources/{log.source.pk}")
    assert status == 409 and Consumer.objects.get(pk=consumer).name in answer["summary"]
    log.append(log.row(1), log.row(2))
    status, answer = api("DELETE", f"consumers/{consumer}")
    assert status == 409 and "2 undelivered" in answer["summary"]
    assert api("DELETE", f"consumers/{consumer}?discard=true") == (204, None)
    assert api("DELETE", f"sources/{log.source.pk}")[0] == 204


def test_pause_resume_and_messages(api: Api, log: Log) -> None:
    consumer = log.consumer(max_deliver=1)
    log.append(*[log.row(key) for key in range(5)])
    assert api("POST", f"consumers/{consumer}/pause")[1]["status"] == "paused"
    assert api("GET", f"http_pull_consumers/{consumer}/receive")[1] == {"data": []}
    assert api("POST", f"consumers/{consumer}/resume")[1]["status"] == "active"
    claim = claims.claim(consumer, 2, lease_ms=10_000)
    claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 0, "answered 500", 500)])  # type: ignore[arg-type]
    for state, count in (("waiting", 3), ("out", 1), ("dead", 1), ("parked", 0), ("passed", 0)):
        status, answer = api("GET", f"consumers/{consumer}/messages?state={state}")
        assert status == 200 and len(answer["data"]) == count, (state, answer)
    assert len(api("GET", f"consumers/{consumer}/messages?state=waiting&pk=3")[1]["data"]) == 1
    pages, cursor = [], ""
    while cursor is not None:
        pages.append(api("GET", f"consumers/{consumer}/messages?state=&since=&limit=2&cursor={cursor}")[1])
        cursor = pages[-1]["next"]
    assert [one["state"] for page in pages for one in page["data"]] == ["dead", "out", "waiting", "waiting", "waiting"], "all, in the order of the log"
    assert [one["state"] for one in api("GET", f"consumers/{consumer}/messages?pk=0")[1]["data"]] == ["dead"]
    assert api("POST", f"consumers/{consumer}/messages/retry", {"state": "dead"}) == (200, {"count": 1})
    assert api("POST", f"consumers/{consumer}/messages/discard", {"ids": [claim.messages[0].id]})[1] == {"count": 1}
    assert lifecycle.backlog(consumer).dead == 0


def test_lists_have_pages(api: Api) -> None:
    for number in range(5):
        HttpEndpoint.objects.create(name=f"e{number}", url="https://example.com/")
    seen, cursor = [], ""
    while True:
        status, page = api("GET", f"http_endpoints?limit=2{cursor}")
        assert status == 200 and len(page["data"]) <= 2
        seen += [item["name"] for item in page["data"]]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert sorted(seen) == [f"e{number}" for number in range(5)]


@pytest.mark.parametrize("accepts", ["text/html", "application/xml", "image/*", ""])
def test_the_answer_is_json_whatever_the_client_accepts(api: Api, accepts: str) -> None:
    for path, status in (("sources", 200), ("sources/none", 404)):
        answer = api.client.get(f"/api/{path}", headers={"authorization": f"Bearer {api.plain}", "accept": accepts})
        assert (answer.status_code, answer["Content-Type"]) == (status, "application/json")


def test_the_document_and_its_page(api: Api) -> None:
    answer = api.client.get("/api/schema?format=json", headers={"authorization": f"Bearer {api.plain}"})
    assert answer.status_code == 200 and "/api/consumers" in answer.json()["paths"]
    assert Client().get("/api/docs").status_code == 302


JUNK: list[Any] = [None, 0, -1, 1e400, "", "\0", "é" * 300, [], [[]], {}, {"a": {}}, True, "00000000-0000-0000-0000-000000000000", "' OR 1=1 --", 2**70]


@pytest.mark.parametrize("seed", range(3))
def test_junk_is_never_a_500(api: Api, log: Log, seed: int) -> None:
    chance = random.Random(seed)
    consumer = log.consumer()
    fields = ["name", "source", "kind", "tables", "actions", "endpoint", "url", "headers", "port", "host", "ids", "state", "ack_ids", "delay_ms",
              "status", "password", "secret_headers", "max_deliver", "group_columns", "since", "pk", "wait_for", "batch_size", "where", "table", "to", "from",
              "until", "dry_run", "consumer", "sort_column", "start_value"]  # fmt: skip
    paths = ["sources", "http_endpoints", "consumers", f"consumers/{consumer}", f"consumers/{consumer}/messages", "backfills", "backfills/x/pause",
             f"consumers/{consumer}/messages/retry", f"consumers/{consumer}/messages/discard", f"http_pull_consumers/{consumer}/receive",
             f"http_pull_consumers/{consumer}/ack", f"http_pull_consumers/{consumer}/nack", f"http_pull_consumers/{consumer}/extend",
             f"sources/{log.source.pk}", "consumers/%00", "consumers/" + "x" * 300, f"consumers/{consumer}/test", f"consumers/{consumer}/rewind",
             f"consumers/{consumer}/republish", "backfills/00000000-0000-0000-0000-000000000000/cancel"]  # fmt: skip
    for _ in range(150):
        path = chance.choice(paths)
        query = "&".join(f"{chance.choice(fields)}={chance.choice(['', '%00', '-1', 'x', '9' * 30, '2026-01-01'])}" for _ in range(chance.randrange(3)))
        body = {chance.choice(fields): chance.choice(JUNK) for _ in range(chance.randrange(5))}
        method = chance.choice(["GET", "POST", "PATCH", "PUT"])
        status, answer = api(method, f"{path}?{query}", None if method == "GET" else body)
        assert status < 500, (method, path, query, body, answer)


def test_a_token_with_a_rate_limit_is_told_to_come_again(api: Api, log: Log, client: Any, monkeypatch: Any) -> None:
    from consumers.tokens import create_token

    monkeypatch.setattr("consumers.tokens.time", SimpleNamespace(monotonic=lambda: 1000.0))  # all in one moment
    plain = create_token("hasty", "manage", rate_limit=3)[1]
    answers = [client.get("/api/sources", HTTP_AUTHORIZATION=f"Bearer {plain}") for _ in range(10)]
    codes = [answer.status_code for answer in answers]
    assert codes[:6] == [200] * 6 and 429 in codes[6:]
    late = answers[codes.index(429)]
    assert late["Retry-After"] == "1" and late.json()["summary"] == "more than 3 requests a second with this token: come again in 1 s"
    assert api("GET", "sources")[0] == 200, "others do not notice"
