"""What /metrics says, for Prometheus: read from the store on each scrape, so every web process says the same."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any
from uuid import UUID

from django.db import connection
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from consumers.alert_models import AlertRule
from consumers.models import Consumer, Source
from consumers.store import counters
from consumers.store.counters import Total
from consumers.store.models import ConsumerPosition, SourceStatus

PARKED_REASONS = ("retry", "blocked", "error", "dead")
EXACT_LAG = 10_000  # messages counted; beyond it an estimate


def exposition() -> bytes:
    """Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StoreCollector())
    return generate_latest(registry)


class StoreCollector(Collector):
    def collect(self) -> Iterable[Metric]:
        totals = counters.totals(exact=EXACT_LAG)
        yield from _sources(totals)
        yield from _consumers(totals)
        yield from _parked()
        yield from _delivery_seconds()
        yield from _installation()


def _sources(totals: dict[UUID, Total]) -> Iterator[Metric]:
    names = dict(Source.objects.values_list("pk", "name"))
    found = {names[pk]: total for pk, total in totals.items() if pk in names}
    yield _gauge("sequin_capture_lag_bytes", "WAL of the source not yet in the log", "source", found, lambda t: t.lag_bytes or 0)
    yield _gauge("sequin_capture_lag_seconds", "How long capture has been behind the source", "source", found, lambda t: t.lag_s)
    yield _counter("sequin_capture_messages", "Changes put into the log", "source", found, lambda t: t.captured)
    retained = GaugeMetricFamily("sequin_slot_retained_bytes", "WAL the slot keeps on the source's disk", labels=["source"])
    state = GaugeMetricFamily("sequin_source_state", "1 for the state the source is in", labels=["source", "state"])
    for status in SourceStatus.objects.filter(pk__in=names):
        retained.add_metric([names[status.pk]], status.retained_bytes or 0)
    for name, what in _rows(
        "SELECT c.name, CASE WHEN p.gap IS NOT NULL THEN 'gap' WHEN c.status = 'paused' THEN 'paused' ELSE coalesce(s.state, 'connecting') END"
        " FROM consumers_source c LEFT JOIN source_status s ON s.source = c.id LEFT JOIN capture_progress p ON p.source = c.id"
    ):
        state.add_metric([name, what], 1)
    yield from (retained, state)


def _consumers(totals: dict[UUID, Total]) -> Iterator[Metric]:
    names = dict(Consumer.objects.values_list("pk", "name"))
    positions = {position.pk: position for position in ConsumerPosition.objects.filter(pk__in=names)}
    found = {names[pk]: total for pk, total in totals.items() if pk in names}
    yield _counter("sequin_consumer_delivered", "Messages acknowledged", "consumer", found, lambda t: t.delivered)
    yield _counter("sequin_consumer_failed_attempts", "Attempts that failed, and leases that ended", "consumer", found, lambda t: t.failed)
    yield _counter("sequin_consumer_filtered", "Messages a filter or transform left out", "consumer", found, lambda t: t.filtered)
    yield _gauge(
        "sequin_consumer_oldest_unacked_seconds", "Age of the oldest undelivered message", "consumer", found, lambda t: t.lag_s
    )
    lag = GaugeMetricFamily("sequin_consumer_lag_messages", "Undelivered messages; past 10,000 waiting an estimate", labels=["consumer"])
    out = GaugeMetricFamily("sequin_consumer_out", "Messages handed out and not acknowledged yet", labels=["consumer"])
    for pk, position in positions.items():
        total = totals.get(pk)
        lag.add_metric([names[pk]], (total.waiting or 0 if total else 0) + position.out_count + position.parked_count)
        out.add_metric([names[pk]], position.out_count)
    yield from (lag, out)


def _parked() -> Iterator[Metric]:
    parked = GaugeMetricFamily("sequin_consumer_parked", "Messages that cannot be delivered now, by reason", labels=["consumer", "reason"])
    # A reason nothing is parked for is 0 and not absent: an alert on it has something to compare with.
    for consumer, reason, count in _rows(
        "SELECT c.name, r.reason, coalesce(sum(cardinality(p.ids)), 0) FROM consumers_consumer c"
        " CROSS JOIN unnest(%s::text[]) r(reason) LEFT JOIN parked p ON p.consumer = c.id AND p.reason = r.reason GROUP BY 1, 2 ORDER BY 1, 2",
        [list(PARKED_REASONS)],
    ):
        parked.add_metric([consumer, reason], count)
    yield parked


def _delivery_seconds() -> Iterator[Metric]:
    """Of everybody together, and of each consumer."""
    about = "From the commit on the source to the acknowledgement"
    together = HistogramMetricFamily("sequin_delivery_seconds", about)
    apart = HistogramMetricFamily("sequin_consumer_delivery_seconds", f"{about}, by consumer", labels=["consumer"])
    ends = [*map(str, _rows("SELECT sequin_delivery_bounds()")[0][0]), "+Inf"]
    all_counts, all_seconds = [0.0] * len(ends), 0.0
    for consumer, counts, seconds in _rows(
        "SELECT c.name, p.took_buckets, p.took_seconds FROM consumers_consumer c JOIN consumer_position p ON p.consumer = c.id"
    ):
        apart.add_metric([consumer], _buckets(ends, counts), sum_value=seconds)
        all_counts = [one + more for one, more in zip(all_counts, counts, strict=True)]
        all_seconds += seconds
    together.add_metric([], _buckets(ends, all_counts), sum_value=all_seconds)
    yield from (together, apart)


def _buckets(ends: list[str], counts: Sequence[float]) -> list[tuple[str, float]]:
    return [(end, round(count)) for end, count in zip(ends, accumulate(counts), strict=True)]


def _installation() -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "sequin_store_bytes", "Size of the store's database", value=_rows("SELECT pg_database_size(current_database())")[0][0]
    )
    firing = GaugeMetricFamily("sequin_alerts_firing", "Alerts that fire, by rule", labels=["rule"])
    for rule in AlertRule.objects.all():
        firing.add_metric([rule.kind], rule.episodes.filter(ended_at=None).exclude(fired_at=None).count())
    yield firing


def _gauge(name: str, about: str, label: str, found: dict[str, Total], value: Callable[[Total], float]) -> Metric:
    family = GaugeMetricFamily(name, about, labels=[label])
    for subject, total in found.items():
        family.add_metric([subject], value(total))
    return family


def _counter(name: str, about: str, label: str, found: dict[str, Total], value: Callable[[Total], float]) -> Metric:
    family = CounterMetricFamily(name, about, labels=[label])
    for subject, total in found.items():
        family.add_metric([subject], value(total))
    return family


def _rows(query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)
        return cursor.fetchall()
