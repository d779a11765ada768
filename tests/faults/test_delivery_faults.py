"""Delivery through faults of endpoints, of workers and of clocks: nothing lost, no key's messages out of order.

Each run prints a verdict line. The names F2 to F22 are those of the fault experiments that docs/push.md lists.
"""
from __future__ import annotations

import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from django.db import connection
from standardwebhooks import Webhook

from consumers import changes
from consumers.models import Consumer, HttpEndpoint
from consumers.store import lifecycle
from consumers.tokens import create_token
from tests.api.pull_world import Client as PullClient
from tests.cluster import Cluster
from tests.conftest import wait_until
from tests.faults.rig import Scene, timed
from tests.installation import kill, process_tree
from tests.ports import new_port
from tests.push.endpoint import Endpoint, Got, status
from tests.push.test_pump import delivered, endpoint, pump, pump_process, push_to  # noqa: F401
from tests.store.world import Log

pytestmark = pytest.mark.django_db(transaction=True)


def counters(consumer: UUID) -> tuple[int, int, int, int]:
    """out, parked, dead, acked."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT out_count, parked_count, dead_count, acked_count FROM consumer_standing WHERE consumer = %s", [consumer]
        )
        return cursor.fetchone()


def say(name: str, where: Endpoint, expected: int, extra: str = "") -> None:
    """The verdict: every message arrived, each key's in order of first arrival, repeats under the same id."""
    seen: dict[str, Any] = {}
    order: dict[int, list[int]] = defaultdict(list)
    repeats = 0
    for got in where.got:
        for message in got.json.get("data", [got.json]):
            key = message["metadata"]["idempotency_key"]
            if key in seen:
                repeats += 1
                assert seen[key] == message, "a repeat is the same message"
                continue
            seen[key] = message
            order[message["record"]["id"]].append(message["metadata"]["commit_idx"] + message["metadata"]["commit_lsn"] * 1000)
    kept = all(numbers == sorted(numbers) for numbers in order.values())
    line = f"{name}: {expected} messages, lost {expected - len(seen)}, repeated {repeats}, order {'kept' if kept else 'BROKEN'}{extra}"
    print(line)  # noqa: T201
    assert len(seen) == expected and kept, line


