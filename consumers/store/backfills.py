"""Begin, pause, resume and cancel backfills. What workers do with them is in `backfill_work`. Uses Django's connection."""
from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from django.db import connection, transaction

# What a worker may take: nobody has its turn, it is time, and what it waits for has been reached.
DUE_SQL = """
    FROM backfills b JOIN capture_progress p ON p.source = b.source
    WHERE b.status = 'running' AND (b.held_until IS NULL OR b.held_until < clock_timestamp()) AND b.due_at <= clock_timestamp()
      AND (b.waits_for IS NULL OR b.waits_for <= p.reached_lsn OR b.waits_epoch <> p.epoch)
"""


def begin(
    backfill_id: UUID,
    *,
    consumer_id: UUID,
    source_id: UUID,
    table: str,
    where: str = "",
    sort_column: str = "",
    start_value: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    barrier_xid: int = 0,
    replay_id: UUID | None = None,
    from_log: bool = False,
) -> None:
    """Let workers get on with it. `barrier_xid`: not before all transactions older than this have ended.

    A republish has a `replay_id`; `from_log`: of the log as it is now, of all the consumer's tables when none is named.
    """
    _execute(
        "INSERT INTO backfills (id, consumer, source, kind, table_name, \"where\", sort_column, start_value, since, until, barrier_xid,"
        " replay, place, to_id) SELECT %(id)s, %(consumer)s, %(source)s, CASE WHEN %(replay)s::uuid IS NULL THEN 'backfill' ELSE"
        " 'republish' END, %(table)s, %(where)s, %(sort)s, %(start)s, %(since)s::timestamptz, %(until)s::timestamptz, %(barrier)s,"
        " %(replay)s::uuid, CASE WHEN %(log)s THEN to_jsonb(coalesce(CASE WHEN %(since)s::timestamptz IS NOT NULL THEN"
        " sequin_find(%(source)s, %(consumer)s, %(since)s::timestamptz, NULL, NULL) - 1 END, f.id - 1)) END,"
        " CASE WHEN %(log)s THEN coalesce((SELECT max(m.id) FROM messages m WHERE m.source = %(source)s), 0) END"
        " FROM (SELECT id FROM log_floor FOR SHARE) f",
        {
            "id": backfill_id, "consumer": consumer_id, "source": source_id, "table": table, "where": where, "sort": sort_column,
            "start": start_value, "since": since, "until": until, "barrier": barrier_xid, "replay": replay_id, "log": from_log,
        },
    )  # fmt: skip


def pause(backfill_id: UUID) -> bool:
    """Stop where it is. What was read and not appended is read again later. False when it was not running."""
    return _set_status(backfill_id, "running", "paused")


def resume(backfill_id: UUID) -> bool:
    """Go on where it stopped, or failed. False when it was not and had not."""
    return _set_status(backfill_id, "paused", "running") or _set_status(backfill_id, "failed", "running")


def cancel(backfill_id: UUID) -> bool:
    """End it; what it has brought stays. False when it had ended, unless by failing."""
    return any(_set_status(backfill_id, before, "cancelled") for before in ("running", "paused", "failed"))


def cancel_all(consumer_id: UUID) -> int:
    """Cancel what runs for a consumer. Returns how many."""
    running = _fetch("SELECT id FROM backfills WHERE consumer = %s AND status IN ('running', 'paused')", [consumer_id])
    return sum(cancel(row[0]) for row in running)


def forget(backfill_id: UUID) -> None:
    """Delete what is known of it; what it has brought stays in the log."""
    with transaction.atomic():
        _execute("DELETE FROM backfills WHERE id = %s", [backfill_id])
        _execute("DELETE FROM backfill_chunks WHERE backfill = %s", [backfill_id])


def brought_since(consumer_id: UUID, since: datetime) -> set[str]:
    """The tables of which backfills that began after this brought all rows."""
    return {
        row[0]
        for row in _fetch(
            "SELECT table_name FROM backfills WHERE consumer = %s AND status = 'completed' AND created_at > %s AND to_id IS NULL"
            " AND \"where\" = '' AND start_value IS NULL",
            [consumer_id, since],
        )
    }


def running_and_due() -> tuple[int, int]:
    """How many run, and how many of these a worker could get on with now and none does."""
    running, due = _fetch(
        f"SELECT (SELECT count(*) FROM backfills WHERE status = 'running'), (SELECT count(*) {DUE_SQL})", []
    )[0]
    return int(running), int(due)


def _set_status(backfill_id: UUID, before: str, after: str) -> bool:
    ended = after in ("cancelled", "completed", "failed")
    with transaction.atomic():
        changed = _fetch(
            "UPDATE backfills SET status = %s, reason = '', holder = NULL, held_until = NULL, waits_for = NULL, wants_lsn = NULL,"
            " due_at = clock_timestamp(), ended_at = CASE WHEN %s THEN clock_timestamp() END WHERE id = %s AND status = %s RETURNING 1",
            [after, ended, backfill_id, before],
        )
        if changed:
            _execute("DELETE FROM backfill_chunks WHERE backfill = %s", [backfill_id])
    return bool(changed)


def _execute(query: str, parameters: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)


def _fetch(query: str, parameters: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)
        return cursor.fetchall()
