"""/health for load balancers and people, /metrics for Prometheus."""
from __future__ import annotations

from django.conf import settings
from django.db import Error as DatabaseFailure
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.csrf import csrf_exempt

from consumers import health as judge
from consumers.api.errors import answer
from consumers.tokens import find_caller, may_operate, token_of
from delivery.metrics import exposition


@csrf_exempt
def health(request: HttpRequest) -> HttpResponse:
    """200 while every source gets on, 503 when one is failing or the store is away."""
    try:
        refused = _refused(request)
        if refused is not None:
            return refused
        sources, consumers = judge.sources(), judge.consumers()
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


@csrf_exempt
def metrics(request: HttpRequest) -> HttpResponse:
    """Prometheus' text format."""
    try:
        refused = _refused(request)
        if refused is not None:
            return refused
        text = exposition()
    except DatabaseFailure as error:
        failed = answer(error)
        return failed if failed is not None else HttpResponse(status=503)
    return HttpResponse(text, content_type="text/plain; version=0.0.4; charset=utf-8")


def _refused(request: HttpRequest) -> HttpResponse | None:
    """None when this caller may look; else 401, or 403 when the token is known and may not. Looking is all there is: 405."""
    if request.method not in ("GET", "HEAD"):
        return JsonResponse({"summary": f"Method \"{request.method}\" not allowed."}, status=405, headers={"Allow": "GET, HEAD"})
    if may_operate(request, settings.SEQUIN_METRICS_PUBLIC):
        return None
    caller = find_caller(token_of(request))
    if caller is None:
        return JsonResponse({"summary": "needs a token of scope manage, or SEQUIN_METRICS_PUBLIC=1"}, status=401, headers={"WWW-Authenticate": "Bearer"})
    return JsonResponse({"summary": f"the token's scope is {caller.scope}; this needs manage"}, status=403)
