"""`/api/backfills`, and consumers that begin with everything: what is taken, refused and shown."""
from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from django.test import Client

from consumers.models import Backfill, Consumer
from consumers.store import backfills, claims
from tests.api.test_management import Api
from tests.capture.backfill_world import begin, fetch, status, step_once, work_off
from tests.capture.world import reading
from tests.conftest import SourceDatabase, wait_until

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def api(transactional_db: None) -> Api:
    return Api("manage")


@pytest.fixture
def source(source_database: SourceDatabase, make_source: Any) -> Any:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, v text, at timestamptz); CREATE TABLE keyless (v json)")
    source_database.execute("INSERT INTO t SELECT g, 'row ' || g, now() FROM generate_series(1, 100) g; ALTER TABLE keyless REPLICA IDENTITY FULL")
    return make_source()


def test_begun_shown_and_delivered(api: Api, source: Any, make_consumer: Any) -> None:
    consumer = make_consumer(source, tables=["public.t"])
    status, made = api("POST", "backfills", {"consumer": consumer.name, "table": "public.t"})
    assert status == 201, made
    assert (made["consumer"], made["consumer_id"], made["table"], made["status"]) == (consumer.name, str(consumer.pk), "public.t", "running")
    assert (made["rows_done"], made["rows_estimated"], made["kind"], made["ended_at"]) == (0, None, "backfill", None)
    with reading(source):
        assert work_off(made["id"]) == "completed"
    status, shown = api("GET", f"backfills/{made['id']}")
    assert status == 200 and (shown["status"], shown["rows_done"], shown["rows_left_out"], shown["seconds_left"]) == ("completed", 100, 0, None)
    assert shown["rows_estimated"] > 0 and shown["rows_per_second"] > 0 and shown["ended_at"] > shown["created_at"]
    claim = claims.claim(consumer.pk, 1000, lease_ms=1000)
    assert [message.action for message in claim.messages] == ["read"] * 100
    _, listed = api("GET", f"consumers/{consumer.name}/messages?state=out&limit=1")
    metadata = listed["data"][0]["message"]["metadata"]
    import base64

    assert base64.b64decode(metadata["idempotency_key"]).decode() == f'{made["id"]}:public.t:["1"]' and "replay_id" not in metadata
    assert metadata["record_pks"] == ["1"] and metadata["commit_idx"] == 0 and metadata["commit_lsn"] > 0
    assert listed["data"][0]["message"]["action"] == "read" and listed["data"][0]["message"]["changes"] is None


def test_pages_of_backfills(api: Api, source: Any, make_consumer: Any) -> None:
    consumer, other = make_consumer(source, tables=["public.t"]), make_consumer(source, "other", tables=["public.t"])
    made = [api("POST", "backfills", {"consumer": consumer.name, "table": "public.t", "start_value": n})[1]["id"] for n in range(5)]
    theirs = api("POST", "backfills", {"consumer": "other", "table": "public.t"})[1]["id"]
    seen, cursor = [], ""
    while cursor is not None:
        _, page = api("GET", f"backfills?limit=2{cursor and '&cursor=' + cursor}")
        seen += [row["id"] for row in page["data"]]
        cursor = page["next"]
    assert seen == [*made, theirs]
    assert [row["id"] for row in api("GET", "backfills?consumer=other")[1]["data"]] == [theirs]
    assert api("GET", "backfills?consumer=nobody")[1]["data"] == []
    backfills.pause(made[0])
    assert [row["id"] for row in api("GET", "backfills?status=paused")[1]["data"]] == [made[0]]
    assert api("GET", "backfills?status=asleep")[0] == 400
    limited = Api("manage", [other])
    assert [row["id"] for row in limited("GET", "backfills")[1]["data"]] == [theirs]
    assert limited("GET", f"backfills/{made[0]}")[0] == 404 and limited("POST", f"backfills/{made[0]}/pause")[0] == 404
    status, answer = limited("POST", "backfills", {"consumer": consumer.name, "table": "public.t"})
    assert status == 422 and "there is none with this name" in answer["validation_errors"]["consumer"][0]
    assert Api("pull")("GET", "backfills")[0] == 403