def overdue_s() -> float:
    """For how long the lease that ended first has been waiting to be taken back."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT coalesce(extract(epoch FROM clock_timestamp() - min(until)), 0) FROM leases")
        return float(cursor.fetchone()[0])


def test_f2_workers_are_killed_again_and_again(log: Log, endpoint: Any, run: Any, long_run: bool) -> None:  # noqa: F811
    where = endpoint()
    consumers = [push_to(log, where), push_to(log, where, batch_size=10)]
    chance, pause = random.Random(2), threading.Event()
    began, longest = time.monotonic(), 0.0
    rounds, sent, kills = (100 if long_run else 3), 0, 0
    watcher = run("run_workers", SEQUIN_WORKERS="2")
    log.append(log.row(0))
    sent += 1
    wait_until(lambda: where.got, 30, "the first push")
    for _ in range(rounds):
        until = time.monotonic() + chance.uniform(2, 10 if long_run else 3)
        while time.monotonic() < until:
            log.append(*[log.row(key % 40) for key in range(20)])
            sent += 20
            pause.wait(0.1)
            longest = max(longest, overdue_s())
        workers = [pid for pid in process_tree(watcher.pid)[1:] if pid != watcher.pid]
        for victim in chance.sample(workers, min(len(workers), chance.choice([1, 1, 2, len(workers)]))):
            kill(victim)
            kills += 1
    for consumer in consumers:
        delivered(consumer, sent, timeout=120)
        assert counters(consumer) == (0, 0, 0, sent)
    assert longest < 10, "a lease that ended is taken back soon"
    single, batched = Endpoint(), Endpoint()
    for got in where.got:
        (batched if "data" in got.json else single).got.append(got)
    for name, part in (("single", single), ("batches of 10", batched)):
        say(f"F2 {kills} SIGKILLs of workers in {time.monotonic() - began:.0f} s, {name}", part, sent, f", no lease overdue by more than {longest:.1f} s")
        part.close()


def test_f3_the_web_server_is_killed_during_acks(log: Log, run: Any, free_port: int, long_run: bool) -> None:  # noqa: F811
    """A client that repeats each ack until it is answered: the outcome is the same however often it was sent."""
    consumer = Consumer.objects.create(name="pulled", source=log.source, kind="pull", ack_wait_ms=2000)
    lifecycle.create_position(consumer.pk, log.source.pk, 0)
    rows = 4000 if long_run else 600
    log.append(*[log.row(key % 50) for key in range(rows)])
    client = PullClient(free_port, create_token("t", "pull")[1])
    answered: set[str] = set()  # idempotency keys of which an ack was answered
    again: list[str] = []
    repeated = [0]
    order: dict[int, list[int]] = defaultdict(list)
    stopping = threading.Event()

    def receive() -> None:
        while not stopping.is_set():
            try:
                got = client.receive("pulled", batch_size=5, wait_for=200)
            except (OSError, http.client.HTTPException):
                stopping.wait(0.02)
                continue
            if got.status != 200 or not got.body["data"]:
                continue
            keys = [item["data"]["metadata"]["idempotency_key"] for item in got.body["data"]]
            again.extend(key for key in keys if key in answered)
            for item in got.body["data"]:
                order[item["data"]["record"]["id"]].append(item["data"]["metadata"]["commit_lsn"])
            attempts = 0
            while not stopping.is_set():
                attempts += 1
                try:
                    settled = client.settle("ack", "pulled", got.ack_ids)
                except (OSError, http.client.HTTPException):
                    stopping.wait(0.02)
                    continue
                assert settled.status in (200, 503)
                if settled.status == 200:
                    assert settled.body["acked"] + settled.body["stale"] == len(keys)
                    # Of an ack sent twice, both numbers are possible; handed out again meanwhile, it is stale.
                    if settled.body["acked"] == len(keys):
                        answered.update(keys)
                    repeated[0] += attempts > 1
                    break

    receiver = threading.Thread(target=receive)
    receiver.start()
    kills = 0
    try:
        chance = random.Random(3)
        while counters(consumer.pk)[3] < rows:
            process = run("run_web", "--port", str(free_port))
            before = counters(consumer.pk)[3]
            wait_until(lambda: counters(consumer.pk)[3] > before + 20 or counters(consumer.pk)[3] == rows, 60, "acks")  # noqa: B023
            stopping.wait(chance.uniform(0, 0.1))
            for pid in process_tree(process.pid):
                kill(pid)
            process.wait(60)
            kills += 1
            if kills == (40 if long_run else 3):
                run("run_web", "--port", str(free_port))
                wait_until(lambda: counters(consumer.pk)[3] == rows, 120, "the rest")
    finally:
        stopping.set()
        receiver.join(60)
    assert counters(consumer.pk) == (0, 0, 0, rows), "each message was acknowledged once"
    assert not again, "nothing came again after its ack had been answered"
    kept = all(sorted(dict.fromkeys(numbers)) == list(dict.fromkeys(numbers)) for numbers in order.values())
    line = f"F3 {kills} SIGKILLs of the web server during acks: {rows} messages, acked {rows}, {repeated[0]} acks sent more than once, order {'kept' if kept else 'BROKEN'}"
    print(line)  # noqa: T201
    assert kept, line


def test_f6_a_worker_stopped_past_its_lease_is_fenced(log: Log, endpoint: Any, pump: Any) -> None:  # noqa: F811
    release = threading.Event()

    def answer(got: Got, handler: Any) -> None:
        if got is where.got[0]:
            release.wait(30)  # the first attempt hangs while its sender is stopped
        status(204)(got, handler)

    where = endpoint(answer)
    consumer = push_to(log, where, timeout_ms=20_000)
    log.append(log.row(1), log.row(1))
    first = pump_process(300)
    try:
        wait_until(lambda: where.got, 20, "the first attempt")
        os.kill(first.pid, signal.SIGSTOP)
        pump()  # takes the turn over when it is no longer renewed, and with it what the other had out
        delivered(consumer, 2)
        assert counters(consumer) == (0, 0, 0, 2)
        release.set()
        os.kill(first.pid, signal.SIGCONT)
        log.append(log.row(1))
        delivered(consumer, 3)
        # The late answer has been taken in when the stopped pump goes on beating.
        beats = "SELECT count(*) FROM heartbeats WHERE process = 'pump' AND pid = %s AND at > now() - interval '1 s'"

        def beating() -> bool:
            with connection.cursor() as cursor:
                cursor.execute(beats, [first.pid])
                return bool(cursor.fetchone()[0])

        wait_until(beating, 20, "the stopped pump to go on")
        assert counters(consumer) == (0, 0, 0, 3), "its late result changed nothing"
        say("F6 SIGSTOP of a worker past its turn", where, 3)
    finally:
        first.kill()
        first.wait()


def test_f14_an_endpoint_that_flaps(log: Log, endpoint: Any, pump: Any, long_run: bool) -> None:  # noqa: F811
    began = time.monotonic()
    half = 10.0 if long_run else 0.5
    failures, enough, settled = 0, 60 if long_run else 5, threading.Event()

    def answer(got: Got, handler: Any) -> None:
        nonlocal failures
        up = settled.is_set() or int((time.monotonic() - began) / half) % 2 == 0
        failures += not up
        status(204 if up else 500)(got, handler)

    where = endpoint(answer)
    consumer = push_to(log, where)
    pump()
    sent = 0
    while failures < enough:
        log.append(*[log.row(key) for key in range(20)])
        sent += 20
        tried = len(where.got)
        wait_until(lambda: len(where.got) > tried, 60, "the next attempts")  # noqa: B023
    settled.set()
    delivered(consumer, sent, timeout=120)
    assert counters(consumer) == (0, 0, 0, sent)
    most = max(Counter(got.headers["webhook-id"] for got in where.got).values())
    # 1 s, 2 s, 4 s … apart, 15 % less at the least.
    assert 0.85 * (2 ** (most - 1) - 1) <= time.monotonic() - began, "no more attempts than the schedule has"
    say("F14 an endpoint that flaps", where, sent, f", at most {most} attempts of one")


def test_f15_an_endpoint_comes_back_to_a_backlog(log: Log, endpoint: Any, pump: Any, long_run: bool) -> None:  # noqa: F811
    count = 200_000 if long_run else 3_000
    up = threading.Event()
    recovered: list[float] = []
    flying, most_at = [0], []
    lock = threading.Lock()

    def answer(got: Got, handler: Any) -> None:
        if up.is_set():
            with lock:
                flying[0] += 1
                most_at.append(flying[0])
            recovered.append(time.monotonic())
            with lock:
                flying[0] -= 1  # before the answer, which makes the next one come
            status(204)(got, handler)
        else:
            status(503)(got, handler)

    where = endpoint(answer)
    consumer = push_to(log, where)
    up.set()
    steady = count // 10
    log.append(*[log.row(key) for key in range(steady)])
    pump()
    delivered(consumer, steady, timeout=120)
    usual = steady / (recovered[-1] - recovered[0])
    up.clear()
    recovered.clear()
    most_at.clear()
    before = len(where.got)
    for begin in range(0, count, 1000):
        log.append(*[log.row(key) for key in range(begin, begin + 1000)])
    wait_until(lambda: len(where.got) >= before + 7, 30, "the breaker to open")
    down = len(where.got) - before
    up.set()
    delivered(consumer, steady + count, timeout=900 if long_run else 60)
    first = sum(1 for at in recovered if at < recovered[0] + 1)
    rate = count / (recovered[-1] - recovered[0])
    assert max(most_at[:10]) <= 5, "the first after the outage come a few at a time, not all at once"
    say("F15 an endpoint comes back", where, steady + count, f", {down} attempts while down, first second {first}, then {rate:.0f}/s, {rate / usual:.0%} of before")


def test_f16_an_endpoint_resets_after_reading(log: Log, endpoint: Any, pump: Any) -> None:  # noqa: F811
    def answer(got: Got, handler: Any) -> None:
        if len(where.got) % 3 == 0:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            handler.close_connection = True
            return
        status(204)(got, handler)

    where = endpoint(answer)
    consumer = push_to(log, where)
    log.append(*[log.row(key % 10) for key in range(60)])
    pump()
    delivered(consumer, 60, timeout=60)
    say("F16 connections reset after the request was read", where, 60)


def test_f17_one_hanging_endpoint_beside_many_healthy_ones(log: Log, endpoint: Any, run: Any, long_run: bool) -> None:  # noqa: F811
    """In alternating rounds, with the consumer of the hanging endpoint paused and active: how long the others wait."""
    healthy, rounds, appends, every_s = (99, 8, 15, 0.7) if long_run else (30, 1, 5, 0.2)
    arrived: dict[str, list[float]] = defaultdict(list)  # by consumer
    hanging = Endpoint()
    hanging.answer = hanging.hang
    took: dict[str, list[float]] = {"paused": [], "active": []}
    try:
        dead = push_to(log, hanging, timeout_ms=5000, status="paused")

        def answer(got: Got, handler: Any) -> None:
            arrived[got.headers["x-consumer"]].append(time.monotonic())
            status(204)(got, handler)

        where = endpoint(answer)
        others = [push_to(log, where, headers={"x-consumer": str(number)}) for number in range(healthy)]
        pause = threading.Event()
        sent: list[float] = []
        run("run_workers", SEQUIN_WORKERS="2")
        log.append(log.row(0))
        sent.append(time.monotonic())
        for consumer in others:
            delivered(consumer, 1, timeout=60)
        for turn in range(2 * rounds):
            how = ("paused", "active")[turn % 2]
            configured = Consumer.objects.get(pk=dead)
            configured.status = how
            changes.save(configured)
            if how == "active":
                tried = len(hanging.got)
                wait_until(lambda: len(hanging.got) > tried, 40, "a request to the hanging endpoint")  # noqa: B023
            first = len(sent)
            for _ in range(appends):
                sent.append(time.monotonic())
                log.append(log.row(len(sent)))
                log.appender.notify()
                pause.wait(every_s)
            for consumer in others:
                delivered(consumer, len(sent), timeout=60)
            took[how] += [times[n] - sent[n] for times in arrived.values() for n in range(first, len(sent))]
        assert counters(dead)[3] == 0
        seen = []
        for name, share in (("median", 0.5), ("p99", 0.99)):
            with_it, without = (sorted(took[how])[int(len(took[how]) * share)] * 1000 for how in ("active", "paused"))
            seen.append(f"{name} {with_it:.0f} ms beside {without:.0f} ms without it, {with_it / without - 1:+.0%}")
        print(f"F17 one endpoint hangs beside {healthy}: {len(sent) * healthy} messages, lost 0, {'; '.join(seen)}")  # noqa: T201
    finally:
        hanging.close()


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_f22_the_clock_of_a_worker_is_wrong(log: Log, endpoint: Any, pump: Any, monkeypatch: Any, ahead_s: int) -> None:  # noqa: F811
    real = time.time

    def answer(got: Got, handler: Any) -> None:
        status(500 if got is where.got[0] else 204)(got, handler)

    where = endpoint(answer)
    consumer = push_to(log, where)
    secret = HttpEndpoint.objects.get().signing_secret

    class Clock:
        """The worker's own clock; the test and the endpoint keep the right one."""

        monotonic = staticmethod(time.monotonic)
        sleep = staticmethod(time.sleep)

        @staticmethod
        def time() -> float:
            return real() + ahead_s

    monkeypatch.setattr("delivery.push.pump.time", Clock)
    log.append(log.row(1), log.row(2))
    with timed() as took:
        pump()
        delivered(consumer, 2, timeout=20)
        seconds = took()
    for got in where.got:
        Webhook(secret).verify(got.body, got.headers)  # refuses timestamps off by more than five minutes
    assert len(where.got) == 3
    say(f"F22 a worker's clock off by {ahead_s} s: signatures valid, retried after {seconds:.1f} s", where, 2)


