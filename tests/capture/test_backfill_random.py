"""Random changes during random backfills and rewinds: who lets the last message of each row win has the table in the end.

Everything real and at once: writers whose transactions overlap, capture, workers, and a client that gives back, lets leases
end and rewinds. Nothing is older than what came before it, except after a rewind.
"""
from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest
from django.db import connection

from capture import backfilling
from consumers import changes
from consumers.models import Backfill, Consumer
from consumers.store import backfill_work, backfills, claims, rewinds
from consumers.store.connection import store_connection
from consumers.store.types import ClaimedMessage
from tests.capture.backfill_world import begin, fetch
from tests.capture.conftest import EMBEDDED
from tests.capture.world import reading
from tests.conftest import SourceDatabase, wait_until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("quick_reader")]

KEYS = 150
WINDOW = 8  # keys that one transaction keeps to itself
LONG_S, SHORT_S = 20.0, 4.0
LEASE_MS = 20_000


class Writer:
    """Changes rows as users do. Each version of a row has a higher `n` than those before it."""

    def __init__(self, conn: psycopg.Connection[Any], chance: random.Random, truncates: bool) -> None:
        self.conn, self.chance, self.truncates = conn, chance, truncates

    def transaction(self) -> None:
        chance = self.chance
        if self.truncates and chance.random() < 0.04:
            self.conn.execute("TRUNCATE t")
            return
        if chance.random() < 0.02:
            self.alter()
            return
        first = chance.randint(1, KEYS)
        with self.conn.transaction(force_rollback=chance.random() < 0.1):
            self.conn.execute("LOCK TABLE t IN ROW EXCLUSIVE MODE")
            self.conn.execute("SELECT pg_advisory_xact_lock(k) FROM generate_series(%s::int, %s) k", [first, first + WINDOW])
            for _ in range(chance.randint(1, 5)):
                try:
                    with self.conn.transaction(force_rollback=chance.random() < 0.1):
                        self.statement(first)
                except psycopg.errors.UniqueViolation:
                    pass
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.05)

    def statement(self, first: int) -> None:
        what = self.chance.choices(["put", "many", "move", "swap", "delete"], [30, 20, 15, 15, 10])[0]
        a, b = self.chance.sample(range(first, first + WINDOW + 1), 2)
        if what == "put":
            self.conn.execute(
                "INSERT INTO t (id, n, v) VALUES (%s, nextval('versions'), 'put') ON CONFLICT (id) DO UPDATE SET n = excluded.n, v = 'put again'", [a]
            )
        elif what == "many":
            self.conn.execute("UPDATE t SET n = nextval('versions'), v = 'many' WHERE id BETWEEN %s AND %s", [min(a, b), max(a, b)])
        elif what == "move":
            self.conn.execute("UPDATE t SET n = nextval('versions'), id = %s WHERE id = %s", [b, a])
        elif what == "swap":
            for before, after in ((a, -a), (b, a), (-a, b)):
                self.conn.execute("UPDATE t SET n = nextval('versions'), id = %s WHERE id = %s", [after, before])
        else:
            self.conn.execute("DELETE FROM t WHERE id = %s", [a])

    def alter(self) -> None:
        self.conn.execute(
            self.chance.choice(  # type: ignore[arg-type]
                ["ALTER TABLE t ADD COLUMN IF NOT EXISTS more int DEFAULT 5", "ALTER TABLE t DROP COLUMN IF EXISTS more",
                 "ALTER TABLE t ALTER n TYPE numeric", "ALTER TABLE t ALTER n TYPE bigint", "ALTER TABLE t REPLICA IDENTITY FULL",
                 "ALTER TABLE t REPLICA IDENTITY DEFAULT", "ANALYZE t"]
            )
        )  # fmt: skip