def test_paused_resumed_cancelled_deleted(api: Api, source: Any, make_consumer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from capture import backfilling

    monkeypatch.setattr(backfilling, "MOST_ROWS", 10)
    backfill = str(begin(make_consumer(source, tables=["public.t"]), page_rows=10))
    with reading(source):
        while fetch("SELECT rows_done FROM backfills") == [(0,)]:
            step_once()
        assert api("POST", f"backfills/{backfill}/pause")[1]["status"] in ("paused",)
        done = api("GET", f"backfills/{backfill}")[1]["rows_done"]
        for _ in range(3):
            step_once()
        assert api("GET", f"backfills/{backfill}")[1]["rows_done"] == done and fetch("SELECT count(*) FROM backfill_chunks") == [(0,)]
        status, answer = api("POST", f"backfills/{backfill}/pause")
        assert status == 409 and answer["summary"] == "the backfill is paused and cannot be paused"
        assert api("POST", f"backfills/{backfill}/resume")[1]["status"] == "running"
        assert api("POST", f"backfills/{backfill}/resume")[0] == 409
        assert work_off(backfill) == "completed"
        assert fetch("SELECT count(*), count(DISTINCT key) FROM messages") == [(100, 100)], "it went on where it stopped"
        assert api("POST", f"backfills/{backfill}/cancel")[0] == 409
        other = api("POST", "backfills", {"consumer": "orders-worker", "table": "public.t"})[1]["id"]
        for body, field in (({"status": "completed"}, "status"), ({"where": "id > 1"}, "where"), ({"nothing": 1}, "nothing"), ({"status": None}, "status")):
            status, answer = api("PATCH", f"backfills/{other}", body)
            assert status == 422 and list(answer["validation_errors"]) == [field], answer
        assert api("PATCH", f"backfills/{other}", {"status": "paused", "table": "public.t"})[1]["status"] == "paused"
        assert api("PATCH", f"backfills/{other}", {"status": "running"})[1]["status"] == "running"
        assert api("PATCH", f"backfills/{other}", {"status": "running"})[0] == 200, "as it is"
        assert api("POST", f"backfills/{other}/cancel")[1]["status"] == "cancelled"
        assert api("PATCH", f"backfills/{other}", {"status": "running"})[0] == 409
        step_once()
        assert fetch("SELECT count(*) FROM messages") == [(100,)]
    assert api("DELETE", f"backfills/{other}")[0] == 204 and api("GET", f"backfills/{other}")[0] == 404
    for path in ("nonsense", str(uuid4())):
        assert api("GET", f"backfills/{path}")[0] == 404 and api("POST", f"backfills/{path}/pause")[0] == 404


def test_one_that_failed_degrades_its_consumer_until_somebody_sees_to_it(api: Api, source: Any, make_consumer: Any) -> None:
    backfill = begin(make_consumer(source, tables=["public.t"]), sort_column="nothing")
    with reading(source):
        assert work_off(backfill) == "failed"
    judged = Client().get("/health").json()["consumers"][0]
    assert judged["status"] == "degraded" and judged["reasons"] == ["the backfill of public.t failed: there is no column nothing any more. Resume or cancel it"]
    assert api("POST", f"backfills/{backfill}/cancel")[1]["status"] == "cancelled"
    assert Client().get("/health").json()["consumers"][0]["status"] == "ok"


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "consumer", "required"), ({"consumer": "orders-worker"}, "table", "required"),
        ({"table": "public.nowhere"}, "table", "not one of the consumer's tables"), ({"table": "public.*"}, "table", "not one of"),
        ({"table": "t"}, "table", "schema.table"), ({"table": 7}, "table", "text"), ({"where": "id >"}, "where", "ends too early"), ({"where": "nothing > 5"}, "where", "no column"),
        ({"where": "random() > 0.5"}, "where", "volatile"), ({"where": "id"}, "where", "true or false"),
        ({"sort_column": "nothing"}, "sort_column", "no column nothing"), ({"start_value": "x"}, "start_value", "is no value of id"),
        ({"start_value": ""}, "start_value", "is no value of id"), ({"start_value": {}}, "start_value", "text"),
        ({"sort_column": "at", "start_value": "yesterday-ish"}, "start_value", "is no value of at"),
        ({"table": "public.keyless", "start_value": 1}, "start_value", "no primary key"),
        ({"table": "public.keyless", "sort_column": "v"}, "sort_column", "order"), ({"colour": "red"}, "colour", "not a field"),
        ({"status": "paused"}, "status", "set by the service"), ({"start_value": "a\0b"}, "start_value", "Null"),
    ],
)  # fmt: skip
def test_what_is_refused(api: Api, source: Any, make_consumer: Any, body: dict[str, Any], field: str, words: str) -> None:
    make_consumer(source, tables=["public.t", "public.keyless"])
    given = body if field in ("consumer",) or words == "required" else {"consumer": "orders-worker", "table": "public.t", **body}
    status, answer = api("POST", "backfills", given)
    assert status == 422 and words in answer["validation_errors"][field][0], answer
    assert not Backfill.objects.exists()


