"""/health for load balancers and people, /metrics for Prometheus."""
from __future__ import annotations

from itertools import accumulate
from typing import Any

from django.conf import settings
from django.db import Error as DatabaseFailure
from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils import timezone

from consumers.api.errors import answer
from consumers.tokens import may_operate
from consumers import health as judge

METRICS: list[tuple[str, str, str, str]] = [
    ("sequin_capture_lag_bytes", "gauge", "source", "SELECT c.name, coalesce(greatest(s.source_lsn - p.reached_lsn, 0), 0)"
     " FROM consumers_source c JOIN source_status s ON s.source = c.id JOIN capture_progress p ON p.source = c.id"),
    ("sequin_capture_lag_seconds", "gauge", "source", "SELECT c.name, CASE WHEN s.source_lsn > p.reached_lsn THEN"
     " extract(epoch FROM now() - p.updated_at) ELSE 0 END FROM consumers_source c JOIN source_status s ON s.source = c.id"
     " JOIN capture_progress p ON p.source = c.id"),
    ("sequin_capture_messages_total", "counter", "source", "SELECT c.name, p.messages FROM consumers_source c"
     " JOIN capture_progress p ON p.source = c.id"),
    ("sequin_source_state", "gauge", "source", "SELECT c.name || '\",state=\"' || CASE WHEN p.gap IS NOT NULL THEN 'gap' WHEN"
     " c.status = 'paused' THEN 'paused' ELSE coalesce(s.state, 'connecting') END, 1 FROM consumers_source c"
     " LEFT JOIN source_status s ON s.source = c.id LEFT JOIN capture_progress p ON p.source = c.id"),
    ("sequin_slot_retained_bytes", "gauge", "source", "SELECT c.name, coalesce(s.retained_bytes, 0) FROM consumers_source c"
     " JOIN source_status s ON s.source = c.id"),
    ("sequin_consumer_delivered_total", "counter", "consumer", "SELECT c.name, p.acked_count FROM consumers_consumer c"
     " JOIN consumer_position p ON p.consumer = c.id"),
    ("sequin_consumer_failed_attempts_total", "counter", "consumer", "SELECT c.name, p.failed_count FROM consumers_consumer c"
     " JOIN consumer_position p ON p.consumer = c.id"),
    ("sequin_consumer_out", "gauge", "consumer", "SELECT c.name, p.out_count FROM consumers_consumer c"
     " JOIN consumer_position p ON p.consumer = c.id"),
    ("sequin_consumer_lag_messages", "gauge", "consumer", "SELECT c.name, (SELECT count(*) FROM (SELECT FROM messages m"
     " WHERE m.source = p.source AND m.id > p.position LIMIT 100000) w) + p.out_count + p.parked_count"
     " FROM consumers_consumer c JOIN consumer_position p ON p.consumer = c.id"),
    ("sequin_consumer_oldest_unacked_seconds", "gauge", "consumer", "SELECT c.name, coalesce(extract(epoch FROM now() -"
     " (SELECT min(m.committed_at) FROM messages m WHERE m.source = p.source AND m.id = least("
     " (SELECT min(first_id) FROM parked x WHERE x.consumer = c.id AND x.reason <> 'dead'),"
     " (SELECT min(l.ids[1]) FROM leases l WHERE l.consumer = c.id),"
     " (SELECT n.id FROM messages n WHERE n.source = p.source AND n.id > p.position ORDER BY n.id LIMIT 1)))), 0)"
     " FROM consumers_consumer c JOIN consumer_position p ON p.consumer = c.id"),
    ("sequin_store_bytes", "gauge", "", "SELECT '', pg_database_size(current_database())"),
]  # fmt: skip


def health(request: HttpRequest) -> HttpResponse:
    """200 while every source gets on, 503 when one is failing or the store is away."""
    try:
        if not may_operate(request, settings.SEQUIN_METRICS_PUBLIC):
            return JsonResponse({"summary": "needs a token of scope manage, or SEQUIN_METRICS_PUBLIC=1"}, status=401)
        sources, consumers = judge.sources(timezone.now()), judge.consumers(timezone.now())
    except DatabaseFailure:
        body = {"status": "failing", "reasons": ["the store is away"], "sources": [], "consumers": []}
        return JsonResponse(body, status=503)
    failing = any(source.status == "failing" for source in sources)
    return JsonResponse(
        {
            "status": "failing" if failing else judge.overall([*sources, *consumers]),
            "sources": [source.as_json() for source in sources],
            "consumers": [consumer.as_json() for consumer in consumers],
        },
        status=503 if failing else 200,
    )


def metrics(request: HttpRequest) -> HttpResponse:
    """Prometheus' text format."""
    try:
        if not may_operate(request, settings.SEQUIN_METRICS_PUBLIC):
            return HttpResponse("needs a token of scope manage, or SEQUIN_METRICS_PUBLIC=1\n", status=401, content_type="text/plain")
        lines = _lines()
    except DatabaseFailure as error:
        failed = answer(error)
        return failed if failed is not None else HttpResponse(status=503)
    return HttpResponse("\n".join(lines) + "\n", content_type="text/plain; version=0.0.4")


def _lines() -> list[str]:
    lines: list[str] = []
    for name, kind, label, query in METRICS:
        lines.append(f"# TYPE {name} {kind}")
        lines += [_line(name, label, *row) for row in _fetch(query)]
    lines.append("# TYPE sequin_consumer_parked gauge")
    for consumer, reason, count in _fetch(
        "SELECT c.name, p.reason, sum(cardinality(p.ids)) FROM consumers_consumer c JOIN parked p ON p.consumer = c.id GROUP BY 1, 2"
    ):
        lines.append(f'sequin_consumer_parked{{consumer="{consumer}",reason="{reason}"}} {count}')
    lines.append("# TYPE sequin_delivery_seconds histogram")
    for consumer, bounds, counts, total in _fetch(
        "SELECT c.name, sequin_delivery_bounds(), p.took_buckets, p.took_seconds FROM consumers_consumer c"
        " JOIN consumer_position p ON p.consumer = c.id"
    ):
        cumulated = list(accumulate(counts))
        for bound, count in zip([*map(str, bounds), "+Inf"], cumulated, strict=True):
            lines.append(f'sequin_delivery_seconds_bucket{{consumer="{consumer}",le="{bound}"}} {count:.0f}')
        lines.append(f'sequin_delivery_seconds_sum{{consumer="{consumer}"}} {total}')
        lines.append(f'sequin_delivery_seconds_count{{consumer="{consumer}"}} {cumulated[-1]:.0f}')
    return lines


def _line(name: str, label: str, value_of: str, value: Any) -> str:
    return f'{name}{{{label}="{value_of}"}} {value}' if label else f"{name} {value}"


def _fetch(query: str) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()