# Two of everything ----------------------------------------------------------------------------------------------------


class Redis:
    """A Redis server of its own, which may go and come back."""

    def __init__(self) -> None:
        self.port = new_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", "/tmp"],
            stdout=subprocess.DEVNULL,
        )
        wait_until(self._answers, 10, "redis to answer")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


@pytest.fixture
def redis() -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    made = Redis()
    yield made
    made.kill()


def test_the_broker_goes_away_and_comes_back(log: Log, endpoint: Any, run: Any, redis: Redis) -> None:  # noqa: F811
    """Pumps go on without it; one that dies meanwhile is replaced as soon as it is back."""
    where = endpoint()
    consumer = push_to(log, where)
    log.append(log.row(1))
    watcher = run("run_workers", SEQUIN_WORKERS="1", Q_BROKER_URL=redis.url)
    delivered(consumer, 1, timeout=30)
    redis.kill()
    log.append(log.row(2))
    delivered(consumer, 2)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pid FROM heartbeats WHERE process = 'pump' ORDER BY at DESC LIMIT 1")
        kill(cursor.fetchone()[0])
    log.append(log.row(3))
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        killed_at = cursor.fetchone()[0]

    def beats() -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT at > %s + interval '3 s' FROM heartbeats WHERE process = 'workers'", [killed_at])
            return bool(cursor.fetchone()[0])

    wait_until(beats, 20, "the watcher to go on")
    assert watcher.poll() is None
    redis.start()
    with timed() as took:
        delivered(consumer, 3, timeout=40)
        print(f"the broker away and back, a pump killed meanwhile: 3 messages, lost 0, pushing again after {took():.1f} s")  # noqa: T201
    assert where.ids == [1, 2, 3]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster("scale").start()
    yield made
    made.remove()


