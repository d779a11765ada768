"""One claim hands out no more than fits into an answer; what does not fit keeps its place."""
from __future__ import annotations

from typing import Any

import pytest

from consumers.models import Consumer
from consumers.store import claims
from consumers.store.lifecycle import backlog
from tests.store.world import Log, keys, receipts, take

pytestmark = pytest.mark.django_db(transaction=True)

MB = 1024 * 1024


def large(log: Log, key: int, size: int) -> Any:
    return log.row(key)._replace(record=b'{"id":%d,"big":"%b"}' % (key, b"x" * size))


def test_large_messages_come_a_few_at_a_time_in_order(log: Log) -> None:
    consumer = log.consumer()
    log.append(*[large(log, key % 2, 5 * MB) for key in range(8)], log.row(9))
    seen: list[int] = []
    for expected in (3, 3, 3):
        claim = claims.claim(consumer, 1000, lease_ms=60_000)
        assert claim.token is not None
        assert len(claim.messages) == expected and {message.deliver_count for message in claim.messages} == {1}
        seen += [message.id for message in claim.messages]
        claims.ack(consumer, [(claim.token, message.id) for message in claim.messages])
    assert seen == sorted(seen) and len(seen) == 9
    assert backlog(consumer).undelivered == 0


def test_one_message_larger_than_the_limit_comes_alone(log: Log) -> None:
    consumer = log.consumer()
    log.append(large(log, 1, 20 * MB), log.row(2))
    first, second = claims.claim(consumer, 10, lease_ms=60_000), claims.claim(consumer, 10, lease_ms=60_000)
    assert [len(claim.messages) for claim in (first, second)] == [1, 1]
    assert first.messages[0].id < second.messages[0].id


def test_what_kept_its_place_and_is_left_out_since_hides_nothing_behind_it(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = log.consumer(actions=["insert", "update"])
    log.append(log.row(1), log.row(2, action=b"U"), log.row(3))
    with monkeypatch.context() as patch:
        patch.setattr(claims, "MAX_CLAIM_BYTES", 1)
        first = take(consumer)
    assert keys(first) == ['["1"]']
    claims.ack(consumer, receipts(first))
    Consumer.objects.filter(pk=consumer).update(actions=["insert"])
    claim = take(consumer, 1)
    if claim.token is None:
        assert not claim.at_end, "there is one to be had"
        claim = take(consumer, 1)
    assert keys(claim) == ['["3"]']
