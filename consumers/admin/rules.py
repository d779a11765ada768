"""Filter and transform: edited, tried on real recent messages before they are saved, and saved."""
from __future__ import annotations

from typing import Any, NamedTuple
from uuid import UUID

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, render
from django.urls import reverse

from consumers import changes, trying
from consumers.admin import json_text
from consumers.admin.pages import CONFIGURE, OPERATE, needs, posted
from consumers.models import ACTIONS, Consumer, Source
from consumers.source_connection import SourceUnreachable
from consumers.store import lifecycle
from consumers.trying import Sample, Tried

RECENT = 20
LABELS = {"where": "Filter", "transform": "Transform"}


class Shown(NamedTuple):
    """One message tried."""

    action: str
    before: str
    payload: str
    tried: Tried


@posted
@needs(OPERATE)
def try_saved(request: HttpRequest, pk: UUID) -> HttpResponse:
    """What the texts in the editors would make of the consumer's newest messages."""
    consumer = get_object_or_404(Consumer.objects.select_related("source", "endpoint"), pk=pk)
    return _answer(request, _with_texts(consumer, request))


@posted
@needs("consumers.add_consumer")
def try_new(request: HttpRequest) -> HttpResponse:
    """The same for a consumer that is being made."""
    try:
        source = Source.objects.get(pk=request.POST.get("source"))
    except (Source.DoesNotExist, ValidationError, ValueError):
        return _problems(request, [("Source", ["Choose one first."])])
    actions = [action for action in request.POST.getlist("actions") if action in ACTIONS]
    name = request.POST.get("name") or "new"
    stream = "rows" if request.POST.get("stream") == "rows" else "changes"
    consumer = Consumer(name=name[:63], source=source, kind="pull", stream=stream, tables=request.POST.getlist("tables"), actions=actions)
    return _answer(request, _with_texts(consumer, request))


@posted
@needs(CONFIGURE)
def save(request: HttpRequest, pk: UUID) -> HttpResponse:
    consumer = _with_texts(get_object_or_404(Consumer.objects.select_related("source", "endpoint"), pk=pk), request)
    try:
        changes.save(consumer)
    except ValidationError as error:
        return _problems(request, _labelled(error))
    messages.success(request, f"Saved. The change applies to {lifecycle.waiting(pk):,} waiting messages, and to all that come.")
    answer = HttpResponse(status=204)
    answer.headers["HX-Redirect"] = reverse("admin:consumers_consumer_page", args=[pk]) + "?tab=rules"
    return answer


def _with_texts(consumer: Consumer, request: HttpRequest) -> Consumer:
    for field in ("where", "transform"):
        text = request.POST.get(field, "").replace("\r\n", "\n")
        setattr(consumer, field, text if text.strip() else "")
    return consumer


def _answer(request: HttpRequest, consumer: Consumer) -> HttpResponse:
    try:
        notices = trying.check(consumer)
        samples = trying.recent(consumer, RECENT)
        tried = trying.run(consumer, samples)
    except ValidationError as error:
        return _problems(request, _labelled(error))
    except (SourceUnreachable, DatabaseError) as error:
        return _problems(request, [("", [" ".join(str(error).split())[:300]])])
    shown = [_shown(sample, one) for sample, one in zip(samples, tried, strict=True)][::-1]
    return render(
        request, "console/tried.html",
        {"shown": shown, "notices": notices, "passed": sum(one.payload is not None and one.error is None for one in tried)},
    )  # fmt: skip


def _shown(sample: Sample, tried: Tried) -> Shown:
    return Shown(sample.action, sample.record, json_text.pretty(tried.payload.decode()) if tried.payload else "", tried)


def _labelled(error: ValidationError) -> list[tuple[str, Any]]:
    return [(LABELS.get(field, "" if field == "non_field_errors" else field), texts) for field, texts in changes.errors_of(error).items()]


def _problems(request: HttpRequest, problems: list[tuple[str, Any]]) -> HttpResponse:
    return render(request, "console/problems.html", {"problems": problems})
