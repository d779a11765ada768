"""Two edit at the same time: what one of them did not touch is not put back to what it was when that one looked."""
from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import ValidationError

from consumers import changes
from consumers.models import Consumer, HttpEndpoint, Source
from tests.store.world import Log, fetch, take

pytestmark = pytest.mark.django_db(transaction=True)


def edit(consumer: Any, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(consumer, name, value)
    changes.save(consumer)


def read(consumer: Any) -> Consumer:
    return Consumer.objects.get(pk=consumer)


def test_a_pause_that_comes_in_between_stays(log: Log) -> None:
    mine = read(log.consumer())
    Consumer.objects.filter(pk=mine.pk).update(status="paused", status_reason="its endpoint answered 410")
    edit(mine, ack_wait_ms=5000)
    now = read(mine.pk)
    assert (now.status, now.status_reason, now.ack_wait_ms) == ("paused", "its endpoint answered 410", 5000)
    assert mine.status == "paused"


def test_who_resumes_resumes_although_somebody_has_edited_it(log: Log) -> None:
    consumer = log.consumer()
    edit(read(consumer), status="paused")
    mine, other = read(consumer), read(consumer)
    edit(mine, status="active")
    edit(other, ack_wait_ms=5000)
    log.append(log.row(1))
    assert len(take(consumer).messages) == 1


@pytest.mark.parametrize("theirs", ["disabled", "paused"])
def test_the_last_who_sets_the_status_sets_it_and_what_comes_then_counts(log: Log, theirs: str) -> None:
    consumer = log.consumer()
    mine = read(consumer)
    edit(read(consumer), status=theirs)
    log.append(log.row(1))
    mine.status = "paused" if theirs == "disabled" else "disabled"
    changes.save(mine)
    log.append(log.row(2))
    edit(mine, status="active")
    log.append(log.row(3))
    keys = [message.key for message in take(consumer).messages]
    assert keys == (['["2"]', '["3"]'] if theirs == "disabled" else ['["3"]'])


def test_what_was_not_judged_together_is_not_saved_together(log: Log) -> None:
    consumer = log.consumer()
    mine = read(consumer)
    edit(read(consumer), ack_wait_ms=5000)
    with pytest.raises(ValidationError, match="somebody else has changed ack_wait_ms of .* at this moment, and nothing was saved"):
        edit(mine, max_deliver=3)
    assert (read(consumer).max_deliver, read(consumer).ack_wait_ms) == (None, 5000)
    mine.refresh_from_db()
    edit(mine, max_deliver=3)
    edit(mine, max_deliver=4)
    assert (read(consumer).max_deliver, read(consumer).ack_wait_ms) == (4, 5000)


def test_what_is_deleted_in_between_is_not_made_anew(log: Log) -> None:
    mine = read(log.consumer())
    changes.delete(read(mine.pk), discard=True)
    with pytest.raises(ValidationError, match="deleted at this moment"):
        edit(mine, max_deliver=3)
    assert not Consumer.objects.exists() and fetch("SELECT count(*) FROM consumer_position") == [(0,)]


def test_of_endpoints_and_sources_too(log: Log) -> None:
    endpoint = HttpEndpoint(name="e", url="https://example.com/a")
    changes.save(endpoint)
    mine = HttpEndpoint.objects.get()
    edit(HttpEndpoint.objects.get(), url="https://example.com/b")
    with pytest.raises(ValidationError, match="changed url of e"):
        edit(mine, timeout_ms=5000)
    mine, other = Source.objects.get(), Source.objects.get()
    edit(other, port=5433)
    with pytest.raises(ValidationError, match="changed port"):
        edit(mine, database="other")
    assert HttpEndpoint.objects.get().url == "https://example.com/b" and Source.objects.get().port == 5433
