"""One consumer: how it is doing, its messages as they come, client code; pausing, retrying, discarding."""
from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode, urlsplit
from uuid import UUID

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils import timezone

from consumers import audit, changes, health, replaying
from consumers.admin import charts, client_code, listing, replay
from consumers.admin.listing import Wanted
from consumers.admin.pages import CONFIGURE, OPERATE, VIEW, ask, is_confirmed, needs, page, posted, tell_how_many
from consumers.models import Consumer
from consumers.store import counters, lifecycle
from consumers.store.counters import Rate
from consumers.store.models import ConsumerPosition, RelationVersion
from consumers.words import counted

SINCE = {"10m": ("last 10 minutes", 10), "1h": ("last hour", 60), "1d": ("last day", 1440), "": ("all", 0)}
STATES = {
    "all": "all", "waiting": "waiting", "out": "out", "parked": "failing or blocked", "dead": "dead letters", "passed": "taken and done",
    "filtered": "filtered out",
}  # fmt: skip
MAX_BATCH = 1_000
SHAPES_LOOKED_AT = 100
TABS = ("messages", "rules", "replay", "code")


@needs(VIEW)
def show(request: HttpRequest, pk: UUID) -> HttpResponse:
    consumer = _find(pk)
    tab = request.GET.get("tab", "messages")
    context: dict[str, Any] = {"consumer": consumer, "tab": tab if tab in TABS else "messages", **_standing(consumer)}
    if context["tab"] == "code":
        context["examples"] = _examples(request, consumer)
    elif context["tab"] == "replay":
        context.update(replay.context(consumer))
    elif context["tab"] == "rules":
        context["columns"] = _columns(consumer)
    else:
        context.update(_listed(request, consumer))
    return page(request, "console/consumer.html", f"Consumer {consumer.name}", may_operate=request.user.has_perm(OPERATE), **context)


@needs(VIEW)
def live(request: HttpRequest, pk: UUID) -> HttpResponse:
    """The list of messages alone, for a page that shows it already."""
    consumer = _find(pk)
    return render(
        request, "console/consumer_messages.html",
        {"consumer": consumer, "may_operate": request.user.has_perm(OPERATE), **_listed(request, consumer)},
    )  # fmt: skip


@needs(VIEW)
def numbers(request: HttpRequest, pk: UUID) -> HttpResponse:
    """What is shown above the list, the same way."""
    consumer = _find(pk)
    return render(request, "console/consumer_numbers.html", {"consumer": consumer, "is_live": True, **_standing(consumer)})


@posted
@needs(OPERATE)
def set_status(request: HttpRequest, pk: UUID, status: str) -> HttpResponse:
    """Pause, resume, disable, enable. Disabling asks first, with the exact count."""
    consumer = _find(pk)
    back = reverse("admin:consumers_consumer_page", args=[pk])
    if status == "disabled":
        if not request.user.has_perm(CONFIGURE):
            return needs(CONFIGURE)(set_status)(request, pk, status)
        if not is_confirmed(request):
            count = lifecycle.backlog(pk).undelivered
            return ask(
                request, title="Disable a consumer", back=back, button=f"Disable and drop {counted(count, 'message')}",
                question=f"Disabling {consumer.name} drops {counted(count, 'undelivered message')}, and whatever comes until it is enabled again.",
            )  # fmt: skip
    consumer.status = status
    try:
        changes.save(consumer)
    except ValidationError as error:
        messages.error(request, " ".join(error.messages))
    else:
        messages.success(request, f"{consumer.name} is now {status}.")
    return redirect(back)


@posted
@needs(OPERATE)
def redrive(request: HttpRequest, pk: UUID, action: str) -> HttpResponse:
    """Retry, discard or republish: the messages ticked, or all in a state. Discarding, and all of a state, ask first."""
    consumer = _find(pk)
    back = _local(request.POST.get("back")) or reverse("admin:consumers_consumer_page", args=[pk])
    ids = [int(text) for text in request.POST.getlist("id")[:MAX_BATCH] if re.fullmatch(r"\d{1,18}", text)]
    state = request.POST.get("state")
    if not ids and (action == "republish" or state not in ("parked", "dead")):
        messages.warning(request, "Nothing was chosen.")
        return redirect(back)
    if not is_confirmed(request) and (action == "discard" or not ids):
        count = _count(pk, ids, state)
        verb = "Discard" if action == "discard" else "Retry"
        tail = "They are not delivered, and this cannot be taken back." if action == "discard" else "They are delivered again, now."
        which = "dead letter" if state == "dead" and not ids else "message"
        return ask(
            request, title=f"{verb} messages", back=back, button=f"{verb} {count:,}",
            question=f"{verb} {counted(count, which)} of {consumer.name}? {tail}",
        )  # fmt: skip
    if action == "republish":
        count = replaying.republish_messages(consumer, ids)
        messages.success(request, f"{counted(count, 'message')} to be delivered once more." if count else "The log has it no more.")
        return redirect(back)
    act = lifecycle.discard if action == "discard" else lifecycle.retry
    count = act(pk, ids) if ids else act(pk, state=state)
    audit.record(action, consumer, count, **({"state": state} if not ids else {"ids": ids[:20]}))
    tell_how_many(request, count, "discarded" if action == "discard" else "to be tried again")
    return redirect(back)


