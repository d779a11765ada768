"""Judge sources and consumers by their progress, not by a process being there."""
from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from django.conf import settings
from django.db import connection

from consumers.hosting import PAUSE_COSTS, readable_bytes
from consumers.store import lifecycle
from consumers.words import counted

DOWN_AFTER = timedelta(seconds=30)
IDLE_AFTER = timedelta(seconds=60)
FORGOTTEN_AT_LEAST = timedelta(hours=1)
# States of a source that do not end by themselves; the others are failing when they last.
FAILING = ("slot_missing", "slot_lost", "slot_foreign", "publication_missing", "store_full")


class Judged(NamedTuple):
    name: str
    status: str
    reasons: list[str]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "status": self.status, "reasons": self.reasons}


def sources(*, only: UUID | None = None, now: datetime | None = None) -> list[Judged]:
    """`ok`, `paused`, `degraded` or `failing`; each but ok with its reasons. `now`: by default the store's clock, which dates everything."""
    now = now or lifecycle.clock()
    rows = _fetch(
        "SELECT c.name, c.status, s.state, s.reasons, s.since, s.at, p.gap, c.created_at FROM consumers_source c"
        " LEFT JOIN source_status s ON s.source = c.id LEFT JOIN capture_progress p ON p.source = c.id WHERE %(only)s::uuid IS NULL OR c.id = %(only)s ORDER BY c.name",
        only,
    )
    return [_judge_source(now, *row) for row in rows]


def consumers(*, only: UUID | None = None, now: datetime | None = None) -> list[Judged]:
    """`ok`, `paused`, `disabled` or `degraded`."""
    now = now or lifecycle.clock()
    forgotten = now - max(settings.SEQUIN_RETENTION / 2, FORGOTTEN_AT_LEAST)
    rows = _fetch(
        "SELECT c.name, c.status, c.status_reason, c.max_parked, p.parked_count, p.dead_count, h.first_id, h.last_error,"
        " p.dropped_count, w.committed_at, CASE WHEN c.max_backlog_bytes IS NOT NULL AND w.committed_at IS NOT NULL OR w.committed_at < %(forgotten)s"
        " THEN sequin_backlog_bytes(p.position) END, c.max_backlog_bytes,"
        " (SELECT count(*) FROM (SELECT FROM parked x WHERE x.consumer = c.id AND x.due_at = 'infinity' LIMIT 1000) held),"
        " c.kind, p.taken_at,"
        " array(SELECT CASE b.kind WHEN 'backfill' THEN 'the backfill of ' || b.table_name ELSE 'republishing' END || ' failed: ' || b.reason"
        " FROM backfills b WHERE b.consumer = c.id AND b.status = 'failed' ORDER BY b.created_at),"
        " (SELECT format('%%s.%%s %%s', r.schema_name, r.table_name, m.key) FROM (SELECT x.source, min(x.first_id) AS id FROM parked x"
        " WHERE x.consumer = c.id AND x.reason <> 'dead' AND p.parked_count >= c.max_parked GROUP BY x.source, x.grp"
        " ORDER BY sum(cardinality(x.ids)) DESC LIMIT 1) g, LATERAL (SELECT relation, key FROM messages y WHERE y.source = g.source"
        " AND y.id = g.id UNION ALL SELECT relation, key FROM kept_messages y WHERE y.source = g.source AND y.id = g.id LIMIT 1) m"
        " JOIN relation_version r ON r.id = m.relation)"
        " FROM consumers_consumer c LEFT JOIN consumer_position p ON p.consumer = c.id LEFT JOIN LATERAL ("
        " SELECT committed_at FROM messages m WHERE m.source = p.source AND m.id > p.position ORDER BY m.id LIMIT 1) w ON true"
        " LEFT JOIN LATERAL ("
        " SELECT first_id, last_error FROM parked x WHERE x.consumer = c.id AND x.last_error IS NOT NULL"
        " AND p.parked_count + p.dead_count > 0 ORDER BY first_id LIMIT 1) h ON true"
        " WHERE %(only)s::uuid IS NULL OR c.id = %(only)s ORDER BY c.name",
        only,
        forgotten,
    )
    return [_judge_consumer(now, settings.SEQUIN_RETENTION, *row) for row in rows]


