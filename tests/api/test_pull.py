"""The pull API over real HTTP: what is handed out, what settles it, and every status code."""
from __future__ import annotations

import json
import socket
import threading
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
from django.db import connection
from django.utils import timezone

from consumers.models import ApiToken, HttpEndpoint
from consumers.store.connection import store_connection
from delivery.pull import receipts
from tests.api.pull_world import Answer, World, server, until, web_server, world  # noqa: F401  (fixtures)

PREFIXES = ("http_pull_consumers", "sequin_streams")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_message_is_received_acked_and_gone(world: World, prefix: str) -> None:
    consumer = world.consumer()
    world.log.append(range(3))
    base = f"/api/{prefix}/{consumer.name}"
    answer = world.client.call("POST", f"{base}/receive", {"batch_size": 10})
    assert answer.status == 200 and answer.keys == [0, 1, 2]
    item = answer.body["data"][0]
    assert set(item) == {"ack_id", "data", "deliver_count"} and item["deliver_count"] == 1
    assert item["data"]["record"] == {"id": 0, "status": "paid"}
    assert item["data"]["metadata"]["consumer"] == {"id": str(consumer.pk), "name": consumer.name}
    acked = world.client.call("POST", f"{base}/ack", {"ack_ids": answer.ack_ids})
    assert acked.body == {"success": True, "acked": 3, "stale": 0}
    again = world.client.call("POST", f"{base}/ack", {"ack_tokens": answer.ack_ids})
    assert again.status == 200 and again.body == {"success": True, "acked": 0, "stale": 3}
    assert world.client.receive(consumer.name).body == {"data": []}


def test_a_consumer_is_found_by_name_and_by_id_with_get_and_post(world: World) -> None:
    consumer = world.consumer()
    world.log.append(range(4))
    got = []
    for name in (consumer.name, consumer.pk):
        path = f"/api/http_pull_consumers/{name}/receive"
        got += world.client.call("GET", f"{path}?max_batch_size=1&wait_for=0").keys
        got += world.client.call("POST", path).keys
    assert got == [0, 1, 2, 3]


def test_messages_of_one_group_wait_for_each_other_and_others_do_not(world: World) -> None:
    consumer = world.consumer()
    world.log.append([1])
    first = world.client.receive(consumer.name)
    world.log.append([1, 2])
    assert world.client.receive(consumer.name, batch_size=10).keys == [2]
    assert world.client.settle("ack", consumer.name, first.ack_ids).body["acked"] == 1
    assert world.client.receive(consumer.name, batch_size=10).keys == [1]


def test_a_nack_makes_it_visible_at_once_with_a_new_ack_id(world: World) -> None:
    consumer = world.consumer()
    world.log.append([1])
    first = world.client.receive(consumer.name)
    assert world.client.settle("nack", consumer.name, first.ack_ids).body == {"success": True, "nacked": 1, "stale": 0}
    second = world.client.receive(consumer.name)
    assert second.keys == [1] and second.body["data"][0]["deliver_count"] == 2 and second.ack_ids != first.ack_ids
    assert world.client.settle("ack", consumer.name, first.ack_ids).body == {"success": True, "acked": 0, "stale": 1}
    assert world.client.settle("ack", consumer.name, second.ack_ids).body["acked"] == 1


def test_a_delayed_nack_hides_it(world: World) -> None:
    consumer = world.consumer()
    world.log.append([1])
    world.client.settle("nack", consumer.name, world.client.receive(consumer.name).ack_ids, delay_ms=43_200_000)
    assert world.client.receive(consumer.name).keys == []


def test_an_expired_message_comes_back_and_a_late_ack_counts_before_that(world: World) -> None:
    consumer = world.consumer(ack_wait_ms=500)
    world.log.append([1, 2])
    first = world.client.receive(consumer.name, batch_size=2)
    back = until(lambda: world.client.receive(consumer.name).keys)
    assert back in ([1], [2])  # two groups: which comes first is open
    answer = world.client.settle("ack", consumer.name, first.ack_ids)
    assert answer.body == {"success": True, "acked": 1, "stale": 1}


