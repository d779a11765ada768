"""Judge sources and consumers by their progress, not by a process being there."""
from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, NamedTuple

from django.db import connection

DOWN_AFTER = timedelta(seconds=30)
# States of a source that do not end by themselves; the others are failing when they last.
FAILING = ("slot_missing", "slot_lost", "slot_foreign", "publication_missing", "store_full")


class Judged(NamedTuple):
    name: str
    status: str
    reasons: list[str]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "status": self.status, "reasons": self.reasons}


def sources(now: datetime) -> list[Judged]:
    """`ok`, `paused`, `degraded` or `failing`; each but ok with its reasons."""
    rows = _fetch(
        "SELECT c.name, c.status, s.state, s.reasons, s.since, s.at, p.gap, c.created_at FROM consumers_source c"
        " LEFT JOIN source_status s ON s.source = c.id LEFT JOIN capture_progress p ON p.source = c.id ORDER BY c.name"
    )
    return [_judge_source(now, *row) for row in rows]


def consumers() -> list[Judged]:
    rows = _fetch(
        "SELECT c.name, c.status, c.max_parked, p.parked_count, p.dead_count, h.first_id, h.last_error"
        " FROM consumers_consumer c LEFT JOIN consumer_position p ON p.consumer = c.id LEFT JOIN LATERAL ("
        " SELECT first_id, last_error FROM parked x WHERE x.consumer = c.id AND x.last_error IS NOT NULL"
        " AND p.parked_count + p.dead_count > 0 ORDER BY first_id LIMIT 1) h ON true ORDER BY c.name"
    )
    return [_judge_consumer(*row) for row in rows]


def overall(judged: list[Judged]) -> str:
    states = {one.status for one in judged}
    return "failing" if "failing" in states else "degraded" if "degraded" in states else "ok"


def _judge_source(
    now: datetime, name: str, configured: str, state: str | None, reasons: list[str] | None, since: datetime | None,
    at: datetime | None, gap: str | None, created_at: datetime,
) -> Judged:  # fmt: skip
    if gap:
        return Judged(name, "failing", [f"gap: {gap}. Backfill what is missing, then acknowledge the gap"])
    if configured == "paused":
        return Judged(name, "paused", ["paused: the slot keeps WAL on the source's disk until it is resumed"])
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
    name: str, configured: str, max_parked: int, parked: int | None, dead: int | None, first_id: int | None, error: str | None
) -> Judged:
    if configured != "active":
        return Judged(name, configured, [])
    reasons = []
    if parked and parked >= max_parked:
        reasons.append(f"takes no more: {parked} messages wait behind failing ones, first of them message {first_id}")
    elif parked:
        reasons.append(f"{parked} messages are parked" + (f", the first because: {error}" if error else ""))
    if dead:
        reasons.append(f"{dead} dead letters")
    return Judged(name, "degraded" if reasons else "ok", reasons)


def _fetch(query: str) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()
