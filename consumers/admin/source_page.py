"""One source: how capture is doing, what the pre-flight says, its tables, what happened to it."""
from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse

from consumers import audit, changes, health, source_setup
from consumers.admin import charts
from consumers.admin.pages import CONFIGURE_SOURCE, OPERATE_SOURCE, ask, is_confirmed, needs, page, posted
from consumers.models import Source
from consumers.preflight import findings
from consumers.source_connection import SourceUnreachable
from consumers.publishing import SetupRefused, publish_tables
from consumers.store import counters, lifecycle
from consumers.store.counters import Rate
from consumers.store.models import SourceEvent, SourceStatus

VIEW_SOURCE = "consumers.view_source"
EVENTS_SHOWN = 20
RECOVERABLE = ("slot_missing", "slot_lost", "publication_missing")


@needs(VIEW_SOURCE)
def show(request: HttpRequest, pk: UUID) -> HttpResponse:
    source = get_object_or_404(Source, pk=pk)
    return page(
        request, "console/source.html", f"Source {source.name}", source=source, may_operate=request.user.has_perm(OPERATE_SOURCE),
        events=SourceEvent.objects.filter(source=pk)[:EVENTS_SHOWN], users=source.consumers.order_by("name")[:50], **_standing(source),
    )  # fmt: skip


@needs(VIEW_SOURCE)
def numbers(request: HttpRequest, pk: UUID) -> HttpResponse:
    source = get_object_or_404(Source, pk=pk)
    return render(request, "console/source_numbers.html", {"source": source, **_standing(source)})


@needs(VIEW_SOURCE)
def check(request: HttpRequest, pk: UUID) -> HttpResponse:
    """The pre-flight, for the page to fetch: the source may take its time to answer."""
    source = get_object_or_404(Source, pk=pk)
    found = sorted(findings(source), key=lambda finding: (finding.ok, not finding.blocking))
    return render(request, "console/findings.html", {"findings": found, "good": sum(one.ok for one in found)})


@needs(VIEW_SOURCE)
def tables(request: HttpRequest, pk: UUID) -> HttpResponse:
    source = get_object_or_404(Source, pk=pk)
    may_publish = source.publication_created and request.user.has_perm(CONFIGURE_SOURCE)
    try:
        found = source_setup.all_tables(source)
        return render(request, "console/source_tables.html", {"source": source, "tables": found, "may_publish": may_publish})
    except SourceUnreachable as error:
        return render(request, "console/source_tables.html", {"problem": str(error)})


@posted
@needs(CONFIGURE_SOURCE)
def publish(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Put the ticked tables into the publication, which is ours."""
    source = get_object_or_404(Source, pk=pk)
    chosen = request.POST.getlist("tables")
    try:
        if chosen:
            publish_tables(source, chosen)
            audit.record("publish", source, len(chosen), tables=chosen[:20])
            messages.success(request, f"{', '.join(chosen[:5])}{' and more' if len(chosen) > 5 else ''}: changes are captured from now on.")
    except (SetupRefused, SourceUnreachable) as error:
        messages.error(request, str(error))
    return redirect(reverse("admin:consumers_source_page", args=[pk]))


@posted
@needs(OPERATE_SOURCE)
def act(request: HttpRequest, pk: UUID, action: str) -> HttpResponse:
    """pause, resume, recover, acknowledge_gap; what may lose something asks first."""
    source = get_object_or_404(Source, pk=pk)
    back = reverse("admin:consumers_source_page", args=[pk])
    question = _question(source, action)
    if question and not is_confirmed(request):
        return ask(request, title=question[0], question=question[1], button=question[0], back=back)
    try:
        messages.success(request, _do(source, action))
    except ValidationError as error:
        messages.error(request, " ".join(error.messages))
    return redirect(back)


def _question(source: Source, action: str) -> tuple[str, str] | None:
    if action == "pause":
        return "Pause capture", (
            f"While {source.name} is paused, its slot keeps WAL on the source's disk, which can fill up. Nothing is lost. Pause it?"
        )
    if action == "recover":
        return "Make the slot anew", (
            f"A new slot of {source.name} begins now. What happened since the old one stopped is not captured: it is shown as a gap."
        )
    if action == "acknowledge_gap":
        return "Acknowledge the gap", f"Changes may be missing: {lifecycle.gap(source.pk) or 'none'}. They are not fetched by this; a backfill does."
    return None


def _do(source: Source, action: str) -> str:
    if action == "recover":
        changes.recover(source)
        return f"{source.name}: capture begins again. What happened meanwhile is shown as a gap."
    if action == "acknowledge_gap":
        return "The gap is acknowledged." if changes.acknowledge_gap(source) else "There is no gap."
    source.status = "paused" if action == "pause" else "active"
    changes.save(source)
    return f"{source.name} is now {source.status}."


def _standing(source: Source) -> dict[str, Any]:
    now = lifecycle.clock()
    status = SourceStatus.objects.filter(pk=source.pk).first()
    judged = health.sources(only=source.pk)
    return {
        "judged": judged[0] if judged else None,
        "status": status,
        "gap": lifecycle.gap(source.pk),
        "is_recoverable": bool(status and status.state in RECOVERABLE),
        "rate": counters.rates().get(source.pk, Rate(0, 0, 0)),
        "look": counters.looks().get(source.pk),
        "hour": charts.traffic(counters.series(source.pk, minutes=60, step=1), now, step=1, kinds=("captured",)),
        "day": charts.traffic(counters.series(source.pk, minutes=1440, step=10), now, step=10, kinds=("captured",)),
    }