@pytest.mark.parametrize("broker", ["postgres", "redis"])
def test_two_of_everything_and_one_is_killed(  # noqa: F811
    cluster: Cluster, transactional_db: None, run: Any, endpoint: Any, broker: str, request: pytest.FixtureRequest, web: str
) -> None:
    """Two run_capture, two run_workers: one of each is killed under load. Nothing lost or out of order, soon taken over."""
    environment = {"SEQUIN_WORKERS": "1", "Q_BROKER_URL": request.getfixturevalue("redis").url if broker == "redis" else ""}
    scene = Scene(cluster)
    where = endpoint()
    target = HttpEndpoint(name="there", url=where.url)
    changes.save(target)
    shared = {"source": scene.source, "tables": ["public.load"], "group_columns": ["key"], "ack_wait_ms": 2000}
    push = Consumer(name="push", kind="push", endpoint=target, **shared)
    pull = Consumer(name="pull", kind="pull", **shared)
    for consumer in (push, pull):
        changes.save(consumer)
    client = PullClient(int(web.rsplit(":", 1)[1]), create_token("t", "pull")[1])
    pulled: list[tuple[int, int]] = []
    stopping = threading.Event()

    def receive() -> None:
        while not stopping.is_set():
            answer = client.receive("pull", batch_size=100, wait_for="1s")
            if answer.status != 200:
                continue  # the store is busy: asked again
            pulled.extend((item["data"]["record"]["key"], item["data"]["record"]["number"]) for item in answer.body["data"])
            if answer.body["data"]:
                client.settle("ack", "pull", answer.ack_ids)

    captures = [run("run_capture", **environment) for _ in range(2)]
    workers = [run("run_workers", **environment) for _ in range(2)]
    receiver = threading.Thread(target=receive)
    receiver.start()
    scene.writer.start()
    try:
        wait_until(lambda: len(where.got) > 20 and len(pulled) > 20, 60, "deliveries to begin")

        def both_pump() -> bool:
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(DISTINCT detail) FROM heartbeats WHERE process = 'pump' AND at > now() - interval '3 s'")
                return bool(cursor.fetchone()[0] == 2)

        wait_until(both_pump, 30, "both clusters to pump")
        recovery = 0.0
        for victim in (captures[0], workers[0]):
            tree = process_tree(victim.pid)
            mark = len(where.got), len(pulled)
            for pid in tree:
                kill(pid)
            with timed() as took:
                wait_until(lambda: len(where.got) > mark[0] + 20 and len(pulled) > mark[1] + 20, 30, "the other to take over")  # noqa: B023
                recovery = max(recovery, took())
        scene.writer.stop()
        committed = scene.committed()
        wait_until(lambda: committed <= set(pulled), 60, "all by pull")
        pushed: set[tuple[int, int]] = set()
        looked_at = 0

        def all_pushed() -> bool:
            nonlocal looked_at
            records = [got.json["record"] for got in where.got[looked_at:]]
            looked_at += len(records)
            pushed.update((record["key"], record["number"]) for record in records)
            return len(pushed) == len(committed)

        wait_until(all_pushed, 60, "all by push")
    finally:
        stopping.set()
        receiver.join(60)
        scene.close()
    for name, arrived in (("pull", pulled), ("push", [(g.json["record"]["key"], g.json["record"]["number"]) for g in where.got])):
        first: dict[int, list[int]] = defaultdict(list)
        for key, number in dict.fromkeys(arrived):
            first[key].append(number)
        assert all(numbers == sorted(numbers) for numbers in first.values()), f"{name} keeps the order of each key"
    print(f"two of everything on the {broker} broker, one of each killed: {len(committed)} committed, lost 0, order kept, "  # noqa: T201
          f"taken over within {recovery:.1f} s")  # fmt: skip
