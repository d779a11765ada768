"""Measure backfills: rows a second from the source's table into the log, and what they do to live messages meanwhile.

Everything runs on this machine, in an installation of its own. `python bench/backfill.py [ROWS] [LIVE RATE]`. Live messages are
pulled as in bench/latency.py: alone; while rows are read that nobody takes yet; and while a client in a process of its own
takes the rows, first as they are backfilled and then the same ones once more, rewound, which shows what the client does.
"""
from __future__ import annotations

import http.client
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.latency import PULL, pull, report, warm_up  # noqa: E402
from tests.installation import Installation  # noqa: E402

MOST_S = 30.0  # of live messages, in each part
FIRST_S = 5.0
READ_ALONE = 5  # backfills
WAITING_ROWS = 45_000
COLUMNS = "id bigint PRIMARY KEY, customer_id int, status text, total numeric, price float8, active bool, created_at timestamptz, meta jsonb"
FILL = (
    "INSERT INTO orders_of_old SELECT g, g %% 1000, 'paid', g * 1.25, g / 3.0, g %% 2 = 0, timestamptz '2026-01-01' + g * interval '1 s',"
    " jsonb_build_object('n', g, 'tag', 'x' || g %% 10) FROM generate_series(%s::bigint, %s) g"
)


class Live:
    """Single-row commits at a steady rate, pulled by a waiting client."""

    def __init__(self, installation: Installation, rate: float) -> None:
        self.installation, self.rate = installation, rate
        self.pulled: dict[int, float] = {}
        self.stopping = threading.Event()
        self.puller = threading.Thread(target=pull, args=(installation, self.pulled, self.stopping))
        self.puller.start()
        warm_up(installation, self.pulled)

    def during(self, what: str, is_over: Callable[[], bool]) -> None:
        """Write until something is over, and report."""
        with self.installation.source() as conn:
            conn.execute("TRUNCATE latency")
        self.pulled.clear()
        sent: dict[int, float] = {}
        with self.installation.source() as conn:
            began = time.time()
            while (time.time() - began < MOST_S and not is_over()) or len(sent) < self.rate:
                time.sleep(max(0.0, began + len(sent) / self.rate - time.time()))
                conn.execute("INSERT INTO latency (id, note) VALUES (%s, 'a note')", [len(sent)])
                sent[len(sent)] = time.time()
        deadline = time.monotonic() + 30
        while not sent.keys() <= self.pulled.keys() and time.monotonic() < deadline:
            time.sleep(0.02)
        report(what, sent, self.pulled)

    def stop(self) -> None:
        self.stopping.set()
        self.puller.join()


class Over:
    """Asked often, looked up now and then."""

    def __init__(self, look: Callable[[], bool]) -> None:
        self._look, self._looked_at, self._over = look, 0.0, False

    def __call__(self) -> bool:
        if not self._over and time.monotonic() - self._looked_at > 0.5:
            self._looked_at = time.monotonic()
            self._over = self._look()
        return self._over


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 300_000
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else 100.0
    base = Path(tempfile.mkdtemp(prefix="sequin-bench-"))
    base.chmod(0o711)
    installation = Installation(base / "home")
    installation.start()
    try:
        prepare(installation, rows)
        live = Live(installation, rate)
        end = time.monotonic() + FIRST_S
        live.during(f"live alone, {rate:g}/s", lambda: time.monotonic() > end)
        read_alone(installation, live)
        with_a_client(installation, live)
        live.stop()
    finally:
        installation.stop()


def prepare(installation: Installation, rows: int) -> None:
    with installation.source() as conn:
        conn.execute(f"CREATE TABLE orders_of_old ({COLUMNS}); CREATE TABLE latency (id int PRIMARY KEY, note text)")  # type: ignore[arg-type]
        for begin in range(0, rows, 100_000):
            conn.execute(FILL, [begin + 1, min(rows, begin + 100_000)])  # type: ignore[arg-type]
        conn.execute("ANALYZE orders_of_old")
    create(installation, PULL, ["public.latency"])
    # Published now: a backfill waits for transactions that were open then.
    create(installation, "all", ["public.orders_of_old"])