def test_what_may_not_be_read_is_refused_with_the_sql(
    api: Api, source: Any, make_consumer: Any, source_database: SourceDatabase
) -> None:
    make_consumer(source, tables=["public.t"])
    with source_database.admin(source_database.name) as conn:
        conn.execute("ALTER TABLE t OWNER TO postgres")
        status, answer = api("POST", "backfills", {"consumer": "orders-worker", "table": "public.t"})
        assert status == 422 and 'GRANT SELECT ON "public"."t" TO' in answer["validation_errors"]["table"][0], answer
        conn.execute(f"GRANT SELECT ON t TO {source_database.name}; ALTER TABLE t ENABLE ROW LEVEL SECURITY")  # type: ignore[arg-type]
        status, answer = api("POST", "backfills", {"consumer": "orders-worker", "table": "public.t"})
        assert status == 422 and "BYPASSRLS" in answer["validation_errors"]["table"][0], answer
        status, answer = api("POST", "consumers", {"name": "all", "source": source.name, "kind": "pull", "tables": ["public.t"], "start_from": "beginning"})
        assert status == 422 and "BYPASSRLS" in answer["validation_errors"]["tables"][0] and not Consumer.objects.filter(name="all").exists()
        conn.execute("DROP PUBLICATION sequin_pub; CREATE PUBLICATION sequin_pub FOR TABLE keyless")
        status, answer = api("POST", "backfills", {"consumer": "orders-worker", "table": "public.t"})
        assert status == 422 and "is not published" in answer["validation_errors"]["table"][0], answer


def test_a_disabled_consumer_gets_none_and_its_backfills_end(api: Api, source: Any, make_consumer: Any) -> None:
    consumer = make_consumer(source, tables=["public.t"])
    made = api("POST", "backfills", {"consumer": consumer.name, "table": "public.t"})[1]["id"]
    api("PATCH", f"consumers/{consumer.name}", {"status": "disabled"})
    assert api("GET", f"backfills/{made}")[1]["status"] == "cancelled"
    status, answer = api("POST", "backfills", {"consumer": consumer.name, "table": "public.t"})
    assert status == 422 and "is disabled" in answer["validation_errors"]["consumer"][0]
    api("PATCH", f"consumers/{consumer.name}", {"status": "active"})
    again = api("POST", "backfills", {"consumer": consumer.name, "table": "public.t"})[1]["id"]
    assert api("DELETE", f"consumers/{consumer.name}?discard=true")[0] == 204
    assert api("GET", f"backfills/{again}")[0] == 404


@pytest.mark.parametrize(("tables", "expected"), [(["public.t"], ["public.t"]), (["public.*"], ["public.keyless", "public.t"]), ([], ["public.keyless", "public.t"])])
def test_a_consumer_that_begins_with_everything(
    api: Api, source: Any, source_database: SourceDatabase, tables: list[str], expected: list[str]
) -> None:
    source_database.execute("DROP PUBLICATION sequin_pub; CREATE PUBLICATION sequin_pub FOR TABLE t, keyless")
    source_database.execute("INSERT INTO keyless VALUES ('1'), ('2')")
    status, consumer = api("POST", "consumers", {"name": "all", "source": source.name, "kind": "pull", "tables": tables, "start_from": "beginning"})
    assert status == 201 and consumer["start_from"] == "beginning", consumer
    source_database.execute("INSERT INTO t VALUES (101, 'new', now())")
    made = api("GET", "backfills?consumer=all")[1]["data"]
    assert sorted(row["table"] for row in made) == expected
    with reading(source):
        assert [work_off(row["id"]) for row in made] == ["completed"] * len(made)
        got = []
        while claim := claims.claim(consumer["id"], 1000, lease_ms=60_000).messages:
            got += claim
    assert [message.key for message in got if message.table == "t" and message.action == "insert"] == ['["101"]']
    reads = [message.key for message in got if message.table == "t" and message.action == "read"]
    assert {f'["{n}"]' for n in range(1, 101)} <= set(reads) and len(reads) == len(set(reads))
    assert sum(message.table == "keyless" for message in got) == (2 if "public.keyless" in expected else 0)
    status, answer = api("PATCH", "consumers/all", {"start_from": "now"})
    assert status == 422 and "counts at creation only" in answer["validation_errors"]["start_from"][0]


def test_transactions_older_than_the_publishing_end_first(
    api: Api, source: Any, make_consumer: Any, source_database: SourceDatabase
) -> None:
    """What they wrote to the table before is in no message; whoever is younger is not waited for."""
    make_consumer(source, tables=["public.t"])
    source_database.execute("DROP PUBLICATION sequin_pub; CREATE PUBLICATION sequin_pub FOR TABLE keyless")
    with source_database.connect(autocommit=False) as older, source_database.connect(autocommit=False) as younger:
        older.execute("INSERT INTO t VALUES (200)")
        source_database.execute("ALTER PUBLICATION sequin_pub ADD TABLE t")
        younger.execute("INSERT INTO t VALUES (201)")
        backfill = api("POST", "backfills", {"consumer": "orders-worker", "table": "public.t"})[1]["id"]
        with reading(source):
            wait_until(lambda: step_once() or status(backfill)[1].startswith("waits for transactions"))
            older.commit()
            assert work_off(backfill) == "completed"
            younger.commit()
            wait_until(lambda: fetch("SELECT 1 FROM messages WHERE action = 'I' AND key = '[\"201\"]'"))
    assert fetch("SELECT count(DISTINCT key) FROM messages") == [(102,)]
