"""Alerts: once when something begins, once when it is over, to each who wants to hear of it."""
from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.core import mail
from django.core.exceptions import ValidationError
from django.utils import timezone

from consumers.alert_models import AlertDestination, AlertEpisode, AlertNotice, AlertRule
from consumers.models import Consumer
from consumers.store import claims, counters, lifecycle
from consumers.store.types import Failure
from delivery import alerting
from tests.push.endpoint import Endpoint, status
from tests.store.world import Log, take

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def endpoint() -> Any:
    started = Endpoint()
    yield started
    started.close()


def dead_letter(log: Log) -> Any:
    consumer = log.consumer(max_deliver=1)
    log.append(log.row(1))
    claim = take(consumer)
    claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 1, "answered <b>500</b>", 500)])
    return consumer


def at(seconds: float) -> Any:
    return timezone.now() + timedelta(seconds=seconds)


def test_one_notice_when_it_begins_and_one_when_it_is_over(log: Log, endpoint: Endpoint) -> None:
    AlertDestination.objects.create(name="ops", kind="webhook", url=endpoint.url, signing_secret="whsec_" + "a" * 32)
    consumer = dead_letter(log)
    name = Consumer.objects.get(pk=consumer).name
    for _ in range(3):
        assert alerting.judge()
    assert alerting.send() == 1 and alerting.send() == 0
    lifecycle.discard(consumer, state="dead")
    alerting.judge()
    assert alerting.send() == 0  # it may come back in a moment
    for seconds in (40, 45, 50):
        alerting.judge(at(seconds))
    assert alerting.send(at(60)) == 1 and alerting.send(at(100)) == 0
    told = [json.loads(request.body) for request in endpoint.got]
    assert [(one["type"], one["rule"], one["subject"]) for one in told] == [
        ("alert.fired", "dead_letters", f"consumer {name}"), ("alert.over", "dead_letters", f"consumer {name}")
    ]  # fmt: skip
    assert told[0]["text"] == "1 dead letter" and "webhook-signature" in endpoint.got[0].headers
    # The next time it is a new episode.
    log.append(log.row(2))
    claim = take(consumer)
    claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 1, "answered 500", 500)])
    alerting.judge()
    assert alerting.send() == 1 and AlertEpisode.objects.count() == 2


def test_a_secret_that_receivers_could_not_read_is_refused() -> None:
    destination = AlertDestination(name="ops", kind="webhook", url="https://example.com/", signing_secret="whsec_" + "a" * 33)
    with pytest.raises(ValidationError, match="signing_secret.*base64"):
        destination.full_clean()
    destination.signing_secret += "aaa"
    destination.full_clean()


def test_what_lasts_too_short_alerts_nobody(log: Log, endpoint: Endpoint) -> None:
    AlertDestination.objects.create(name="ops", kind="webhook", url=endpoint.url)
    AlertRule.objects.filter(kind="consumer_paused").update(after_s=60)
    consumer = log.consumer()
    Consumer.objects.filter(pk=consumer).update(status="paused")
    alerting.judge()
    assert AlertEpisode.objects.get(subject__startswith="consumer").state == "pending"
    Consumer.objects.filter(pk=consumer).update(status="active")
    alerting.judge(at(30))
    alerting.judge(at(90))
    assert alerting.send(at(90)) == 0 and not AlertEpisode.objects.filter(subject__startswith="consumer").exists()


def test_a_destination_that_fails_is_tried_again_later_and_told_once(log: Log, endpoint: Endpoint) -> None:
    AlertDestination.objects.create(name="ops", kind="slack", url=endpoint.url)
    endpoint.answer = status(500)
    dead_letter(log)
    alerting.judge()
    assert alerting.send() == 0 and alerting.send() == 0  # not before its time
    assert "500" in AlertNotice.objects.get().error
    endpoint.answer = status(200)
    assert alerting.send(at(31)) == 1 and alerting.send(at(100)) == 0
    assert json.loads(endpoint.got[-1].body)["text"].startswith("*Alert: consumer ")


def test_addresses_that_pushes_may_not_reach_are_not_reached(log: Log, endpoint: Endpoint, settings: Any) -> None:
    settings.SEQUIN_ALLOWED_NETWORKS = []
    AlertDestination.objects.create(name="inside", kind="webhook", url=endpoint.url)
    dead_letter(log)
    alerting.judge()
    assert alerting.send() == 0 and endpoint.got == []
    assert "not a public address" in AlertNotice.objects.get().error


def test_rules_choose_and_are_turned_off(log: Log, endpoint: Endpoint) -> None:
    picky = AlertDestination.objects.create(name="picky", kind="webhook", url=endpoint.url)
    picky.rules.add(AlertRule.objects.get(kind="disk"))
    dead_letter(log)
    alerting.judge()
    assert alerting.send() == 0
    AlertRule.objects.filter(kind="dead_letters").update(enabled=False)
    alerting.judge(at(100))
    alerting.judge(at(200))
    assert AlertEpisode.objects.get(rule__kind="dead_letters").state == "over"


def test_by_mail(log: Log, settings: Any) -> None:
    settings.EMAIL_CONFIGURED = True
    AlertDestination.objects.create(name="team", kind="email", addresses="a@example.com, b@example.com")
    dead_letter(log)
    alerting.judge()
    assert alerting.send() == 1
    assert mail.outbox[0].to == ["a@example.com", "b@example.com"] and "dead letters" in mail.outbox[0].subject


@pytest.mark.parametrize("kind", ["capture_lag", "consumer_lag", "retained_wal", "source_failing"])
def test_what_sources_and_consumers_do_wrong_is_noticed(log: Log, kind: str) -> None:
    AlertRule.objects.update(after_s=0)
    log.source.status = "active"
    log.source.save()
    consumer = log.consumer()
    log.append(log.row(1))
    lifecycle.set_source_status(log.source.pk, "slot_lost", ["gone"], retained_bytes=10**11, source_lsn=10**9)
    counters.count()
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("UPDATE counted SET lag_s = 10000")
    alerting.judge()
    found = AlertEpisode.objects.get(rule__kind=kind)
    assert found.state == "firing" and found.subject.endswith(Consumer.objects.get(pk=consumer).name if kind == "consumer_lag" else log.source.name)
