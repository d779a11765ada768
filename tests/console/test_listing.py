"""A consumer's messages as the console lists them: newest first, by state, key, time and text, never the whole log at once."""
from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from consumers.admin import listing
from consumers.admin.listing import Wanted, newest
from consumers.models import Consumer
from consumers.store import claims
from consumers.store.types import Failure
from tests.store.world import Log, receipts, take

pytestmark = pytest.mark.django_db(transaction=True)


def states(consumer: Any, **wanted: Any) -> list[tuple[str, str]]:
    found = newest(Consumer.objects.get(pk=consumer), Wanted(**wanted))
    return [(row.key, row.standing.state) for row in found.rows]


def test_every_state_has_its_word(log: Log) -> None:
    consumer, strict = log.consumer(), log.consumer(max_deliver=1)
    log.append(*[log.row(key) for key in (1, 2, 3)], log.row(3), log.row(4))
    claim = take(consumer, 3)
    claims.ack(consumer, receipts(claim)[:1])
    claims.fail(consumer, [Failure(claim.token, claim.messages[2].id, 60_000, "answered 500", 500)])
    assert states(consumer) == [("4", "waiting"), ("3", "waiting"), ("3", "retry"), ("2", "out"), ("1", "passed")]
    assert [message.key for message in take(consumer, 10).messages] == ['["4"]']  # the second of row 3 is behind the first
    assert states(consumer) == [("4", "out"), ("3", "blocked"), ("3", "retry"), ("2", "out"), ("1", "passed")]
    for state, rows in (
        ("waiting", []), ("parked", [("3", "blocked"), ("3", "retry")]), ("out", [("4", "out"), ("2", "out")]), ("passed", [("1", "passed")]),
        ("dead", []),
    ):  # fmt: skip
        assert states(consumer, state=state) == rows
    third, fourth = claim.messages[2].id, claim.messages[2].id + 1
    assert listing.blocked_by(consumer, fourth) == third and listing.blocked_by(consumer, third) is None
    claim = take(strict, 1)
    claims.fail(strict, [Failure(claim.token, claim.messages[0].id, 1, "answered 400", 400)])
    assert states(strict, state="dead") == [("1", "dead")] and states(strict)[-1] == ("1", "dead")


def test_by_key_text_and_time(log: Log) -> None:
    consumer = log.consumer()
    log.append(*[log.row(key) for key in (1, 2, 12)])
    assert [key for key, _ in states(consumer, key="12")] == ["12"]
    assert [key for key, _ in states(consumer, key='["2"]')] == ["2"]
    assert [key for key, _ in states(consumer, text='"ID":12')] == ["12"]
    assert states(consumer, text="100%") == [] and states(consumer, since=timezone.now() - timedelta(hours=1)) == []


def test_the_search_goes_on_where_it_ended(log: Log, monkeypatch: Any) -> None:
    monkeypatch.setattr(listing, "_LOG_SQL", listing._LOG_SQL.replace(f"LIMIT {listing.SEARCHED_ROWS}", "LIMIT 10"))
    monkeypatch.setattr(listing, "SEARCHED_ROWS", 10)
    consumer = Consumer.objects.get(pk=log.consumer())
    log.append(*[log.row(key) for key in range(25)])
    seen, before = 0, 2**63 - 1
    for _ in range(4):
        page = newest(consumer, Wanted(key="0", before=before))
        seen += len(page.rows)
        if page.older is None:
            break
        assert page.searched_rows == 10
        before = page.older
    assert seen == 1


def test_pages_ask_no_more_of_the_store_with_more_consumers(log: Log) -> None:
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("admin", "", "password"))

    def queries(path: str) -> int:
        client.get(path)
        with CaptureQueriesContext(connection) as captured:
            assert client.get(path).status_code == 200
        return len(captured)

    log.consumer()
    log.append(log.row(1))
    paths = ("/admin/", "/admin/consumers/consumer/", "/metrics")
    few = [queries(path) for path in paths]
    for _ in range(12):
        log.consumer()
    assert [queries(path) for path in paths] == few
