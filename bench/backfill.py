"""Measure a backfill: rows a second from the source's table into the log, and what it does to live messages meanwhile.

Everything runs on this machine, in an installation of its own. `python bench/backfill.py [ROWS] [LIVE RATE]`. Live messages are
pulled as in bench/latency.py, first alone and then beside the backfill, so that the two can be compared.
"""
from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.latency import PULL, pull, report, warm_up, write  # noqa: E402
from tests.installation import Installation  # noqa: E402

ALONE_S = 8.0
COLUMNS = "id bigint PRIMARY KEY, customer_id int, status text, total numeric, price float8, active bool, created_at timestamptz, meta jsonb"
FILL = (
    "INSERT INTO orders_of_old SELECT g, g %% 1000, 'paid', g * 1.25, g / 3.0, g %% 2 = 0, timestamptz '2026-01-01' + g * interval '1 s',"
    " jsonb_build_object('n', g, 'tag', 'x' || g %% 10) FROM generate_series(%s::bigint, %s) g"
)


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 500_000
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else 100.0
    base = Path(tempfile.mkdtemp(prefix="sequin-bench-"))
    base.chmod(0o711)
    installation = Installation(base / "home")
    installation.start()
    try:
        with installation.source() as conn:
            conn.execute(f"CREATE TABLE orders_of_old ({COLUMNS}); CREATE TABLE latency (id int PRIMARY KEY, note text)")  # type: ignore[arg-type]
            for begin in range(0, rows, 100_000):
                conn.execute(FILL, [begin + 1, min(rows, begin + 100_000)])  # type: ignore[arg-type]
            conn.execute("ANALYZE orders_of_old")
        shared = {"source": "playground", "kind": "pull"}
        installation.call("POST", "/api/consumers", {**shared, "name": PULL, "tables": ["public.latency"]})
        pulled: dict[int, float] = {}
        stopping = threading.Event()
        puller = threading.Thread(target=pull, args=(installation, pulled, stopping))
        puller.start()
        warm_up(installation, pulled)
        alone = write(installation, rate, int(rate * ALONE_S))
        until_all(alone, pulled)
        report(f"live alone, {rate:g}/s", alone, pulled)
        with installation.source() as conn:
            conn.execute("TRUNCATE latency")
        beside: dict[int, float] = {}
        pulled.clear()
        began = time.monotonic()
        made = installation.call("POST", "/api/consumers", {**shared, "name": "all", "tables": ["public.orders_of_old"], "start_from": "beginning"})
        assert made[0] == 201, made
        writer = threading.Thread(target=lambda: beside.update(write(installation, rate, int(rate * ALONE_S))))
        writer.start()
        drained = threading.Event()
        drainer = threading.Thread(target=drain, args=(installation, drained))
        drainer.start()
        done = follow(installation, began)
        writer.join()
        until_all(beside, pulled)
        report("live beside the backfill", beside, pulled)
        print(f"backfill: {done['rows_done']} rows in {done['took']:.1f} s, {done['rows_done'] / done['took']:,.0f} rows/s, with a client that takes them")
        drained.set()
        drainer.join()
        stopping.set()
        puller.join()
    finally:
        installation.stop()


def until_all(sent: dict[int, float], arrived: dict[int, float]) -> None:
    deadline = time.monotonic() + 30
    while not sent.keys() <= arrived.keys() and time.monotonic() < deadline:
        time.sleep(0.02)


def drain(installation: Installation, stopping: threading.Event) -> None:
    """Take what the backfill brings, a thousand at a time."""
    while not stopping.is_set():
        messages = installation.receive("all", size=1000, wait="1s")
        if messages:
            installation.ack("all", messages)


def follow(installation: Installation, began: float) -> dict[str, Any]:
    """Wait until it has ended; show how it gets on."""
    shown = time.monotonic()
    while True:
        (backfill,) = installation.call("GET", "/api/backfills?consumer=all")[1]["data"]
        took = time.monotonic() - began
        if backfill["status"] != "running":
            assert backfill["status"] == "completed", backfill
            return {**backfill, "took": took}
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"  {took:5.1f} s: {backfill['rows_done']} of about {backfill['rows_estimated']}, {backfill['rows_per_second'] or 0:,.0f} rows/s {backfill['reason']}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