def test_extend_keeps_it_hidden_and_can_shorten(world: World) -> None:
    consumer = world.consumer(ack_wait_ms=500)
    world.log.append([1])
    held = world.client.receive(consumer.name)
    extended = world.client.settle("extend", consumer.name, held.ack_ids, ack_wait_ms=3_600_000)
    assert extended.body == {"success": True, "extended": 1, "stale": 0}
    assert world.client.receive(consumer.name, wait_for=900).keys == []
    world.client.settle("extend", consumer.name, held.ack_ids, ack_wait_ms=500)
    assert world.client.receive(consumer.name, wait_for=10_000).keys == [1]


def test_no_more_than_max_ack_pending_are_out(world: World) -> None:
    consumer = world.consumer(max_ack_pending=2)
    world.log.append(range(5))
    assert world.client.receive(consumer.name, batch_size=10).keys == [0, 1]
    assert world.client.receive(consumer.name, batch_size=10).keys == []


def test_a_paused_consumer_hands_out_nothing(world: World) -> None:
    consumer = world.consumer(status="paused")
    world.log.append([1])
    assert world.client.receive(consumer.name).body == {"data": []}


def test_what_is_unknown_malformed_or_anothers_is_stale_and_changes_nothing(world: World) -> None:
    mine, other = world.consumer(), world.consumer("other")
    world.log.append([1])
    held, foreign = world.client.receive(mine.name), world.client.receive(other.name)
    nobodys = receipts.encode_one(mine.pk, 77).decode()
    strange = ["", "x", "ü", "\ud800", "A" * 32, "A" * 100_000, nobodys, *foreign.ack_ids]
    for call, done in (("ack", "acked"), ("nack", "nacked"), ("extend", "extended")):
        answer = world.client.settle(call, mine.name, strange)
        assert answer.status == 200 and answer.body == {"success": True, done: 0, "stale": len(strange)}
    assert world.client.settle("ack", mine.name, [*held.ack_ids, *held.ack_ids]).body == {"success": True, "acked": 1, "stale": 1}
    assert world.client.settle("ack", other.name, foreign.ack_ids).body["acked"] == 1


def test_a_body_without_a_length_is_read(world: World) -> None:
    consumer = world.consumer()
    world.log.append([1])
    body = json.dumps({"ack_ids": world.client.receive(consumer.name).ack_ids}).encode()
    status, answer = _chunked(world, consumer.name, body)
    assert status == 200 and answer["acked"] == 1
    status, answer = _chunked(world, consumer.name, b'{"ack_ids": ["' + b"x" * 1_200_000 + b'"]}')
    assert status == 413 and "larger" in answer["summary"]


