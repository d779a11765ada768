"""The first page: what needs a person, what flows, and every source and consumer as a card."""
from __future__ import annotations

from typing import Any, NamedTuple
from uuid import UUID

from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone

from consumers import health
from consumers.admin import charts
from consumers.models import Consumer, Source
from consumers.store import counters, lifecycle
from consumers.store.counters import EVERYTHING, Look, Rate
from consumers.store.models import ConsumerPosition, SourceStatus

SHOWN = 48  # consumers as cards, those in need first; the list has all of them
SPARK_MINUTES = 60
STALE_S = 30
NO_RATE = Rate(0, 0, 0)
ORDER = {"failing": 0, "degraded": 1, "ok": 2, "paused": 3, "disabled": 4}


class Need(NamedTuple):
    """Something a person should see to."""

    colour: str
    name: str
    url: str
    text: str


def fill(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """unfold's dashboard callback. `?part=live`: only what changes, for the page that shows it already."""
    now = timezone.now()
    rates, looks = counters.rates(), counters.looks()
    sources = _sources(rates, looks)
    consumers = _consumers(rates, looks)
    context.update(
        title="Home",
        page_base="console/bare.html" if request.GET.get("part") == "live" else "admin/base.html",
        sources=sources,
        consumers=consumers[:SHOWN],
        more_consumers=max(0, len(consumers) - SHOWN),
        needs=_needs(sources + consumers),
        total=rates.get(EVERYTHING, NO_RATE),
        lag_s=max((source["lag_s"] for source in sources), default=0),
        hour=charts.traffic(counters.series(EVERYTHING, minutes=60, step=1), now, step=1),
        day=charts.traffic(counters.series(EVERYTHING, minutes=1440, step=10), now, step=10),
        steps=_steps(sources, consumers),
        not_counting=bool(sources) and not any((now - look.at).total_seconds() < STALE_S for look in looks.values()),
    )
    _draw_sparklines(context["consumers"])
    return context


def _sources(rates: dict[UUID, Rate], looks: dict[UUID, Look]) -> list[dict[str, Any]]:
    judged = {one.name: one for one in health.sources()}
    statuses = {status.pk: status for status in SourceStatus.objects.all()}
    cards = []
    for source in Source.objects.all():
        status, look, found = statuses.get(source.pk), looks.get(source.pk), judged.get(source.name)
        cards.append(
            {
                "kind": "source",
                "name": source.name,
                "url": reverse("admin:consumers_source_page", args=[source.pk]),
                "where": f"{source.host}:{source.port}/{source.database}",
                "state": found.status if found else "connecting",
                "reasons": found.reasons if found else [],
                "rate": rates.get(source.pk, NO_RATE).captured,
                "lag_bytes": look.lag_bytes if look else None,
                "lag_s": look.lag_s if look else 0,
                "retained": status.retained_bytes if status else None,
            }
        )
    return sorted(cards, key=lambda card: (ORDER.get(card["state"], 1), card["name"]))


def _consumers(rates: dict[UUID, Rate], looks: dict[UUID, Look]) -> list[dict[str, Any]]:
    judged = {one.name: one for one in health.consumers()}
    counts = {row[0]: row[1:] for row in ConsumerPosition.objects.values_list("pk", "parked_count", "dead_count", "acked_count")}
    cards = []
    # Plain values: making two hundred models would take longer than everything else.
    for pk, name, source, endpoint in Consumer.objects.values_list("pk", "name", "source__name", "endpoint__name"):
        look, found = looks.get(pk), judged.get(name)
        failing, dead, delivered = counts.get(pk, (0, 0, 0))
        cards.append(
            {
                "kind": "consumer",
                "id": pk,
                "name": name,
                "url": reverse("admin:consumers_consumer_page", args=[pk]),
                "where": f"{source} → {endpoint or 'pull'}",
                "state": found.status if found else "degraded",
                "reasons": found.reasons if found else [],
                "rate": rates.get(pk, NO_RATE).delivered,
                "failing": failing,
                "dead": dead,
                "delivered": delivered,
                "waiting": look.waiting if look else None,
                "oldest_s": look.lag_s if look else 0,
            }
        )
    return sorted(cards, key=lambda card: (ORDER.get(card["state"], 1), card["name"].lower()))


def _needs(cards: list[dict[str, Any]]) -> list[Need]:
    found = [
        Need("bad" if card["state"] == "failing" else "warn", card["name"], card["url"], reason)
        for card in cards
        if card["state"] not in ("ok", "disabled")
        for reason in card["reasons"]
    ]
    return sorted(found, key=lambda need: need.colour != "bad")


def _steps(sources: list[dict[str, Any]], consumers: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The way from nothing to a message, until one has arrived."""
    if any(consumer["delivered"] for consumer in consumers):
        return None
    first = consumers[0] if consumers else None
    done = [bool(sources), bool(sources) and (bool(consumers) or lifecycle.publishes_tables()), bool(consumers), False]
    texts = [
        ("Connect a database", "Its URL, and a check that says what is missing.", reverse("admin:consumers_source_add")),
        ("Pick tables", "Those whose changes are to be kept.", f"{sources[0]['url']}#tables" if sources else ""),
        ("Add a consumer", "Which tables, and where their changes go.", reverse("admin:consumers_consumer_add")),
        ("See a message", "Change a row and watch it arrive.", first["url"] + "?tab=code" if first else ""),
    ]
    return [
        {"title": title, "text": text, "url": url, "done": done[number], "now": not done[number] and all(done[:number])}
        for number, (title, text, url) in enumerate(texts)
    ]


def _draw_sparklines(cards: list[dict[str, Any]]) -> None:
    bins = counters.many_series([card["id"] for card in cards], minutes=SPARK_MINUTES, step=1)
    for card in cards:
        delivered = [float(one.delivered) for one in bins[card["id"]]]
        card["spark"] = charts.sparkline(delivered) if any(delivered) else None
