"""/health for load balancers and people, /metrics for Prometheus."""
from __future__ import annotations

from django.conf import settings
from django.db import Error as DatabaseFailure
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils import timezone

from consumers.api.errors import answer
from consumers.tokens import may_operate
from delivery.metrics import exposition
from consumers import health as judge

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
        text = exposition()
    except DatabaseFailure as error:
        failed = answer(error)
        return failed if failed is not None else HttpResponse(status=503)
    return HttpResponse(text, content_type="text/plain; version=0.0.4; charset=utf-8")
