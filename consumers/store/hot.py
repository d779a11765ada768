"""Keep the hot tables small while an old snapshot keeps vacuum from cleaning them.

A dump, a report or a forgotten transaction that stays open holds every version of a row that was ever updated since. Claims
find the newest first (see consumer_position), but the room is taken, and what reads the others has to pass them all. These
tables hold little, so they are emptied and filled again: what TRUNCATE frees is free whatever snapshots there are. It waits
for nobody: where somebody holds the tables themselves, as a dump does, it tries again later.
"""
from __future__ import annotations

import logging
import threading
import time
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from consumers.store.connection import store_connection, why_away
from consumers.store.locks import REWRITE_LOCK

log = logging.getLogger(__name__)

Connection = psycopg.Connection[Any]

KIB, MIB = 1024, 1024 * 1024
DEAD_SHARE = 4  # rewritten when they take more than so many times what they hold
MOST_BYTES = 16 * MIB  # held by living rows: more than that is not rewritten, it would take too long
OLD_SNAPSHOT_XIDS = 500  # a snapshot that so many transactions have passed
LOCK_WAIT_MS = 50  # so long claims queue behind an attempt in vain
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 120.0
LOOK_EVERY_S, RECONNECT_S = 1.0, 2.0

_OLDEST_SQL = """
    SELECT greatest(
        (SELECT max(age(backend_xmin)) FROM pg_stat_activity
         WHERE pid <> pg_backend_pid() AND backend_type IS DISTINCT FROM 'autovacuum worker'),  -- which keeps nobody from cleaning up
        (SELECT max(age(xmin)) FROM pg_replication_slots),
        (SELECT max(age(transaction)) FROM pg_prepared_xacts))
"""


def keep_small(stopping: threading.Event) -> None:
    """Look every second until told to stop; the body of a thread. Any number of processes may."""
    tables = HotTables()
    while not stopping.is_set():
        try:
            with store_connection(application_name="sequin housekeeping") as conn:
                while not stopping.wait(LOOK_EVERY_S):
                    tables.look(conn)
        except psycopg.Error as error:
            log.warning("housekeeping waits for the store: %s", why_away(error))
            stopping.wait(RECONNECT_S)


class Size(NamedTuple):
    taken: int
    living: int


Group = dict[str, int]

# Tables that are rewritten together, each with the bytes from which on it is. Everything that hands out or settles messages
# looks at consumer_position first, or with its first statement, so no call sees that group half way.
GROUPS: tuple[Group, ...] = (
    {"consumer_position": 8 * MIB, "leases": 8 * MIB, "parked": 512 * KIB, "released": 512 * KIB},
    {"capture_progress": 512 * KIB},
    {"turns": 512 * KIB},
    {"heartbeats": 512 * KIB},
)


class HotTables:
    """One for each process that looks after them; `look` is called every second or so."""

    def __init__(self) -> None:
        self._not_before = [0.0] * len(GROUPS)
        self._pause = [FIRST_PAUSE_S] * len(GROUPS)

    def look(self, conn: Connection) -> list[str]:
        """Rewrite what has grown behind an old snapshot. `conn` must be in autocommit. Returns the tables rewritten."""
        now = time.monotonic()
        grown = [number for number, group in enumerate(GROUPS) if self._not_before[number] <= now and _has_grown(conn, group)]
        if not grown or not _is_held(conn):
            return []
        if not _first(conn, "SELECT pg_try_advisory_lock(%s)", [REWRITE_LOCK]):
            return []
        try:
            return [table for number in grown for table in self._rewrite(conn, number)]
        finally:
            conn.execute("SELECT pg_advisory_unlock(%s)", [REWRITE_LOCK])

    def _rewrite(self, conn: Connection, number: int) -> list[str]:
        try:
            done = rewrite(conn, GROUPS[number])
        except psycopg.errors.LockNotAvailable:
            # Somebody holds them. Each attempt in vain makes claims wait a moment, so there are few.
            self._not_before[number] = time.monotonic() + self._pause[number]
            self._pause[number] = min(2 * self._pause[number], LONGEST_PAUSE_S)
            return []
        self._pause[number] = FIRST_PAUSE_S
        return done


def rewrite(conn: Connection, group: Group) -> list[str]:
    """Empty and fill again those tables of a group that hold little and take much. Raises LockNotAvailable."""
    with conn.transaction():
        conn.execute(f"SET LOCAL lock_timeout = {LOCK_WAIT_MS}")
        conn.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.SQL(", ").join(map(sql.Identifier, group))))
        done = []
        for table, large_bytes in group.items():
            size = _size(conn, table)
            if size.taken > large_bytes and size.taken > DEAD_SHARE * size.living and size.living < MOST_BYTES:
                _refill(conn, sql.Identifier(table))
                done.append(table)
                log.debug("rewrote table=%s bytes=%s living=%s", table, size.taken, size.living)
        return done


def _refill(conn: Connection, table: sql.Identifier) -> None:
    with conn.cursor() as cursor:
        with cursor.copy(sql.SQL("COPY {} TO STDOUT (FORMAT binary)").format(table)) as out:
            rows = b"".join(out)
        cursor.execute(sql.SQL("TRUNCATE {}").format(table))
        with cursor.copy(sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(table)) as into:
            into.write(rows)


def _has_grown(conn: Connection, group: Group) -> bool:
    query = "SELECT bool_or(pg_total_relation_size(t::regclass) > large) FROM unnest(%s::text[], %s::bigint[]) u(t, large)"
    return bool(_first(conn, query, [list(group), list(group.values())]))


def _size(conn: Connection, table: str) -> Size:
    name = sql.Identifier(table)
    living = _first(conn, sql.SQL("SELECT coalesce(sum(pg_column_size(t.*)), 0) FROM {} t").format(name))
    return Size(int(_first(conn, "SELECT pg_total_relation_size(%s::regclass)", [table])), int(living))


def _is_held(conn: Connection) -> bool:
    return int(_first(conn, _OLDEST_SQL) or 0) > OLD_SNAPSHOT_XIDS


def _first(conn: Connection, query: Any, parameters: Any = None) -> Any:
    row = conn.execute(query, parameters).fetchone()
    return row[0] if row else None
