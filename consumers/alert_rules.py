"""What holds right now of what people may want to be told. Reads only; what follows is `delivery/alerting.py`'s."""
from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from django.conf import settings

from consumers import health
from consumers.words import counted, duration
from consumers.alert_models import AlertRule
from consumers.hosting import readable_bytes
from consumers.models import Consumer, Source
from consumers.store import counters
from consumers.store.models import ConsumerPosition, SourceStatus

PAUSED, DISABLED = "paused", "disabled"


class Condition(NamedTuple):
    """One rule that holds for one thing, in a sentence."""

    kind: str
    subject: str
    text: str


def holding(now: datetime) -> list[Condition]:
    """Everything that holds, of the rules that are enabled."""
    rules = {rule.kind: rule for rule in AlertRule.objects.filter(enabled=True)}
    found = [*_sources(now, rules), *_consumers(now, rules), *_disk(rules)]
    return [condition for condition in found if condition.kind in rules]


def _sources(now: datetime, rules: dict[str, AlertRule]) -> Iterator[Condition]:
    looks = counters.looks()
    statuses = {status.pk: status for status in SourceStatus.objects.all()}
    judged = {one.name: one for one in health.sources(now=now)}
    for source in Source.objects.all():
        subject, one, status, look = f"source {source.name}", judged.get(source.name), statuses.get(source.pk), looks.get(source.pk)
        if one is not None and one.status == "failing":
            yield Condition("source_failing", subject, "; ".join(one.reasons))
        if status is not None and _over(rules, "retained_wal", status.retained_bytes):
            yield Condition("retained_wal", subject, f"its slot keeps {readable_bytes(status.retained_bytes or 0)} of WAL on the source's disk")
        if look is not None and source.status == "active" and _over(rules, "capture_lag", look.lag_s):
            yield Condition("capture_lag", subject, f"capture is {duration(look.lag_s)} behind")


def _consumers(now: datetime, rules: dict[str, AlertRule]) -> Iterator[Condition]:
    looks = counters.looks()
    positions = {position.pk: position for position in ConsumerPosition.objects.all()}
    judged = {one.name: one for one in health.consumers(now=now)}
    for consumer in Consumer.objects.exclude(status=DISABLED):
        subject, one = f"consumer {consumer.name}", judged.get(consumer.name)
        position, look = positions.get(consumer.pk), looks.get(consumer.pk)
        if consumer.status == PAUSED:
            yield Condition("consumer_paused", subject, consumer.status_reason or "it is paused, and collects meanwhile")
        elif position is not None and position.parked_count and one is not None:
            yield Condition("consumer_failing", subject, "; ".join(one.reasons))
        if look is not None and consumer.status == "active" and _over(rules, "consumer_lag", look.lag_s):
            yield Condition("consumer_lag", subject, f"its oldest undelivered message is {duration(look.lag_s)} old")
        if position is not None and _over(rules, "dead_letters", position.dead_count):
            yield Condition("dead_letters", subject, counted(position.dead_count, "dead letter"))


def _disk(rules: dict[str, AlertRule]) -> Iterator[Condition]:
    if SourceStatus.objects.filter(state="store_full").exists():
        yield Condition("disk", "the store", "its disk is full: capture has stopped storing, and goes on when there is room")
        return
    rule, directory = rules.get("disk"), settings.SEQUIN_STORE_DIRECTORY
    if rule is None or rule.threshold is None or directory is None:
        return
    try:
        found = os.statvfs(directory)
    except OSError:
        return
    free = 100 * found.f_bavail / max(1, found.f_blocks)
    if free < rule.threshold:
        yield Condition("disk", "the store", f"{free:.0f} % of its disk are free ({readable_bytes(found.f_bavail * found.f_frsize)})")


def _over(rules: dict[str, AlertRule], kind: str, value: float | None) -> bool:
    rule = rules.get(kind)
    return rule is not None and rule.threshold is not None and value is not None and value > rule.threshold
