"""Per-minute counters: every message counted once, rates and charts without a gap."""
from __future__ import annotations

from typing import Any

import pytest

from consumers.models import Consumer
from consumers.store import claims, counters, lifecycle, locks
from consumers.store.connection import store_connection
from consumers.store.types import Failure
from delivery import alerting
from tests.store.world import Log, fetch, receipts, take

pytestmark = pytest.mark.django_db(transaction=True)


def totals(subject: Any) -> tuple[int, int, int]:
    bins = counters.series(subject, minutes=60, step=1)
    assert len(bins) == 60 and all(later.at > earlier.at for earlier, later in zip(bins, bins[1:]))
    return sum(b.captured for b in bins), sum(b.delivered for b in bins), sum(b.failed for b in bins)


def test_each_message_is_counted_once_however_often_one_looks(log: Log) -> None:
    consumer = log.consumer()
    log.append(*[log.row(key) for key in range(5)])
    counters.count()
    claim = take(consumer, 3)
    claims.ack(consumer, receipts(claim)[:2])
    claims.fail(consumer, [Failure(claim.token, claim.messages[2].id, 1000, "answered 500", 500)])
    for _ in range(3):
        assert counters.count()
    assert totals(log.source.pk) == (5, 0, 0)
    assert totals(consumer) == (0, 2, 1)
    assert totals(counters.EVERYTHING) == (5, 2, 1)
    rates = counters.rates()
    assert rates[consumer].delivered > 0 and rates[log.source.pk].captured > 0
    # A day in steps of ten minutes tells the same.
    assert sum(b.delivered for b in counters.series(consumer, minutes=1440, step=10)) == 2


def test_counting_and_alerts_wait_for_no_housekeeping(log: Log) -> None:
    with store_connection() as conn:
        conn.execute("SELECT pg_advisory_lock(%s), pg_advisory_lock(%s)", [locks.MAINTENANCE_LOCK, locks.REWRITE_LOCK])
        assert counters.count() and alerting.judge()


def test_what_waits_and_how_old_it_is(log: Log) -> None:
    consumer = log.consumer()
    log.append(*[log.row(key) for key in range(3)])
    claim = take(consumer, 1)
    claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 60_000, "answered 500", 500)])
    counters.count()
    look = counters.looks()[consumer]
    assert look.waiting == 2 and look.lag_s > 1_000  # the rows of this log were committed in the year 2000
    assert counters.looks()[log.source.pk].lag_bytes is not None or fetch("SELECT 1 FROM source_status") == []


@pytest.mark.parametrize(
    "state, since, at, behind",
    [("active", "2 hours", "1 second", False), ("unreachable", "2 hours", "1 second", True), ("active", "3 hours", "2 hours", True)],
)
def test_a_source_that_nobody_reads_is_behind_since_it_was_read(log: Log, state: str, since: str, at: str, behind: bool) -> None:
    lifecycle.set_source_status(log.source.pk, state, source_lsn=1)
    fetch("UPDATE source_status SET since = now() - %s::interval, at = now() - %s::interval", since, at)
    lag_s = counters.totals()[log.source.pk].lag_s
    assert 7_190 < lag_s < 7_300 if behind else lag_s == 0


def test_subjects_that_are_gone_are_forgotten(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1))
    counters.count()
    Consumer.objects.filter(pk=consumer).delete()
    fetch("UPDATE minute_counters SET minute = minute - interval '50 hours'")
    counters.forget_old()
    assert consumer not in counters.looks() and fetch("SELECT 1 FROM minute_counters") == []
