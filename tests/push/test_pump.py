"""A pump on real sockets and the real store."""
from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import connection, transaction
from standardwebhooks import Webhook

from consumers import changes
from consumers.models import Consumer, HttpEndpoint
from consumers.store import lifecycle, turns
from consumers.store.connection import store_connection
from delivery.push import retry
from delivery.push.pump import Pump
from delivery.transforming import make
from tests.conftest import ROOT, process_environment, wait_until
from tests.push.endpoint import Endpoint, Got, status
from tests.store.world import Log, fetch, waits_for_lock

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Endpoint]]:
    made: list[Endpoint] = []

    def make(*arguments: Any) -> Endpoint:
        made.append(Endpoint(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def pump(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Pump]]:
    """Start pumps in threads; they are stopped, and their database connections closed, at the end.

    Their turns outlast a test process that a busy machine stops for some seconds.
    """
    monkeypatch.setattr(turns, "TURN_S", 30.0)
    running: list[tuple[Pump, threading.Thread]] = []

    def start() -> Pump:
        made = Pump()

        def run() -> None:
            try:
                made.run(3600)
            finally:
                connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        running.append((made, thread))
        return made

    yield start
    for made, _ in running:
        made._stopped = True
    for _, thread in running:
        thread.join(60)
        assert not thread.is_alive()


def push_to(log: Log, where: Endpoint, *, timeout_ms: int = 5000, headers: Any = None, secret_headers: Any = None, **fields: Any) -> UUID:
    target = HttpEndpoint(
        name=f"e-{uuid4().hex[:6]}", url=where.url, timeout_ms=timeout_ms, headers=headers or {}, secret_headers=secret_headers or {}
    )
    changes.save(target)
    consumer = Consumer.objects.create(name=f"p-{uuid4().hex[:6]}", source=log.source, kind="push", endpoint=target, **fields)
    lifecycle.create_position(consumer.pk, log.source.pk, 0)
    return consumer.pk


def delivered(consumer: UUID, count: int, timeout: float = 20) -> None:
    def acked() -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT acked_count FROM consumer_standing WHERE consumer = %s", [consumer])
            return bool(cursor.fetchone()[0] >= count)

    wait_until(acked, timeout, f"{count} messages delivered")


def parked(consumer: UUID) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT reason, last_error, last_status, deliver_count FROM parked WHERE consumer = %s ORDER BY first_id", [consumer])
        return cursor.fetchall()


def test_a_message_is_one_signed_post(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint()
    consumer = push_to(log, where, headers={"x-team": "shop"}, secret_headers={"authorization": "Bearer s3cret"}, path="/hook?a=b")
    log.append(log.row(1))
    pump()
    delivered(consumer, 1)
    (got,) = where.got
    secret = Consumer.objects.get(pk=consumer).endpoint.signing_secret  # type: ignore[union-attr]
    assert Webhook(secret).verify(got.body, got.headers)["record"]["id"] == 1
    assert got.path == "/hook?a=b" and got.headers["content-type"] == "application/json"
    assert (got.headers["x-team"], got.headers["authorization"]) == ("shop", "Bearer s3cret")
    assert got.headers["webhook-id"] == got.json["metadata"]["idempotency_key"]


def test_batches_are_one_array(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint()
    consumer = push_to(log, where, batch_size=10)
    log.append(*[log.row(key) for key in range(25)])
    pump()
    delivered(consumer, 25)
    # Batches of different groups are in flight at once; inside each the log's order holds.
    assert sorted(where.ids) == list(range(25)) and max(len(got.ids) for got in where.got) == 10
    assert all(got.ids == sorted(got.ids) for got in where.got)


def test_a_group_arrives_in_order_and_a_failing_one_holds_up_only_itself(log: Log, endpoint: Any, pump: Any) -> None:
    def answer(got: Got, handler: Any) -> None:
        failing = got.ids == [1] and len([g for g in where.got if g.ids == [1]]) == 1
        status(500 if failing else 200)(got, handler)

    where = endpoint(answer)
    consumer = push_to(log, where)
    log.append(log.row(1), log.row(2), log.row(1), log.row(3))
    pump()
    delivered(consumer, 4)
    ones = [got.json["record"]["n"] for got in where.got if got.ids == [1]]
    assert ones == [1010, 1010, 1030], "the failed one again, and only then the next of its group"
    assert sorted(got.ids[0] for got in where.got[:3]) == [1, 2, 3], "the others did not wait for it"


def test_retry_after_holds_the_endpoint(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint(lambda got, handler: (status(429, Retry_After="2") if got is where.got[0] else status(200))(got, handler))
    consumer = push_to(log, where)
    log.append(log.row(1))
    pump()
    wait_until(lambda: parked(consumer), 10, "the failure")
    log.append(log.row(2))
    delivered(consumer, 2)
    assert len([got for got in where.got if got.ids == [1]]) == 2
    assert [ok for ok, in attempts(consumer)].count(False) == 1


def attempts(consumer: UUID) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT ok FROM attempts WHERE consumer = %s ORDER BY id", [consumer])
        return cursor.fetchall()


def test_an_attempt_keeps_its_headers_and_no_secret(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint(status(500))
    consumer = push_to(log, where, headers={"x-team": "shop"}, secret_headers={"authorization": "Bearer s3cret"})
    log.append(log.row(1))
    pump()
    wait_until(lambda: attempts(consumer), 10, "the attempt to be kept")
    with connection.cursor() as cursor:
        cursor.execute("SELECT headers FROM attempts WHERE consumer = %s ORDER BY id LIMIT 1", [consumer])
        kept = json.loads(cursor.fetchone()[0])
    sent = where.got[0].headers
    assert kept == {
        "webhook-id": sent["webhook-id"], "webhook-timestamp": sent["webhook-timestamp"], "webhook-signature": "********",
        "x-team": "shop", "authorization": "********",
    }  # fmt: skip


def test_410_pauses_the_consumer(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint(status(410))
    consumer = push_to(log, where)
    log.append(log.row(1))
    pump()
    wait_until(lambda: Consumer.objects.get(pk=consumer).status == "paused", 10, "the pause")
    assert parked(consumer)[0][2] == 410


def test_a_redirect_is_a_failure_that_says_so(log: Log, endpoint: Any, pump: Any) -> None:
    elsewhere = endpoint()
    where = endpoint(status(302, Location=elsewhere.url))
    consumer = push_to(log, where)
    log.append(log.row(1))
    pump()
    (failed, *_) = wait_until(lambda: parked(consumer), 10, "the failure")
    assert "redirects are not followed" in failed[1] and elsewhere.got == []


def test_an_answer_that_breaks_after_its_headers_counts(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint()
    where.answer = where.break_off
    consumer = push_to(log, where)
    log.append(log.row(1))
    pump()
    delivered(consumer, 1)
    assert len(where.got) == 1


@pytest.mark.parametrize("manner", ["hang", "drip"])
def test_an_endpoint_that_never_answers_is_a_timeout(log: Log, endpoint: Any, pump: Any, manner: str) -> None:
    where = endpoint()
    where.answer = getattr(where, manner)
    consumer = push_to(log, where, timeout_ms=500)
    log.append(log.row(1))
    pump()
    (failed, *_) = wait_until(lambda: parked(consumer), 10, "the timeout")
    assert "within 0.5 s" in failed[1]


def test_a_poison_message_is_found_by_smaller_batches(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint(lambda got, handler: status(500 if 5 in got.ids else 200)(got, handler))
    consumer = push_to(log, where, batch_size=8, max_deliver=12)
    log.append(*[log.row(key) for key in range(8)])
    pump()
    delivered(consumer, 7, timeout=60)
    wait_until(lambda: [row[0] for row in parked(consumer)] in (["retry"], ["dead"]), 20, "the poison to be back: it may be under way")
    assert sorted(set(where.ids)) == list(range(8))


def test_past_max_deliver_it_is_a_dead_letter_and_the_group_goes_on(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint(lambda got, handler: status(500 if got.json["record"]["n"] == 1010 else 200)(got, handler))
    consumer = push_to(log, where, max_deliver=2)
    log.append(log.row(1), log.row(1))
    pump()
    delivered(consumer, 1)
    assert parked(consumer) == [("dead", "answered 500", 500, 2)]


def test_a_private_address_is_never_dialled(log: Log, endpoint: Any, pump: Any, settings: Any) -> None:
    settings.SEQUIN_ALLOWED_NETWORKS = []
    where = endpoint()
    consumer = push_to(log, where)
    log.append(log.row(1))
    pump()
    (refused, *_) = wait_until(lambda: parked(consumer), 10, "the refusal")
    assert "not a public address" in refused[1] and where.got == []


def test_hanging_endpoints_do_not_slow_the_others(log: Log, endpoint: Any, pump: Any) -> None:
    """10 consumers, 3 of them hanging, 2 pumps: the other 7 get everything long before a hanging one times out."""
    wheres = [endpoint() for _ in range(10)]
    for where in wheres[:3]:
        where.answer = where.hang
    consumers = [push_to(log, where, timeout_ms=60_000) for where in wheres]
    pump()
    pump()
    log.append(*[log.row(key) for key in range(50)])
    for consumer in consumers[3:]:
        delivered(consumer, 50, timeout=30)
    assert all(sorted(where.ids) == list(range(50)) for where in wheres[3:])
    for where in wheres:
        where.closing.set()


def test_an_edited_endpoint_gets_what_is_not_sent_yet(log: Log, endpoint: Any, pump: Any) -> None:
    broken, mended = endpoint(status(500)), endpoint()
    consumer = push_to(log, broken)
    log.append(log.row(1))
    pump()
    wait_until(lambda: parked(consumer), 10, "the failure")
    target = Consumer.objects.get(pk=consumer).endpoint
    assert target is not None
    target.url = mended.url
    changes.save(target)
    delivered(consumer, 1)
    assert mended.ids == [1]


def test_a_stopped_pump_gives_back_what_it_has(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint()
    where.answer = where.hang
    consumer = push_to(log, where, timeout_ms=60_000)
    log.append(log.row(1), log.row(2))
    first = pump()
    wait_until(lambda: where.got, 10, "the request")
    first._stopped = True
    second = endpoint()
    HttpEndpoint.objects.update(url=second.url)
    wait_until(lambda: lifecycle.backlog(consumer).out == 0, 15, "the messages to be given back")
    pump()
    delivered(consumer, 2)
    assert sorted(second.ids) == [1, 2]
    where.closing.set()


def held_back(where: Endpoint, code: int = 204) -> threading.Event:
    """Let the endpoint answer only when the event is set."""
    release = threading.Event()

    def answer(got: Got, handler: Any) -> None:
        release.wait(120)
        status(code)(got, handler)

    where.answer = answer
    return release


@contextmanager
def claim_held_up(log: Log, consumer: UUID) -> Iterator[None]:
    """A new message comes, and its pump waits in the store for the claim of it."""
    with store_connection(autocommit=False) as conn:
        conn.execute("SELECT FROM consumer_position WHERE consumer = %s FOR UPDATE", [consumer])
        log.append(log.row(3))
        lifecycle.wake(consumer)
        wait_until(lambda: waits_for_lock("%sequin_claim%"), 10, "the claim to wait")
        yield


def pump_process(seconds: int = 60) -> subprocess.Popen[bytes]:
    """A pump in a process of its own, on the test's store."""
    code = f"import django; django.setup(); from delivery.push.pump import Pump; Pump().run({seconds})"
    return subprocess.Popen([sys.executable, "-c", code], env=process_environment(), cwd=ROOT)


def turns_of(pump: Pump) -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM turns WHERE holder = %s", [pump.holder])
        return int(cursor.fetchone()[0])


def longest_turn_s(pump: Pump) -> float:
    with connection.cursor() as cursor:
        cursor.execute("SELECT coalesce(extract(epoch FROM max(until) - clock_timestamp()), 0) FROM turns WHERE holder = %s", [pump.holder])
        return float(cursor.fetchone()[0])


class Slice(float):
    """Of a pump's time: over when `over` is set, whatever the clock says."""

    over: threading.Event

    def __radd__(self, now: float) -> Slice:
        return self

    def __gt__(self, now: float) -> bool:
        return not self.over.is_set()


def begins(made: Pump) -> tuple[threading.Thread, threading.Event]:
    """Let a pump run until its slice is over, which is told by the event; the thread ends with it."""
    slice_s = Slice()
    slice_s.over = threading.Event()

    def run() -> None:
        try:
            made.run(slice_s)
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, slice_s.over


def test_turns_move_to_another_pump_without_a_message_sent_twice(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint()
    release = held_back(where)
    consumers = [push_to(log, where, timeout_ms=60_000) for _ in range(4)]
    log.append(log.row(1), log.row(1))
    first = pump()
    wait_until(lambda: len(where.got) == 4, 10, "a request of each")
    second = pump_process()
    try:
        wait_until(lambda: sum(lane.leaving for lane in first._lanes.values()) == 2, 20, "two to be given up")
        assert len(where.got) == 4 and turns_of(first) == 4, "not before what is in flight is answered"
        release.set()
        for consumer in consumers:
            delivered(consumer, 2)
        wait_until(lambda: turns_of(first) == 2, 10, "the turns to be shared")
        assert sorted(where.ids) == [1] * 8
    finally:
        second.kill()
        second.wait()


def test_the_end_of_a_slice_cuts_no_slow_answer_off(log: Log, endpoint: Any) -> None:
    where, quick = endpoint(), endpoint()
    release = held_back(where)
    slow, other = push_to(log, where, timeout_ms=60_000), push_to(log, quick)
    log.append(log.row(1))
    made = Pump()
    thread, over = begins(made)
    wait_until(lambda: where.got, 10, "the request")
    over.set()
    wait_until(lambda: made._retired and any(lane.leaving for lane in made._lanes.values()), 10, "the slice to end")
    log.append(log.row(2))
    delivered(other, 2)  # the others go on meanwhile
    release.set()
    thread.join(60)
    assert not thread.is_alive()
    delivered(slow, 1)
    assert where.ids.count(1) == 1


def test_a_pump_that_ends_gives_up_all_other_turns_before_the_last_answer(log: Log, endpoint: Any, pump: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("delivery.push.pump.LAST_ANSWERS_S", 60.0)
    where, quick = endpoint(), endpoint()
    slow, others = push_to(log, where, timeout_ms=60_000), [push_to(log, quick) for _ in range(4)]
    log.append(log.row(1))
    first = pump()
    for consumer in [slow, *others]:
        delivered(consumer, 1)
    release = held_back(where)
    log.append(log.row(2))
    wait_until(lambda: where.ids == [1, 2], 10, "the request")
    try:
        first._stopped = True
        wait_until(lambda: turns_of(first) == 1, 10, "the other turns to be given up")
        second = pump()
        log.append(log.row(3))
        for consumer in others:
            delivered(consumer, 3)
        assert turns_of(first) == 1 and turns_of(second) == 4 and where.ids == [1, 2]
    finally:
        release.set()
    delivered(slow, 3)
    assert sorted(where.ids) == [1, 2, 3] and sorted(quick.ids) == [1] * 4 + [2] * 4 + [3] * 4
    assert turns_of(second) == 5


@pytest.mark.parametrize("others", [0, 1])
def test_an_answer_that_is_awaited_at_the_end_of_a_slice_holds_up_no_other_slow_endpoint(
    log: Log, endpoint: Any, pump: Any, others: int
) -> None:
    hanging, slow = endpoint(), endpoint()
    release_hanging, release_slow = held_back(hanging), held_back(slow)
    last, other = push_to(log, hanging, timeout_ms=60_000), push_to(log, slow, timeout_ms=60_000)
    log.append(log.row(1))
    made = Pump()
    thread, over = begins(made)
    try:
        wait_until(lambda: hanging.got and slow.got, 10, "the requests")
        over.set()
        wait_until(lambda: made._retired and sum(lane.leaving for lane in made._lanes.values()) == 2, 10, "the slice to end")
        takes_over = pump() if others else made
        wait_until(lambda: turns.shares()[1] == others, 10, "the other to begin")  # else the first one takes its turn back
        log.append(log.row(2))
        assert turns_of(made) == 2, "not before what is in flight is answered"
        release_slow.set()
        delivered(other, 2)
        wait_until(lambda: turns_of(takes_over) == 2 - others, 10, "its turn to be kept, or taken over")
        assert thread.is_alive()
        release_hanging.set()
        thread.join(60)
        takes_over = takes_over if others else pump()
        delivered(last, 2)
        assert sorted(hanging.ids) == sorted(slow.ids) == [1, 2]
    finally:
        release_slow.set()
        release_hanging.set()
        thread.join(60)
    assert not thread.is_alive()


def test_a_pump_that_awaits_an_answer_takes_over_from_one_that_ends(log: Log, endpoint: Any, pump: Any) -> None:
    where, quick = endpoint(), endpoint()
    release = held_back(where)
    slow, other = push_to(log, where, timeout_ms=60_000), push_to(log, quick, status="paused")
    log.append(log.row(1))
    made = Pump()
    thread, over = begins(made)
    try:
        wait_until(lambda: where.got, 10, "the request")
        over.set()
        wait_until(lambda: made._retired and any(lane.leaving for lane in made._lanes.values()), 10, "the slice to end")
        second = pump()
        wait_until(lambda: turns.shares()[1] == 1, 10, "the other to begin")
        resumed = Consumer.objects.get(pk=other)
        resumed.status = "active"
        changes.save(resumed)
        delivered(other, 1)
        assert turns_of(second) == 1, "one that ends takes nothing while there is another"
        second._stopped = True
        wait_until(lambda: turns_of(made) == 2, 10, "the turn to be taken over")
        log.append(log.row(2))
        delivered(other, 2)
        assert thread.is_alive() and where.ids == [1]
    finally:
        release.set()
        thread.join(60)
    assert not thread.is_alive()
    delivered(slow, 1)


def test_a_turn_goes_with_the_last_answer(log: Log, endpoint: Any, pump: Any, monkeypatch: Any) -> None:
    """Not only when turns are next looked at: what a pump that has just begun should serve waits meanwhile."""
    where = endpoint()
    release = held_back(where)
    for _ in range(4):
        push_to(log, where, timeout_ms=60_000)
    log.append(log.row(1))
    first = pump()
    wait_until(lambda: len(where.got) == 4, 10, "a request of each")
    # Never again by the clock; only this process, the other pump has its own.
    monkeypatch.setattr("consumers.store.turns.TURN_S", 3600.0)
    monkeypatch.setattr("consumers.store.turns.ALIVE_S", 60.0)  # it will not beat, either, and the other may take long to begin
    wait_until(lambda: longest_turn_s(first) > 60, 10, "the turns to be held for longer")
    monkeypatch.setattr("delivery.push.pump.RENEW_TURNS_S", 30.0)
    second = pump_process()
    try:
        wait_until(lambda: sum(lane.leaving for lane in first._lanes.values()) == 2, 10, "two to be given up as soon as it has begun")
        release.set()
        wait_until(lambda: turns_of(first) == 2, 10, "the turns to be shared")
    finally:
        second.kill()
        second.wait()


def test_a_probe_that_hangs_holds_up_no_end_of_a_slice(log: Log, endpoint: Any, pump: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("delivery.push.pump.LAST_ANSWERS_S", 60.0)
    where, quick = endpoint(), endpoint()
    release = threading.Event()

    def answer(got: Got, handler: Any) -> None:
        if len(where.got) > retry.FAILURES_TO_OPEN:
            release.wait(60)
        status(503)(got, handler)

    where.answer = answer
    push_to(log, where, timeout_ms=60_000, concurrency=1)
    other = push_to(log, quick)
    log.append(*[log.row(key) for key in range(10)])
    made = pump()
    try:
        wait_until(lambda: len(where.got) > retry.FAILURES_TO_OPEN, 20, "the probe of an open breaker")
        delivered(other, 10)
        made._stopped = True
        wait_until(lambda: turns_of(made) == 0, 10, "the turns, the healthy one's too, to be given up")
    finally:
        release.set()


def test_pausing_lets_what_is_in_flight_be_answered(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint()
    release = held_back(where)
    consumer = push_to(log, where, timeout_ms=60_000, concurrency=1)
    log.append(log.row(1), log.row(2))
    pump()
    wait_until(lambda: where.got, 10, "the request")
    configured = Consumer.objects.get(pk=consumer)
    configured.status = "paused"
    changes.save(configured)
    wait_until(lambda: lifecycle.backlog(consumer).blocked == 1, 10, "the other one to be given back")
    release.set()
    delivered(consumer, 1)
    configured.status = "active"
    changes.save(configured)
    delivered(consumer, 2)
    assert where.ids == [1, 2]


def test_an_edit_of_what_is_wanted_applies_to_all_that_is_not_sent(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint()
    release = held_back(where)
    consumer = push_to(log, where, timeout_ms=60_000, concurrency=1)
    log.append(log.row(1), log.row(2), log.row(3, action=b"D"))
    pump()
    wait_until(lambda: where.got, 10, "the request")
    configured = Consumer.objects.get(pk=consumer)
    configured.actions = ["delete"]
    changes.save(configured)

    def claimed_anew() -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT array_agg(m.action ORDER BY m.id) FROM leases, messages m WHERE m.id = ANY (ids)")
            return bool(cursor.fetchone()[0] == ["I", "D"])  # the first is in flight

    wait_until(claimed_anew, 10, "the rest to be claimed anew")
    release.set()
    delivered(consumer, 2)
    assert where.ids == [1, 3] and lifecycle.backlog(consumer).undelivered == 0


def test_while_the_store_is_slow_what_is_in_hand_is_sent_and_a_failure_holds_up_its_group(log: Log, endpoint: Any, pump: Any) -> None:
    release = threading.Event()

    def answer(got: Got, handler: Any) -> None:
        release.wait(30)
        failing = got.ids == [5] and where.ids.count(5) == 1
        status(500 if failing else 204)(got, handler)

    where = endpoint(answer)
    consumer = push_to(log, where, concurrency=2)
    log.append(*[log.row(key) for key in range(20)], log.row(5))
    pump()
    wait_until(lambda: len(where.got) == 2, 10, "the first requests")
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT FROM consumer_position WHERE consumer = %s FOR UPDATE", [consumer])
        release.set()
        wait_until(lambda: sorted(where.ids) == list(range(20)), 10, "the others, though nothing can be acknowledged")
    delivered(consumer, 21)
    assert where.ids.count(5) == 3 and len(where.ids) == 22


def test_a_consumer_that_was_let_go_gets_nothing_more_when_its_last_answer_comes_while_the_store_works(
    log: Log, endpoint: Any, pump: Any
) -> None:
    first, answered = threading.Event(), threading.Event()

    def answer(got: Got, handler: Any) -> None:
        first.wait(30)
        status(204)(got, handler)
        answered.set()

    where, other, third = endpoint(answer), endpoint(), endpoint()
    second = held_back(other)
    goes, stays, claims = push_to(log, where, concurrency=1), push_to(log, other, concurrency=1), push_to(log, third)
    log.append(log.row(1), log.row(2))
    pump()
    wait_until(lambda: where.got and other.got, 10, "the first requests")
    delivered(claims, 2)
    Consumer.objects.filter(pk=goes).update(status="disabled")
    wait_until(lambda: len(parked(goes)) == 2, 10, "what it has in hand to be given back")
    with claim_held_up(log, claims):
        first.set()
        wait_until(answered.is_set, 10, "the last answer")
        second.set()
        wait_until(lambda: len(other.got) == 2, 10, "what the pump has in hand of another one to be sent")
    delivered(stays, 3)
    assert where.ids == [1]


def test_a_pump_that_waits_for_the_store_sends_nothing_once_its_turns_have_ended(
    log: Log, endpoint: Any, pump: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN_S", 2.0)
    where, other = endpoint(), endpoint()
    release = held_back(where)
    loses, claims = push_to(log, where, concurrency=1), push_to(log, other)
    log.append(log.row(1), log.row(2))
    lanes = pump()._lanes
    wait_until(lambda: where.got, 10, "the first request")
    delivered(claims, 2)
    lost = lanes[loses]
    with claim_held_up(log, claims):
        monkeypatch.setattr(turns, "TURN_S", 60.0)  # the other one keeps it; the pump waits, and renews nothing
        wait_until(lambda: loses in turns.take(uuid4(), 2), 10, "the turn to end")
        release.set()
        wait_until(lambda: lost.acks, 10, "the answer to be taken in")
    wait_until(lambda: loses not in lanes, 10, "the pump to see that the turn is gone")
    assert where.ids == [1] and not lost.pending


def test_a_transform_that_this_machine_cannot_run_is_run_later(log: Log, endpoint: Any, pump: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where = endpoint()
    consumer = push_to(log, where, transform="function transform(action, record) return {record = record} end")
    runs = []

    def runs_out(*given: Any) -> Any:
        runs.append(1)
        if len(runs) == 1:
            raise RuntimeError("can't start new thread")
        return make(*given)

    monkeypatch.setattr("delivery.push.pump.make", runs_out)
    log.append(log.row(1))
    pump()
    delivered(consumer, 1)
    assert where.ids == [1] and len(runs) == 2


def test_a_consumer_deleted_in_flight_harms_nobody(log: Log, endpoint: Any, pump: Any) -> None:
    where, other = endpoint(), endpoint()
    release = held_back(where, 410)
    goes, stays = push_to(log, where), push_to(log, other)
    log.append(log.row(1))
    pump()
    wait_until(lambda: where.got, 10, "the request")
    changes.delete(Consumer.objects.get(pk=goes), discard=True)
    release.set()
    log.append(log.row(2))
    delivered(stays, 2)


def test_strange_notices_do_no_harm(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint()
    consumer = push_to(log, where)
    running = pump()
    wait_until(lambda: running._lanes, 10, "the turn")
    with connection.cursor() as cursor:
        for channel in ("sequin_log", "sequin_consumer", "sequin_config", "sequin_turns", "sequin_stop"):
            for payload in ("", "junk", "{}", "[]", '{"source": 1}', "consumer:x"):
                cursor.execute("SELECT pg_notify(%s, %s)", [channel, payload])
    log.append(log.row(1))
    delivered(consumer, 1)


def test_many_poison_messages_starve_nobody(log: Log, endpoint: Any, pump: Any) -> None:
    """The breaker opens for an endpoint that answers badly to some messages only; a probe with another one closes it."""

    def answer(got: Got, handler: Any) -> None:
        status(500 if got.ids[0] < 22 else 204)(got, handler)

    where = endpoint(answer)
    consumer = push_to(log, where, concurrency=2)
    log.append(*[log.row(key) for key in range(60)])
    pump()
    delivered(consumer, 38, timeout=40)
    assert lifecycle.backlog(consumer).undelivered == 22


def test_a_consumer_that_is_enabled_again_is_served_at_once(log: Log, endpoint: Any, pump: Any) -> None:
    """Its turn goes when it is disabled: kept by the pump that serves it no more, nobody could take it until the slice ends."""
    where = endpoint()
    consumer = push_to(log, where)
    pump()
    log.append(log.row(1))
    delivered(consumer, 1)
    configured = Consumer.objects.get(pk=consumer)
    configured.status = "disabled"
    changes.save(configured)
    wait_until(lambda: not fetch("SELECT 1 FROM turns WHERE consumer = %s", consumer), 20, "the turn to be given up")
    configured.status = "active"
    changes.save(configured)
    log.append(log.row(2))
    delivered(consumer, 2)
    assert where.ids == [1, 2]


def test_resuming_delivers_what_was_collected(log: Log, endpoint: Any, pump: Any) -> None:
    where = endpoint()
    consumer = push_to(log, where, status="paused")
    log.append(log.row(1))
    pump()
    configured = Consumer.objects.get(pk=consumer)
    configured.status = "active"
    changes.save(configured)
    delivered(consumer, 1)
