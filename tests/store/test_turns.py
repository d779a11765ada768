"""Turns of push consumers, taken by several pumps at once."""
from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest
from django.db import connection

from consumers import changes
from consumers.models import Consumer, HttpEndpoint
from consumers.store import turns
from tests.store.world import Log, fetch

pytestmark = pytest.mark.django_db(transaction=True)

PUMPS, EACH = 6, 5


def test_pumps_that_look_at_the_same_time_take_all_that_is_free_and_nothing_twice(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN_S", 600.0)
    target = HttpEndpoint(name="there", url="http://127.0.0.1:9")
    changes.save(target)
    for number in range(PUMPS * EACH):
        Consumer.objects.create(name=f"p-{number}", source=log.source, kind="push", endpoint=target)
    together = threading.Barrier(PUMPS)

    def take(_: int) -> list[UUID]:
        try:
            connection.ensure_connection()
            together.wait(30)
            return turns.take(uuid4(), EACH)
        finally:
            connection.close()

    for _ in range(5):
        with ThreadPoolExecutor(PUMPS) as pumps:
            taken = list(pumps.map(take, range(PUMPS)))
        assert [len(some) for some in taken] == [EACH] * PUMPS
        assert len({one for some in taken for one in some}) == PUMPS * EACH
        with connection.cursor() as cursor:
            cursor.execute("DELETE FROM turns")


def test_a_turn_that_lapsed_is_held_on_as_long_as_nobody_took_it(log: Log) -> None:
    target = HttpEndpoint(name="there", url="http://127.0.0.1:9")
    changes.save(target)
    consumer = Consumer.objects.create(name="p", source=log.source, kind="push", endpoint=target)
    slow, other = uuid4(), uuid4()
    assert turns.take(slow, 1) == [consumer.pk]
    fetch("UPDATE turns SET until = clock_timestamp() - interval '1 minute'")
    assert turns.renew(slow) == {consumer.pk: "active"}
    assert turns.take(other, 1) == []
    fetch("UPDATE turns SET until = clock_timestamp() - interval '1 minute'")
    assert turns.take(other, 1) == [consumer.pk]
    assert turns.renew(slow) == {}
