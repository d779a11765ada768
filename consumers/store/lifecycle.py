"""What people and processes do to a consumer's place in the log: begin, end, count, disable, retry, discard; and beats.

The face of the store for the console, the management API and the watchers. Uses Django's connection.
"""
from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connection, transaction

from consumers.store.events import add_event
from consumers.store.types import Backlog, key_text

WAITING_LIMIT = 100_000  # a count beyond it says "at least"
ERROR_CHARACTERS = 2_000
RESPONSE_CHARACTERS = 2_000


class Attempt(NamedTuple):
    """One push of one message, for the console."""

    consumer_id: UUID
    source_id: UUID
    message_id: int
    ok: bool
    status: int | None
    error: str | None
    duration_ms: int
    response: str | None
    url: str
    deliver_count: int
    headers: str
    """What it was sent with, as JSON; secret values masked."""


def epoch(source_id: UUID) -> int:
    """The one that the source's log is in. To be asked before its LSN, which means nothing in a later one."""
    return int(_fetch("SELECT coalesce((SELECT epoch FROM capture_progress WHERE source = %s), 1)", [source_id])[0][0])


def create_position(consumer_id: UUID, source_id: UUID, start_lsn: int, start_epoch: int = 1) -> None:
    """Let a new consumer begin at the end of the log, with nothing committed on the source before `start_lsn` in `start_epoch`."""
    _execute(
        "INSERT INTO consumer_position (consumer, source, position, start_id, start_lsn, start_epoch) SELECT %(consumer)s,"
        " %(source)s, last, last, %(lsn)s, %(epoch)s"
        " FROM (SELECT coalesce(max(id), 0) AS last FROM messages WHERE source = %(source)s) m",
        {"consumer": consumer_id, "source": source_id, "lsn": start_lsn, "epoch": start_epoch},
    )


def last_id(source_id: UUID) -> int:
    """The last message of a source."""
    return int(_fetch("SELECT coalesce(max(id), 0) FROM messages WHERE source = %s", [source_id])[0][0])


def create_position_before(
    consumer_id: UUID, source_id: UUID, last: int, *, xmin: int, xmax: int, running: Sequence[int], is_standby: bool, start_lsn: int,
    start_epoch: int,
) -> None:
    """Let a new consumer begin just below the first logged change that a snapshot of the source does not see.

    `last`: the last message of the source when the snapshot had not been taken yet.
    """
    with transaction.atomic():
        _fetch("SELECT id FROM log_floor FOR SHARE")  # no partition goes that it begins in
        _execute(
            "INSERT INTO consumer_position (consumer, source, position, start_id, start_lsn, start_epoch) SELECT %(consumer)s,"
            " %(source)s, seen, seen, %(lsn)s, %(epoch)s"
            " FROM sequin_seen(%(source)s, %(last)s, %(xmin)s, %(xmax)s, %(running)s::bigint[], %(standby)s) seen ON CONFLICT DO NOTHING",
            {
                "consumer": consumer_id, "source": source_id, "last": last, "xmin": xmin, "xmax": xmax, "running": list(running),
                "standby": is_standby, "lsn": start_lsn, "epoch": start_epoch,
            },
        )  # fmt: skip


def drop_consumer(consumer_id: UUID) -> None:
    """Forget a consumer: its position, leases, parked messages, attempts, turn and backfills."""
    with transaction.atomic():
        for table in ("consumer_position", "leases", "parked", "released", "attempts", "turns", "backfills"):
            _execute(f"DELETE FROM {table} WHERE consumer = %s", [consumer_id])
        _execute("DELETE FROM backfill_chunks c WHERE NOT EXISTS (SELECT FROM backfills b WHERE b.id = c.backfill)")


def drop_source(source_id: UUID) -> None:
    """Forget a source's history. Its messages stay until retention drops their partitions."""
    with transaction.atomic():
        for table in ("capture_progress", "source_status", "source_events", "source_tables", "source_epoch", "log_lost"):
            _execute(f"DELETE FROM {table} WHERE source = %s", [source_id])


