"""The log's partitions: made ahead, cut, and dropped only when nobody needs them."""
from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.db import connection

from consumers.store import claims, lifecycle
from consumers.store.connection import store_connection
from consumers.store.locks import MAINTENANCE_LOCK, PARTITION_LOCK
from consumers.store.partitions import AHEAD_IDS, PARTITION_IDS, maintain
from consumers.store.types import Failure
from tests.store.world import Log, fetch, keys, receipts, take

pytestmark = pytest.mark.django_db(transaction=True)

AT_ONCE = timedelta(microseconds=1)


@pytest.fixture
def store() -> Iterator[psycopg.Connection[Any]]:
    with store_connection() as conn:
        yield conn


def partitions() -> list[str]:
    return [row[0] for row in fetch("SELECT name FROM log_partition ORDER BY from_id")]


def cut(store: psycopg.Connection[Any]) -> list[str]:
    """Let everything so far count as old: the sequence jumps, and the partition is closed."""
    return [*maintain(store, AT_ONCE), *maintain(store, AT_ONCE)]


def test_there_is_always_room_ahead(log: Log, store: psycopg.Connection[Any]) -> None:
    log.append(log.row(1))
    top, last = fetch("SELECT max(to_id), (SELECT last_value FROM messages_id) FROM log_partition")[0]
    assert top - last >= AHEAD_IDS - 1
    with connection.cursor() as cursor:
        cursor.execute("SELECT setval('messages_id', %s)", [top - 5])
    log.append(*[log.row(key) for key in range(20)])
    assert fetch("SELECT max(to_id) FROM log_partition")[0][0] >= top + PARTITION_IDS


def test_an_append_waits_neither_for_maintenance_nor_while_another_makes_partitions(log: Log, store: psycopg.Connection[Any]) -> None:
    log.append(log.row(1))
    top = fetch("SELECT max(to_id) FROM log_partition")[0][0]
    with connection.cursor() as cursor:
        cursor.execute("SELECT setval('messages_id', %s)", [top - AHEAD_IDS + 10])  # something is to be made, and not at once
    with store.transaction():
        for lock in (MAINTENANCE_LOCK, PARTITION_LOCK):
            store.execute("SELECT pg_advisory_xact_lock(%s)", [lock])
        log.appender._conn.execute("SET statement_timeout = '5s'")
        log.append(log.row(2))
        assert fetch("SELECT max(to_id) FROM log_partition")[0][0] == top
    maintain(store, timedelta(days=7))
    assert fetch("SELECT max(to_id) FROM log_partition")[0][0] > top


def test_a_delivered_partition_goes_and_ids_go_on(log: Log, store: psycopg.Connection[Any]) -> None:
    consumer = log.consumer()
    log.append(log.row(1))
    claims.ack(consumer, receipts(take(consumer)))
    before = partitions()
    dropped = cut(store)
    assert dropped and dropped[0] in before and fetch("SELECT count(*) FROM messages") == [(0,)]
    log.append(log.row(2))
    assert keys(take(consumer)) == ['["2"]']
    assert fetch("SELECT id FROM log_floor")[0][0] >= PARTITION_IDS


def test_what_a_consumer_has_still_to_take_stays(log: Log, store: psycopg.Connection[Any]) -> None:
    consumer = log.consumer()
    paused = log.consumer(status="paused")
    log.append(log.row(1))
    claims.ack(consumer, receipts(take(consumer)))
    assert cut(store) == [] and fetch("SELECT count(*) FROM messages") == [(1,)]
    assert lifecycle.waiting(paused) == 1


def test_parked_and_leased_messages_outlive_their_partition(log: Log, store: psycopg.Connection[Any]) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(1), log.row(2))
    claim = take(consumer, 2)
    assert keys(claim) == ['["1"]', '["1"]']
    claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 0, "answered 500", 500)])
    leased = take(consumer, 10)
    claims.nack(consumer, receipts(leased)[:1])
    assert cut(store), "the partition goes"
    again = take(consumer, 10)
    assert keys(again) == ['["1"]', '["1"]'] and again.messages[0].record == claim.messages[0].record
    claims.ack(consumer, [*receipts(again), *receipts(leased)])
    maintain(store, timedelta(days=1))
    assert fetch("SELECT count(*) FROM kept_messages") == [(0,)]


def test_a_log_that_is_not_old_is_left_alone(log: Log, store: psycopg.Connection[Any]) -> None:
    consumer = log.consumer()
    log.append(log.row(1))
    claims.ack(consumer, receipts(take(consumer)))
    before = partitions()
    assert maintain(store, timedelta(days=7)) == [] and partitions() == before