class Client:
    """Takes what its consumer gets. What it gives back it has not looked at, so that it need not remember what it did."""

    def __init__(self, consumer: Consumer, chance: random.Random, gives_back: bool) -> None:
        """One that gives back does not go back to before it was made: the table may have been emptied then."""
        self.consumer, self.chance, self.gives_back = consumer, chance, gives_back
        [(self.first,)] = fetch("SELECT coalesce(max(id), 0) + 1 FROM messages") if gives_back else [(1,)]
        self.rows: dict[int, Any] = {}
        self.newest: dict[int, int] = {}
        self.rewound = self.read = 0

    def turn(self, quiet: bool = False) -> bool:
        """Take some. False when nothing was to be had. `quiet`: all of it, and no rewinding."""
        what = "take" if quiet else self.chance.choices(["take", "part", "lose", "rewind"], [80, 8, 4, 2])[0]
        if what == "rewind":
            self.rewind()
        most = 1000 if quiet else self.chance.choice([1, 3, 20, 100])
        claim = claims.claim(self.consumer.pk, most, lease_ms=50 if what == "lose" and self.gives_back else LEASE_MS)
        if claim.token is None:
            return not claim.at_end
        if what == "lose" and self.gives_back:
            return True
        taken = len(claim.messages)
        if what == "part" and self.gives_back:
            taken = self.chance.randint(0, taken)
        for message in claim.messages[:taken]:
            self.note(message)
        claims.ack(self.consumer.pk, [(claim.token, message.id) for message in claim.messages[:taken]])
        claims.nack(self.consumer.pk, [(claim.token, message.id) for message in claim.messages[taken:]], self.chance.choice([0, 20]))
        return True

    def rewind(self) -> None:
        [(first, position)] = fetch(
            "SELECT coalesce((SELECT min(id) FROM messages WHERE source = p.source), 1), position FROM consumer_position p WHERE consumer = %s",
            self.consumer.pk,
        )
        first = max(first, self.first)
        if position < first:
            return
        back = self.chance.choice([first - 1, self.chance.randint(first - 1, position), max(first - 1, position - 50)])
        self.rewound += rewinds.rewind(self.consumer.pk, self.consumer.source_id, back).replay_id is not None
        self.newest.clear()

    def note(self, message: ClaimedMessage) -> None:
        if message.action == "truncate":
            self.rows.clear()
            return
        key = int(json.loads(message.key)[0])
        row = json.loads(message.record)
        before = json.loads(message.changes or "{}").get("id")
        if before is not None:
            self.rows.pop(before, None)
        if message.action == "delete":
            self.rows.pop(key, None)
            return
        self.read += message.action == "read"
        version = int(row["n"])
        assert version >= self.newest.get(key, 0), f"{message.action} {message.id} of {key}: version {version} after {self.newest[key]}"
        self.newest[key] = version
        self.rows[key] = {name: row[name] for name in ("id", "n", "v")}


