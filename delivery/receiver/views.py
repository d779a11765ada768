"""A receiver of our own for the playground: takes pushes as a user's server would, and shows what arrived."""
from __future__ import annotations

import hmac
import json
import time
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.csrf import csrf_exempt

from consumers.models import HttpEndpoint
from consumers.tokens import may_operate
from delivery.models import Arrival
from delivery.push.signing import signature

ENDPOINT_NAME = "playground-receiver"
KEPT = 200
SHOWN = 50
TOLERANCE_S = 300


@csrf_exempt
def receiver(request: HttpRequest) -> HttpResponse:
    """POST: take a push, if it is signed with the playground's secret. GET: the page."""
    if request.method == "POST":
        return _take(request)
    if not _may_see(request):
        return redirect(f"/admin/login/?next={request.path}")
    return render(request, "receiver/page.html", {"arrivals": _shown()})


def arrivals(request: HttpRequest) -> HttpResponse:
    """The table alone, which the page fetches each second."""
    if not _may_see(request):
        return HttpResponse(status=403)
    return render(request, "receiver/arrivals.html", {"arrivals": _shown()})


def _take(request: HttpRequest) -> HttpResponse:
    endpoint = HttpEndpoint.objects.filter(name=ENDPOINT_NAME).first()
    webhook_id = request.headers.get("webhook-id", "")
    stamp = request.headers.get("webhook-timestamp", "")
    if endpoint is None or not stamp.isdigit() or abs(time.time() - int(stamp[:12])) > TOLERANCE_S:
        return JsonResponse({"summary": "this receiver takes pushes of the playground's endpoint only"}, status=401)
    expected = signature(endpoint.signing_secret, webhook_id, int(stamp), request.body).split()
    given = request.headers.get("webhook-signature", "").split()
    if not any(hmac.compare_digest(one, other) for one in expected for other in given):
        return JsonResponse({"summary": "the signature does not fit"}, status=401)
    arrival = Arrival.objects.create(webhook_id=webhook_id, body=request.body.decode("utf-8", "replace").replace("\0", ""))
    if arrival.pk % 50 == 0:
        Arrival.objects.filter(pk__lte=arrival.pk - KEPT).delete()
    return HttpResponse(status=204)


def _may_see(request: HttpRequest) -> bool:
    return request.user.is_staff or may_operate(request, public=False)


def _shown() -> list[dict[str, Any]]:
    return [_summary(arrival) for arrival in Arrival.objects.all()[:SHOWN]]


def _summary(arrival: Arrival) -> dict[str, Any]:
    try:
        body = json.loads(arrival.body)
        metadata = body["metadata"]
        table = f"{metadata['table_schema']}.{metadata['table_name']}"
        return {
            "at": arrival.at,
            "action": body["action"],
            "table": table,
            "record": _member(arrival.body, "record"),
            "changes": _member(arrival.body[len(_member(arrival.body, "record")) :], "changes") if body["changes"] else "",
        }
    except (ValueError, KeyError, TypeError):
        return {"at": arrival.at, "action": "", "table": "", "record": arrival.body[:500], "changes": ""}


def _member(text: str, name: str) -> str:
    """A member of the message as it was sent: numbers keep their digits."""
    begin = text.index(f'"{name}":') + len(name) + 3
    _, end = json.JSONDecoder().raw_decode(text, begin)
    return text[begin:end]