def backlog(consumer_id: UUID, *, waiting_limit: int = WAITING_LIMIT) -> Backlog:
    """Count a consumer's undelivered messages; those waiting in the log up to `waiting_limit`."""
    counts = _fetch(
        "SELECT p.out_count, p.dead_count, coalesce(r.retry, 0), coalesce(r.error, 0), p.parked_count"
        " FROM consumer_standing p LEFT JOIN LATERAL (SELECT count(*) FILTER (WHERE reason = 'retry') AS retry,"
        " count(*) FILTER (WHERE reason = 'error') AS error FROM parked WHERE consumer = p.consumer AND reason <> 'dead'"
        " AND p.parked_count > 0) r ON true WHERE p.consumer = %s",
        [consumer_id],
    )
    if not counts:
        return Backlog(0, 0, 0, 0, 0, 0)
    out, dead, retry, error, parked = counts[0]
    return Backlog(waiting(consumer_id, limit=waiting_limit), out, retry, parked - retry - error, error, dead)


def waiting(consumer_id: UUID, *, limit: int = WAITING_LIMIT) -> int:
    """Count the messages beyond the consumer's position that are for it, up to `limit`."""
    return int(
        _fetch(
            f"SELECT count(*) FROM (SELECT FROM ({WAITING_SQL}) m LIMIT %(limit)s) counted",
            {"consumer": consumer_id, "limit": limit},
        )[0][0]
    )


# The messages beyond the position of consumer %(consumer)s that are for it, as a claim would find them.
WAITING_SQL = """
    SELECT m.* FROM consumer_position p
    JOIN consumers_consumer c ON c.id = p.consumer
    JOIN messages m ON m.source = p.source AND m.id > p.position
    JOIN relation_version r ON r.id = m.relation
    WHERE p.consumer = %(consumer)s AND c.status <> 'disabled' AND (m.consumer = p.consumer OR m.consumer IS NULL
      AND (c.stream = 'changes' OR m.action IN ('I', 'U')) AND CASE m.action WHEN 'I' THEN 'insert' WHEN 'U' THEN 'update' WHEN 'D' THEN 'delete' WHEN 'T' THEN 'truncate' END
          = ANY (c.actions)
      AND (c.tables = '{}' OR r.schema_name || '.' || r.table_name = ANY (c.tables) OR r.schema_name || '.*' = ANY (c.tables))
      AND (m.epoch <> p.start_epoch OR m.commit_lsn >= p.start_lsn))
    ORDER BY m.id
"""


