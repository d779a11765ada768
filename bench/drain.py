"""Measure the drain of a backlog into the log, beside pg_recvlogical on the same backlog, in alternating rounds.

The source is a cluster of its own; the store another. Changes are of an 8-column table, 1,000 rows a transaction, 60 %
inserts, 35 % updates, 5 % deletes. `python bench/drain.py [CHANGES]`. Prints changes a second, the ratio, peak memory.
"""
from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench._store import store  # noqa: E402

ROUNDS = 3
TABLE = """
CREATE TABLE orders (id bigint PRIMARY KEY, customer_id int, status text, amount numeric, price float8, active boolean,
                     created_at timestamptz, meta jsonb)
"""
ROWS = """
INSERT INTO orders SELECT i, mod(i, 1000), 'pending', i * 1.25, i / 7.0, mod(i, 2) = 0, now(),
    jsonb_build_object('n', i, 'note', repeat('x', 40)) FROM generate_series(%(first)s::bigint, %(first)s::bigint + 599) i
"""
UPDATES = "UPDATE orders SET status = 'paid', amount = amount + 1 WHERE id BETWEEN %(first)s AND %(first)s + 349"
DELETES = "DELETE FROM orders WHERE id BETWEEN %(first)s + 550 AND %(first)s + 599"


def main() -> None:
    changes = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    home = Path(tempfile.mkdtemp(prefix="sequin-bench-"))
    home.chmod(0o711)
    from sequinapp.embedded_postgres import EmbeddedPostgres

    server = EmbeddedPostgres(home, {"max_slot_wal_keep_size": "-1"})
    server.start()
    try:
        with store():
            measure(server, changes, str(server._binaries() / "pg_recvlogical"))
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)


def measure(server: Any, changes: int, yardstick: str) -> None:
    import psycopg

    conninfo = f"host=127.0.0.1 port={server.port} user=postgres password={server.password} dbname=postgres"
    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute(TABLE)
        conn.execute("CREATE PUBLICATION bench FOR TABLE orders")
        for number in range(ROUNDS):
            for who in ("ours", "theirs"):
                conn.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [f"{who}_{number}"])
        for first in range(0, changes, 1000):
            with conn.transaction():
                for statement in (ROWS, UPDATES, DELETES):
                    conn.execute(statement, {"first": first})
        row = conn.execute("SELECT pg_current_wal_insert_lsn(), pg_current_wal_insert_lsn() - '0/0'").fetchone()
    assert row is not None
    end_text, end = str(row[0]), int(row[1])
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(ROUNDS):
        ours.append(drain(server, number, changes, end))
        theirs.append(recvlogical(yardstick, server, number, changes, end_text))
    print(f"{changes} changes, {ROUNDS} alternating rounds, median of each")
    print(f"into the log     {statistics.median(ours):10,.0f} changes/s")
    ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
    print(f"pg_recvlogical   {statistics.median(theirs):10,.0f} changes/s     ratio {ratio:.2f}")
    print(f"peak memory of the reader's process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def drain(server: Any, number: int, changes: int, end: int) -> float:
    """Our reader, from connecting until the last change is stored and confirmed."""
    from capture.reader import Reader
    from consumers.models import Source
    from consumers.store.appender import Appender

    source = Source.objects.create(
        name=f"bench-{number}", host="127.0.0.1", port=server.port, database="postgres", username="postgres",
        password=server.password, slot_name=f"ours_{number}", publication_name="bench",
    )  # fmt: skip
    with Appender(source.pk) as appender:
        assert appender.lock_source()
        reader: Any = None
        reader = Reader(source, appender, stopping=lambda: done(reader, end))
        began = time.perf_counter()
        reader.run()
        return changes / (time.perf_counter() - began)


def done(reader: Any, end: int) -> bool:
    """The last transaction ends just below `end`; between transactions, nothing but a few bytes of other WAL is left."""
    return bool(not reader._transactions.is_open and reader._progress.stored_lsn >= end - 65_536)


def recvlogical(program: str, server: Any, number: int, changes: int, end: str) -> float:
    arguments = [
        program, "-h", "127.0.0.1", "-p", str(server.port), "-U", "postgres", "-d", "postgres", "--slot", f"theirs_{number}",
        "--start", "--endpos", end, "--no-loop", "-f", "/dev/null", "-o", "proto_version=1", "-o", "publication_names=bench",
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(arguments, check=True, env={**os.environ, "PGPASSWORD": server.password})
    return changes / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