def overall(judged: list[Judged]) -> str:
    states = {one.status for one in judged}
    return "failing" if "failing" in states else "degraded" if "degraded" in states else "ok"


def _judge_source(
    now: datetime, name: str, configured: str, state: str | None, reasons: list[str] | None, since: datetime | None,
    at: datetime | None, gap: str | None, created_at: datetime,
) -> Judged:  # fmt: skip
    if gap:
        return Judged(name, "failing", [f"gap: {gap}. Backfill all tables of its consumers, or acknowledge the gap"])
    if configured == "paused":
        if state in FAILING:
            return Judged(name, "failing", [f"{state}: {reason}" for reason in reasons or []])
        costs = reasons if state == "paused" and reasons else []
        return Judged(name, "degraded" if costs else "paused", [PAUSE_COSTS, *costs])
    if state is None or at is None or since is None:
        waiting = now - created_at > DOWN_AFTER
        return Judged(name, "failing" if waiting else "degraded", ["no reader has reported yet: does run_capture run?"])
    if state != "active":
        down = state in FAILING or now - since > DOWN_AFTER
        return Judged(name, "failing" if down else "degraded", [f"{state}: {reason}" for reason in reasons or ["not reading"]])
    if now - at > DOWN_AFTER:
        return Judged(name, "failing", [f"its reader was last heard of at {at:%Y-%m-%d %H:%M:%S} UTC: does run_capture run?"])
    return Judged(name, "degraded" if reasons else "ok", list(reasons or []))


def _judge_consumer(
    now: datetime, retention: timedelta, name: str, configured: str, why: str, max_parked: int, parked: int | None, dead: int | None,
    first_id: int | None, error: str | None, dropped: int | None, waiting_since: datetime | None, held: int | None, limit: int | None,
    unfit: int, kind: str, taken_at: datetime | None, failed_backfills: list[str], largest: str | None,
) -> Judged:  # fmt: skip
    if configured == "disabled":
        return Judged(name, configured, [])
    reasons = [f"paused: {why}"] if why else []
    if waiting_since is not None and now - waiting_since > max(retention / 2, FORGOTTEN_AT_LEAST):
        since = f"{waiting_since:%Y-%m-%d %H:%M} UTC"
        reasons.append(f"has taken nothing of what was committed since {since}: it holds back {readable_bytes(held or 0)} of the log")
    if limit is not None and held is not None and held > limit:
        reasons.append(f"holds back {readable_bytes(held)} of the log, more than max_backlog_bytes: {readable_bytes(limit)}")
    if dropped:
        reasons.append(f"{counted(dropped, 'message')} {'was' if dropped == 1 else 'were'} dropped because its backlog was full (on_full: drop_oldest)")
    reasons += [f"{failed}. Resume or cancel it" for failed in failed_backfills]
    if configured == "paused":
        return Judged(name, configured, reasons)
    idle_since = max(waiting_since, taken_at or waiting_since) if waiting_since is not None else None
    if kind == "push" and idle_since is not None and now - idle_since > IDLE_AFTER:
        reasons.append(f"nothing has been taken to push since {idle_since:%Y-%m-%d %H:%M:%S} UTC: does run_workers run, is its endpoint held?")
    if parked and parked >= max_parked:
        reasons.append(f"takes no more: {parked} messages wait behind failing ones, most of them in the group of {largest}")
    elif parked:
        reasons.append(f"{counted(parked, 'message')} {'is' if parked == 1 else 'are'} parked" + (f", the first because: {error}" if error else ""))
    if unfit:
        reasons.append(f"{unfit}{' or more' if unfit == 1000 else ''} of them lead rows that are held until its filter is saved anew: it does not fit their table")
    if dead:
        reasons.append(counted(dead, "dead letter"))
    return Judged(name, "degraded" if reasons else "ok", reasons)


def _fetch(query: str, only: UUID | None, forgotten: datetime | None = None) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, {"only": only, "forgotten": forgotten})
        return cursor.fetchall()
