"""Transforms where messages are delivered: payloads, what is dropped, what fails, and neighbours that notice nothing."""
from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import connection

from consumers import changes
from consumers.models import Consumer
from consumers.store.models import ConsumerPosition
from delivery import transforming
from delivery.push.pump import Pump
from tests.api.test_management import Api
from tests.conftest import wait_until
from tests.push.endpoint import Endpoint, status
from tests.push.test_pump import endpoint, pump, push_to  # noqa: F401
from tests.store.world import Log

pytestmark = pytest.mark.django_db(transaction=True)

EVEN = "function transform(action, record, changes, metadata)\n  if record.id % 2 == 1 then return nil end\n  return {id = record.id, key = metadata.idempotency_key}\nend"
BREAKS = "function transform(action, record)\n  if record.id == 2 then error('two') end\n  return record.id\nend"
SLOW = "function transform(action, record)\n  while true do end\nend"


@pytest.fixture
def api(transactional_db: None) -> Api:
    return Api()


def pull(log: Log, transform: str, **fields: Any) -> Consumer:  # noqa: F811
    consumer = Consumer.objects.get(pk=log.consumer(transform=transform, **fields))
    return consumer


def receive(api: Api, consumer: Consumer, size: int = 100, wait: int = 0) -> list[Any]:
    code, answer = api("POST", f"http_pull_consumers/{consumer.name}/receive", {"batch_size": size, "wait_for": wait})
    assert code == 200, answer
    return list(answer["data"])


def ack(api: Api, consumer: Consumer, items: list[Any]) -> None:
    answer = api("POST", f"http_pull_consumers/{consumer.name}/ack", {"ack_ids": [item["ack_id"] for item in items]})
    assert answer[1]["acked"] == len(items)


def parked(consumer: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT reason, deliver_count, last_error FROM parked WHERE consumer = %s ORDER BY first_id", [getattr(consumer, "pk", consumer)])
        return cursor.fetchall()


def test_pull_gives_what_the_function_returns_and_counts_what_it_drops(log: Log, api: Api) -> None:  # noqa: F811
    consumer = pull(log, EVEN)
    log.append(*[log.row(key) for key in range(10)])
    items = receive(api, consumer, 3) + receive(api, consumer, 100)
    assert [item["data"]["id"] for item in items] == [0, 2, 4, 6, 8] and all(item["data"]["key"] for item in items)
    ack(api, consumer, items)
    position = ConsumerPosition.objects.get(pk=consumer.pk)
    assert (position.acked_count, position.filtered_count, position.out_count) == (5, 5, 0)
    log.append(*[log.row(2 * key + 1) for key in range(2000)])
    assert receive(api, consumer, 1) == [] and ConsumerPosition.objects.get(pk=consumer.pk).filtered_count == 2005


def test_pull_parks_what_fails_and_gives_it_once_the_function_is_mended(log: Log, api: Api) -> None:  # noqa: F811
    consumer = pull(log, BREAKS)
    log.append(*[log.row(key) for key in (1, 2, 3, 2, 4)])
    items = receive(api, consumer)
    assert [item["data"] for item in items] == [1, 3, 4]
    rows = parked(consumer)
    assert [(reason, tries) for reason, tries, _ in rows] == [("error", 1), ("blocked", 0)] and "transform: line 2" in rows[0][2] and "two" in rows[0][2]
    with connection.cursor() as cursor:
        cursor.execute("UPDATE parked SET due_at = now() WHERE due_at IS NOT NULL")
    assert receive(api, consumer) == [] and parked(consumer)[0][1] == 2
    consumer.refresh_from_db()
    consumer.transform = "function transform(action, record) return {mended = record.id} end"
    changes.save(consumer)
    items = receive(api, consumer)
    assert [item["data"] for item in items] == [{"mended": 2}, {"mended": 2}] and [item["deliver_count"] for item in items] == [3, 1]


@pytest.fixture
def mended_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Consumer], None]:
    """The function has failed, the store does not know it yet, and then the function is saved anew."""

    def prepare(consumer: Consumer) -> None:
        run, done = transforming._run, []

        def edit_after_it(*given: Any) -> Any:
            results = run(*given)
            if not done:
                done.append(True)
                edited = Consumer.objects.get(pk=consumer.pk)
                edited.transform = "function transform(action, record) return {mended = record.id} end"
                changes.save(edited)
                connection.close()
            return results

        monkeypatch.setattr(transforming, "_run", edit_after_it)

    return prepare


def test_pull_gives_at_once_what_failed_by_the_function_of_before(log: Log, api: Api, mended_while_it_runs: Any) -> None:  # noqa: F811
    consumer = pull(log, BREAKS)
    mended_while_it_runs(consumer)
    log.append(log.row(2), log.row(2))
    items = receive(api, consumer) or receive(api, consumer)
    assert [item["data"] for item in items] == [{"mended": 2}, {"mended": 2}]


