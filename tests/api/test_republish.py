"""`POST /api/consumers/{c}/republish`: what matches, counted and shown before it runs, delivered once more."""
from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from consumers.models import Consumer, Source
from consumers.store import claims, lifecycle
from consumers.store.connection import store_connection
from consumers.store.partitions import maintain
from tests.api.test_management import Api
from tests.capture.backfill_world import fetch, step_once
from tests.capture.world import await_messages, reading
from tests.conftest import SourceDatabase, wait_until

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def api(transactional_db: None) -> Api:
    return Api("manage")


class Shop:
    """A source with a table whose changes are in the log, and consumers."""

    def __init__(self, database: SourceDatabase, make_source: Any, make_consumer: Any) -> None:
        self.database, self._make_consumer = database, make_consumer
        database.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, total numeric); ALTER TABLE orders REPLICA IDENTITY FULL")
        self.source: Source = make_source()
        self.consumer: Consumer = make_consumer(self.source, "orders", tables=["public.orders"])
        database.execute("INSERT INTO orders SELECT g, CASE WHEN g % 2 = 0 THEN 'paid' ELSE 'open' END, g * 1.50 FROM generate_series(1, 20) g")
        database.execute("UPDATE orders SET status = 'paid' WHERE id = 1; DELETE FROM orders WHERE id = 3")
        with reading(self.source):
            await_messages(22)

    def take(self, consumer: Consumer | None = None) -> list[Any]:
        """Everything there is for the consumer, acknowledged."""
        name = (consumer or self.consumer).pk
        got: list[Any] = []
        while True:
            claim = claims.claim(name, 1000, lease_ms=60_000)
            if claim.token is not None:
                claims.ack(name, [(claim.token, message.id) for message in claim.messages])
                got += claim.messages
            elif claim.at_end:  # else the filter was not through yet
                return got

    def work_off(self) -> None:
        wait_until(lambda: step_once() or not fetch("SELECT 1 FROM backfills WHERE status = 'running'"), 30)


@pytest.fixture
def shop(source_database: SourceDatabase, make_source: Any, make_consumer: Any) -> Iterator[Shop]:
    yield Shop(source_database, make_source, make_consumer)


def test_from_the_log_as_it_was(api: Api, shop: Shop) -> None:
    first = {message.id: message for message in shop.take()}
    where = {"where": "status = 'paid' AND total > 10"}
    status, looked = api("POST", "consumers/orders/republish", {**where, "dry_run": True})
    assert status == 200 and (looked["count"], looked["is_exact"], len(looked["sample"])) == (7, True, 7), looked
    assert looked["sample"][0]["record"] == {"id": 8, "status": "paid", "total": 12.00} and not fetch("SELECT 1 FROM backfills")
    status, begun = api("POST", "consumers/orders/republish", where)
    assert status == 201, begun
    shop.work_off()
    again = shop.take()
    assert [message.key for message in again] == [f'["{n}"]' for n in range(8, 21, 2)]
    assert {str(message.replay_id) for message in again} == {begun["replay_id"]}
    keys = {(message.commit_lsn, message.commit_idx, message.epoch, message.record, message.committed_at) for message in first.values()}
    assert all((m.commit_lsn, m.commit_idx, m.epoch, m.record, m.committed_at) in keys for m in again), "the key stays the same"
    shown = api("GET", f"backfills/{begun['backfills'][0]}")[1]
    assert (shown["kind"], shown["status"], shown["rows_done"], shown["replay_id"]) == ("republish", "completed", 7, begun["replay_id"])
    assert shop.take() == []
    api("POST", "consumers/orders/republish", where)
    shop.work_off()
    assert len(shop.take()) == 7, "copies are not copied again"


def test_actions_old_values_and_everything(api: Api, shop: Shop) -> None:
    shop.take()
    for where, expected in (("action = 'delete'", ['["3"]']), ("old.status = 'open' AND new.status = 'paid'", ['["1"]']), ("", None)):
        api("POST", "consumers/orders/republish", {"where": where})
        shop.work_off()
        got = [message.key for message in shop.take()]
        assert got == expected if expected is not None else len(got) == 22


def test_a_stretch_of_time(api: Api, shop: Shop) -> None:
    shop.take()
    fetch("UPDATE messages SET committed_at = timestamptz '2026-01-01 00:00Z' + commit_idx * interval '1 h'")
    bounds = {"since": "2026-01-01T05:00:00Z", "until": "2026-01-01T08:00:00Z"}
    assert api("POST", "consumers/orders/republish", {**bounds, "dry_run": True})[1]["count"] == 3
    api("POST", "consumers/orders/republish", bounds)
    shop.work_off()
    assert [message.key for message in shop.take()] == ['["6"]', '["7"]', '["8"]'], "since is inclusive, until is not"


