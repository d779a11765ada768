"""Measure claim+ack beside PGMQ and beside a plain SKIP LOCKED queue table, in the same server, in alternating rounds.

    python bench/queues.py [--seconds 2] [--rounds 3] [--only sql|http] [--snapshot]

The same work each time: take a batch of messages of about 400 bytes, settle them, 1 and 4 receivers (processes), none of them
waiting for the disk. Ours keeps the order of each group and the log for replay; the others delete what is settled. First by
SQL, as a worker beside the database would; then by HTTP: ours through run_web, the others through the thinnest service there
can be (bench/_queue_server.py) on the same web server. --snapshot: beside a transaction that stays open all the time, as of a
backup, a report or a forgotten session, so that nothing that is settled can be cleaned up.
"""
from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench._store import store  # noqa: E402

BATCHES, RECEIVERS = (1, 10, 100, 1000), (1, 4)
FILL = 200_000
BODY = '{"id": %s, "status": "paid", "filler": "' + "x" * 350 + '"}'

Cycle = Callable[[int], int]
"""Takes and settles a batch; returns how many messages that were."""


def connect() -> Any:
    import psycopg

    return psycopg.connect(os.environ["DATABASE_URL"], autocommit=True, options="-c synchronous_commit=off")


def ours(consumer: Any) -> Cycle:
    from consumers.store import claims

    def cycle(batch: int) -> int:
        claim = claims.claim(consumer, batch, lease_ms=60_000)
        return 0 if claim.token is None else claims.ack(consumer, [(claim.token, m.id) for m in claim.messages]).done

    return cycle


def pgmq(_: Any) -> Cycle:
    conn = connect()

    def cycle(batch: int) -> int:
        rows = conn.execute("SELECT msg_id, read_ct, message FROM pgmq.read('bench', 60, %s)", [batch]).fetchall()
        if rows:
            conn.execute("SELECT pgmq.delete('bench', %s::bigint[])", [[row[0] for row in rows]]).fetchall()
        return len(rows)

    return cycle


def skip_locked(_: Any) -> Cycle:
    conn = connect()

    def cycle(batch: int) -> int:
        rows = conn.execute(
            "UPDATE plain_queue SET until = now() + interval '60 s', taken = taken + 1 WHERE id IN (SELECT id FROM plain_queue"
            " WHERE until <= now() ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED) RETURNING id, body",
            [batch],
        ).fetchall()
        if rows:
            conn.execute("DELETE FROM plain_queue WHERE id = ANY (%s)", [[row[0] for row in rows]])
        return len(rows)

    return cycle


def by_http(port: int, path: str, token: str = "") -> Cycle:
    conn = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def call(name: str, body: Any) -> Any:
        conn.request("POST", f"{path}/{name}", json.dumps(body), headers)
        answer = conn.getresponse()
        data = answer.read()
        assert answer.status == 200, data[:300]
        return json.loads(data)

    def cycle(batch: int) -> int:
        ids = [one["ack_id"] for one in call("receive", {"batch_size": batch})["data"]]
        return int(call("ack", {"ack_ids": ids})["acked"]) if ids else 0

    return cycle


def receive(make: Callable[[Any], Cycle], argument: Any, batch: int, seconds: float, start: Any, counts: Any) -> None:
    from django.db import connection

    connection.close()  # not the parent's
    cycle = make(argument)
    start.wait()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds and (got := cycle(batch)):
        done += got
    counts.put((done, time.perf_counter() - began))
    connection.close()


def rate(make: Callable[[Any], Cycle], argument: Any, batch: int, receivers: int, seconds: float) -> float:
    context = multiprocessing.get_context("fork")
    start, counts = context.Barrier(receivers), context.Queue()
    running = [context.Process(target=receive, args=(make, argument, batch, seconds, start, counts)) for _ in range(receivers)]
    for process in running:
        process.start()
    found = [counts.get(timeout=120) for _ in running]
    for process in running:
        process.join()
    return sum(done for done, _ in found) / max(took for _, took in found)