def _find(pk: UUID) -> Consumer:
    return get_object_or_404(Consumer.objects.select_related("source", "endpoint"), pk=pk)


def _count(consumer_id: UUID, ids: list[int], state: str | None) -> int:
    if ids:
        return len(ids)
    backlog = lifecycle.backlog(consumer_id)
    return backlog.dead if state == "dead" else backlog.retry + backlog.blocked + backlog.error


def _standing(consumer: Consumer) -> dict[str, Any]:
    now = lifecycle.clock()
    judged = health.consumers(only=consumer.pk)
    position = ConsumerPosition.objects.filter(pk=consumer.pk).first()
    return {
        "judged": judged[0] if judged else None,
        "position": position,
        "rate": counters.rates().get(consumer.pk, Rate(0, 0, 0)),
        "look": counters.looks().get(consumer.pk),
        "hour": charts.traffic(counters.series(consumer.pk, minutes=60, step=1), now, step=1, kinds=("delivered", "failed", "filtered")),
        "day": charts.traffic(counters.series(consumer.pk, minutes=1440, step=10), now, step=10, kinds=("delivered", "failed", "filtered")),
    }  # fmt: skip


def _listed(request: HttpRequest, consumer: Consumer) -> dict[str, Any]:
    given = request.GET
    state = given.get("state", "all")
    wanted = Wanted(
        state=state if state in listing.STATES else "all",
        key=given.get("key") or None,
        since=_since(given.get("since", "")),
        text=(given.get("text") or "").replace("\0", "")[:200] or None,
        before=int(given["before"]) if re.fullmatch(r"\d{1,18}", given.get("before", "")) else 2**63 - 1,
    )
    found = listing.newest(consumer, wanted)
    kept = {name: given[name] for name in ("state", "key", "since", "text") if given.get(name)}
    here = reverse("admin:consumers_consumer_page", args=[consumer.pk])
    return {
        "listed": found,
        "wanted": wanted,
        "shows_filtered": any(row.standing.state == "filtered" for row in found.rows),
        "since": given.get("since", ""),
        "states": STATES,
        "sinces": {name: text for name, (text, _) in SINCE.items()},
        "older": f"{here}?{urlencode({**kept, 'before': found.older})}" if found.older else "",
        "is_newest": "before" not in given,
        "query": urlencode(kept),
        "here": f"{here}?{urlencode(kept)}",
    }


def _since(name: str) -> datetime | None:
    minutes = SINCE.get(name, ("", 0))[1]
    return timezone.now() - timedelta(minutes=minutes) if minutes else None


def _columns(consumer: Consumer) -> list[str]:
    """Names of its tables' columns, for the editor to complete."""
    shapes = RelationVersion.objects.filter(source=consumer.source_id).order_by("-seen_at")[:SHAPES_LOOKED_AT]
    names = {
        column["name"]
        for shape in shapes
        if not consumer.tables or str(shape) in consumer.tables or f"{shape.schema_name}.*" in consumer.tables
        for column in shape.columns
    }  # fmt: skip
    return sorted(name for name in names if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name))


def _examples(request: HttpRequest, consumer: Consumer) -> list[client_code.Example]:
    url = f"{request.scheme}://{request.get_host()}"
    if consumer.kind == "pull":
        return client_code.pull(url, consumer.name)
    endpoint = consumer.endpoint
    path = (urlsplit(endpoint.url).path.rstrip("/") + consumer.path.partition("?")[0] if endpoint else "") or "/"
    return client_code.push(url, consumer.name, endpoint=endpoint.name if endpoint else "", path=path, batched=consumer.batch_size > 1)


def _local(path: str | None) -> str | None:
    return path if path and path.startswith("/admin/") and "\\" not in path else None