def test_from_the_table_as_it_is_now(api: Api, shop: Shop) -> None:
    shop.take()
    where = {"where": "status = 'paid' AND total < 10", "from": "table"}
    status, looked = api("POST", "consumers/orders/republish", {**where, "dry_run": True})
    assert status == 200 and (looked["count"], looked["is_exact"]) == (4, True), looked
    assert sorted(row["record"]["id"] for row in looked["sample"]) == [1, 2, 4, 6]
    shop.database.execute("UPDATE orders SET status = 'paid' WHERE id = 5")
    status, begun = api("POST", "consumers/orders/republish", where)
    assert status == 201, begun
    with reading(shop.source):
        shop.work_off()
    again = [message for message in shop.take() if message.action == "read"]
    assert [message.key for message in again] == [f'["{n}"]' for n in (1, 2, 4, 5, 6)]
    assert {str(message.replay_id) for message in again} == {begun["replay_id"]}
    assert {str(message.backfill_id) for message in again} == set(begun["backfills"])


def test_what_is_republished_goes_through_the_consumers_own_filter(api: Api, shop: Shop) -> None:
    status, answer = api("PATCH", "consumers/orders", {"where": "total > 20"})
    assert status == 200, answer
    shop.take()
    body = {"where": "status = 'paid'"}
    assert api("POST", "consumers/orders/republish", {**body, "dry_run": True})[1]["count"] == 4
    api("POST", "consumers/orders/republish", body)
    shop.work_off()
    assert [message.key for message in shop.take()] == [f'["{n}"]' for n in (14, 16, 18, 20)]


def test_only_the_consumer_asked_for_gets_it(api: Api, shop: Shop, make_consumer: Any) -> None:
    other = make_consumer(shop.source, "other", tables=["public.orders"])
    shop.take()
    api("POST", "consumers/orders/republish", {})
    shop.work_off()
    assert len(shop.take()) == 22 and shop.take(other) == []
    api("POST", "consumers/other/republish", {})
    shop.work_off()
    assert len(shop.take(other)) == 22, "a consumer may be given what was before it"


def test_several_tables_and_older_shapes(api: Api, shop: Shop) -> None:
    shop.database.execute("CREATE TABLE customers (id int PRIMARY KEY, name text)")
    assert api("PATCH", "consumers/orders", {"tables": ["public.orders", "public.customers"]})[0] == 200
    with reading(shop.source):
        shop.database.execute("INSERT INTO customers VALUES (1, 'é')")
        shop.database.execute("ALTER TABLE orders ADD more int; INSERT INTO orders VALUES (30, 'paid', 1, 5)")
        await_messages(24)
    shop.take()
    status, answer = api("POST", "consumers/orders/republish", {"where": "more = 5"})
    assert status == 422 and "public.customers has no column 'more'" in answer["validation_errors"]["where"][0]
    status, answer = api("POST", "consumers/orders/republish", {"where": "more = 5", "table": "public.orders"})
    assert status == 201, answer
    shop.work_off()
    assert [message.key for message in shop.take()] == ['["30"]'], "what has no such column does not match"
    api("POST", "consumers/orders/republish", {"table": "public.customers"})
    api("POST", "consumers/orders/republish", {"table": "public.customers", "from": "table"})
    with reading(shop.source):
        shop.work_off()
    assert [(message.table, message.action) for message in shop.take()] == [("customers", "insert"), ("customers", "read")]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"where": "status ="}, 422, "where"), ({"where": "nothing = 1"}, 422, "has no column 'nothing'"), ({"where": "now() > '2026-01-01'"}, 422, "where"),
        ({"where": 5}, 400, "where: expected a text"), ({"from": "memory"}, 400, "from: expected log or table"), ({"dry_run": 1}, 400, "dry_run"),
        ({"since": "2026-01-01"}, 400, "since"), ({"from": "table", "since": "2026-01-01T00:00:00Z"}, 400, "go with from: log"),
        ({"colour": 1}, 400, "colour"), ({"table": "public.nothing"}, 422, "nothing of public.nothing"),
        ({"table": "public.nothing", "from": "table"}, 422, "not one of the consumer's tables"),
        ({"where": "nothing = 1", "from": "table"}, 422, "has no column 'nothing'"),
        ({"where": "1 / (id - 4) > 0", "dry_run": True}, 422, "division by zero"),
        ({"where": "1 / (id - 4) > 0", "dry_run": True, "from": "table"}, 422, "division by zero"),
    ],
)  # fmt: skip
def test_what_is_refused(api: Api, shop: Shop, body: dict[str, Any], code: int, words: str) -> None:
    status, answer = api("POST", "consumers/orders/republish", body)
    assert status == code and words in answer["summary"], answer
    assert not fetch("SELECT 1 FROM backfills")


def test_a_condition_that_fails_ends_it_with_the_message(api: Api, shop: Shop) -> None:
    for origin in ("log", "table"):
        _, begun = api("POST", "consumers/orders/republish", {"where": "1 / (id - 4) > 0", "from": origin})
        with reading(shop.source):
            shop.work_off()
        shown = api("GET", f"backfills/{begun['backfills'][0]}")[1]
        assert shown["status"] == "failed" and "division by zero" in shown["reason"]