class Engines:
    """The three, each with FILL messages to take."""

    def __init__(self) -> None:
        from tests.api.pull_world import Log, make_source

        self.log = Log(make_source("bench"))
        relation = self.log._relation("orders")
        from consumers.store.types import LogRow

        for begin in range(0, FILL, 5000):
            lsn = self.log.progress.stored_lsn + 100
            after = self.log.progress._replace(stored_lsn=lsn, reached_lsn=lsn)
            rows = [
                LogRow(relation, 1, b"I", b'["%d"]' % n, None, 1, lsn, n, 0, (BODY % n).encode(), None, None, True)
                for n in range(begin, begin + 5000)
            ]
            self.log.appender.append(rows, self.log.progress, after)
            self.log.progress = after
        self.conn = connect()
        found = importlib.util.find_spec("pgmq")
        self.has_pgmq = found is not None and bool(found.submodule_search_locations)
        if self.has_pgmq:
            assert found is not None and found.submodule_search_locations
            self.conn.execute((Path(found.submodule_search_locations[0]) / "sql" / "pgmq.sql").read_text())
            self.conn.execute("SELECT pgmq.create('bench')")
        self.conn.execute(
            "CREATE TABLE plain_queue (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, until timestamptz NOT NULL DEFAULT now(),"
            " taken int NOT NULL DEFAULT 0, body jsonb NOT NULL) WITH (fillfactor = 70)"
        )
        self.conn.execute("CREATE INDEX plain_queue_until ON plain_queue (until, id)")
        self.number = 0

    def there(self, makers: dict[str, Callable[[Any], Cycle]]) -> dict[str, Callable[[Any], Cycle]]:
        return {name: make for name, make in makers.items() if name != "pgmq" or self.has_pgmq}

    def prepare(self, name: str) -> Any:
        """Fill up; what the receivers of this engine are given."""
        if name == "ours":
            from tests.api.pull_world import make_consumer

            self.number += 1
            consumer = make_consumer(self.log.source, f"c{self.number}", max_ack_pending=1_000_000)
            self.conn.execute("UPDATE consumer_position SET position = 0 WHERE consumer = %s", [consumer.pk])
            return consumer.pk
        if name == "pgmq":
            self.conn.execute("SELECT pgmq.purge_queue('bench')")
            self.conn.execute(
                "INSERT INTO pgmq.q_bench (vt, message) SELECT clock_timestamp(), format(%s, g)::jsonb FROM generate_series(1, %s) g",
                [BODY, FILL],
            )
            self.conn.execute("VACUUM ANALYZE pgmq.q_bench")
        else:
            self.conn.execute("TRUNCATE plain_queue")
            self.conn.execute("INSERT INTO plain_queue (body) SELECT format(%s, g)::jsonb FROM generate_series(1, %s) g", [BODY, FILL])
            self.conn.execute("VACUUM ANALYZE plain_queue")
        return None  # nothing but the table


@contextmanager
def open_snapshot() -> Iterator[None]:
    with connect() as conn:
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SELECT 1")
        yield
        conn.execute("ROLLBACK")


def compare(engines: Engines, title: str, makers: dict[str, Callable[[Any], Cycle]], options: argparse.Namespace) -> None:
    from django.db import connection

    print(f"{title:>24}" + "".join(f"{name:>14}" for name in makers) + "   ours to each of the others")
    for receivers in RECEIVERS:
        for batch in BATCHES:
            found: dict[str, list[float]] = {name: [] for name in makers}
            for _ in range(options.rounds):
                for name, make in makers.items():
                    argument = engines.prepare(name)
                    connection.close()
                    found[name].append(rate(make, argument, batch, receivers, options.seconds))
            medians = {name: statistics.median(rates) for name, rates in found.items()}
            # Of each round by itself: what the machine did besides is the same for all in it.
            ratios = "".join(
                f"{statistics.median(ours / theirs for ours, theirs in zip(found['ours'], found[name], strict=True)):>9.2f}"
                for name in makers if name != "ours"
            )  # fmt: skip
            label = f"{receivers} receivers, batch {batch}"
            print(f"{label:>24}" + "".join(f"{medians[name]:>14,.0f}" for name in makers) + ratios, flush=True)


@contextmanager
def thin_server() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--blocking-threads", "100", "--backpressure", "100", "--no-ws", "--log-level", "error", "bench._queue_server:application"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the thin server does not answer"
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["sql", "http"])
    parser.add_argument("--snapshot", action="store_true", help="beside a transaction that stays open")
    options = parser.parse_args()
    snapshot = open_snapshot if options.snapshot else nullcontext
    with store():
        engines = Engines()
        if not engines.has_pgmq:
            print("PGMQ is not installed (requirements-dev.txt): left out")
        if options.only != "http":
            makers = {"ours": ours, "pgmq": pgmq, "skip locked": skip_locked}
            with snapshot():
                compare(engines, "SQL: messages/s", engines.there(makers), options)
        if options.only != "sql":
            from consumers.tokens import create_token
            from tests.api.pull_world import web_server

            token = create_token("bench", "pull")[1]
            with web_server() as (_, port), thin_server() as thin, snapshot():
                makers = {
                    "ours": lambda consumer: by_http(port, f"/api/http_pull_consumers/{consumer}", token),
                    "pgmq": lambda _: by_http(thin, "/pgmq"),
                    "skip locked": lambda _: by_http(thin, "/skip"),
                }
                compare(engines, "HTTP: messages/s", engines.there(makers), options)
        engines.conn.close()
        engines.log.close()


if __name__ == "__main__":
    main()
