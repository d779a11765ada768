"""Measure pushes a second, single and in batches of 100, beside a bare keep-alive loop over libcurl, alternating.

The sink is a process of its own on loopback that answers at once. The bare loop posts the same bytes with as many requests in
flight as the pump has, and does nothing else: no claim, no rendering, no signature, no ack.
"""
from __future__ import annotations

import os
import resource
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

os.environ["SEQUIN_TEST_DURABLE"] = "1"

CONCURRENCY = 10
ROUNDS = 3
SINGLE, BATCHED = 3_000, 100_000


@contextmanager
def sink(take: Callable[[bytes], None] | None = None) -> Iterator[int]:
    """A process that reads requests and answers 204; its port. `take` is given each body, before the answer."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    port = int(listener.getsockname()[1])
    pid = os.fork()
    if not pid:
        while True:
            conn, _ = listener.accept()
            threading.Thread(target=answer, args=(conn, take), daemon=True).start()
    listener.close()
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def answer(conn: socket.socket, take: Callable[[bytes], None] | None) -> None:
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    held = b""
    while True:
        while b"\r\n\r\n" not in held:
            more = conn.recv(262_144)
            if not more:
                return
            held += more
        head, _, rest = held.partition(b"\r\n\r\n")
        length = int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split(b":")[1])
        while len(rest) < length:
            rest += conn.recv(262_144)
        held = rest[length:]
        if take is not None:
            take(rest[:length])
        conn.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")


def bare(url: str, body: bytes, headers: dict[str, str], count: int) -> float:
    """POSTs a second of a bare loop over libcurl with CONCURRENCY requests in flight, connections kept alive."""
    import pycurl

    def handle() -> Any:
        made = pycurl.Curl()
        made.setopt(pycurl.URL, url)
        made.setopt(pycurl.POST, 1)
        made.setopt(pycurl.POSTFIELDS, body)
        made.setopt(pycurl.HTTPHEADER, [f"{name}: {value}" for name, value in headers.items()] + ["Expect:"])
        made.setopt(pycurl.WRITEFUNCTION, lambda data: None)
        return made

    multi = pycurl.CurlMulti()
    handles = [handle() for _ in range(CONCURRENCY)]
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


def main() -> None:
    import tests.postgres_plugin as cluster

    try:
        with sink() as port:
            measure(f"http://127.0.0.1:{port}/")
    finally:
        cluster.pytest_unconfigure(None)


def measure(url: str) -> None:
    import django
    import psycopg

    os.environ["DJANGO_SETTINGS_MODULE"] = "sequinapp.settings"
    base = os.environ["DATABASE_URL"].rsplit("/", 1)[0]
    with psycopg.connect(f"{base}/postgres", autocommit=True) as conn:
        conn.execute("CREATE DATABASE sequin")
    django.setup()
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    print(f"{'':22}{'pump':>12}{'bare loop':>12}{'ratio':>8}   (median of {ROUNDS} alternating rounds, {CONCURRENCY} in flight)")
    for name, batch, count in (("single, POST/s", 1, SINGLE), ("batches of 100, msg/s", 100, BATCHED)):
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(pumped(url, batch, count))
            body = b'{"data":[' + b",".join([BODY] * batch) + b"]}" if batch > 1 else BODY
            theirs.append(bare(url, body, HEADERS, max(CONCURRENCY, count // batch)) * batch)
        ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
        print(f"{name:22}{statistics.median(ours):12,.0f}{statistics.median(theirs):12,.0f}{ratio:8.2f}")
    print(f"peak memory of the pump's process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


HEADERS = {"Content-Type": "application/json", "webhook-id": "x" * 80, "webhook-timestamp": "1", "webhook-signature": "v1," + "x" * 44}
BODY = (
    b'{"record":{"id":1,"status":"pending","total":154.97,"created_at":"2026-11-23T10:00:00.123456+00:00"},"changes":null,'
    b'"action":"insert","metadata":{"table_schema":"public","table_name":"orders","record_pks":["1"],"commit_timestamp":'
    b'"2026-11-23T10:00:00.456789Z","commit_lsn":26741848,"commit_idx":0,"idempotency_key":"' + b"x" * 80 + b'",'
    b'"transaction_annotations":null,"consumer":{"id":"6a63bbb1-6ac1-4adf-9562-f1094c72216f","name":"bench"},"database":'
    b'{"id":"6a63bbb1-6ac1-4adf-9562-f1094c72216f","name":"shop","database":"shop"}}}'
)


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
