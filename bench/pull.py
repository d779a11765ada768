"""Measure the pull side: claim+ack messages a second at batches 1, 100, 1000, and how a thousand long polls are borne.

    python bench/pull.py [--seconds 3] [--waiters 1000]

Server, client and Postgres share the machine. One line a measurement; `rate` is the median of ROUNDS rounds, all of them behind it.
"""
from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._store import store  # noqa: E402

import django  # noqa: E402

django.setup()

from consumers.models import Consumer  # noqa: E402
from consumers.store import claims  # noqa: E402
from tests.api.pull_world import Client, Log, World, web_server  # noqa: E402

BATCHES = (1, 100, 1000)
ROUNDS = 3
LEASE_MS = 60_000
FILL = 5_000  # rows in one append

Cycle = Callable[[], int]
"""Claims a batch and acknowledges it; returns how many messages that were."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round")
    parser.add_argument("--waiters", type=int, default=1000)
    options = parser.parse_args()
    with store(), web_server(SEQUIN_MAX_WAITERS=str(max(options.waiters, 1))) as (process, port):
        world = World(port)
        try:
            for batch in BATCHES:
                cycle = partial(_by_function, world.consumer(f"functions-{batch}").pk, batch)
                _report("functions", batch, 1, [_rate(world.log, cycle, batch, 1, options.seconds) for _ in range(ROUNDS)])
            for threads in (1, 4):
                for batch in BATCHES:
                    consumer = world.consumer(f"http-{threads}-{batch}")
                    rates = [_rate_http(world, consumer, batch, threads, options.seconds) for _ in range(ROUNDS)]
                    _report("http", batch, threads, rates)
            _long_polls(world, options.waiters)
            print(f"memory of the web worker: {_peak_mb(process.pid):.0f} MB at its peak")
        finally:
            world.log.close()


def _by_function(consumer_id: UUID, batch: int) -> int:
    claim = claims.claim(consumer_id, batch, lease_ms=LEASE_MS)
    if claim.token is None:
        return 0
    token = claim.token
    return claims.ack(consumer_id, [(token, message.id) for message in claim.messages]).done


def _rate_http(world: World, consumer: Consumer, batch: int, threads: int, seconds: float) -> float:
    local = threading.local()

    def cycle() -> int:
        if not hasattr(local, "conn"):
            local.conn = http.client.HTTPConnection("127.0.0.1", world.port, timeout=60)
        received = _post(local.conn, world.client.token, f"{consumer.name}/receive", {"batch_size": batch})
        ids = [item["ack_id"] for item in received["data"]]
        return int(_post(local.conn, world.client.token, f"{consumer.name}/ack", {"ack_ids": ids})["acked"]) if ids else 0

    return _rate(world.log, cycle, batch, threads, seconds)


def _post(conn: http.client.HTTPConnection, token: str | None, path: str, body: object) -> dict[str, list[dict[str, str]]]:
    conn.request("POST", f"/api/http_pull_consumers/{path}", json.dumps(body), {"Authorization": f"Bearer {token}"})
    response = conn.getresponse()
    data = response.read()
    assert response.status == 200, data[:300]
    return dict(json.loads(data))


def _rate(log: Log, cycle: Cycle, batch: int, threads: int, seconds: float) -> float:
    """Messages a second while the log never runs dry: it is filled up again outside the measured time."""
    keys = iter(range(10**12))
    done, spent = 0, 0.0
    while spent < seconds:
        left = threads * max(4 * batch, 500)
        for start in range(0, left, FILL):
            log.append([next(keys) for _ in range(min(FILL, left - start))], notify=False)
        counts = [0] * threads
        began = time.perf_counter()
        workers = [threading.Thread(target=_work, args=(cycle, counts, number)) for number in range(threads)]
        if threads == 1:
            _work(cycle, counts, 0)
        else:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        spent += time.perf_counter() - began
        done += sum(counts)
    return done / spent


def _work(cycle: Cycle, counts: list[int], number: int) -> None:
    while got := cycle():
        counts[number] += got


def _report(how: str, batch: int, clients: int, rates: list[float]) -> None:
    shown = ", ".join(f"{rate:,.0f}" for rate in rates)
    print(f"claim+ack by {how:9} batch {batch:4} clients {clients}: {statistics.median(rates):9,.0f} messages/s  ({shown})", flush=True)


def _long_polls(world: World, waiters: int) -> None:
    """Latency of the rest of the API beside the waiters; then one message each, appended at once."""
    consumer, other = world.consumer("waited"), world.consumer("other", tables=["public.other"])
    ends: list[float] = []
    full = threading.Event()

    def wait() -> None:
        path = f"/api/http_pull_consumers/{consumer.name}/receive?wait_for=5m"
        if world.client.call("GET", path, timeout_s=300).status == 429:
            full.set()
        else:
            ends.append(time.perf_counter())

    # One of them is one too many; its refusal says that all others wait.
    polls = [threading.Thread(target=wait, daemon=True) for _ in range(waiters + 1)]
    for poll in polls:
        poll.start()
    assert full.wait(60), "the long polls did not all begin to wait within 60 s"
    took = [_timed(world.client, other.name) for _ in range(200)]
    print(f"beside {waiters} long polls: a receive takes {_ms(statistics.median(took))}, p99 {_ms(sorted(took)[-2])}", flush=True)
    singles = []
    for key in range(20):
        began = time.perf_counter()
        before = len(ends)
        world.log.append([10**9 + key])
        while len(ends) == before:
            time.sleep(0.0002)
        singles.append(ends[-1] - began)
    print(f"append to a waiting client, {waiters} waiting: median {_ms(statistics.median(singles))}, most {_ms(max(singles))}", flush=True)
    rest = waiters - len(ends)
    began = time.perf_counter()
    world.log.append(range(2 * 10**9, 2 * 10**9 + rest))
    for poll in polls:
        poll.join(120)
    times = sorted(end - began for end in ends[-rest:])
    print(f"{rest} messages to {rest} polls: first {_ms(times[0])}, median {_ms(times[rest // 2])}, last {_ms(times[-1])}", flush=True)


def _timed(client: Client, consumer: str) -> float:
    began = time.perf_counter()
    assert client.receive(consumer).status == 200
    return time.perf_counter() - began


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _peak_mb(parent: int) -> float:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    peaks = [line.split()[1] for child in children for line in Path(f"/proc/{child}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return max(map(int, peaks), default=0) / 1024


if __name__ == "__main__":
    main()