def test_half_a_body_is_no_call(world: World) -> None:
    """Its client went away, or announced too much: what was meant is not known, and nothing may be handed out for it."""
    consumer = world.consumer()
    world.log.append([1])
    with socket.create_connection(("127.0.0.1", world.port), timeout=30) as conn:
        conn.sendall(
            f"POST /api/http_pull_consumers/{consumer.name}/receive HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
            f'Authorization: Bearer {world.client.token}\r\n\r\n{{"batch_size": 1}}'.encode()
        )
        conn.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(partial(conn.recv, 65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ") and b"17 of the 50 bytes" in answer, answer
    assert world.client.receive(consumer.name).body["data"][0]["deliver_count"] == 1


@pytest.mark.parametrize("call, body", [
    ("receive", {"batch_size": 0}), ("receive", {"batch_size": 1001}), ("receive", {"batch_size": "many"}),
    ("receive", {"batch_size": 1, "max_batch_size": 2}), ("receive", {"wait_for": 300_001}), ("receive", {"wait_for": "1d"}),
    ("receive", "{"), ("receive", "[]"), ("receive", "null"), ("receive", b"\xff\xfe"), ("receive", '{"batch_size": NaN}'),
    ("receive", "[" * 100_000), ("receive", '{"batch_size": ' + "9" * 10_000 + "}"),
    ("ack", {}), ("ack", None), ("ack", {"ack_ids": []}), ("ack", {"ack_ids": "x"}), ("ack", {"ack_ids": [1]}),
    ("ack", {"ack_ids": ["x"] * 10_001}), ("nack", {"ack_ids": ["x"], "delay_ms": -1}), ("nack", {}),
    ("extend", {"ack_ids": ["x"], "ack_wait_ms": 499}), ("extend", {"ack_ids": ["x"], "ack_wait_ms": "soon"}),
])  # fmt: skip
def test_a_bad_request_is_400_with_a_summary(world: World, call: str, body: Any) -> None:
    consumer = world.consumer()
    answer = world.client.call("POST", f"/api/http_pull_consumers/{consumer.name}/{call}", body)
    assert answer.status == 400 and set(answer.body) == {"summary"} and answer.body["summary"]


def test_a_bad_query_is_400(world: World) -> None:
    consumer = world.consumer()
    answer = world.client.call("GET", f"/api/http_pull_consumers/{consumer.name}/receive?batch_size=x")
    assert answer.status == 400 and "batch_size" in answer.body["summary"]


def test_a_head_takes_nothing(world: World) -> None:
    consumer = world.consumer()
    world.log.append([1])
    for call in ("receive", "ack"):
        for method in ("HEAD", "OPTIONS", "PUT", "DELETE"):
            answer = world.client.call(method, f"/api/http_pull_consumers/{consumer.name}/{call}")
            assert answer.status == 405, (method, call)
    assert world.client.receive(consumer.name).body["data"][0]["deliver_count"] == 1


def test_who_is_refused_early_gets_an_answer_and_no_broken_connection(world: World) -> None:
    """More than fits into the buffers between two ends: the client is still sending when the answer is made."""
    consumer = world.consumer()
    large = b'{"a":"' + b"a" * 8_000_000 + b'"}'
    for client, status, elsewhere in ((world.client, 413, 403), (replace(world.client, token="unknown"), 401, 401)):
        assert client.call("POST", f"/api/http_pull_consumers/{consumer.name}/ack", large).status == status
        assert client.call("POST", "/api/sources", large).status == elsewhere


def test_a_body_over_one_mebibyte_is_413(world: World) -> None:
    consumer = world.consumer()
    answer = world.client.call("POST", f"/api/http_pull_consumers/{consumer.name}/ack", b"x" * 1_048_577)
    assert answer.status == 413 and answer.body["summary"]


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ", "Bearer wrong", "Basic dTpw", "Token x", "Bearer é"])
def test_without_a_known_token_it_is_401(world: World, header: str | None) -> None:
    consumer = world.consumer()
    anonymous = type(world.client)(world.port, None)
    headers = {} if header is None else {"Authorization": header.encode("utf-8").decode("latin-1")}
    answer = anonymous.call("POST", f"/api/http_pull_consumers/{consumer.name}/receive", {}, **headers)
    assert answer.status == 401 and answer.body["summary"] and "sqn_" not in answer.body["summary"]


@pytest.mark.parametrize("change", [{"revoked_at": timezone.now}, {"expires_at": lambda: timezone.now() - timedelta(seconds=1)}])
def test_a_revoked_or_expired_token_is_401_at_once(world: World, change: dict[str, Any]) -> None:
    consumer = world.consumer()
    client = world.with_token()
    assert client.receive(consumer.name).status == 200
    token = ApiToken.objects.latest("created_at")
    for field, value in change.items():
        setattr(token, field, value())
    token.save()
    until(lambda: client.receive(consumer.name).status == 401, within_s=15)


def test_using_a_token_is_noted(world: World) -> None:
    consumer = world.consumer()
    client = world.with_token()
    client.receive(consumer.name)
    assert ApiToken.objects.latest("created_at").last_used_at is not None


def test_a_pull_token_may_not_manage(world: World) -> None:
    answer = world.client.call("GET", "/api/consumers")
    assert answer.status == 403 and "scope" in answer.body["summary"]
    assert world.with_token("manage").call("GET", "/api/consumers").status == 200


def test_what_is_not_there_and_what_is_not_yours_look_the_same(world: World) -> None:
    mine, other = world.consumer(), world.consumer("other")
    limited = world.with_token("pull", [mine])
    assert limited.receive(mine.name).status == 200
    names = ["nothing", other.name, other.pk, "00000000-0000-0000-0000-000000000000", "a\0b", "ü", "x" * 5000, "..%2f"]
    for name in names:
        answer = limited.receive(name)
        assert answer.status == 404 and set(answer.body) == {"summary"}, name
    assert limited.settle("ack", other.name, ["x"]).status == 404


def test_a_token_for_one_consumer_does_not_outlive_it(world: World) -> None:
    mine, other = world.consumer(), world.consumer("other")
    limited, both = world.with_token("pull", [mine]), world.with_token("pull", [mine, other])
    assert limited.receive(mine.name).status == 200
    mine.delete()
    until(lambda: limited.receive(other.name).status == 401, within_s=15)
    assert both.receive(other.name).status == 200


def test_a_push_consumer_is_not_found(world: World) -> None:
    endpoint = HttpEndpoint.objects.create(name=f"hook-{world.mark}", url="https://example.com/")
    pushed = world.consumer("pushed", kind="push", endpoint=endpoint)
    for client, says in ((world.client, "push consumer"), (world.with_token("pull", [world.consumer()]), "there is no pull consumer")):
        for name in (pushed.name, pushed.pk):
            answer = client.receive(name)
            assert answer.status == 404 and says in answer.body["summary"], name


def test_a_renamed_consumer_is_found_under_its_new_name(world: World) -> None:
    consumer = world.consumer()
    old = consumer.name
    assert world.client.receive(old).status == 200
    consumer.name = f"new-{world.mark}"
    consumer.save()
    until(lambda: world.client.receive(old).status == 404, within_s=15)
    assert world.client.receive(consumer.name).status == 200


def test_a_consumer_that_many_wait_for_leaves_room_for_the_others(world: World) -> None:
    """Its calls are held up in the store here, all of them at once: two claims and two acks have a connection in hand."""
    busy, other = world.consumer("busy"), world.consumer("other")
    world.log.append([1, 2, 3])
    ids = world.client.receive(busy.name, batch_size=1).ack_ids
    calls = [partial(world.client.receive, busy.name), partial(world.client.settle, "ack", busy.name, ids)]
    answers: list[Answer] = []
    callers = [threading.Thread(target=lambda call=call: answers.append(call())) for call in calls * 20]
    with store_connection(autocommit=False) as conn:
        conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [str(busy.pk)])
        for caller in callers:
            caller.start()
        until(lambda: waiting_for_locks(conn) == 4)
        assert len(world.client.receive(other.name, batch_size=3).keys) == 3
        assert not answers
    for caller in callers:
        caller.join(120)
    assert [answer.status for answer in answers] == [200] * 40


def waiting_for_locks(conn: Any) -> int:
    return int(conn.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchone()[0])


def waiting_for_table(conn: Any, table: str) -> int:
    query = "SELECT count(*) FROM pg_locks WHERE relation = %s::regclass AND NOT granted"
    return int(conn.execute(query, [table]).fetchone()[0])


def test_the_answer_is_json_whatever_the_client_accepts(world: World) -> None:
    path = f"/api/http_pull_consumers/{world.consumer().name}/receive?format=xml"
    assert world.client.call("GET", path, Accept="text/xml").body == {"data": []}


def test_another_method_is_405_and_another_path_404(world: World) -> None:
    consumer = world.consumer()
    base = f"/api/http_pull_consumers/{consumer.name}"
    assert world.client.call("DELETE", f"{base}/receive").status == 405
    assert world.client.call("GET", f"{base}/ack").status == 405
    assert world.client.call("POST", f"{base}/consume", {}).status == 404


def test_a_name_that_is_not_ours_gets_nothing(world: World) -> None:
    consumer = world.consumer()
    world.log.append([1])
    for _ in range(2):
        answer = world.client.call("POST", f"/api/http_pull_consumers/{consumer.name}/receive", {}, Host="elsewhere.example")
        assert answer.status == 400 and set(answer.body) == {"summary"}
        assert "'elsewhere.example'" in answer.body["summary"] and "ALLOWED_HOSTS" in answer.body["summary"]
    assert world.client.receive(consumer.name).body["data"][0]["deliver_count"] == 1


def test_what_django_answers_is_the_same(world: World) -> None:
    """A method in small letters is no call in front of it, but to Django it is the same."""
    consumer = world.consumer()
    world.log.append([1])
    path = f"/api/http_pull_consumers/{consumer.name}"
    received = world.client.call("post", f"{path}/receive", {"batch_size": 5})
    assert received.status == 200 and received.keys == [1]
    for call, done in (("extend", "extended"), ("nack", "nacked")):
        assert world.client.call("post", f"{path}/{call}", {"ack_ids": received.ack_ids}).body == {"success": True, done: 1, "stale": 0}
    ack_ids = world.client.call("get", f"{path}/receive?batch_size=5").ack_ids
    assert world.client.call("post", f"{path}/ack", {"ack_ids": ack_ids}).body == {"success": True, "acked": 1, "stale": 0}
    for refused in (lambda method: world.client.call(method, f"{path}/ack", {}), lambda method: world.client.call(method, f"{path}x/ack", {})):
        through, before = refused("post"), refused("POST")
        assert (through.status, through.body) == (before.status, before.body)


def test_a_mistake_of_ours_is_500_with_a_summary(world: World) -> None:
    consumer = world.consumer()
    with web_server() as (_, port), store_connection() as conn:
        client = type(world.client)(port, world.client.token)
        conn.execute("ALTER FUNCTION sequin_claim RENAME TO sequin_claim_away")
        try:
            answer = client.receive(consumer.name)
        finally:
            conn.execute("ALTER FUNCTION sequin_claim_away RENAME TO sequin_claim")
        assert answer.status == 500 and set(answer.body) == {"summary"}
        assert client.receive(consumer.name).status == 200


def test_while_the_store_is_away_it_is_503_and_afterwards_it_works(world: World) -> None:
    consumer = world.consumer()
    with web_server() as (_, port), _admin_connection() as admin:
        client = type(world.client)(port, world.client.token)
        assert client.receive(consumer.name).status == 200
        name = connection.settings_dict["NAME"]
        admin.execute(psycopg.sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(psycopg.sql.Identifier(name)))
        try:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s",
                [name, connection.connection.info.backend_pid],
            )
            answer = until(lambda: _unless(client.receive(consumer.name), 200))
            assert answer.status == 503 and answer.body["summary"] and "Retry-After" in {k.title() for k in answer.headers}
        finally:
            admin.execute(psycopg.sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(psycopg.sql.Identifier(name)))
        until(lambda: client.receive(consumer.name).status == 200, within_s=20)


def _unless(answer: Any, status: int) -> Any:
    return None if answer.status == status else answer


def _admin_connection() -> psycopg.Connection[Any]:
    return store_connection(dbname="postgres")


def _chunked(world: World, consumer: str, body: bytes) -> tuple[int, Any]:
    with socket.create_connection(("127.0.0.1", world.port), timeout=20) as conn:
        conn.sendall(
            f"POST /api/http_pull_consumers/{consumer}/ack HTTP/1.1\r\nHost: localhost\r\n"
            f"Authorization: Bearer {world.client.token}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
        )
        for start in range(0, len(body), 60_000):
            piece = body[start : start + 60_000]
            conn.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        conn.sendall(b"0\r\n\r\n")
        answer = b""
        while data := conn.recv(65_536):
            answer += data
    head, _, tail = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(tail)
