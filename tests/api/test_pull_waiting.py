"""Long polls: whatever makes a message deliverable ends them, a thousand disturb nobody, and the server's stop ends all."""
from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
from django.db import connection
from django.utils import timezone

from consumers.changes import save
from consumers.envelope import addressing
from consumers.models import ApiToken, Consumer
from consumers.store import claims, lifecycle
from consumers.store.connection import store_connection
from consumers.tokens import create_token
from delivery.pull import calls
from delivery.pull.directory import Receiver
from delivery.pull.shortcut import Called
from delivery.pull.waiting import WaitingRoom
from tests.api.pull_world import Answer, Client, World, server, until, web_server, world  # noqa: F401  (fixtures)
from tests.conftest import wait_until
from tests.store.world import Log

SOON_S = 60.0  # long before the polls would end by themselves
WAIT_MS = 120_000


class Poll:
    """A long poll under way in a thread."""

    def __init__(self, client: Client, consumer: str, **parameters: Any) -> None:
        self.is_long = "wait_for" not in parameters
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.ended_at = 0.0
        self._thread = threading.Thread(target=self._run, args=(client, consumer, {"wait_for": WAIT_MS, **parameters}), daemon=True)
        self._thread.start()

    def _run(self, client: Client, consumer: str, parameters: dict[str, Any]) -> None:
        try:
            self.answer = client.receive(consumer, **parameters)
        except Exception as error:
            self.error = error
        self.ended_at = time.monotonic()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self, within_s: float) -> Answer:
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"still waiting after {within_s} s"
        assert self.answer is not None, self.error
        return self.answer


def waiting(world: World, consumer: Consumer, count: int = 1, client: Client | None = None, **parameters: Any) -> list[Poll]:
    """`count` polls that have looked and found nothing."""
    polls = [Poll(client or world.client, consumer.name, **parameters) for _ in range(count)]
    _let_them_settle(polls)
    return polls


def _let_them_settle(polls: list[Poll]) -> None:
    """From outside a waiting poll looks like one that is about to look, so this gives them a moment. Nothing depends on it:
    a poll that looks later finds the message at once."""
    threading.Event().wait(0.3)
    assert not any(poll.is_over for poll in polls if poll.is_long)


def test_an_append_ends_it(world: World) -> None:
    consumer = world.consumer()
    [poll] = waiting(world, consumer)
    world.log.append([1])
    assert poll.result(SOON_S).keys == [1]


def test_an_append_to_another_table_does_not(world: World) -> None:
    consumer = world.consumer(tables=["public.orders"])
    [poll] = waiting(world, consumer, wait_for=1500)
    world.log.append([1], table="customers")
    assert poll.result(SOON_S).body == {"data": []}


def test_a_lost_notice_is_found_by_the_sweep(world: World) -> None:
    consumer = world.consumer()
    [poll] = waiting(world, consumer)
    world.log.append([1], notify=False)
    assert poll.result(SOON_S).keys == [1]


def test_a_nack_ends_it(world: World) -> None:
    consumer = world.consumer()
    world.log.append([1])
    held = world.client.receive(consumer.name)
    [poll] = waiting(world, consumer)
    world.client.settle("nack", consumer.name, held.ack_ids)
    assert poll.result(SOON_S).keys == [1]


def test_a_delayed_nack_ends_it_when_it_falls_due(world: World) -> None:
    consumer = world.consumer()
    world.log.append([1])
    held = world.client.receive(consumer.name)
    [poll] = waiting(world, consumer)
    before = time.monotonic()
    world.client.settle("nack", consumer.name, held.ack_ids, delay_ms=700)
    assert poll.result(SOON_S).keys == [1]
    assert poll.ended_at - before > 0.69


def test_the_end_of_a_lease_ends_it(world: World) -> None:
    consumer = world.consumer(ack_wait_ms=3000)
    world.log.append([1])
    world.client.receive(consumer.name)
    [poll] = waiting(world, consumer)
    assert poll.result(3 + SOON_S).keys == [1]


def test_an_ack_ends_it_when_the_group_was_busy(world: World) -> None:
    consumer = world.consumer()
    world.log.append([1])
    held = world.client.receive(consumer.name)
    world.log.append([1])
    [poll] = waiting(world, consumer)
    world.client.settle("ack", consumer.name, held.ack_ids)
    assert poll.result(SOON_S).keys == [1]


def test_an_ack_ends_it_when_too_many_were_out(world: World) -> None:
    consumer = world.consumer(max_ack_pending=1)
    world.log.append([1, 2])
    held = world.client.receive(consumer.name)
    [poll] = waiting(world, consumer)
    world.client.settle("ack", consumer.name, held.ack_ids)
    assert poll.result(SOON_S).keys == [2]


def test_resuming_a_paused_consumer_ends_it(world: World) -> None:
    consumer = world.consumer(status="paused")
    world.log.append([1])
    [poll] = waiting(world, consumer)
    consumer.status = "active"
    save(consumer)
    assert poll.result(SOON_S).keys == [1]


