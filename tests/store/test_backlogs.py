"""max_backlog_bytes and what on_full does past it; the consumer that nobody reads is named."""
from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import connection
from django.test import Client

from consumers.models import Consumer
from consumers import changes
from consumers.store import backlogs, claims
from consumers.store.backlogs import enforce
from consumers.store.connection import store_connection
from consumers.store.models import ConsumerPosition
from consumers.store.partitions import maintain
from tests.api.pull_world import Log, make_consumer, make_source

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def log() -> Iterator[Log]:
    with store_connection() as conn:
        maintain(conn, timedelta(microseconds=1))  # a partition's bytes are counted by its ids: it begins here, whatever others have drawn
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
        assert cursor.fetchone() == (dropped,) and dropped > 0
    assert held <= 1_000_000 < before
    assert enforce_now() == []
    assert "were dropped" in health(client, consumer.name)[1][0]
    assert ConsumerPosition.objects.get(consumer=other.pk).position < position.position


@pytest.mark.parametrize("on_full", ["pause", "drop_oldest"])
@pytest.mark.parametrize("edit", [{"on_full": "hold"}, {"max_backlog_bytes": 100_000_000}], ids=lambda edit: str(*edit))
def test_what_is_done_with_a_full_one_is_what_it_says_then(log: Log, monkeypatch: pytest.MonkeyPatch, on_full: str, edit: dict[str, Any]) -> None:
    """The consumer is edited when it has been found to be full, and nothing has been done about it yet."""
    consumer = make_consumer(log.source, max_backlog_bytes=1_000_000, on_full=on_full)
    fill(log)
    before = ConsumerPosition.objects.get(consumer=consumer.pk).position

    def measured(held: int) -> str:
        if not saved:
            saved.append(changes.save(edited))
        return str(held)

    def last_id(conn: Any) -> int:
        measured(0)
        return found(conn)

    saved: list[None] = []
    found = backlogs._last_id
    edited = Consumer.objects.get(pk=consumer.pk)
    for name, value in edit.items():
        setattr(edited, name, value)
    monkeypatch.setattr(backlogs, "readable_bytes", measured)
    monkeypatch.setattr(backlogs, "_last_id", last_id)
    assert len(enforce_now()) == 1 and saved
    assert Consumer.objects.get(pk=consumer.pk).status == "active"
    assert ConsumerPosition.objects.get(consumer=consumer.pk).position == before


def test_what_is_on_its_way_into_the_log_is_not_dropped(log: Log) -> None:
    consumer = make_consumer(log.source, max_backlog_bytes=1_000_000, on_full="drop_oldest")
    log.append([1])
    Consumer.objects.filter(pk=consumer.pk).update(max_backlog_bytes=1)
    with store_connection(autocommit=False) as conn:
        conn.execute(
            "INSERT INTO messages (source, relation, table_oid, action, key, xid, commit_lsn, commit_idx, committed_at, epoch, record, old_values_known)"
            " SELECT source, relation, table_oid, action, '[\"2\"]', xid, commit_lsn, 1, committed_at, epoch, record, old_values_known FROM messages"
        )
        enforce_now()
    assert [message.key for message in claims.claim(consumer.pk, 10, lease_ms=1000).messages] == ['["2"]']


def test_the_log_of_another_source_is_nobodys_backlog(log: Log, client: Client) -> None:
    quiet = Log(make_source("quiet"))
    consumer = make_consumer(quiet.source, max_backlog_bytes=1_000_000, on_full="pause")
    fill(log)
    assert enforce_now() == [] and health(client, consumer.name)[0] == "ok"
    quiet.close()


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
