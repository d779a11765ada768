"""Cut the log into partitions ahead of the appends, and drop those that nobody needs any more.

A partition holds a million ids. It is cut earlier when it grows old, so that retention frees space on quiet logs too.
Made by CREATE and ATTACH, removed by DETACH CONCURRENTLY and DROP with lock timeouts: neither ever queues in front of
claims.
"""
from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import psycopg
from psycopg import sql

from consumers.store.locks import MAINTENANCE_LOCK, PARTITION_LOCK, SEQUENCE_LOCK

log = logging.getLogger(__name__)

PARTITION_IDS = 1_000_000
AHEAD_IDS = 1_000_000  # there is always room for so many more messages
CUTS_PER_RETENTION = 8

Connection = psycopg.Connection[Any]


def ensure_ahead(conn: Connection) -> None:
    """Make partitions until there is room for AHEAD_IDS more ids. While another makes them, half of that will do."""
    with conn.transaction():
        last, top = _last_id(conn), _top(conn)
        if top - last >= AHEAD_IDS:
            return
        lock = "pg_try_advisory_xact_lock" if top - last >= AHEAD_IDS // 2 else "true from pg_advisory_xact_lock"
        locked = conn.execute(f"SELECT {lock}(%s)", [PARTITION_LOCK]).fetchone()
        if not locked or not locked[0]:
            return
        last, top = _last_id(conn), _top(conn)
        while top - last < AHEAD_IDS:
            _create(conn, top, top + PARTITION_IDS)
            top += PARTITION_IDS


def maintain(conn: Connection, retention: timedelta) -> list[str]:
    """Make room ahead, cut an old partition, drop what is past retention and needed by nobody. Returns the names dropped.

    Safe to call from any number of processes; those that come second do nothing. `conn` must be in autocommit.
    """
    locked = conn.execute("SELECT pg_try_advisory_lock(%s)", [MAINTENANCE_LOCK]).fetchone()
    if not locked or not locked[0]:
        return []
    try:
        _cut_by_age(conn, retention)
        ensure_ahead(conn)
        _measure(conn)
        dropped = []
        for name, from_id, to_id in _past(conn, retention):
            if not _drop(conn, name, from_id, to_id):
                break  # the floor may not rise above what is still there
            dropped.append(name)
        _drop_unneeded_copies(conn)
        _trim_attempts(conn)
        return dropped
    finally:
        conn.execute("SELECT pg_advisory_unlock(%s)", [MAINTENANCE_LOCK])


def _last_id(conn: Connection) -> int:
    row = conn.execute("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM messages_id").fetchone()
    assert row is not None
    return int(row[0])


def _top(conn: Connection) -> int:
    row = conn.execute("SELECT coalesce(max(to_id), 0) FROM log_partition").fetchone()
    assert row is not None
    return int(row[0])


