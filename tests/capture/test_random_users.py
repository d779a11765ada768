"""Several users change tables at random, and the tables themselves; the reader is killed at random. The log equals the tables.

Tables of every replica identity, without a key, partitioned; TOASTed values, changed keys, rows that move between partitions,
truncations, savepoints, columns that come, go, are renamed and retyped. Each change carries a number of its own, so that nothing
lost, doubled or out of order hides behind a later change.
"""
from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import psycopg
import pytest
from django.db import connection

from tests.capture.test_values import exact
from tests.capture.world import ForkedReader
from tests.conftest import SourceDatabase, wait_until

pytestmark = pytest.mark.django_db(transaction=True)

PLAIN = "id int, code text NOT NULL, seq bigint, v text, big text, ns numeric[]"
TABLES = {
    "by_default": [f"CREATE TABLE by_default ({PLAIN}, PRIMARY KEY (code, id))"],
    "by_full": [f"CREATE TABLE by_full ({PLAIN}, PRIMARY KEY (id, code))", "ALTER TABLE by_full REPLICA IDENTITY FULL"],
    "by_index": [
        f"CREATE TABLE by_index ({PLAIN}, PRIMARY KEY (id, code), UNIQUE (code, id))", "ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code_id_key"
    ],
    "parted": [
        f"CREATE TABLE parted ({PLAIN}, PRIMARY KEY (id, code)) PARTITION BY RANGE (id)",
        *(f"CREATE TABLE parted{n} PARTITION OF parted FOR VALUES FROM ({n * 10}) TO ({n * 10 + 10})" for n in range(4)),
        "CREATE TABLE parted_rest (v text, big text, ns numeric[], seq bigint, code text NOT NULL, id int NOT NULL, PRIMARY KEY (id, code))",
        "ALTER TABLE parted ATTACH PARTITION parted_rest DEFAULT", "ALTER TABLE parted1 REPLICA IDENTITY FULL",
    ],
}  # fmt: skip
VALUES = [None, "", "NULL", "é\n\"\\", r"\u0000", "x" * 30, "{}"]
IN_THE_WAY = (psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable, psycopg.errors.SerializationFailure)
EACH = "id * 4 + CASE code WHEN 'a' THEN 0 WHEN 'b,c' THEN 1 ELSE 2 END"  # another number for each row of a statement
NUMBERS = ["{}", "{1,NULL,NaN}", "{{1.50,-0},{1e30,2}}", None]