def keep_claims_out(consumer_id: UUID) -> None:
    """Until this transaction ends. One that waited for the row alone would go on by the configuration of before."""
    _fetch("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [str(consumer_id)])
    _fetch("SELECT 1 FROM consumer_position WHERE consumer = %s FOR UPDATE", [consumer_id])


def held(consumer_id: UUID) -> tuple[int, int]:
    """How many messages are out and parked; inside a transaction, and until it ends nothing more will be."""
    keep_claims_out(consumer_id)
    rows = _fetch("SELECT out_count, parked_count FROM consumer_standing WHERE consumer = %s", [consumer_id])
    return rows[0] if rows else (0, 0)  # type: ignore[return-value]


def disable(consumer_id: UUID) -> None:
    """Drop what a consumer has out and parked. What comes is not collected until `enable`."""
    with transaction.atomic():
        keep_claims_out(consumer_id)
        _execute("DELETE FROM parked WHERE consumer = %s", [consumer_id])
        _execute(
            "WITH gone AS (DELETE FROM leases WHERE consumer = %(consumer)s RETURNING cardinality(ids) AS n)"
            " UPDATE consumer_position p SET out_count = 0, parked_count = 0, dead_count = 0,"
            " acked_count = p.acked_count + p.out_count - (SELECT coalesce(sum(n), 0) FROM gone) WHERE consumer = %(consumer)s",
            {"consumer": consumer_id},
        )


def enable(consumer_id: UUID) -> None:
    """Let a disabled consumer begin again at the end of the log."""
    with transaction.atomic():
        keep_claims_out(consumer_id)
        _execute(
            "UPDATE consumer_position p SET (position, start_id) = (SELECT x.last, x.last FROM (SELECT greatest(p.position,"
            " (SELECT max(id) FROM messages WHERE source = p.source)) AS last) x) WHERE consumer = %s",
            [consumer_id],
        )
    wake(consumer_id)


def retry(consumer_id: UUID, ids: Sequence[int] | None = None, **chosen: Any) -> int:
    """Let parked messages and dead letters be tried again now: by id, or by state, since, until and key. Returns how many."""
    return _redrive(consumer_id, False, ids, **chosen)


def discard(consumer_id: UUID, ids: Sequence[int] | None = None, **chosen: Any) -> int:
    """Drop parked messages and dead letters: by id, or by state, since, until and key. Returns how many."""
    return _redrive(consumer_id, True, ids, **chosen)


def mended(consumer_id: UUID) -> int:
    """The filter or transform was saved anew: messages that failed because of it are due at once. Returns how many."""
    return int(_fetch("SELECT sequin_mended(%s)", [consumer_id])[0][0])


def wake(consumer_id: UUID) -> None:
    """Tell waiting receivers and pumps that something may have become deliverable."""
    _execute("SELECT pg_notify('sequin_consumer', %s)", [str(consumer_id)])


def set_source_status(
    source_id: UUID,
    state: str,
    reasons: Sequence[str] = (),
    *,
    retained_bytes: int | None = None,
    source_lsn: int | None = None,
    confirmed_lsn: int | None = None,
) -> None:
    """Say how a source is doing. `since` moves when the state changes; a number not given stays."""
    _execute(
        "INSERT INTO source_status AS s (source, state, reasons, retained_bytes, source_lsn, confirmed_lsn)"
        " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (source) DO UPDATE SET"
        " since = CASE WHEN s.state = excluded.state THEN s.since ELSE now() END, state = excluded.state,"
        " reasons = excluded.reasons, retained_bytes = coalesce(excluded.retained_bytes, s.retained_bytes),"
        " source_lsn = coalesce(excluded.source_lsn, s.source_lsn),"
        " confirmed_lsn = coalesce(excluded.confirmed_lsn, s.confirmed_lsn), at = now()",
        [source_id, state, list(reasons), retained_bytes, source_lsn, confirmed_lsn],
    )


def note_source(source_id: UUID, kind: str, text: str) -> None:
    """Tell people what happened to a source."""
    add_event(_execute, source_id, kind, None, text)


def source_state(source_id: UUID) -> str | None:
    """What `set_source_status` was last told."""
    rows = _fetch("SELECT state FROM source_status WHERE source = %s", [source_id])
    return rows[0][0] if rows else None


def has_begun(source_id: UUID) -> bool:
    """Whether the source has ever been read."""
    return bool(_fetch("SELECT 1 FROM capture_progress WHERE source = %s", [source_id]))


def gap(source_id: UUID) -> str | None:
    """What may be missing from the source's log, while nobody has acknowledged it."""
    rows = _fetch("SELECT gap FROM capture_progress WHERE source = %s", [source_id])
    return rows[0][0] if rows else None


def publishes_tables() -> bool:
    """Whether capture has seen a published table at any source."""
    rows = _fetch("SELECT EXISTS (SELECT FROM source_tables WHERE jsonb_array_length(coalesce(tables -> 'published', '[]')) > 0)")
    return bool(rows[0][0])


def gap_since(source_id: UUID) -> datetime | None:
    """When the newest of what may be missing from the log was noticed."""
    rows = _fetch("SELECT gap_at FROM capture_progress WHERE source = %s", [source_id])
    return rows[0][0] if rows else None


def acknowledge_gap(source_id: UUID) -> bool:
    """Somebody knows about the gap of this source. False: there is none."""
    return bool(
        _fetch("UPDATE capture_progress SET gap = NULL, gap_at = NULL WHERE source = %s AND gap IS NOT NULL RETURNING 1", [source_id])
    )


def close_gap(source_id: UUID, since: datetime, why: str) -> bool:
    """What was missing has come, unless more has been noticed after `since`."""
    with transaction.atomic():
        closed = _fetch("UPDATE capture_progress SET gap = NULL, gap_at = NULL WHERE source = %s AND gap_at = %s RETURNING 1", [source_id, since])
        if closed:
            add_event(_execute, source_id, "gap_closed", None, why)
    return bool(closed)


def clock() -> datetime:
    """The store's clock: machines may differ, and what is due when is decided by this one."""
    found: datetime = _fetch("SELECT clock_timestamp()")[0][0]
    return found


def beat(process: str, detail: str = "", *, pid: int | None = None) -> None:
    """Say that this process is alive and getting on. The watchers restart a process that no longer does."""
    _execute(
        "INSERT INTO heartbeats (process, host, pid, at, detail) VALUES (%s, %s, %s, clock_timestamp(), %s)"
        " ON CONFLICT (process, host, pid) DO UPDATE SET at = excluded.at, detail = excluded.detail",
        [process, socket.gethostname(), pid or os.getpid(), detail],
    )


def beat_age_s(process: str, detail: str) -> float:
    """How long ago a process of this name, with this detail, last beat; infinity when none has."""
    age = _fetch(
        "SELECT extract(epoch FROM clock_timestamp() - max(at)) FROM heartbeats WHERE process = %s AND detail = %s", [process, detail]
    )[0][0]
    return float("inf") if age is None else float(age)


def record_attempts(attempts: Iterable[Attempt]) -> None:
    """Keep these attempts for the console. Not worth waiting for the disk."""
    rows = [
        {
            "consumer": str(a.consumer_id), "source": str(a.source_id), "message_id": a.message_id, "ok": a.ok, "status": a.status,
            "error": _cut(a.error, ERROR_CHARACTERS), "duration_ms": a.duration_ms, "response": _cut(a.response, RESPONSE_CHARACTERS),
            "url": a.url, "deliver_count": a.deliver_count, "headers": a.headers,
        }
        for a in attempts
    ]  # fmt: skip
    if not rows:
        return
    with transaction.atomic():
        _execute("SELECT set_config('synchronous_commit', 'off', true)")
        _execute(
            # As one document: psycopg would quote each text of an array by itself.
            "INSERT INTO attempts (consumer, source, message_id, ok, status, error, duration_ms, response, url, deliver_count, headers)"
            " SELECT * FROM json_to_recordset(%s) AS r(consumer uuid, source uuid, message_id bigint, ok boolean, status integer,"
            " error text, duration_ms integer, response text, url text, deliver_count integer, headers text)",
            [json.dumps(rows)],
        )


def _redrive(
    consumer_id: UUID,
    drop: bool,
    ids: Sequence[int] | None,
    *,
    state: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    key: Sequence[str] | None = None,
) -> int:
    return int(
        _fetch(
            "SELECT sequin_redrive(%s, %s, %s::bigint[], %s, %s, %s, %s)",
            [consumer_id, drop, None if ids is None else list(ids), state, since, until, None if key is None else key_text(key)],
        )[0][0]
    )


def _cut(text: str | None, limit: int) -> str | None:
    return None if text is None else text[:limit].replace("\0", "\\0")


def _execute(query: str, parameters: Any = None) -> None:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)


def _fetch(query: str, parameters: Any = None) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)
        return cursor.fetchall()
