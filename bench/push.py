"""Measure pushes a second, single and in batches of 100, beside bare keep-alive loops that post the same bytes, alternating.

The sink is a process of its own on loopback that answers at once. The bare loops do nothing else: no claim, no rendering, no
signature, no ack. One is a single handle of libcurl's, `perform()` after `perform()`; one has as many requests in flight as the
pump, on libcurl's multi interface; one is a Session of requests.
"""
from __future__ import annotations

import os
import resource
import select
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONCURRENCY = 10
ROUNDS = 3
SINGLE, BATCHED = 20_000, 200_000


@contextmanager
def sink(take: Callable[[bytes], None] | None = None) -> Iterator[int]:
    """A process that reads requests and answers 204; its port. `take` is given each body, before the answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        port = int(listener.getsockname()[1])
        pid = os.fork()
        if not pid:
            serve(listener, take)
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def serve(listener: socket.socket, take: Callable[[bytes], None] | None) -> None:
    """One thread for all connections, so that the sink takes as little as it can from those it measures."""
    ready = select.epoll()
    ready.register(listener, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    held: dict[int, bytes] = {}  # of a request that is not there as a whole
    while True:
        for fd, _ in ready.poll():
            if fd == listener.fileno():
                conn, _ = listener.accept()
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ready.register(conn, select.EPOLLIN)
                connections[conn.fileno()] = conn
                continue
            conn = connections[fd]
            try:
                data = conn.recv(65_536)
                answers, held[fd] = answer(held.get(fd, b"") + data, take)
                conn.sendall(answers)
            except OSError:
                data = b""
            if not data:
                ready.unregister(fd)
                connections.pop(fd).close()
                held.pop(fd, None)


def answer(data: bytes, take: Callable[[bytes], None] | None) -> tuple[bytes, bytes]:
    """The answers to all requests that are there as a whole, and the rest."""
    answers = b""
    while (end := data.find(b"\r\n\r\n") + 4) > 3:
        head = data[:end].lower()
        size = end + int(head.partition(b"content-length:")[2].partition(b"\r")[0])
        if len(data) < size:
            break
        if take is not None:
            take(data[end:size])
        data = data[size:]
        answers += b"HTTP/1.1 204 No Content\r\n\r\n"
    return answers, data


def handle(url: str, body: bytes) -> Any:
    import pycurl

    made = pycurl.Curl()
    made.setopt(pycurl.URL, url)
    made.setopt(pycurl.POST, 1)
    made.setopt(pycurl.POSTFIELDS, body)
    made.setopt(pycurl.HTTPHEADER, [f"{name}: {value}" for name, value in HEADERS.items()] + ["Expect:"])
    made.setopt(pycurl.WRITEFUNCTION, lambda data: None)
    return made


def one_handle(url: str, body: bytes, count: int) -> float:
    """POSTs a second of the plainest loop over libcurl: one request after another on one connection."""
    one = handle(url, body)
    one.perform()
    began = time.perf_counter()
    for _ in range(count):
        one.perform()
    return count / (time.perf_counter() - began)


def many_in_flight(url: str, body: bytes, count: int) -> float:
    """POSTs a second of a loop over libcurl with CONCURRENCY requests in flight, connections kept alive."""
    import pycurl

    multi = pycurl.CurlMulti()
    handles = [handle(url, body) for _ in range(CONCURRENCY)]
    for one in handles:
        multi.add_handle(one)
    sent, done = CONCURRENCY, 0
    began = time.perf_counter()
    while done < count:
        multi.perform()
        _, good, bad = multi.info_read()
        assert not bad, bad
        for one in good:
            done += 1
            multi.remove_handle(one)
            if sent < count:
                sent += 1
                multi.add_handle(one)
        if not good:
            multi.select(1.0)
    return count / (time.perf_counter() - began)


def session(url: str, body: bytes, count: int) -> float:
    """POSTs a second of requests at its best: prepared once, sent by the adapter."""
    import requests

    with requests.Session() as kept:
        kept.trust_env = False
        prepared = kept.prepare_request(requests.Request("POST", url, HEADERS, data=body))
        adapter = kept.get_adapter(url)
        adapter.send(prepared).close()
        began = time.perf_counter()
        for _ in range(count):
            assert adapter.send(prepared).content == b""
        return count / (time.perf_counter() - began)


def main() -> None:
    from bench._store import store

    with store(), sink() as port:
        measure(f"http://127.0.0.1:{port}/")


def measure(url: str) -> None:
    print(f"median of {ROUNDS} alternating rounds; in brackets the pump's share of it, by rounds")
    print(f"{'':24}{'pump':>10}" + "".join(f"{name:>24}" for name in LOOPS))
    for name, batch, count in (("single, POST/s", 1, SINGLE), ("batches of 100, msg/s", 100, BATCHED)):
        body = b'{"data":[' + b",".join([BODY] * batch) + b"]}" if batch > 1 else BODY
        rounds = []
        for _ in range(ROUNDS):
            ours = pumped(url, batch, count)
            rounds.append((ours, [loop(url, body, max(1000, count // batch)) * batch for loop in LOOPS.values()]))
        print(f"{name:24}{statistics.median(ours for ours, _ in rounds):10,.0f}", end="")
        for at in range(len(LOOPS)):
            ratio = statistics.median(ours / theirs[at] for ours, theirs in rounds)
            print(f"{statistics.median(theirs[at] for _, theirs in rounds):17,.0f} ({ratio:.2f})", end="")
        print()
    print(f"peak memory of the pump's process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


HEADERS = {"Content-Type": "application/json", "webhook-id": "x" * 80, "webhook-timestamp": "1", "webhook-signature": "v1," + "x" * 44}
BODY = (
    b'{"record":{"id":1,"status":"pending","total":154.97,"created_at":"2026-11-23T10:00:00.123456+00:00"},"changes":null,'
    b'"action":"insert","metadata":{"table_schema":"public","table_name":"orders","record_pks":["1"],"commit_timestamp":'
    b'"2026-11-23T10:00:00.456789Z","commit_lsn":26741848,"commit_idx":0,"idempotency_key":"' + b"x" * 80 + b'",'
    b'"transaction_annotations":null,"consumer":{"id":"6a63bbb1-6ac1-4adf-9562-f1094c72216f","name":"bench"},"database":'
    b'{"id":"6a63bbb1-6ac1-4adf-9562-f1094c72216f","name":"shop","database":"shop"}}}'
)


LOOPS: dict[str, Callable[[str, bytes, int], float]] = {
    "one handle": one_handle,
    f"{CONCURRENCY} in flight": many_in_flight,
    "requests": session,
}


def pumped(url: str, batch: int, count: int) -> float:
    """Messages a second of a real pump that works off a backlog of `count`."""
    from uuid import uuid4

    from django.db import connection

    from consumers.models import Consumer, HttpEndpoint, Source
    from consumers.store import lifecycle
    from consumers.store.appender import Appender
    from consumers.store.types import ColumnShape, LogRow, Progress, RelationShape
    from delivery.push.pump import Pump

    source = Source.objects.create(name=f"s-{uuid4().hex[:8]}", host="localhost", database="shop", username="u", status="paused")
    endpoint = HttpEndpoint.objects.create(name=source.name, url=url)
    consumer = Consumer.objects.create(
        name=source.name, source=source, kind="push", endpoint=endpoint, batch_size=batch, concurrency=CONCURRENCY
    )
    lifecycle.create_position(consumer.pk, source.pk, 0)
    with Appender(source.pk) as appender:
        progress = Progress(1, "1", 1, 1, 0, 0, 1)
        appender.begin_history(progress)
        shape = RelationShape(1, "public", "orders", (ColumnShape("id", 20, -1, "bigint"),), ("id",), "d")
        relation = appender.register_relation(1, shape)
        for first in range(0, count, 2000):
            after = progress._replace(stored_lsn=first + 10_000, reached_lsn=first + 10_000)
            rows = [
                LogRow(relation, 1, b"I", b'["%d"]' % i, None, 1, i + 10, 0, 0, BODY[10:113], None, None, True)
                for i in range(first, min(first + 2000, count))
            ]
            appender.append(rows, progress, after)
            progress = after

    def acked() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT acked_count FROM consumer_standing WHERE consumer = %s", [consumer.pk])
            row = cursor.fetchone()
        return int(row[0]) if row else 0

    pump = Pump()
    thread = threading.Thread(target=run, args=(pump,))
    began = time.perf_counter()
    thread.start()
    deadline = began + 60
    while acked() < count and time.perf_counter() < deadline:
        time.sleep(0.02)
    rate = acked() / (time.perf_counter() - began)
    pump._stopped = True
    thread.join()
    Consumer.objects.filter(pk=consumer.pk).update(status="disabled")
    return rate


def run(pump: Any) -> None:
    from django.db import connection

    try:
        pump.run(120)
    finally:
        connection.close()


if __name__ == "__main__":
    main()