def _create(conn: Connection, from_id: int, to_id: int) -> None:
    name = f"messages_{from_id:012d}"
    table = sql.Identifier(name)
    conn.execute(sql.SQL("CREATE TABLE {} (LIKE messages INCLUDING DEFAULTS INCLUDING INDEXES)").format(table))
    conn.execute(
        sql.SQL("ALTER TABLE messages ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(table, from_id, to_id)
    )
    conn.execute("INSERT INTO log_partition (name, from_id, to_id) VALUES (%s, %s, %s)", [name, from_id, to_id])


def _cut_by_age(conn: Connection, retention: timedelta) -> None:
    """Jump the sequence to the next partition when the current one began long ago and holds something; close what is full.

    Appends hold the lock shared to their end, so nothing comes into a closed partition any more.
    """
    with conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(%s)", [SEQUENCE_LOCK])
        last = _last_id(conn)
        row = conn.execute(
            "SELECT to_id FROM log_partition p WHERE from_id <= %s AND to_id > %s + 1 AND closed_at IS NULL"
            " AND coalesce((SELECT max(closed_at) FROM log_partition), created_at) < now() - %s::interval",
            [last, last, retention / CUTS_PER_RETENTION],
        ).fetchone()
        if row is not None and last > 0:
            conn.execute("SELECT setval('messages_id', %s - 1)", [row[0]])
        conn.execute(
            "UPDATE log_partition SET closed_at = now() WHERE closed_at IS NULL AND to_id <= %s + 1", [_last_id(conn)]
        )


def _past(conn: Connection, retention: timedelta) -> list[tuple[str, int, int]]:
    """Partitions closed longer than `retention` ago, oldest first, up to the first that a consumer still has to take."""
    rows = conn.execute(
        "SELECT name, from_id, to_id FROM log_partition WHERE closed_at < now() - %s::interval ORDER BY from_id",
        [retention],
    ).fetchall()
    past: list[tuple[str, int, int]] = []
    for name, from_id, to_id in rows:
        if _is_needed(conn, from_id, to_id):
            break
        past.append((name, from_id, to_id))
    return past


def _is_needed(conn: Connection, from_id: int, to_id: int) -> bool:
    """Whether a consumer has still to take something between these ids, or a republish to look at it."""
    row = conn.execute(
        "SELECT EXISTS (SELECT FROM backfills b WHERE b.to_id >= %(from)s AND b.status IN ('running', 'paused')"
        " AND b.place::bigint < %(to)s) OR EXISTS (SELECT FROM consumer_position p JOIN consumers_consumer c ON c.id = p.consumer"
        " WHERE c.status <> 'disabled' AND p.position < %(to)s AND EXISTS (SELECT FROM messages m"
        " WHERE m.source = p.source AND m.id > p.position AND m.id >= %(from)s AND m.id < %(to)s))",
        {"from": from_id, "to": to_id},
    ).fetchone()
    return bool(row and row[0])


def _measure(conn: Connection) -> None:
    """Of partitions that nothing comes into any more: note the latest commits, and index the keys.

    A rewind to a row looks for its key. An index that appends had to fill as well would cost them a third of their speed.
    """
    rows = conn.execute("SELECT name FROM log_partition WHERE NOT measured AND closed_at IS NOT NULL").fetchall()
    for (name,) in rows:
        table = sql.Identifier(name)
        with conn.transaction():
            conn.execute(
                sql.SQL(
                    "INSERT INTO log_extent SELECT {}, source, epoch, max(committed_at), max(commit_lsn) FROM {} GROUP BY 2, 3"
                ).format(sql.Literal(name), table)
            )
            conn.execute(sql.SQL("CREATE INDEX ON {} USING brin (key text_bloom_ops)").format(table))
            conn.execute("UPDATE log_partition SET measured = true WHERE name = %s", [name])


def _drop(conn: Connection, name: str, from_id: int, to_id: int) -> bool:
    """Raise the floor, copy what leases and parked rows still name, detach and drop. False: needed after all, or a lock was not
    to be had.
    """
    table = sql.Identifier(name)
    needed = True
    with conn.transaction():
        # A rewind holds the floor while it moves a position: whoever comes second sees what the first has done.
        conn.execute("UPDATE log_floor SET id = greatest(id, %s)", [to_id])
        if _is_needed(conn, from_id, to_id):
            raise psycopg.Rollback
        conn.execute(
            sql.SQL(
                "INSERT INTO kept_messages SELECT m.* FROM {} m JOIN ("
                " SELECT source, unnest(ids) AS id FROM leases UNION SELECT source, unnest(ids) FROM parked"
                ") needed USING (source, id) ON CONFLICT DO NOTHING"
            ).format(table)
        )
        conn.execute(
            sql.SQL(
                "INSERT INTO log_lost AS l SELECT source, epoch, max(committed_at), max(commit_lsn) FROM {} GROUP BY 1, 2"
                " ON CONFLICT (source, epoch) DO UPDATE SET committed_at = greatest(l.committed_at, excluded.committed_at),"
                " commit_lsn = greatest(l.commit_lsn, excluded.commit_lsn)"
            ).format(table)
        )
        conn.execute("DELETE FROM log_extent WHERE partition = %s", [name])
        needed = False
    if needed:
        return False
    try:
        conn.execute("SET lock_timeout = '2s'")
        pending = conn.execute(
            "SELECT inhdetachpending FROM pg_inherits WHERE inhrelid = to_regclass(%s)", [name]
        ).fetchone()
        if pending is not None:
            how = "FINALIZE" if pending[0] else "CONCURRENTLY"
            conn.execute(sql.SQL("ALTER TABLE messages DETACH PARTITION {} " + how).format(table))
        with conn.transaction():
            conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
            conn.execute("DELETE FROM log_partition WHERE name = %s", [name])
    except psycopg.errors.LockNotAvailable:
        return False  # the next round finishes it
    finally:
        conn.execute("RESET lock_timeout")
    log.info("dropped log partition=%s from_id=%s to_id=%s", name, from_id, to_id)
    return True


def _drop_unneeded_copies(conn: Connection) -> None:
    """One join, however many of either there are."""
    conn.execute(
        "DELETE FROM kept_messages k WHERE NOT EXISTS (SELECT FROM (SELECT source, unnest(ids) AS id FROM leases"
        " UNION ALL SELECT source, unnest(ids) FROM parked) needed WHERE needed.source = k.source AND needed.id = k.id)"
    )


def _trim_attempts(conn: Connection) -> None:
    """Keep the failures of a week and the last 1,000 successes of each consumer."""
    conn.execute("DELETE FROM attempts WHERE NOT ok AND at < now() - interval '7 days'")
    conn.execute(
        # Materialized: a plan made for an empty table looks each consumer's thousandth up for every row.
        "WITH old AS MATERIALIZED (SELECT c.consumer, (SELECT id FROM attempts x WHERE x.consumer = c.consumer AND x.ok"
        " ORDER BY id DESC OFFSET 1000 LIMIT 1) AS below FROM (SELECT DISTINCT consumer FROM attempts) c)"
        " DELETE FROM attempts a USING old WHERE a.consumer = old.consumer AND a.ok AND a.id <= old.below"
    )
