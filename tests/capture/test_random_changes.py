"""Random changes on random tables, read back through us, give the source's tables."""
from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.db import connection

from tests.capture.test_values import exact
from tests.capture.world import read_until
from tests.conftest import SourceDatabase

pytestmark = pytest.mark.django_db(transaction=True)

COLUMNS = {
    "text": lambda chance: chance.choice(["", "NULL", "é\n\"\\", "x" * 5000, None]),
    "numeric": lambda chance: chance.choice([None, "NaN", str(chance.randint(-(10**30), 10**30)), f"{chance.random():.17f}"]),
    "jsonb": lambda chance: chance.choice(['{"a": [1, null, "x"]}', "null", '"\\u00e9"', None]),
    "text[]": lambda chance: chance.choice(["{}", '{a,"b,c",NULL}', "{{x},{y}}", None]),
    "timestamptz": lambda chance: chance.choice(["2026-11-23 10:00:00.123456+00", "infinity", "0044-03-15 00:00+00 BC", None]),
    "double precision": lambda chance: chance.choice(["NaN", "-Infinity", repr(chance.uniform(-1e300, 1e300)), None]),
    "bytea": lambda chance: chance.choice(["\\x", "\\x00ff", None]),
    "int[]": lambda chance: chance.choice(["[0:1]={1,2}", "{1,NULL}", None]),
}


class RandomUser:
    """Does to the tables what users do, rolled-back savepoints and changes of keys included."""

    def __init__(self, conn: psycopg.Connection[Any], seed: int) -> None:
        self.conn, self.chance = conn, random.Random(seed)
        self.tables: dict[str, list[str]] = {}
        for number in range(3):
            kinds = self.chance.sample(sorted(COLUMNS), self.chance.randint(2, 5))
            columns = ", ".join(f"c{i} {kind}" for i, kind in enumerate(kinds))
            conn.execute(f"CREATE TABLE t{number} (k1 int, k2 text, {columns}, PRIMARY KEY (k2, k1))")  # type: ignore[arg-type]
            conn.execute(f"ALTER TABLE t{number} REPLICA IDENTITY FULL")  # type: ignore[arg-type]
            self.tables[f"t{number}"] = kinds

    def transaction(self) -> None:
        with self._block():
            for _ in range(self.chance.randint(1, 6)):
                try:
                    with self._block(rolled_back=self.chance.random() < 0.2):
                        self.statement()
                except psycopg.errors.UniqueViolation:
                    pass

    @contextmanager
    def _block(self, rolled_back: bool = False) -> Iterator[None]:
        with self.conn.transaction(force_rollback=rolled_back):
            yield

    def statement(self) -> None:
        table = self.chance.choice(sorted(self.tables))
        kinds = self.tables[table]
        what = self.chance.choices(["insert", "update", "key", "delete", "truncate"], [50, 30, 8, 11, 1])[0]
        key = (self.chance.randint(1, 12), self.chance.choice(["a", "é\"", "b,c"]))
        at = self.chance.randrange(len(kinds))
        if what == "insert":
            values = [COLUMNS[kind](self.chance) for kind in kinds]
            self.conn.execute(f"INSERT INTO {table} VALUES ({', '.join(['%s'] * (2 + len(values)))})", [*key, *values])  # type: ignore[arg-type]
        elif what == "update":
            value = COLUMNS[kinds[at]](self.chance)
            self.conn.execute(f"UPDATE {table} SET c{at} = %s WHERE k1 < %s", [value, key[0]])  # type: ignore[arg-type]
        elif what == "key":
            self.conn.execute(f"UPDATE {table} SET k1 = k1 + 100 WHERE (k1, k2) = (%s, %s)", key)  # type: ignore[arg-type]
        elif what == "delete":
            self.conn.execute(f"DELETE FROM {table} WHERE k1 = %s", [key[0]])  # type: ignore[arg-type]
        else:
            self.conn.execute(f"TRUNCATE {table}")  # type: ignore[arg-type]

    def state(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for table in self.tables:
            rows = self.conn.execute(f"SELECT json_build_array(k2, k1::text)::text, to_json(t)::text FROM {table} t").fetchall()  # type: ignore[arg-type]
            found[table] = {str(exact(key)): exact(text) for key, text in rows}
        return found


def replayed() -> dict[str, dict[str, Any]]:
    """What the log says the tables are."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT r.table_name, m.action, m.record, m.key, m.old_key FROM messages m JOIN relation_version r ON r.id = m.relation"
            " ORDER BY m.id"
        )
        tables: dict[str, dict[str, Any]] = {}
        for table, action, record, key, old_key in cursor.fetchall():
            rows = tables.setdefault(table, {})
            if action == "T":
                rows.clear()
                continue
            if action == "D":
                assert rows.pop(str(exact(key))) == exact(record), "a delete carries the row as it was"
                continue
            if action == "U":
                before = rows.pop(str(exact(old_key or key)), None)
                assert before is not None, "an update of a row that is there"
            rows[str(exact(key))] = exact(record)
        return tables


@pytest.mark.parametrize("seed", range(3))
def test_what_is_read_back_is_what_is_there(source_database: SourceDatabase, make_source: Any, seed: int, long_run: bool) -> None:
    with source_database.connect(options="-c timezone=UTC -c datestyle=ISO") as conn:
        user = RandomUser(conn, seed)
        conn.execute("CREATE PUBLICATION sequin_pub FOR TABLE " + ", ".join(user.tables))
        source = make_source()
        for _ in range(2000 if long_run else 150):
            user.transaction()
        conn.execute("INSERT INTO t0 (k1, k2) VALUES (99999, 'the last')")
        wanted = user.state()
    last = str(exact('["the last", "99999"]'))
    read_until(source, lambda: last in replayed().get("t0", {}))
    found = replayed()
    assert {table: found.get(table, {}) for table in wanted} == wanted
