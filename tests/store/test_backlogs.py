"""max_backlog_bytes and what on_full does past it; the consumer that nobody reads is named."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import connection
from django.test import Client

from consumers.models import Consumer
from consumers.store import claims
from consumers.store.backlogs import enforce
from consumers.store.connection import store_connection
from consumers.store.models import ConsumerPosition
from tests.api.pull_world import Log, make_consumer, make_source

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log(make_source())
    yield made
    made.close()


def fill(log: Log, rows: int = 60_000) -> None:
    for begin in range(0, rows, 10_000):
        log.append(list(range(begin, min(rows, begin + 10_000))))


def enforce_now() -> list[Any]:
    with store_connection() as conn:
        return enforce(conn)


def health(client: Client, name: str) -> tuple[str, list[str]]:
    body = client.get("/health").json()
    (one,) = [consumer for consumer in body["consumers"] if consumer["name"] == name]
    return one["status"], one["reasons"]


def test_hold_keeps_everything_and_says_so(log: Log, client: Client) -> None:
    consumer = make_consumer(log.source, max_backlog_bytes=1_000_000)
    fill(log)
    assert [full.on_full for full in enforce_now()] == ["hold"]
    assert len(claims.claim(consumer.pk, 1000, lease_ms=1000).messages) == 1000
    status, reasons = health(client, consumer.name)
    assert status == "degraded" and "more than max_backlog_bytes" in reasons[0]


def test_pause_pauses_with_its_reason_and_resuming_forgets_it(log: Log, client: Client) -> None:
    consumer = make_consumer(log.source, max_backlog_bytes=1_000_000, on_full="pause")
    fill(log)
    enforce_now()
    status, reasons = health(client, consumer.name)
    assert status == "paused" and "holds back" in reasons[0]
    paused = Consumer.objects.get(pk=consumer.pk)
    paused.status = "active"
    paused.full_clean()
    assert paused.status_reason == ""


def test_drop_oldest_drops_no_more_than_it_must_and_counts(log: Log, client: Client) -> None:
    consumer = make_consumer(log.source, max_backlog_bytes=1_000_000, on_full="drop_oldest")
    other = make_consumer(log.source, name="other")
    fill(log)
    enforce_now()
    position = ConsumerPosition.objects.get(consumer=consumer.pk)
    with connection.cursor() as cursor:
        cursor.execute("SELECT sequin_backlog_bytes(%s), sequin_backlog_bytes(%s)", [position.position, position.position - 3000])
        held, before = cursor.fetchone()
        cursor.execute("SELECT dropped_count FROM consumer_position WHERE consumer = %s", [position.consumer])
        (dropped,) = cursor.fetchone()
        cursor.execute("SELECT count(*) FROM messages WHERE id <= %s", [position.position])
        assert cursor.fetchone() == (dropped,) and dropped > 10_000
    assert held <= 1_000_000 < before
    assert enforce_now() == []
    assert "were dropped" in health(client, consumer.name)[1][0]
    assert ConsumerPosition.objects.get(consumer=other.pk).position < position.position


def test_a_limit_too_small_is_refused(log: Log) -> None:
    with pytest.raises(ValidationError, match="max_backlog_bytes"):
        make_consumer(log.source, max_backlog_bytes=1000)


def test_a_consumer_that_nobody_reads_is_named(log: Log, client: Client) -> None:
    consumer = make_consumer(log.source)
    fill(log, 10)
    assert health(client, consumer.name)[0] == "ok"
    with connection.cursor() as cursor:
        cursor.execute("UPDATE messages SET committed_at = now() - interval '5 days'")
    status, reasons = health(client, consumer.name)
    assert status == "degraded" and "has taken nothing" in reasons[0]