class User(threading.Thread):
    """Commits transactions until told to stop; `committed` has the numbers of what was committed, by table and key in order."""

    numbers = count(1)

    def __init__(self, database: SourceDatabase, seed: int, transactions: int) -> None:
        super().__init__(daemon=True)
        self.database, self.chance, self.transactions = database, random.Random(seed), transactions
        self.committed: set[int] = set()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with self.database.connect() as conn:
                conn.execute("SET lock_timeout = '2s'")
                self.may_prepare = conn.execute("SHOW max_prepared_transactions").fetchone() != ("0",)
                for _ in range(self.transactions):
                    self._transaction(conn)
        except BaseException as error:
            self.error = error

    def _transaction(self, conn: psycopg.Connection[Any]) -> None:
        """Committed, given up, or first prepared, where the server lets."""
        how = self.chance.choices(["commit", "give up", "prepare", "prepare, give up"], [80, 10, 7, 3])[0]
        if not self.may_prepare:
            how = how.replace("prepare, ", "").replace("prepare", "commit")
        name = f"{self.database.name}_{next(self.numbers)}"
        try:
            conn.execute("BEGIN")
            done = self._statements(conn)
            if how.startswith("prepare"):
                conn.execute(f"PREPARE TRANSACTION '{name}'")  # type: ignore[arg-type]
                conn.execute(f"{'ROLLBACK' if 'give up' in how else 'COMMIT'} PREPARED '{name}'")  # type: ignore[arg-type]
            else:
                conn.execute("ROLLBACK" if how == "give up" else "COMMIT")
            self.committed.update([] if "give up" in how else done)
        except IN_THE_WAY:
            conn.execute("ROLLBACK")

    def _statements(self, conn: psycopg.Connection[Any]) -> list[int]:
        done: list[int] = []
        for _ in range(self.chance.choice([1, 1, 2, 5, 20])):
            undone = self.chance.random() < 0.15
            try:
                with conn.transaction(force_rollback=undone):
                    numbers = self._statement(conn)
            except psycopg.errors.UniqueViolation:
                continue
            done += [] if undone else numbers
        return done

    def _statement(self, conn: psycopg.Connection[Any]) -> list[int]:
        """One statement; returns the numbers of the rows it wrote."""
        chance = self.chance
        table = chance.choice(sorted(TABLES))
        what = chance.choices(["insert", "upsert", "update", "big", "key", "delete", "truncate"], [30, 15, 25, 8, 12, 9.5, 0.5])[0]
        key = (chance.randint(0, 45), chance.choice(["a", 'é"', "b,c"]))
        number = next(self.numbers) * 1000
        rows: list[Any] = []
        if what in ("insert", "upsert"):
            tail = "ON CONFLICT (id, code) DO UPDATE SET seq = excluded.seq, v = excluded.v" if what == "upsert" else ""
            size = chance.choice([10, 5000])
            rows = conn.execute(
                f"INSERT INTO {table} (id, code, seq, v, big, ns) VALUES (%s, %s, %s, %s, %s, %s) {tail} RETURNING seq",  # type: ignore[arg-type]
                [*key, number, chance.choice(VALUES), "".join(chance.choices("abcdef", k=size)), chance.choice(NUMBERS)],
            ).fetchall()
        elif what == "truncate":
            conn.execute(f"TRUNCATE {table}")  # type: ignore[arg-type]
        elif what == "delete":
            conn.execute(f"DELETE FROM {table} WHERE id = %s", [key[0]])  # type: ignore[arg-type]
        else:
            change, where = {
                "update": ("v = %(v)s", "id BETWEEN %(id)s AND %(id)s + 4"), "big": ("big = repeat('y', %(size)s)", "id = %(id)s"),
                "key": ("id = (id + 17) %% 47", "id = %(id)s"),
            }[what]  # fmt: skip
            rows = conn.execute(
                f"UPDATE {table} t SET {change}, seq = %(number)s + {EACH} WHERE {where} RETURNING seq",  # type: ignore[arg-type]
                {"v": chance.choice(VALUES), "size": chance.choice([3, 6000]), "id": key[0], "number": number},
            ).fetchall()
        return [row[0] for row in rows]


class Owner:
    """Changes the tables while they are used. Where that changes rows without a word, it touches them all, so that they are sent."""

    def __init__(self, database: SourceDatabase, seed: int) -> None:
        self.database, self.chance = database, random.Random(seed)
        self.touched: set[int] = set()
        self.columns: dict[str, list[str]] = {table: [] for table in TABLES}

    def change(self) -> None:
        before = {table: list(columns) for table, columns in self.columns.items()}
        try:
            self._change()
        except IN_THE_WAY:
            self.columns = before

    def _change(self) -> None:
        table = self.chance.choice(sorted(TABLES))
        own = self.columns[table]
        number = next(User.numbers) * 1000
        what = self.chance.choice(["add", "add", "drop", "rename", "retype", "identity"])
        with self.database.connect(options="-c lock_timeout=1s") as conn, conn.transaction():
            if what == "add":
                own.append(f"x{number}")
                conn.execute(f"ALTER TABLE {table} ADD x{number} int DEFAULT {number}")  # type: ignore[arg-type]
            elif what == "identity" and table != "by_index":
                leaf = "parted2" if table == "parted" else table
                conn.execute(f"ALTER TABLE {leaf} REPLICA IDENTITY {self.chance.choice(['DEFAULT', 'FULL'])}")  # type: ignore[arg-type]
            elif own and what == "drop":
                conn.execute(f"ALTER TABLE {table} DROP {own.pop()}")  # type: ignore[arg-type]
            elif own and what == "rename":
                conn.execute(f"ALTER TABLE {table} RENAME {own[0]} TO r{number}")  # type: ignore[arg-type]
                own[0] = f"r{number}"
            elif own and what == "retype":
                conn.execute(f"ALTER TABLE {table} ALTER {own[0]} TYPE text USING 't' || {own[0]}")  # type: ignore[arg-type]
            rows = conn.execute(f"UPDATE {table} SET seq = {number} + {EACH} RETURNING seq").fetchall()  # type: ignore[arg-type]
        self.touched.update(row[0] for row in rows)


