"""A key that is erased stays so, whatever copies messages meanwhile."""
from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from consumers.store import claims, erasure, lifecycle
from consumers.store.connection import store_connection
from consumers.store.locks import SEQUENCE_LOCK
from consumers.store.partitions import maintain
from tests.conftest import wait_until
from tests.store.world import Log, beginning, fetch, receipts, take, waits_for_lock

pytestmark = pytest.mark.django_db(transaction=True)

AT_ONCE = timedelta(microseconds=1)
RECORDS = "SELECT record FROM messages UNION ALL SELECT record FROM kept_messages"


@pytest.fixture
def store() -> Iterator[psycopg.Connection[Any]]:
    with store_connection() as conn:
        yield conn


def erase(log: Log) -> None:
    erasure.erase(log.source.pk, "public.orders", '["1"]')


def parked_in_an_old_partition(log: Log, store: psycopg.Connection[Any]) -> str:
    """One message, in a partition that is measured and that nobody needs any more. Returns the partition's name."""
    consumer, paused = log.consumer(), log.consumer(status="paused")
    log.append(log.row(1))
    claims.nack(consumer, receipts(take(consumer)), 60_000)
    gone = [*maintain(store, AT_ONCE), *maintain(store, AT_ONCE)]  # what earlier tests have left
    [(name,)] = fetch("SELECT partition FROM log_extent WHERE source = %s", log.source.pk)
    assert name not in gone
    lifecycle.drop_consumer(paused)
    return str(name)


def test_what_a_partition_that_goes_leaves_behind_is_erased_too(log: Log, store: psycopg.Connection[Any]) -> None:
    parked_in_an_old_partition(log, store)
    with store_connection(autocommit=False) as holding:
        holding.execute("SELECT FROM log_extent FOR UPDATE")
        going = beginning(lambda: maintain(store, AT_ONCE))
        wait_until(lambda: waits_for_lock("DELETE FROM log_extent%"), 10, "the partition to be copied")
        erasing = beginning(lambda: erase(log))
        wait_until(lambda: not erasing.is_alive() or waits_for_lock("%log_floor FOR SHARE"), 10, "the erasure to end, or to wait")
    going.join(60)
    erasing.join(60)
    assert fetch(RECORDS) == [("{}",)]


def test_a_partition_that_goes_meanwhile_ends_no_erasure(log: Log, store: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name = parked_in_an_old_partition(log, store)
    places = erasure._places

    def then_it_goes(*given: Any) -> list[str]:
        found = places(*given)
        maintain(store, AT_ONCE)
        return found

    monkeypatch.setattr(erasure, "_places", then_it_goes)
    erase(log)
    assert fetch("SELECT to_regclass(%s)", name) == [(None,)]
    assert fetch(RECORDS) == [("{}",)]


def test_a_copy_on_its_way_into_the_log_is_erased_too(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1))
    with store_connection(autocommit=False) as copying:
        ids = [row[0] for row in fetch("SELECT id FROM messages")]
        copying.execute("SELECT sequin_copy(%s, %s, %s, %s, %s)", [consumer, log.source.pk, SEQUENCE_LOCK, ids, uuid4()])
        erasing = beginning(lambda: erase(log))
        wait_until(lambda: not erasing.is_alive() or waits_for_lock("%pg_advisory_xact_lock%"), 10, "the erasure to end, or to wait")
    erasing.join(60)
    assert fetch(RECORDS) == [("{}",), ("{}",)]