def test_push_sends_at_once_what_failed_by_the_function_of_before(
    log: Log, endpoint: Any, pump: Any, mended_while_it_runs: Any, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    monkeypatch.setattr(transforming, "delay_ms", lambda *_: 3_600_000)
    reconfigure, fail, failed = Pump._reconfigure, transforming.claims.fail, threading.Event()
    monkeypatch.setattr(Pump, "_reconfigure", lambda pump: reconfigure(pump) if failed.is_set() else None)  # its notice comes after the failure

    def note(*given: Any) -> Any:
        settled = fail(*given)
        failed.set()
        return settled

    monkeypatch.setattr(transforming.claims, "fail", note)
    where = endpoint()
    mended_while_it_runs(Consumer.objects.get(pk=push_to(log, where, transform=BREAKS)))
    log.append(log.row(2))
    pump()
    wait_until(lambda: where.got, 10, "it to arrive")
    assert where.got[0].json == {"mended": 2} and failed.is_set()


def test_a_function_that_always_fails_ends_in_dead_letters(log: Log, api: Api) -> None:  # noqa: F811
    consumer = pull(log, "function transform() error('always') end", max_deliver=1)
    log.append(log.row(1), log.row(1), log.row(2))
    assert receive(api, consumer) == []
    assert [reason for reason, _, _ in parked(consumer)] == ["dead", "dead", "dead"]


def test_a_waiting_poll_is_not_ended_by_what_is_dropped(log: Log, api: Api) -> None:  # noqa: F811
    consumer = pull(log, EVEN)
    log.append(log.row(1), log.row(3))
    assert receive(api, consumer, wait=200) == []


def test_rows_are_record_and_metadata_only(log: Log, api: Api) -> None:  # noqa: F811
    consumer = pull(log, "", stream="rows")
    log.append(log.row(1), log.row(1), log.row(2), log.row(1, action=b"D"))
    items = receive(api, consumer)
    assert [sorted(item["data"]) for item in items] == [["metadata", "record"]] * 2
    assert sorted(item["data"]["record"]["id"] for item in items) == [1, 2]


def test_push_sends_what_the_function_returns(log: Log, endpoint: Callable[..., Endpoint], pump: Callable[[], Pump]) -> None:  # noqa: F811
    single, batched = endpoint(), endpoint()
    first, second = push_to(log, single, transform=EVEN), push_to(log, batched, transform=EVEN, batch_size=3)
    log.append(*[log.row(key) for key in range(10)])
    pump()
    wait_until(lambda: len(single.got) == 5 and sum(len(json.loads(got.body)["data"]) for got in batched.got) == 5, 20)
    assert sorted(json.loads(got.body)["id"] for got in single.got) == [0, 2, 4, 6, 8]
    assert all(got.headers["webhook-id"] == json.loads(got.body)["key"] for got in single.got)
    wait_until(lambda: all(ConsumerPosition.objects.get(pk=one).filtered_count == 5 and ConsumerPosition.objects.get(pk=one).acked_count == 5 for one in (first, second)))


def test_a_slow_function_fails_its_own_messages_and_no_others(log: Log, endpoint: Callable[..., Endpoint], pump: Callable[[], Pump]) -> None:  # noqa: F811
    slow, quick = endpoint(), endpoint()
    hanging, fine = push_to(log, slow, transform=SLOW), push_to(log, quick)
    log.append(*[log.row(key) for key in range(20)])
    pump()
    wait_until(lambda: len(quick.got) == 20, 20)
    wait_until(lambda: len(parked(hanging)) == 20, 30)
    assert slow.got == [] and all("longer than 50 ms CPU" in error for _, _, error in parked(hanging)) and parked(fine) == []


def test_an_edit_counts_for_what_a_pump_holds(log: Log, endpoint: Callable[..., Endpoint], pump: Callable[[], Pump]) -> None:  # noqa: F811
    where = endpoint(lambda got, handler: status(204 if b"new" in got.body else 503)(got, handler))
    consumer_id = push_to(log, where, transform="function transform(a, record) return {old = record.id} end")
    log.append(*[log.row(key) for key in range(50)])
    pump()
    wait_until(lambda: where.got, 20)
    consumer = Consumer.objects.get(pk=consumer_id)
    consumer.transform = "function transform(a, record) return {new = record.id} end"
    changes.save(consumer)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE parked SET due_at = now() WHERE due_at IS NOT NULL")
    wait_until(lambda: len({json.loads(got.body).get("new") for got in where.got} - {None}) == 50, 30)


def test_what_does_not_compile_is_refused_with_its_line(log: Log) -> None:  # noqa: F811
    for text, told in (("function transform(\n  return 1\nend", "line 2"), ("x = 1", "transform"), ("function transform() end " + " " * 300_000, "longer")):
        consumer = Consumer(name="c", source=log.source, kind="pull", transform=text)
        with pytest.raises(ValidationError) as refused:
            consumer.full_clean()
        assert told in refused.value.message_dict["transform"][0]


def test_children_that_are_killed_lose_and_double_nothing(log: Log, endpoint: Callable[..., Endpoint], pump: Callable[[], Pump]) -> None:  # noqa: F811
    where = endpoint()
    push_to(log, where, transform="function transform(a, record) return {record = {id = record.id}} end", batch_size=5)
    for begin in range(0, 1000, 100):
        log.append(*[log.row(key) for key in range(begin, begin + 100)])
    pump()
    killed = 0

    def all_there() -> bool:
        nonlocal killed
        for transformer in list(transforming.pool._transformers.values()):
            if transformer.pid is not None and killed < 20:
                with suppress(ProcessLookupError):
                    os.kill(transformer.pid, signal.SIGKILL)
                    killed += 1
        return sum(len(got.ids) for got in list(where.got)) >= 1000

    wait_until(all_there, 60)
    ids = [number for got in where.got for number in got.ids]
    assert sorted(ids) == list(range(1000)) and killed >= 5
