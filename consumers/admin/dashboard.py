"""The first page: every source and consumer, how it is doing, and why."""
from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.urls import reverse

from consumers.models import Consumer, Source
from consumers.store import lifecycle
from consumers.store.models import ConsumerPosition, SourceStatus

SHOWN = 100


def fill(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """unfold's dashboard callback."""
    statuses = {status.pk: status for status in SourceStatus.objects.all()[:SHOWN]}
    positions = {position.pk: position for position in ConsumerPosition.objects.all()[:SHOWN]}
    context["sources"] = [_source(source, statuses.get(source.pk)) for source in Source.objects.all()[:SHOWN]]
    context["consumers"] = [
        _consumer(consumer, positions.get(consumer.pk)) for consumer in Consumer.objects.select_related("source")[:SHOWN]
    ]
    return context


def _source(source: Source, status: SourceStatus | None) -> dict[str, Any]:
    gap = lifecycle.gap(source.pk)
    state = "gap" if gap else "paused" if source.status == "paused" else status.state if status else "connecting"
    return {
        "name": source.name,
        "url": reverse("admin:consumers_source_change", args=[source.pk]),
        "state": state,
        "why": gap or "; ".join(status.reasons if status else []),
    }


def _consumer(consumer: Consumer, position: ConsumerPosition | None) -> dict[str, Any]:
    return {
        "name": consumer.name,
        "url": reverse("admin:consumers_consumer_change", args=[consumer.pk]),
        "kind": consumer.kind,
        "source": consumer.source.name,
        "state": consumer.status,
        "waiting": lifecycle.waiting(consumer.pk, limit=10_000),
        "out": position.out_count if position else 0,
        "parked": position.parked_count if position else 0,
        "dead": position.dead_count if position else 0,
        "delivered": position.acked_count if position else 0,
    }
