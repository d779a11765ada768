"""F21: a table is backfilled beside hot writers while processes are killed; a client's copy equals the table, and nothing goes back.

Writers change rows all over the table, hot ones again and again: they put, delete and move them. Each version of a row has a
higher number than those before it. `copying_client` lets the last message of a row win, in a process of its own.

`make faults` runs 10,000,000 rows with a kill every 15 s; SEQUIN_F21_ROWS says another number.
"""
from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from http.client import HTTPException
from typing import Any

import psycopg

from tests.conftest import wait_until
from tests.faults.copying_client import CONSUMER, Copy, take
from tests.faults.rig import peak_mb
from tests.faults.test_kill_loop import VICTIMS, installation, strike  # noqa: F401
from tests.installation import Installation

WRITERS, HOT = 4, 1_000
SHORT_ROWS, LONG_ROWS = 60_000, 10_000_000
EVERY_S = 15.0
IN_THE_SUITE = ["run_capture --reader", "postgres", "run_workers --cluster"]  # each as soon as it has got on again


class Writer(threading.Thread):
    """Changes rows as long as it is let, whatever happens to the server."""

    def __init__(self, installation: Installation, rows: int, seed: int) -> None:  # noqa: F811
        super().__init__(daemon=True)
        self.installation, self.rows, self.chance = installation, rows, random.Random(seed)
        self.stopping = threading.Event()
        self.commits = 0

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                with self.installation.source() as conn:
                    while not self.stopping.wait(0.005):
                        self.transaction(conn)
                        self.commits += 1
            except (psycopg.Error, OSError):
                self.stopping.wait(0.1)

    def transaction(self, conn: psycopg.Connection[Any]) -> None:
        a, b = sorted((self.row(), self.row()))
        what = self.chance.choices(["put", "delete", "move"], [80, 12, 8])[0]
        with conn.transaction():
            # Who has a row has its next number, too.
            conn.execute("SELECT pg_advisory_xact_lock(%s)", [a])
            if what == "move" and a != b:
                conn.execute("SELECT pg_advisory_xact_lock(%s)", [b])
                conn.execute("DELETE FROM big WHERE id = %s", [b])
                conn.execute("UPDATE big SET id = %s, n = nextval('versions') WHERE id = %s", [b, a])
            elif what == "delete":
                conn.execute("DELETE FROM big WHERE id = %s", [a])
            else:
                conn.execute(
                    "INSERT INTO big VALUES (%s, nextval('versions'), 'put') ON CONFLICT (id) DO UPDATE SET n = excluded.n, v = 'put again'", [a]
                )

    def row(self) -> int:
        """Mostly a hot one; these lie all over the table."""
        if self.chance.random() < 0.1:
            return self.chance.randint(1, self.rows)
        return 1 + self.chance.randrange(HOT) * max(1, self.rows // HOT) % self.rows


def fill(installation: Installation, rows: int) -> None:  # noqa: F811
    with installation.source() as conn:
        conn.execute("CREATE TABLE big (id bigint PRIMARY KEY, n bigint NOT NULL, v text); ALTER TABLE big REPLICA IDENTITY FULL; CREATE SEQUENCE versions")
        for first in range(1, rows + 1, 500_000):
            conn.execute(
                "INSERT INTO big SELECT g, nextval('versions'), 'first ' || g FROM generate_series(%s::bigint, %s) g", [first, min(rows, first + 499_999)]
            )
        conn.execute("ANALYZE big")


def backfill_of(installation: Installation) -> dict[str, Any] | None:  # noqa: F811
    """What the API says about it; None while nobody answers."""
    try:
        status, body = installation.call("GET", f"/api/backfills?consumer={CONSUMER}", timeout=5)
        return body["data"][0] if status == 200 else None
    except (OSError, HTTPException, ValueError):
        return None


def is_taken(installation: Installation) -> bool:  # noqa: F811
    with installation.store() as conn:
        return bool(
            conn.execute(
                "SELECT 1 FROM consumer_position p JOIN consumers_consumer c ON c.id = p.consumer WHERE c.name = %s AND"
                " p.out_count + p.parked_count = 0 AND p.position >= (SELECT max(id) FROM messages WHERE source = p.source)", [CONSUMER],
            ).fetchone()
        )  # fmt: skip


def test_f21_a_backfill_beside_hot_writers_while_processes_are_killed(installation: Installation, long_run: bool) -> None:  # noqa: F811
    rows = int(os.environ.get("SEQUIN_F21_ROWS", LONG_ROWS if long_run else SHORT_ROWS))
    fill(installation, rows)
    writers = [Writer(installation, rows, seed) for seed in range(WRITERS)]
    for writer in writers:
        writer.start()
    context = multiprocessing.get_context("spawn")
    answer, theirs = context.Pipe()
    stop, seen_last = context.Event(), context.Event()
    began = time.monotonic()
    status, body = installation.call(
        "POST", "/api/consumers",
        {"name": CONSUMER, "source": "playground", "kind": "pull", "tables": ["public.big"], "start_from": "beginning", "ack_wait_ms": 5000},
    )  # fmt: skip
    assert status == 201, body
    arguments = (installation.port, installation.token, installation.psql_url(), rows, seen_last, stop, theirs)
    client = context.Process(target=take, args=arguments, daemon=True)
    client.start()
    try:
        kills, recovery_s, peak = kill_while_it_runs(installation, rows, deadline=began + 180 + rows / 1_000)
        took = time.monotonic() - began
        for writer in writers:
            writer.stopping.set()
        for writer in writers:
            writer.join(60)
        wait_until(lambda: put_last(installation, rows + 1), 30, "the source to be there")
        assert seen_last.wait(150 + rows / 2_000), "the last change never arrived"
        wait_until(lambda: is_taken(installation), 60 + rows / 2_000, "all to be taken")
        stop.set()
        assert answer.poll(120)
        there, wrong, taken, repeats, gone_back = answer.recv()
    finally:
        stop.set()
        client.join(60)
        client.kill()
    brought = wait_until(lambda: backfill_of(installation), 30, "the web server")
    line = (
        f"F21 {rows} rows backfilled beside {WRITERS} writers, {kills} kills of any process: {there} rows in the table, differing {wrong},"
        f" gone back {len(gone_back)}, {taken} taken, {repeats} repeats, {sum(writer.commits for writer in writers)} commits meanwhile,"
        f" {brought['rows_left_out']} overtaken, {rows / took:,.0f} rows/s, recovery {recovery_s:.1f} s, peak {peak} MB"
    )
    print(line)  # noqa: T201
    assert not wrong and not gone_back and there > rows / 2 and kills >= len(IN_THE_SUITE), (line, gone_back)


def put_last(installation: Installation, key: int) -> bool:  # noqa: F811
    try:
        with installation.source() as conn:
            conn.execute("INSERT INTO big VALUES (%s, nextval('versions'), 'last') ON CONFLICT (id) DO NOTHING", [key])
    except psycopg.Error:
        return False
    return True


def kill_while_it_runs(installation: Installation, rows: int, *, deadline: float) -> tuple[int, float, int]:  # noqa: F811
    """Strike again and again until the backfill has ended.

    How often; after how long it got on again, at most; and the most memory a worker has had.
    """
    kills, recovery_s, peak = 0, 0.0, 0
    is_short = rows <= SHORT_ROWS
    victims = IN_THE_SUITE[:] if is_short else random.sample(VICTIMS, len(VICTIMS))
    struck_at = time.monotonic()
    mark: int | None = 0
    while True:
        found = backfill_of(installation)
        if found is not None and found["status"] != "running":
            assert found["status"] == "completed", found
            return kills, recovery_s, peak
        now = time.monotonic()
        assert now < deadline, f"not completed: {found}"
        if found is not None and mark is not None and found["rows_done"] > mark:
            recovery_s, mark = max(recovery_s, now - struck_at), None
        if found is not None and mark is None and (is_short or now - struck_at > EVERY_S) and victims:
            peak = max([peak, *(peak_mb(pid) for pid in installation.pids("run_workers --cluster"))])
            struck_at, mark = now, found["rows_done"]
            strike(installation, victims.pop(0))
            kills += 1
            if not is_short:
                victims = victims or random.sample(VICTIMS, len(VICTIMS))
        time.sleep(0.05)


def test_what_goes_back_or_differs_is_found() -> None:
    """The client that decides would see it."""
    copy = Copy(3)
    message = lambda action, key, number, **changes: {"data": {"action": action, "record": {"id": key, "n": number}, "changes": changes}}  # noqa: E731
    copy.take([message("insert", 1, 1), message("update", 1, 3, n=1)])
    copy.take([message("update", 1, 3, n=1), message("insert", 1, 1)])
    assert copy.repeats == 1 and not copy.gone_back
    copy.take([message("read", 1, 2)])
    assert copy.gone_back == ["read of 1: 2 after 3"]
    copy.take([message("update", 2, 4, id=1, n=3)])
    assert list(copy.present) == [0, 0, 1, 0, 0]
