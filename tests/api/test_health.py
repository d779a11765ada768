"""/health judges by progress; /metrics has the contract's names. Both without a token on loopback only."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.db import connection
from django.test import Client
from prometheus_client.parser import text_string_to_metric_families

from consumers.store import lifecycle
from tests.api.pull_world import Log, make_consumer, make_source
from consumers.models import Consumer, HttpEndpoint, Source
from consumers.tokens import create_token

pytestmark = pytest.mark.django_db(transaction=True)
REMOTE = {"REMOTE_ADDR": "203.0.113.9"}
METRICS = (
    "sequin_capture_lag_bytes", "sequin_capture_lag_seconds", "sequin_slot_retained_bytes", "sequin_consumer_lag_messages",
    "sequin_consumer_oldest_unacked_seconds", "sequin_consumer_delivered_total", "sequin_consumer_failed_attempts_total",
    "sequin_consumer_out", "sequin_consumer_parked", "sequin_store_bytes", "sequin_capture_messages_total", "sequin_delivery_seconds",
)  # fmt: skip


@pytest.fixture
def source() -> Iterator[Source]:
    yield make_source()


@pytest.fixture
def log(source: Source) -> Iterator[Log]:
    log = Log(source)
    yield log
    log.close()


def health(client: Client, **extra: Any) -> tuple[int, Any]:
    answer = client.get("/health", **extra)
    return answer.status_code, answer.json()


def test_nothing_configured_is_ok(client: Client) -> None:
    assert health(client) == (200, {"status": "ok", "sources": [], "consumers": []})


def test_a_source_whose_reader_reports_is_ok(client: Client, source: Source, log: Log) -> None:
    make_consumer(source)
    lifecycle.set_source_status(source.pk, "active")
    status, body = health(client)
    assert status == 200 and body["status"] == "ok"
    assert body["sources"] == [{"name": "shop", "status": "ok", "reasons": []}]
    assert body["consumers"] == [{"name": "orders", "status": "ok", "reasons": []}]


def test_a_failing_source_is_503_with_its_reason(client: Client, source: Source, log: Log) -> None:
    lifecycle.set_source_status(source.pk, "slot_lost", ["slot sequin_slot is lost"])
    status, body = health(client)
    assert status == 503 and body["status"] == "failing"
    assert body["sources"][0]["reasons"] == ["slot_lost: slot sequin_slot is lost"]


def test_a_gap_is_failing_until_somebody_acknowledges_it(client: Client, source: Source, log: Log) -> None:
    lifecycle.set_source_status(source.pk, "active")
    log.appender.note_gap("the slot was made anew")
    status, body = health(client)
    assert status == 503 and "the slot was made anew" in body["sources"][0]["reasons"][0]


def test_a_parked_message_degrades_its_consumer_only(client: Client, source: Source, log: Log) -> None:
    from consumers.store import claims

    consumer = make_consumer(source)
    make_consumer(source, "other")
    lifecycle.set_source_status(source.pk, "active")
    log.append([1])
    claim = claims.claim(consumer.pk, 1, lease_ms=30_000)
    assert claim.token is not None
    claims.nack(consumer.pk, [(claim.token, claim.messages[0].id)], 60_000)
    status, body = health(client)
    assert status == 200 and body["status"] == "degraded"
    assert {one["name"]: one["status"] for one in body["consumers"]} == {"orders": "degraded", "other": "ok"}


def test_a_consumer_that_is_full_of_parked_messages_names_the_group(client: Client, source: Source, log: Log) -> None:
    from consumers.store import claims

    consumer = make_consumer(source)
    Consumer.objects.update(max_parked=3)
    log.append([7, 8])
    claim = claims.claim(consumer.pk, 2, lease_ms=30_000)
    assert claim.token is not None
    claims.nack(consumer.pk, [(claim.token, message.id) for message in claim.messages], 60_000)
    log.append([8, 8, 8, 9])
    assert len(claims.claim(consumer.pk, 2, lease_ms=30_000).messages) == 1
    reasons = health(client)[1]["consumers"][0]["reasons"]
    assert reasons == ['takes no more: 5 messages wait behind failing ones, most of them in the group of public.orders ["8"]']


def test_a_push_consumer_that_nobody_serves_is_degraded(client: Client, source: Source, log: Log) -> None:
    endpoint = HttpEndpoint.objects.create(name="e", url="https://example.com/")
    make_consumer(source, kind="push", endpoint=endpoint)
    make_consumer(source, "pulled")
    log.append([1])
    assert [one["status"] for one in health(client)[1]["consumers"]] == ["ok", "ok"]
    with connection.cursor() as cursor:
        cursor.execute("UPDATE messages SET committed_at = now() - interval '2 minutes'")
    assert {one["name"]: one["status"] for one in health(client)[1]["consumers"]} == {"orders": "degraded", "pulled": "ok"}


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_from_elsewhere_it_needs_a_token_that_may_manage(client: Client, path: str, settings: Any) -> None:
    assert client.get(path, **REMOTE).status_code == 401
    assert client.get(path, HTTP_X_FORWARDED_FOR="203.0.113.9").status_code == 401
    _, pull = create_token("puller", "pull")
    assert client.get(path, HTTP_AUTHORIZATION=f"Bearer {pull}", **REMOTE).status_code == 403
    assert client.get(path, HTTP_AUTHORIZATION="Bearer nonsense", **REMOTE).status_code == 401
    _, manage = create_token("manager", "manage")
    assert client.get(path, HTTP_AUTHORIZATION=f"Bearer {manage}", **REMOTE).status_code == 200
    settings.SEQUIN_METRICS_PUBLIC = True
    assert client.get(path, **REMOTE).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_there_is_nothing_to_post(path: str) -> None:
    strict = Client(enforce_csrf_checks=True)
    for method in ("post", "put", "delete", "options"):
        answer = getattr(strict, method)(path)
        assert answer.status_code == 405 and answer.json()["summary"], method
    assert strict.head(path).status_code == 200


def test_metrics_count_what_happened(client: Client, source: Source, log: Log) -> None:
    from consumers.store import claims

    consumer = make_consumer(source)
    lifecycle.set_source_status(source.pk, "active", retained_bytes=4096, source_lsn=1000)
    log.append([1, 2, 3])
    claim = claims.claim(consumer.pk, 2, lease_ms=30_000)
    assert claim.token is not None
    claims.ack(consumer.pk, [(claim.token, claim.messages[0].id)])
    answer = client.get("/metrics")
    text = answer.content.decode()
    assert answer.status_code == 200 and answer["Content-Type"].startswith("text/plain; version=0.0.4")
    for name in METRICS:
        assert f"# TYPE {name} " in text
    # A parser that is not ours reads it.
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
    }  # fmt: skip
    assert samples["sequin_slot_retained_bytes", "shop"] == 4096
    assert samples["sequin_consumer_delivered_total", "orders"] == 1
    assert samples["sequin_capture_messages_total", "shop"] == 3
    assert samples["sequin_delivery_seconds_count",] == samples["sequin_consumer_delivery_seconds_count", "orders"] == 1
    assert samples["sequin_delivery_seconds_bucket", "+Inf"] == samples["sequin_consumer_delivery_seconds_bucket", "orders", "+Inf"] == 1
    assert [samples["sequin_consumer_parked", "orders", reason] for reason in ("retry", "blocked", "error", "dead")] == [0, 0, 0, 0]
    assert samples["sequin_consumer_out", "orders"] == 1
    assert samples["sequin_consumer_lag_messages", "orders"] == 2


def test_the_dashboard_asks_for_metrics_that_there_are(client: Client) -> None:
    dashboard = json.loads((settings.BASE_DIR / "docs" / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"] for target in panel["targets"]
        for name in re.findall(r"sequin_\w+", target["expr"])
    }  # fmt: skip
    text = client.get("/metrics").content.decode()
    for name in asked:
        assert f"# TYPE {name} " in text or f"# TYPE {name.removesuffix('_bucket')} histogram" in text, name
