"""Per-minute counters for charts and rates, made by looking at the running totals now and then.

Nothing on the way of a message counts for these: capture and acknowledging keep their totals anyway. Whoever looks adds
the difference since the last look to the present minute; any number of processes may, one at a time does.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connection, transaction

from consumers.store.locks import COUNTING_LOCK

EXACT_WAITING = 1_000  # waiting messages are counted up to this, beyond it estimated
KEPT = timedelta(hours=49)
EVERYTHING = UUID(int=0)

# One row a subject: its totals, what waits, how far it is behind.
_LOOK_SQL = """
    SELECT c.id AS subject, p.messages AS captured, 0::bigint AS delivered, 0::bigint AS failed, 0::bigint AS filtered,
           NULL::bigint AS waiting, greatest(s.source_lsn - p.reached_lsn, 0) AS lag_bytes,
           -- Where nobody reads, nobody knows how far the source has got: it is behind since it was last read.
           extract(epoch FROM CASE WHEN s.source_lsn > p.reached_lsn THEN now() - p.updated_at WHEN s.state <> 'active' THEN now() - s.since
                              WHEN s.at < now() - interval '30 s' THEN now() - s.at ELSE interval '0' END) AS lag_s
    FROM consumers_source c JOIN capture_progress p ON p.source = c.id LEFT JOIN source_status s ON s.source = c.id
    UNION ALL
    SELECT c.id, 0, p.acked_count, p.failed_count, p.filtered_count,
           CASE WHEN w.n < %(exact)s THEN w.n ELSE greatest(w.n, ((l.last - p.position) * h.share)::bigint) END,
           NULL, CASE WHEN o.first IS NULL THEN 0 ELSE greatest(0, extract(epoch FROM now() - (
               SELECT m.committed_at FROM messages m WHERE m.source = p.source AND m.id = o.first))) END
    FROM consumers_consumer c JOIN consumer_standing p ON p.consumer = c.id
    CROSS JOIN LATERAL (SELECT count(*) AS n, min(x.id) AS first FROM (
        SELECT m.id FROM messages m WHERE m.source = p.source AND m.id > p.position AND c.status <> 'disabled'
        ORDER BY m.id LIMIT %(exact)s) x) w
    CROSS JOIN LATERAL (SELECT least(w.first, (SELECT min(k.first_id) FROM parked k WHERE k.consumer = c.id
        AND k.reason <> 'dead' AND p.parked_count > 0), (SELECT min(y.ids[1]) FROM leases y WHERE y.consumer = c.id)) AS first) o
    CROSS JOIN (SELECT last_value AS last FROM messages_id) l
    CROSS JOIN LATERAL (SELECT coalesce((SELECT messages FROM capture_progress g WHERE g.source = p.source)::numeric
        / nullif((SELECT sum(messages) FROM capture_progress), 0), 1) AS share) h
"""
_COUNT_SQL = f"""
    WITH seen AS MATERIALIZED ({_LOOK_SQL}), added AS (
        SELECT s.subject, greatest(0, s.captured - coalesce(b.captured, 0)) AS captured,
               greatest(0, s.delivered - coalesce(b.delivered, 0)) AS delivered,
               greatest(0, s.failed - coalesce(b.failed, 0)) AS failed,
               greatest(0, s.filtered - coalesce(b.filtered, 0)) AS filtered, s.lag_bytes, s.lag_s
        FROM seen s LEFT JOIN counted b ON b.subject = s.subject
    ), kept AS (
        INSERT INTO counted SELECT s.*, now() FROM seen s ON CONFLICT (subject) DO UPDATE SET captured = excluded.captured,
            delivered = excluded.delivered, failed = excluded.failed, filtered = excluded.filtered,
            waiting = excluded.waiting, lag_bytes = excluded.lag_bytes, lag_s = excluded.lag_s, at = excluded.at
    )
    INSERT INTO minute_counters AS m
    SELECT a.subject, date_trunc('minute', now()), a.captured, a.delivered, a.failed, a.filtered, a.lag_bytes, a.lag_s
    FROM added a WHERE a.captured + a.delivered + a.failed + a.filtered > 0 OR a.lag_bytes > 0 OR a.lag_s >= 1
    UNION ALL
    SELECT %(everything)s, date_trunc('minute', now()), sum(captured), sum(delivered), sum(failed), sum(filtered),
           max(lag_bytes), max(lag_s)
    FROM added HAVING count(*) > 0
    ON CONFLICT (subject, minute) DO UPDATE SET captured = m.captured + excluded.captured,
        delivered = m.delivered + excluded.delivered, failed = m.failed + excluded.failed,
        filtered = m.filtered + excluded.filtered, lag_bytes = greatest(m.lag_bytes, excluded.lag_bytes),
        lag_s = greatest(m.lag_s, excluded.lag_s)