def test_retrying_a_dead_letter_ends_it(world: World) -> None:
    consumer = world.consumer(max_deliver=1)
    world.log.append([1])
    world.client.settle("nack", consumer.name, world.client.receive(consumer.name).ack_ids)
    [poll] = waiting(world, consumer)
    assert lifecycle.retry(consumer.pk, state="dead") == 1
    assert poll.result(SOON_S).keys == [1]


def test_a_poll_that_goes_the_moment_it_is_woken_wakes_the_next() -> None:
    """Its time is over, and it goes with nothing: what it was woken for is there for others, and no second notice comes."""
    waiting_room = WaitingRoom()
    waiting_room.listen = lambda: None  # type: ignore[method-assign]
    to = addressing(consumer_id=uuid4(), consumer_name="c", source_id=uuid4(), source_name="s", database="d", stream="changes")
    receiver = Receiver(uuid4(), "c", uuid4(), timezone.now(), (), 30_000, "", to)
    first, second = waiting_room.enter(receiver), waiting_room.enter(receiver)
    waiting_room.wake(receiver.id)
    assert first.event.is_set() and not second.event.is_set()
    waiting_room.leave(first, more=False)
    assert second.event.is_set()


def test_a_sweep_hears_what_was_changed_before_it_wakes_anybody(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may see an append before the notices of what came earlier were read: a token revoked, say."""
    order: list[str] = []
    waiting_room = WaitingRoom()
    monkeypatch.setattr(waiting_room, "_hear", lambda channel, payload: order.append(payload))
    monkeypatch.setattr(waiting_room, "_wake_source", lambda source, relations: order.append("woken"))
    with store_connection() as listening, store_connection() as other:
        listening.execute("LISTEN sequin_config")
        other.execute("SELECT pg_notify('sequin_config', 'token')")
        log.append(log.row(1))
        waiting_room._sweep(listening, {})
    assert order == ["token", "woken"]


def test_a_poll_hears_of_tables_that_were_added_while_it_waits(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sweep helps: it would be a second late."""
    monkeypatch.setattr("delivery.pull.waiting.SWEEP_S", 1000)
    monkeypatch.setattr("consumers.changes.publish_tables", lambda source, tables: None)
    monkeypatch.setattr("consumers.changes.check_where", lambda consumer: [])
    monkeypatch.setattr("consumers.changes.check_groups", lambda consumer: [])
    consumer = Consumer.objects.get(pk=log.consumer(tables=["public.others"]))
    _, secret = create_token("t", scope="pull")
    looked: list[Any] = []
    claim = claims.claim

    def look(*given: Any, **named: Any) -> Any:
        found = claim(*given, **named)
        looked.append(found.version)
        return found

    monkeypatch.setattr(claims, "claim", look)
    request = Called({"REQUEST_METHOD": "GET", "QUERY_STRING": "wait_for=120000", "HTTP_AUTHORIZATION": f"Bearer {secret}"})
    answers: list[bytes] = []

    def receive() -> None:
        try:
            answers.append(calls.receive(request, calls.admit(request), consumer.name))
        finally:
            connection.close()

    polls = [threading.Thread(target=receive) for _ in range(2)]
    for poll in polls:
        poll.start()
    wait_until(lambda: len(looked) >= 4, 10, "both to wait")
    consumer.tables = ["public.others", "public.orders"]
    save(consumer)
    wait_until(lambda: looked.count(consumer.updated_at) > 0, 10, "one to look again")
    for key in (1, 2):
        log.append(log.row(key))
        log.appender.notify()
        wait_until(lambda: len([poll for poll in polls if not poll.is_alive()]) >= key, 10, "a poll to end")
    assert sorted(b'"id":%d,' % key in answer for key in (1, 2) for answer in answers) == [False, False, True, True]


def test_many_polls_of_one_message_each_share_a_burst(world: World) -> None:
    """Each poll that takes all it asked for wakes the next, so one notice is enough for all."""
    consumer = world.consumer()
    polls = waiting(world, consumer, 20)
    world.log.append(range(20))
    keys = [key for poll in polls for key in poll.result(SOON_S).keys]
    assert sorted(keys) == list(range(20))


def test_nobody_gets_a_message_twice(world: World) -> None:
    consumer = world.consumer()
    polls = waiting(world, consumer, 20, wait_for=2000, batch_size=3)
    for start in range(0, 40, 4):
        world.log.append(range(start, start + 4))
    keys = [key for poll in polls for key in poll.result(SOON_S).keys]
    keys += world.client.receive(consumer.name, batch_size=1000).keys
    assert sorted(keys) == list(range(40))


def test_polls_of_different_consumers_get_the_same_message(world: World) -> None:
    consumers = [world.consumer(f"c{number}") for number in range(5)]
    polls = [waiting(world, consumer)[0] for consumer in consumers]
    world.log.append([1])
    assert [poll.result(SOON_S).keys for poll in polls] == [[1]] * 5


def test_a_wait_that_runs_out_is_an_empty_answer_in_time(world: World) -> None:
    consumer = world.consumer()
    began = time.monotonic()
    assert world.client.receive(consumer.name, wait_for="1s").body == {"data": []}
    assert 0.9 < time.monotonic() - began < SOON_S


def test_a_revoked_token_gets_nothing_more(world: World) -> None:
    consumer = world.consumer()
    client = world.with_token()
    token = ApiToken.objects.latest("created_at")
    [poll] = waiting(world, consumer, client=client)
    token.revoked_at = timezone.now()
    token.save()
    until(lambda: client.receive(consumer.name).status == 401)
    world.log.append([1])
    assert poll.result(SOON_S).status == 401
    assert world.client.receive(consumer.name).keys == [1]


def test_deleting_the_consumer_ends_all_its_polls_with_404(world: World) -> None:
    consumer = world.consumer()
    polls = waiting(world, consumer, 5)
    lifecycle.drop_consumer(consumer.pk)
    consumer.delete()
    assert [poll.result(SOON_S).status for poll in polls] == [404] * 5


def test_a_cut_listener_is_back_at_once(world: World) -> None:
    consumer = world.consumer()
    [poll] = waiting(world, consumer)
    with store_connection() as conn:
        conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sequin pull listener'")
    world.log.append([1])
    assert poll.result(SOON_S).keys == [1]


def test_strange_notices_do_no_harm(world: World) -> None:
    consumer = world.consumer()
    [poll] = waiting(world, consumer)
    with store_connection() as conn:
        for channel in ("sequin_log", "sequin_consumer", "sequin_config"):
            for payload in ("", "x", "consumer:x", "[]", '{"source": 1}', '{"source": "x", "relations": 1}'):
                conn.execute("SELECT pg_notify(%s, %s)", [channel, payload])
    world.log.append([1])
    assert poll.result(SOON_S).keys == [1]


def test_past_the_most_waiters_it_is_429_and_stopping_ends_every_poll(world: World) -> None:
    consumer = world.consumer()
    with web_server(SEQUIN_MAX_WAITERS="3") as (process, port):
        client = Client(port, world.client.token)
        polls = [Poll(client, consumer.name) for _ in range(4)]
        [over] = until(lambda: [poll for poll in polls if poll.is_over], within_s=30)
        polls.remove(over)
        refused = over.result(0)
        assert refused.status == 429 and {"Retry-After", "retry-after"} & set(refused.headers) and refused.body["summary"]
        assert client.receive(consumer.name).status == 200  # without waiting there is room
        process.terminate()
        assert [poll.result(SOON_S).body for poll in polls] == [{"data": []}] * 3
        assert process.wait(60) == 0


WAITERS = 1000  # SEQUIN_MAX_WAITERS' default


def test_a_thousand_waiters_leave_the_api_quick_and_get_what_comes(world: World) -> None:
    consumer, other = world.consumer(), world.consumer("other", tables=["public.other"])
    with _sockets_waiting(world, consumer, WAITERS) as sockets:
        took = []
        for _ in range(50):
            began = time.monotonic()
            assert world.client.receive(other.name).status == 200
            took.append(time.monotonic() - began)
        assert max(took) < SOON_S, took  # how quick it is says bench/pull.py
        world.log.append(range(WAITERS))
        began = time.monotonic()
        answers = [_read_answer(one) for one in sockets]
        assert all(b'"deliver_count":1' in answer for answer in answers)
        assert len({answer.split(b'"record_pks":["')[1].split(b'"')[0] for answer in answers}) == WAITERS
        assert time.monotonic() - began < 100


@contextmanager
def _sockets_waiting(world: World, consumer: Consumer, count: int) -> Iterator[list[socket.socket]]:
    request = (
        f"GET /api/http_pull_consumers/{consumer.name}/receive?wait_for=120s HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {world.client.token}\r\nConnection: close\r\n\r\n"
    ).encode()
    sockets = []
    selector = selectors.DefaultSelector()
    try:
        for _ in range(count + 1):
            sockets.append(socket.create_connection(("127.0.0.1", world.port), timeout=60))
            sockets[-1].sendall(request)
            selector.register(sockets[-1], selectors.EVENT_READ)
        # One of them is one too many; its refusal says that all others wait.
        [(ready, _)] = selector.select(110)
        refused: Any = ready.fileobj
        assert refused.recv(65_536).startswith(b"HTTP/1.1 429")
        sockets.remove(refused)
        refused.close()
        yield sockets
    finally:
        selector.close()
        for one in sockets:
            one.close()


def _read_answer(conn: socket.socket) -> bytes:
    answer = b""
    while data := conn.recv(65_536):
        answer += data
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    return answer