def create(installation: Installation, name: str, tables: list[str]) -> None:
    status, body = installation.call("POST", "/api/consumers", {"name": name, "source": "playground", "kind": "pull", "tables": tables})
    assert status == 201, body


def read_alone(installation: Installation, live: Live) -> None:
    """One backfill after the other, each of as many rows as may wait for a consumer."""
    done: list[float] = []

    def read() -> None:
        for number in range(READ_ALONE):
            create(installation, f"late{number}", ["public.orders_of_old"])
            began = time.monotonic()
            begin(installation, f"late{number}", start_value=str(last(installation) - WAITING_ROWS + 1))
            wait_for(installation)
            done.append(time.monotonic() - began)
            installation.call("DELETE", f"/api/consumers/late{number}")

    reading = threading.Thread(target=read)
    reading.start()
    live.during("beside rows that are read", lambda: not reading.is_alive())
    reading.join()
    print(f"  {len(done)} times {WAITING_ROWS} rows, each in {min(done):.1f} to {max(done):.1f} s: {WAITING_ROWS * len(done) / sum(done):,.0f} rows/s into the log")


def with_a_client(installation: Installation, live: Live) -> None:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    drainer = context.Process(target=drain, args=(installation.port, installation.token, stop))
    drainer.start()
    began = time.monotonic()
    begin(installation, "all")
    live.during("beside a backfill whose rows a client takes", Over(lambda: ended(installation)))
    wait_for(installation)
    taken(installation)
    took = time.monotonic() - began
    total = last(installation)
    print(f"  {total} rows in {took:.1f} s: {total / took:,.0f} rows/s to the client")
    began = time.monotonic()
    status, body = installation.call("POST", "/api/consumers/all/rewind", {"to": "beginning"})
    assert status == 200, body
    live.during("beside the same client, rewound", Over(lambda: waiting(installation) == 0))
    taken(installation)
    took = time.monotonic() - began
    print(f"  {total} rows in {took:.1f} s: {total / took:,.0f} rows/s to the client")
    stop.set()
    drainer.join()


def drain(port: int, token: str, stop: Any) -> None:
    """Take what the backfill brings, a thousand at a time."""
    conn = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    while not stop.is_set():
        conn.request("GET", "/api/http_pull_consumers/all/receive?batch_size=1000&wait_for=1s", headers=headers)
        messages = json.loads(conn.getresponse().read())["data"]
        if messages:
            conn.request("POST", "/api/http_pull_consumers/all/ack", json.dumps({"ack_ids": [m["ack_id"] for m in messages]}), headers)
            conn.getresponse().read()


def begin(installation: Installation, consumer: str, **more: str) -> None:
    status, body = installation.call("POST", "/api/backfills", {"consumer": consumer, "table": "public.orders_of_old", **more})
    assert status == 201, body


def ended(installation: Installation) -> bool:
    return not installation.call("GET", "/api/backfills?status=running")[1]["data"]


def wait_for(installation: Installation) -> None:
    while not ended(installation):
        time.sleep(0.1)
    failed = [backfill for backfill in installation.call("GET", "/api/backfills?limit=100")[1]["data"] if backfill["status"] != "completed"]
    assert not failed, failed


def waiting(installation: Installation) -> int:
    """Ids of the log that lie before the client."""
    with installation.store() as conn:
        row = conn.execute(
            "SELECT (SELECT max(id) FROM messages WHERE consumer = p.consumer) - p.position FROM consumer_position p"
            " JOIN consumers_consumer c ON c.id = p.consumer WHERE c.name = 'all'"
        ).fetchone()
    return max(0, row[0] or 0) if row else 0


def taken(installation: Installation) -> None:
    while waiting(installation):
        time.sleep(0.5)


def last(installation: Installation) -> int:
    with installation.source() as conn:
        row = conn.execute("SELECT max(id) FROM orders_of_old").fetchone()
    assert row is not None
    return int(row[0])


if __name__ == "__main__":
    main()