"""


class Bin(NamedTuple):
    """What happened from `at` on, for one step of a chart."""

    at: datetime
    captured: int
    delivered: int
    failed: int
    filtered: int
    lag_bytes: int
    lag_s: float


class Rate(NamedTuple):
    """Messages a second, over the last minute or two."""

    captured: float
    delivered: float
    failed: float


class Look(NamedTuple):
    """What was last found out about a subject."""

    waiting: int | None
    lag_bytes: int | None
    lag_s: float
    at: datetime


class Total(NamedTuple):
    """What a source or a consumer has done ever, and how it stands, right now."""

    captured: int
    delivered: int
    failed: int
    filtered: int
    waiting: int | None
    lag_bytes: int | None
    lag_s: float


def totals(*, exact: int = EXACT_WAITING) -> dict[UUID, Total]:
    """Of every subject; waiting messages are counted up to `exact`, beyond it estimated."""
    with connection.cursor() as cursor:
        cursor.execute(_LOOK_SQL, {"exact": exact})
        return {row[0]: Total(*row[1:]) for row in cursor.fetchall()}


def count() -> bool:
    """Look at the totals and add what is new to the present minute. False: another process is at it."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [COUNTING_LOCK])
        row = cursor.fetchone()
        if not row or not row[0]:
            return False
        cursor.execute("SELECT set_config('synchronous_commit', 'off', true)")
        cursor.execute(_COUNT_SQL, {"exact": EXACT_WAITING, "everything": EVERYTHING})
    return True


def forget_old() -> None:
    """Drop what charts show no more, and subjects that are gone."""
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM minute_counters WHERE minute < now() - %s * interval '1 s'", [KEPT.total_seconds()])
        cursor.execute(
            "DELETE FROM counted WHERE subject NOT IN (SELECT id FROM consumers_source UNION ALL SELECT id FROM consumers_consumer)"
        )


def looks() -> dict[UUID, Look]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT subject, waiting, lag_bytes, lag_s, at FROM counted")
        return {row[0]: Look(*row[1:]) for row in cursor.fetchall()}


def rates() -> dict[UUID, Rate]:
    """Of every subject that did something in this minute or the last; EVERYTHING is all of them."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT subject, sum(captured), sum(delivered), sum(failed), extract(epoch FROM now() - date_trunc('minute', now())) + 60"
            " FROM minute_counters WHERE minute >= date_trunc('minute', now()) - interval '1 minute'"
            " AND subject = ANY (ARRAY(SELECT subject FROM counted) || %s::uuid) GROUP BY subject",
            [EVERYTHING],
        )
        return {row[0]: Rate(*(float(total) / float(row[4]) for total in row[1:4])) for row in cursor.fetchall()}


def series(subject: UUID, *, minutes: int, step: int) -> list[Bin]:
    """The last `minutes` in steps of `step` minutes, oldest first, without a gap."""
    return _series([subject], minutes, step).get(subject, [])


def many_series(subjects: Iterable[UUID], *, minutes: int, step: int) -> dict[UUID, list[Bin]]:
    return _series(list(subjects), minutes, step)


def _series(subjects: Sequence[UUID], minutes: int, step: int) -> dict[UUID, list[Bin]]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT date_trunc('minute', now())")
        last: datetime = cursor.fetchone()[0]
        # Steps begin at round times: every ten minutes is :00, :10, …
        first = last - timedelta(minutes=minutes - step + last.minute % step)
        cursor.execute(
            "SELECT subject, floor(extract(epoch FROM minute - %(first)s) / 60 / %(step)s)::int, sum(captured), sum(delivered),"
            " sum(failed), sum(filtered), coalesce(max(lag_bytes), 0), coalesce(max(lag_s), 0) FROM minute_counters"
            " WHERE subject = ANY (%(subjects)s) AND minute >= %(first)s GROUP BY 1, 2",
            {"first": first, "step": step, "subjects": list(subjects)},
        )
        found = {(row[0], row[1]): row[2:] for row in cursor.fetchall()}
    times = [first + timedelta(minutes=step * number) for number in range(minutes // step)]
    nothing = (0, 0, 0, 0, 0, 0.0)
    return {
        subject: [_bin(at, found.get((subject, number), nothing)) for number, at in enumerate(times)] for subject in subjects
    }


def _bin(at: datetime, row: tuple[Any, ...]) -> Bin:
    captured, delivered, failed, filtered, lag_bytes, lag_s = row
    return Bin(at, int(captured), int(delivered), int(failed), int(filtered), int(lag_bytes), float(lag_s))
