"""Measure backfills: rows a second into the log and to a client, and what they do to live messages meanwhile.

    python bench/backfill.py [--rows 300000] [--rate 100] [--rounds 3] [--seconds 15]

Everything runs on this machine, in an installation of its own; writer, live client and the client that takes rows are processes
of their own. In each round live messages are pulled: alone; while rows are read that nobody takes yet; while a client takes the
rows as they are backfilled; and while it takes the same ones again, rewound, which shows what the client does.
"""
from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.latency import PULL, WAIT_S, processes, pull, write  # noqa: E402
from tests.installation import Installation, temporary  # noqa: E402

TAKER = "taker"
WAITING_ROWS = 45_000  # of one consumer: a little less than may wait for it
COLUMNS = "id bigint PRIMARY KEY, customer_id int, status text, total numeric, price float8, active bool, created_at timestamptz, meta jsonb"
FILL = (
    "INSERT INTO orders_of_old SELECT g, g %% 1000, 'paid', g * 1.25, g / 3.0, g %% 2 = 0, timestamptz '2026-01-01' + g * interval '1 s',"
    " jsonb_build_object('n', g, 'tag', 'x' || g %% 10) FROM generate_series(%s::bigint, %s) g"
)


class Bench:
    """An installation with a table to backfill, and what was measured in it."""

    def __init__(self, installation: Installation, options: argparse.Namespace) -> None:
        self.installation, self.options = installation, options
        self.live: dict[str, list[float]] = defaultdict(list)
        """Milliseconds, by what went on meanwhile."""
        self.rates: dict[str, list[float]] = defaultdict(list)
        self.taken = processes.Value("q", 0)
        self._late = 0

    def prepare(self) -> None:
        rows = self.options.rows
        with self.installation.source() as conn:
            conn.execute(f"CREATE TABLE orders_of_old ({COLUMNS}); CREATE TABLE latency (id int PRIMARY KEY, note text)")  # type: ignore[arg-type]
            for first in range(1, rows + 1, 100_000):
                conn.execute(FILL, [first, min(rows, first + 99_999)])  # type: ignore[arg-type]
            conn.execute("ANALYZE orders_of_old")
        self.consumer(PULL, "public.latency")
        # Published now: a backfill waits for transactions that were open then.
        self.consumer(TAKER, "public.orders_of_old")
        with self.installation.source() as conn:
            conn.execute("INSERT INTO latency VALUES (-1, 'warm up')")
        self.installation.ack(PULL, self.installation.receive(PULL, wait="30s"))

    # What goes on ----------------------------------------------------------------------------------------------------

    def read(self, is_over: Callable[[], bool]) -> None:
        """One backfill after the other, for consumers that nobody reads for."""
        while not is_over():
            self._late += 1
            name = f"late{self._late}"
            self.consumer(name, "public.orders_of_old")
            began = time.monotonic()
            self.backfill(name, start_value=str(max(1, self.options.rows - WAITING_ROWS + 1)))
            while self.running():
                time.sleep(0.05)
            self.rates["rows read"].append(min(self.options.rows, WAITING_ROWS) / (time.monotonic() - began))
            self.call("DELETE", f"/api/consumers/{name}?discard=true")

    def backfill_taken(self, is_over: Callable[[], bool]) -> None:
        self.taken_while("rows backfilled and taken", lambda: self.backfill(TAKER), is_over)

    def rewind_taken(self, is_over: Callable[[], bool]) -> None:
        self.taken_while("the same rewound and taken", lambda: self.call("POST", f"/api/consumers/{TAKER}/rewind", {"to": "beginning"}), is_over)

    def taken_while(self, what: str, again: Callable[[], Any], is_over: Callable[[], bool]) -> None:
        """Begin anew whenever all is taken, and let what is under way end afterwards."""
        began, before = time.monotonic(), self.taken.value
        while not is_over():
            again()
            while not (is_over() or (not self.running() and self.is_taken())):
                time.sleep(0.1)
        self.rates[what].append((self.taken.value - before) / (time.monotonic() - began))
        for found in self.call("GET", "/api/backfills?status=running")["data"]:
            self.call("POST", f"/api/backfills/{found['id']}/cancel")
        while not self.is_taken():
            time.sleep(0.1)

    # Live messages ---------------------------------------------------------------------------------------------------

    def phase(self, what: str, doing: Callable[[Callable[[], bool]], None]) -> None:
        """Live messages at a steady rate, while something is done."""
        rate, seconds = self.options.rate, self.options.seconds
        with self.installation.source() as conn:
            conn.execute("TRUNCATE latency")
        count = int(rate * seconds)
        begin = time.time() + 1.0
        over = threading.Event()
        worker = threading.Thread(target=doing, args=(over.is_set,))
        worker.start()
        sent_queue, arrived_queue = processes.Queue(), processes.Queue()
        running = [
            processes.Process(target=write, args=(self.installation.psql_url(), 0, 1, 1, count, rate, begin, sent_queue)),
            processes.Process(target=pull, args=(self.installation.port, self.installation.token, count, begin + seconds + WAIT_S, arrived_queue)),
        ]
        for process in running:
            process.start()
        sent = sent_queue.get(timeout=seconds + 2 * WAIT_S)
        over.set()
        arrived = arrived_queue.get(timeout=2 * WAIT_S)
        worker.join()
        assert sent.keys() <= arrived.keys(), f"{len(sent) - len(arrived)} live messages never came"
        took = [(arrived[number] - at) * 1000 for number, at in sent.items()]
        self.live[what] += took
        print(f"  {what}: {percentiles(took)}", flush=True)

    def report(self) -> None:
        print(f"all rounds, {self.options.rate:g} live messages a second, ms from commit to the client:")
        alone = sorted(self.live["alone"])
        for what, took in self.live.items():
            more = [pick(sorted(took), share) - pick(alone, share) for share in (0.5, 0.99)]
            print(f"  {what}: {percentiles(took)}" + ("" if what == "alone" else f"; median {more[0]:+.1f}, p99 {more[1]:+.1f}"))
        for what, rates in self.rates.items():
            print(f"  {what}: {sum(rates) / len(rates):,.0f} rows/s ({min(rates):,.0f} to {max(rates):,.0f})")

    # Asking the installation -----------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None) -> Any:
        status, answer = self.installation.call(method, path, body)
        assert status < 300, (method, path, status, answer)
        return answer

    def consumer(self, name: str, table: str) -> None:
        self.call("POST", "/api/consumers", {"name": name, "source": "playground", "kind": "pull", "tables": [table]})

    def backfill(self, consumer: str, **more: str) -> None:
        self.call("POST", "/api/backfills", {"consumer": consumer, "table": "public.orders_of_old", **more})

    def running(self) -> bool:
        found = self.call("GET", "/api/backfills?limit=500")["data"]
        assert not [backfill for backfill in found if backfill["status"] == "failed"], found
        return any(backfill["status"] == "running" for backfill in found)

    def is_taken(self) -> bool:
        with self.installation.store() as conn:
            row = conn.execute(
                "SELECT p.position >= coalesce((SELECT max(id) FROM messages WHERE consumer = p.consumer), 0) AND p.out_count + p.parked_count = 0"
                " FROM consumer_position p JOIN consumers_consumer c ON c.id = p.consumer WHERE c.name = %s", [TAKER],
            ).fetchone()  # fmt: skip
        return bool(row and row[0])


