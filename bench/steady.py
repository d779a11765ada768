"""Measure steady load with a snapshot held open on the store: does throughput hold, do the hot tables stay small?

    python bench/steady.py [--minutes 2] [--rate 2000] [--batch 100] [--dump]

One appender at RATE messages a second, two receivers that keep up in batches of BATCH and now and then nack, and one transaction
that stays open from the beginning, so that no dead row may be removed. The housekeeping of run_workers and run_web runs beside.
With --dump the transaction holds the hot tables too, as pg_dump does: then they cannot be rewritten until it ends. The first
tenth is compared with the last. For half an hour: --minutes 30.
"""
from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench._store import store  # noqa: E402

TABLES = ("consumer_position", "leases", "parked", "capture_progress")
PART_ROWS = 100


class Load:
    """The appender and the receivers, each in a thread of its own."""

    def __init__(self, rate: int, batch: int) -> None:
        from tests.api.pull_world import Log, make_consumer, make_source

        self.rate, self.batch = rate, batch
        self.log = Log(make_source("bench"))
        self.consumer = make_consumer(self.log.source, "steady").pk
        self.stopping, self.counting = threading.Event(), threading.Lock()
        self.appended = self.acked = 0
        self.slowest_claim_s = 0.0

    def append(self) -> None:
        began, number = time.monotonic(), 0
        while not self.stopping.is_set():
            self.log.append([(number + row) % 5000 for row in range(PART_ROWS)], notify=False)
            number += PART_ROWS
            self.appended = number
            self.stopping.wait(max(0.0, began + number / self.rate - time.monotonic()))

    def receive(self) -> None:
        from django.db import connection

        from consumers.store import claims

        turn = 0
        while not self.stopping.is_set():
            began = time.monotonic()
            claim = claims.claim(self.consumer, self.batch, lease_ms=30_000)
            self.slowest_claim_s = max(self.slowest_claim_s, time.monotonic() - began)
            if claim.token is None:
                self.stopping.wait(0.005)
                continue
            turn += 1
            receipts = [(claim.token, message.id) for message in claim.messages]
            if turn % 50 == 0:
                claims.nack(self.consumer, receipts[-1:], 100)
                receipts.pop()
            if receipts:
                done = claims.ack(self.consumer, receipts).done
                with self.counting:
                    self.acked += done
        connection.close()


def sizes(conn: Any) -> str:
    found = [(name, conn.execute("SELECT pg_total_relation_size(%s::regclass)", [name]).fetchone()[0]) for name in TABLES]
    return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--rate", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dump", action="store_true")
    options = parser.parse_args()
    with store():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    import psycopg

    from consumers.store.hot import keep_small

    minutes = options.minutes
    load = Load(options.rate, options.batch)
    threads = [threading.Thread(target=load.append), *[threading.Thread(target=load.receive) for _ in range(2)]]
    threads.append(threading.Thread(target=keep_small, args=(load.stopping,)))
    with psycopg.connect(os.environ["DATABASE_URL"]) as held, psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as conn:
        held.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        held.execute("SELECT count(*) FROM messages")
        if options.dump:
            held.execute(f"LOCK TABLE {', '.join(TABLES)} IN ACCESS SHARE MODE")
        for thread in threads:
            thread.start()
        rates = []
        try:
            for part in range(10):
                before, began = load.acked, time.monotonic()
                load.slowest_claim_s = 0.0
                time.sleep(minutes * 6)
                rates.append((load.acked - before) / (time.monotonic() - began))
                behind = load.appended - load.acked
                print(f"{part + 1:>2}/10: {rates[-1]:7,.0f} messages/s, {behind} behind, slowest claim {load.slowest_claim_s * 1000:.0f} ms; {sizes(conn)}", flush=True)
        finally:
            load.stopping.set()
            for thread in threads:
                thread.join()
        print(f"the last tenth at {rates[-1] / rates[0]:.2f} of the first, a snapshot held open for {minutes:g} minutes")
        load.log.close()


if __name__ == "__main__":
    main()
