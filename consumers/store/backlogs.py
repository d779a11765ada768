"""Keep consumers within what they may hold back of the log: `max_backlog_bytes`, and what `on_full` says to do past it."""
from __future__ import annotations

import logging
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from consumers.hosting import readable_bytes

log = logging.getLogger(__name__)

Connection = psycopg.Connection[Any]


class Full(NamedTuple):
    """A consumer that holds back more than it may."""

    consumer_id: UUID
    name: str
    source_id: UUID
    on_full: str
    limit: int
    held: int
    position: int


def enforce(conn: Connection) -> list[Full]:
    """Pause, or drop the oldest of, those that hold back too much; those that only hold are health's to name."""
    rows = conn.execute(
        "SELECT * FROM (SELECT c.id, c.name, p.source, c.on_full, c.max_backlog_bytes, sequin_backlog_bytes(p.position) AS held,"
        " p.position FROM consumers_consumer c JOIN consumer_position p ON p.consumer = c.id"
        " WHERE c.max_backlog_bytes IS NOT NULL AND c.status <> 'disabled' AND EXISTS (SELECT FROM messages m WHERE m.source = p.source"
        " AND m.id > p.position)) x WHERE held > max_backlog_bytes"
    ).fetchall()
    full = [Full(*row) for row in rows]
    for one in full:
        if one.on_full == "pause":
            _pause(conn, one)
        elif one.on_full == "drop_oldest":
            _drop_oldest(conn, one)
    return full


def _pause(conn: Connection, one: Full) -> None:
    reason = f"its backlog holds back {readable_bytes(one.held)} of the log, more than max_backlog_bytes: {readable_bytes(one.limit)}"
    done = conn.execute(
        "UPDATE consumers_consumer SET status = 'paused', status_reason = %s, updated_at = now() WHERE id = %s AND status = 'active'"
        " AND (on_full, max_backlog_bytes) = (%s, %s)",
        [reason, one.consumer_id, one.on_full, one.limit],
    )
    if done.rowcount:
        conn.execute("SELECT pg_notify('sequin_config', '')")
        log.warning("paused consumer=%s: %s", one.name, reason)


def _drop_oldest(conn: Connection, one: Full) -> None:
    """Move its position to where the rest fits. What it has out or parked stays its own."""
    low, high = one.position, _last_id(conn)
    while high - low > 1000:
        middle = (low + high) // 2
        row = conn.execute("SELECT sequin_backlog_bytes(%s)", [middle]).fetchone()
        assert row is not None
        low, high = (middle, high) if row[0] > one.limit else (low, middle)
    with conn.transaction():
        row = conn.execute("SELECT position FROM consumer_position WHERE consumer = %s FOR UPDATE", [one.consumer_id]).fetchone()
        if row is None or row[0] >= high:
            return
        # An edit waits for that row too: what is saved by now counts, the next one comes afterwards.
        if not conn.execute(
            "SELECT 1 FROM consumers_consumer WHERE id = %s AND (on_full, max_backlog_bytes) = (%s, %s)", [one.consumer_id, one.on_full, one.limit]
        ).fetchone():
            return
        dropped = conn.execute(
            # Ids up to the last one drawn may be those of messages on their way into the log: of a source they come in order.
            "UPDATE consumer_position SET position = CASE WHEN EXISTS (SELECT FROM messages WHERE source = %(source)s AND id > %(to)s)"
            " THEN %(to)s ELSE coalesce(d.last, position) END, dropped_count = dropped_count + d.n FROM (SELECT max(id) AS last,"
            " count(*) AS n FROM messages WHERE source = %(source)s AND id > %(from)s AND id <= %(to)s) d WHERE consumer = %(consumer)s"
            " RETURNING dropped_count",
            {"to": high, "from": row[0], "source": one.source_id, "consumer": one.consumer_id},
        ).fetchone()
    assert dropped is not None
    log.warning("dropped the oldest messages of consumer=%s: its backlog was full; %s dropped so far", one.name, dropped[0])


def _last_id(conn: Connection) -> int:
    row = conn.execute("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM messages_id").fetchone()
    assert row is not None
    return int(row[0])