def test_it_stops_resumes_and_outlives_a_killed_worker(api: Api, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    from consumers import republishing

    monkeypatch.setattr(republishing, "COPY_AT_ONCE", 3)
    shop.take()
    _, begun = api("POST", "consumers/orders/republish", {})
    (backfill,) = begun["backfills"]
    before = republishing.get_on

    def dies(*given: Any) -> Any:
        work, job, search, _ = given
        left = [2]

        def keep() -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        return before(work, job, search, keep)

    monkeypatch.setattr(republishing, "get_on", dies)
    with pytest.raises(KeyboardInterrupt):
        step_once()
    monkeypatch.setattr(republishing, "get_on", before)
    assert fetch("SELECT rows_done FROM backfills") == [(6,)]
    assert api("POST", f"backfills/{backfill}/pause")[1]["status"] == "paused"
    step_once()
    assert api("POST", f"backfills/{backfill}/resume")[1]["rows_done"] == 6
    shop.work_off()
    assert len(shop.take()) == 22


def test_the_log_is_kept_while_it_is_looked_at(api: Api, shop: Shop) -> None:
    shop.take()
    api("POST", "consumers/orders/republish", {})
    with store_connection() as conn:
        at_once = timedelta(microseconds=1)
        maintain(conn, at_once)
        maintain(conn, at_once)
        assert fetch("SELECT count(*) FROM messages") == [(22,)]
        shop.work_off()
        assert len(shop.take()) == 22
        assert [*maintain(conn, at_once), *maintain(conn, at_once)]


def test_one_that_goes_on_after_its_part_of_the_log_has_gone_says_so(api: Api, shop: Shop) -> None:
    """One that failed keeps nothing from going."""
    shop.take()
    _, begun = api("POST", "consumers/orders/republish", {"where": "1 / (id - 20) < 0"})
    (backfill,) = begun["backfills"]
    shop.work_off()
    assert api("GET", f"backfills/{backfill}")[1]["status"] == "failed"
    with store_connection() as conn:
        at_once = timedelta(microseconds=1)
        assert [*maintain(conn, at_once), *maintain(conn, at_once)]
    assert api("POST", f"backfills/{backfill}/resume")[0] == 200
    shop.work_off()
    shown = api("GET", f"backfills/{backfill}")[1]
    assert shown["status"] == "failed" and "have left the log meanwhile" in shown["reason"], shown


def test_a_token_of_others_and_a_disabled_consumer(api: Api, shop: Shop, make_consumer: Any) -> None:
    other = make_consumer(shop.source, "other", tables=["public.orders"])
    assert Api("manage", [other])("POST", "consumers/orders/republish", {})[0] == 404
    assert Api("pull", [shop.consumer])("POST", "consumers/orders/republish", {})[0] == 403
    Consumer.objects.filter(pk=shop.consumer.pk).update(status="disabled")
    assert api("POST", "consumers/orders/republish", {})[0] == 409


def test_who_did_it_is_kept(api: Api, shop: Shop) -> None:
    shop.take()
    assert api("POST", "consumers/orders/rewind", {"to": "beginning"})[0] == 200
    _, begun = api("POST", "consumers/orders/republish", {"where": "id = 5"})
    api("POST", f"backfills/{begun['backfills'][0]}/cancel")
    assert api("POST", "backfills", {"consumer": "orders", "table": "public.orders"})[0] == 201
    told = fetch("SELECT action, subject FROM consumers_auditentry ORDER BY id DESC LIMIT 4")
    assert told == [(what, "consumer orders") for what in ("begin backfill", "cancel backfill", "republish", "rewind")]


def test_a_rewind_of_a_filtered_consumer_to_before_its_beginning(api: Api, shop: Shop, make_consumer: Any) -> None:
    """What its filter has judged ahead was judged by where it began."""
    late = make_consumer(shop.source, "late", tables=["public.orders"], where="status = 'paid'")
    assert shop.take(late) == []
    assert api("POST", "consumers/late/rewind", {"to": {"pk": ["2"]}})[0] == 200
    got = shop.take(late)
    assert [message.key for message in got][:2] == ['["2"]', '["4"]'] and len(got) >= 11
    assert lifecycle.waiting(late.pk) == 0


def test_a_key_is_the_same_for_every_delivery_of_a_change(api: Api, shop: Shop) -> None:
    def keys() -> list[str]:
        listed = api("GET", "consumers/orders/messages?state=waiting&limit=100")[1]["data"]
        return [row["message"]["metadata"]["idempotency_key"] for row in listed]

    first = keys()
    assert len(first) == len(set(first)) == 22 and base64.b64decode(first[0]).decode().startswith(str(shop.source.pk))
    shop.take()
    api("POST", "consumers/orders/republish", {})
    shop.work_off()
    assert keys() == first
    shop.take()
    api("POST", "consumers/orders/rewind", {"to": "beginning"})
    assert keys() == first * 2