def drain(port: int, token: str, stop: Any, taken: Any) -> None:
    """Take what there is for the client, a thousand at a time."""
    conn = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    base = f"/api/http_pull_consumers/{TAKER}"
    while not stop.is_set():
        conn.request("GET", f"{base}/receive?batch_size=1000&wait_for=1s", headers=headers)
        messages = json.loads(conn.getresponse().read())["data"]
        if messages:
            conn.request("POST", f"{base}/ack", json.dumps({"ack_ids": [m["ack_id"] for m in messages]}), headers)
            conn.getresponse().read()
            taken.value += len(messages)


@contextmanager
def draining(bench: Bench) -> Iterator[None]:
    stop = processes.Event()
    drainer = processes.Process(target=drain, args=(bench.installation.port, bench.installation.token, stop, bench.taken))
    drainer.start()
    try:
        yield
    finally:
        stop.set()
        drainer.join()


def pick(took: list[float], share: float) -> float:
    return took[min(len(took) - 1, int(len(took) * share))]


def percentiles(took: list[float]) -> str:
    took = sorted(took)
    return ", ".join(f"{name} {pick(took, share):.1f}" for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--rows", 300_000), ("--rate", 100.0), ("--rounds", 3), ("--seconds", 15.0)):
        parser.add_argument(name, type=type(default), default=default)
    options = parser.parse_args()
    with temporary() as installation:
        bench = Bench(installation, options)
        bench.prepare()
        for number in range(options.rounds):
            print(f"round {number + 1}", flush=True)
            bench.phase("alone", lambda is_over: None)
            bench.phase("beside rows that are read", bench.read)
            with draining(bench):
                bench.phase("beside a backfill that a client takes", bench.backfill_taken)
                bench.phase("beside the same client, rewound", bench.rewind_taken)
        bench.report()


if __name__ == "__main__":
    main()