def tables(conn: psycopg.Connection[Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for table in TABLES:
        rows = conn.execute(f"SELECT id, code, to_json(t)::text FROM {table} t").fetchall()  # type: ignore[arg-type]
        found[table] = {str((str(number), code)): dict(exact(text)[1]) for number, code, text in rows}
    return found


class Replay:
    """The log, read as a careful consumer would."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
        self.numbers: list[int] = []
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT r.table_name, m.action, m.record, m.key, m.old_key, m.unchanged, r.primary_key, m.epoch, m.commit_lsn, m.commit_idx"
                " FROM messages m JOIN relation_version r ON r.id = m.relation ORDER BY m.id"
            )
            rows = cursor.fetchall()
        at = (0, 0, -1)
        for table, action, record, key, old_key, unchanged, primary_key, epoch, lsn, index in rows:
            assert (epoch, lsn, index) == (at[0], at[1], at[2] + 1) or ((epoch, lsn) > at[:2] and index == 0), "each change once, in order"
            at = (epoch, lsn, index)
            self._apply(table, action, dict(exact(record)[1]), key, old_key, json.loads(unchanged or "[]"), primary_key)

    def _apply(
        self, table: str, action: str, record: dict[str, Any], key: str, old_key: str | None, unchanged: list[str], primary_key: list[str]
    ) -> None:
        rows = self.tables[table]
        if action == "T":
            rows.clear()
            return
        if action != "D":
            self.numbers.append(int(record["seq"][1]))
        if table == "by_index" and action == "D":  # what the server sends of the key is the index, the same columns here
            key = json.dumps([record["id"][1], record["code"]], ensure_ascii=False)
        place = _place(key, primary_key)
        if action == "D":
            assert rows.pop(place, None) is not None, f"a delete of a row that is there: {table} {place}"
            return
        before = rows.pop(_place(old_key, primary_key) if old_key else place, None)
        assert (before is None) == (action == "I"), f"{action} of {table} {place}"
        for name in unchanged:
            assert before is not None
            record[name] = before[name]
        rows[place] = record


def _place(key: str, primary_key: list[str]) -> str:
    values = dict(zip(primary_key, json.loads(key), strict=True))
    return str((values["id"], values["code"]))


@contextmanager
def killed_now_and_then(source: Any, chance: random.Random, **constants: Any) -> Iterator[Callable[[], None]]:
    """A reader that is killed again and again, until the function given is called; it lives on until the block ends."""
    reader = ForkedReader(source, **constants)
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(chance.uniform(0.05, 0.8)):
            reader.kill()
            reader.start()

    def spare() -> None:
        stop.set()
        killer.join()

    reader.start()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield spare
    finally:
        spare()
        reader.kill()


@pytest.mark.parametrize("seed", range(8))
def test_the_log_equals_the_tables(source_database: SourceDatabase, make_source: Any, seed: int, long_run: bool) -> None:
    if seed > 0 and not long_run:
        pytest.skip("one will do; --long runs them all")
    for statements in TABLES.values():
        for statement in statements:
            source_database.execute(statement)
    for table in ("by_default", "by_full", "by_index"):
        source_database.execute(f"ALTER TABLE {table} ALTER big SET STORAGE EXTERNAL")
    source_database.execute(
        "CREATE PUBLICATION sequin_pub FOR TABLE " + ", ".join(TABLES) + " WITH (publish_via_partition_root = true)"
    )
    source = make_source()
    with source_database.connect(options="-c timezone=UTC -c datestyle=ISO") as conn:
        with killed_now_and_then(source, random.Random(seed), **{"capture.reader.BATCH_ROWS": 7, "capture.reader.READ_MESSAGES": 9}) as spare:
            users = [User(source_database, 10 * seed + n, 150 if long_run else 30) for n in range(3)]
            owner = Owner(source_database, seed)
            for user in users:
                user.start()
            while any(user.is_alive() for user in users):
                owner.change()
            spare()
            for user in users:
                assert user.error is None, user.error
            conn.execute("INSERT INTO by_full (id, code, seq) VALUES (9999, 'last', 0)")
            wait_until(lambda: _has_last(), 60, "the last row in the log")
        wanted = tables(conn)
    found = Replay()
    expected = set().union(owner.touched, *(user.committed for user in users), {0})
    assert len(found.numbers) == len(set(found.numbers)), "each change once"
    assert set(found.numbers) == expected
    for table, rows in wanted.items():
        mine = {place: {name: row.get(name) for name in rows.get(place, row)} for place, row in found.tables[table].items()}
        assert mine == rows, table


def _has_last() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM messages WHERE record LIKE '%%\"code\":\"last\"%%'")
        return bool(cursor.fetchone()[0])