class Crowd:
    """Threads that do something again and again. What one of them raises ends all, and the test."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.failed: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def keep(self, doing: Callable[[], Any]) -> threading.Thread:
        def run() -> None:
            try:
                while not self.stopping.is_set():
                    doing()
            except BaseException as error:
                self.failed.append(error)
                self.stopping.set()
            finally:
                connection.close()

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()
        return thread

    def end(self) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        if self.failed:
            raise self.failed[0]


@contextmanager
def crowd() -> Iterator[Crowd]:
    made = Crowd()
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def source_server(servers: dict[str, Any]) -> Any:
    return servers[EMBEDDED]


def test_a_copy_that_lets_the_last_message_win_is_the_table(
    source_database: SourceDatabase, make_source: Any, monkeypatch: pytest.MonkeyPatch, long_run: bool
) -> None:
    for name, value in {"CHUNK_ROWS": 7, "MOST_ROWS": 25}.items():
        monkeypatch.setattr(backfilling, name, value)
    for name, value in {"LOOK_FIRST": 20, "FAR_BEHIND": 200}.items():
        monkeypatch.setattr(backfill_work, name, value)
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY, n bigint, v text); CREATE SEQUENCE versions; CREATE PUBLICATION sequin_pub FOR TABLE t")
    source_database.execute("INSERT INTO t SELECT g, nextval('versions'), 'first' FROM generate_series(1, 100) g")
    source = make_source()
    read = rewound = 0
    for round_ in range(12 if long_run else 2):
        seed = random.randrange(1 << 30)
        try:
            client = one_round(source_database, source, random.Random(seed), f"c{round_}", LONG_S if long_run else SHORT_S, truncates=bool(round_ % 2))
        except BaseException as error:
            error.add_note(f"seed {seed}, round {round_}, backfills still running: {running()}")
            raise
        read, rewound = read + client.read, rewound + client.rewound
    assert read and (rewound or not long_run)  # a table that was emptied a moment ago has no rows to be read


def one_round(database: SourceDatabase, source: Any, chance: random.Random, name: str, seconds: float, *, truncates: bool) -> Client:
    """`truncates`: of a table that is emptied a client may not give back what came before."""
    consumer = Consumer(name=name, source=source, kind="pull", tables=["public.t"], start_from="beginning", actions=["insert", "update", "delete", "truncate"])
    client = Client(consumer, random.Random(chance.random()), gives_back=not truncates)
    with reading(source), crowd() as working, crowd() as writing:
        for _ in range(2):
            writer = Writer(database.connect(), random.Random(chance.random()), truncates)
            writing.keep(writer.transaction)
            working.keep(lambda: backfilling.step(slice_s=0.2) or time.sleep(0.02))
        changes.save(consumer)
        [first] = Backfill.objects.filter(consumer=consumer)
        fetch("UPDATE backfills SET page_rows = 10 WHERE id = %s", first.pk)
        # In the end it takes what waits: a backfill for a consumer with much before it goes on when it has.
        taking = working.keep(lambda: client.turn(quiet=writing.stopping.is_set()) or time.sleep(0.01))
        end = time.monotonic() + seconds
        others: list[UUID] = []
        while time.monotonic() < end and not (writing.failed or working.failed):
            meddle(consumer, chance, others)
            time.sleep(chance.random() * 0.2)
        writing.end()
        for backfill in others:
            backfills.resume(backfill)
        wait_until(lambda: working.failed or not running(), 60, "the backfills to end")
        [(last,)] = database.execute("INSERT INTO t VALUES (1000, nextval('versions'), 'last') ON CONFLICT (id) DO UPDATE SET n = excluded.n RETURNING n")
        wait_until(lambda: fetch("SELECT 1 FROM messages WHERE key = '[\"1000\"]' AND (record::json->>'n')::bigint = %s", int(last)), 30)
        working.end()
        assert not taking.is_alive()
    wait_until(lambda: not client.turn(quiet=True) and not fetch("SELECT 1 FROM consumer_position WHERE out_count + parked_count > 0"), 60, "all to be taken")
    assert fetch("SELECT status FROM backfills WHERE id = %s", first.pk) == [("completed",)]
    assert not fetch("SELECT reason FROM backfills WHERE status = 'failed'")
    expected = {row["id"]: row for (row,) in database.execute("SELECT json_build_object('id', id, 'n', n, 'v', v) FROM t")}
    assert client.rows == expected, {key: (client.rows.get(key), expected.get(key)) for key in client.rows.keys() | expected.keys() if client.rows.get(key) != expected.get(key)}
    consumer.status = "disabled"
    changes.save(consumer)
    return client


def running() -> list[Any]:
    """The backfills that run, and how far the log is."""
    return fetch("SELECT to_jsonb(b), p.reached_lsn FROM backfills b LEFT JOIN capture_progress p ON p.source = b.source WHERE b.status = 'running'")


def meddle(consumer: Consumer, chance: random.Random, begun: list[UUID]) -> None:
    """Begin another backfill, do something to one of them, or let the log lag behind what pages see."""
    what = chance.choice(["begin", "begin", "pause", "resume", "cancel", "hold", "hold", "nothing"])
    if what == "hold":
        with store_connection() as conn, conn.transaction():
            conn.execute("SELECT FROM capture_progress FOR UPDATE")
            conn.execute("SELECT pg_sleep(%s)", [chance.random() * 0.5])
    elif what == "begin":
        how = chance.choice([{}, {"where": "id % 2 = 0"}, {"sort_column": "n"}, {"sort_column": "id", "start_value": "40"}, {"sort_column": "v"}])
        begun.append(begin(consumer, page_rows=chance.choice([10, 25]), **how))
    elif begun and what != "nothing":
        {"pause": backfills.pause, "resume": backfills.resume, "cancel": backfills.cancel}[what](chance.choice(begun))
