"""Rewinds: what is out, parked and dead is delivered once more and not twice, and a point that has gone is refused."""
from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from django.db import connection

from consumers.models import Consumer
from consumers.envelope import addressing, render
from consumers.store import claims, lifecycle, rewinds
from consumers.store.connection import store_connection
from consumers.store.partitions import maintain
from consumers.store.rewinds import OutOfReach
from consumers.store.types import Failure
from tests.conftest import wait_until
from tests.store.world import Log, fetch, keys, receipts, take, waits_for_lock

pytestmark = pytest.mark.django_db(transaction=True)

AT_ONCE = timedelta(microseconds=1)


def append(log: Log, *row_keys: int) -> list[int]:
    """Append an insert for each key, and return the ids."""
    log.append(*[log.row(key) for key in row_keys])
    return [row[0] for row in fetch("SELECT id FROM messages WHERE source = %s ORDER BY id", log.source.pk)][-len(row_keys) :]


def counts(consumer: UUID) -> tuple[int, int, int]:
    return fetch("SELECT out_count, parked_count, dead_count FROM consumer_standing WHERE consumer = %s", consumer)[0]  # type: ignore[return-value]


def rewind(log: Log, consumer: UUID, position: int) -> rewinds.Rewound:
    return rewinds.rewind(consumer, log.source.pk, position)


def test_everything_from_the_point_on_comes_again_in_order(log: Log) -> None:
    consumer = log.consumer()
    ids = append(log, 1, 2, 3, 4)
    claims.ack(consumer, receipts(take(consumer)))
    done = rewind(log, consumer, ids[1] - 1)
    assert (done.position, done.messages_estimate) == (ids[1] - 1, 3) and done.first_commit_timestamp is not None
    again = take(consumer)
    assert keys(again) == ['["2"]', '["3"]', '["4"]'] and [m.deliver_count for m in again.messages] == [1, 1, 1]


def test_replayed_messages_say_so_and_new_ones_do_not(log: Log) -> None:
    consumer = log.consumer()
    ids = append(log, 1, 2)
    first = take(consumer)
    claims.ack(consumer, receipts(first))
    assert [m.replay_id for m in first.messages] == [None, None]
    done = rewind(log, consumer, ids[1] - 1)
    append(log, 3)
    again = take(consumer)
    assert [m.replay_id for m in again.messages] == [done.replay_id, None]
    claims.nack(consumer, receipts(again))
    after = take(consumer)
    assert [m.replay_id for m in after.messages] == [done.replay_id, None], "also when it is retried"
    to = addressing(consumer_id=consumer, consumer_name="c", source_id=log.source.pk, source_name="s", database="d")
    body = render(after.messages[0], to).decode()
    assert f'"replay_id":"{done.replay_id}"' in body
    key = body.split('"idempotency_key":"')[1].split('"')[0]
    assert key in render(first.messages[1], to).decode(), "the key stays the same"


def test_what_is_out_and_parked_comes_once_more(log: Log) -> None:
    consumer = log.consumer(max_deliver=2)
    ids = append(log, 1, 2, 3, 4, 5)
    claim = take(consumer)
    for _ in range(2):  # the fourth dies
        claims.nack(consumer, [(claim.token, ids[3])])
        dead = take(consumer)
        claim = claim if not dead.messages else claim._replace(token=dead.token)
    claims.fail(consumer, [Failure(take_token, ids[0], 10_000_000, "no", 500) for take_token in [fetch("SELECT token FROM leases")[0][0]]])
    assert counts(consumer) == (3, 1, 1)
    done = rewind(log, consumer, ids[2] - 1)
    assert done.replay_id is not None and counts(consumer)[0] == 0
    again = take(consumer)
    assert keys(again) == ['["2"]', '["3"]', '["4"]', '["5"]'], "the first waits for its retry still"
    assert [m.deliver_count for m in again.messages] == [2, 1, 1, 1]
    assert counts(consumer) == (4, 1, 0)


def test_receipts_from_before_the_rewind_are_stale(log: Log) -> None:
    consumer = log.consumer()
    ids = append(log, 1, 2, 3)
    expired = take(consumer)
    fetch("UPDATE leases SET until = clock_timestamp() - interval '1 s' WHERE consumer = %s", consumer)
    claim = take(consumer, 1)  # the first again; the second is parked, and a late ack would count
    rewind(log, consumer, ids[2] - 1)
    assert claims.ack(consumer, [*receipts(claim), *receipts(expired)]) == (0, 4)
    assert keys(take(consumer)) == ['["1"]', '["2"]', '["3"]']


def test_a_run_of_a_blocked_group_is_cut_at_the_point(log: Log) -> None:
    consumer = log.consumer()
    first = append(log, 1)
    claim = take(consumer)
    ids = append(log, 1, 1, 1, 2)
    claims.ack(consumer, receipts(take(consumer)))
    assert counts(consumer) == (1, 3, 0)
    rewind(log, consumer, ids[1] - 1)
    assert counts(consumer) == (0, 2, 0)
    claims.ack(consumer, receipts(claim))
    again = take(consumer)
    assert [m.id for m in again.messages] == [*first, *ids] and counts(consumer) == (5, 0, 0)


def test_a_point_ahead_of_the_position_skips_nothing(log: Log) -> None:
    consumer = log.consumer()
    ids = append(log, 1, 2, 3)
    claim = take(consumer, 1)
    done = rewind(log, consumer, ids[2] - 1)
    assert done.replay_id is None and done.position == ids[0]
    assert claims.ack(consumer, receipts(claim)) == (1, 0) and keys(take(consumer)) == ['["2"]', '["3"]']


def test_a_consumer_may_go_back_beyond_its_beginning(log: Log) -> None:
    early = append(log, 1, 2)
    consumer = log.consumer()
    fetch("UPDATE consumer_position SET start_lsn = 999999 WHERE consumer = %s", consumer)
    rewind(log, consumer, early[1] - 1)
    assert keys(take(consumer)) == ['["2"]']


def test_points_are_found(log: Log) -> None:
    consumer, source = log.consumer(), log.source.pk
    ids = append(log, 1, 2, 1, 3)
    for number, id_ in enumerate(ids):
        fetch("UPDATE messages SET committed_at = timestamptz '2026-01-01 00:00Z' + %s * interval '1 h' WHERE id = %s", [0, 2, 1, 3][number], id_)
    at = lambda hours: fetch("SELECT timestamptz '2026-01-01 00:00Z' + %s * interval '1 h'", hours)[0][0]  # noqa: E731
    fetch("UPDATE consumers_source SET created_at = '2025-12-01Z' WHERE id = %s", source)
    assert rewinds.before_row(consumer, source, "public.orders", ["1"]) == ids[0] - 1
    assert rewinds.before_row(consumer, source, "public.orders", ["1"], last=True) == ids[2] - 1
    with pytest.raises(OutOfReach, match="no message of the row"):
        rewinds.before_row(consumer, source, "public.orders", ["4"])
    with pytest.raises(OutOfReach):
        rewinds.before_row(consumer, source, "public.customers", ["1"])
    assert rewinds.before_time(consumer, source, at(0)) == ids[0] - 1, "the time itself is included"
    assert rewinds.before_time(consumer, source, at(1)) == ids[1] - 1, "commit times are not in order: none is left out"
    assert rewinds.before_time(consumer, source, at(3)) == ids[3] - 1
    assert rewinds.before_time(consumer, source, at(4)) == ids[3], "nothing since then"
    with pytest.raises(OutOfReach) as refused:
        rewinds.before_time(consumer, source, at(-24 * 365))
    assert refused.value.oldest is not None and refused.value.oldest.id == ids[0]
    lsns = [row[0] for row in fetch("SELECT ('0/0'::pg_lsn + commit_lsn)::text FROM messages WHERE source = %s ORDER BY id", source)]
    assert [rewinds.before_lsn(consumer, source, lsn) for lsn in lsns] == [id_ - 1 for id_ in ids]
    assert rewinds.before_lsn(consumer, source, "FF/0") == ids[3]
    with pytest.raises(OutOfReach):
        rewinds.before_lsn(consumer, source, "0/1")
    assert rewinds.beginning() < ids[0]


def test_a_partition_that_was_dropped_is_out_of_reach(log: Log) -> None:
    consumer, source = log.consumer(), log.source.pk
    old = append(log, 1)
    claims.ack(consumer, receipts(take(consumer)))
    with store_connection() as conn:
        assert [*maintain(conn, AT_ONCE), *maintain(conn, AT_ONCE)]
    new = append(log, 2)
    claims.ack(consumer, receipts(take(consumer)))
    moment, lsn = fetch("SELECT committed_at - interval '1 ms', ('0/0'::pg_lsn + commit_lsn - 15)::text FROM messages WHERE id = %s", new[0])[0]
    fetch("UPDATE consumers_source SET created_at = '1990-01-01Z' WHERE id = %s", source)
    fetch("UPDATE log_lost SET committed_at = %s - interval '1 hour' WHERE source = %s", moment, source)
    assert rewinds.before_time(consumer, source, moment) == new[0] - 1, "only what was dropped is out of reach"
    with pytest.raises(OutOfReach) as refused:
        rewinds.before_time(consumer, source, moment - timedelta(hours=1))
    assert refused.value.oldest is not None and refused.value.oldest.id == new[0]
    with pytest.raises(OutOfReach):
        rewinds.before_lsn(consumer, source, lsn)
    with pytest.raises(OutOfReach):
        rewinds.before_row(consumer, source, "public.orders", ["1"])
    with pytest.raises(OutOfReach):
        rewind(log, consumer, old[0] - 1)
    rewind(log, consumer, rewinds.beginning())
    assert keys(take(consumer)) == ['["2"]']


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("by", ["time", "lsn"])
def test_a_point_whose_partition_goes_while_it_is_looked_for_is_out_of_reach(log: Log, monkeypatch: pytest.MonkeyPatch, by: str, number: int) -> None:
    """Whichever question the partition goes behind; the next message is there then, and would do for an answer."""
    consumer, source = log.consumer(), log.source.pk
    [old] = append(log, 1)
    claims.ack(consumer, receipts(take(consumer)))
    fetch("UPDATE consumers_source SET created_at = '1990-01-01Z' WHERE id = %s", source)
    moment, lsn = fetch("SELECT committed_at, ('0/0'::pg_lsn + commit_lsn)::text FROM messages WHERE id = %s", old)[0]
    ask, asked = rewinds._fetch, 0

    def going(query: str, parameters: Any) -> list[tuple[Any, ...]]:
        nonlocal asked
        found, asked = ask(query, parameters), asked + 1
        if asked == number:
            with store_connection() as conn:
                assert [*maintain(conn, AT_ONCE), *maintain(conn, AT_ONCE)]
            new = append(log, 2)
            fetch("UPDATE messages SET committed_at = committed_at + interval '1 h' WHERE id = %s", new[0])
            claims.ack(consumer, receipts(take(consumer)))
        return found

    monkeypatch.setattr(rewinds, "_fetch", going)
    with pytest.raises(OutOfReach):
        rewind(log, consumer, rewinds.before_time(consumer, source, moment) if by == "time" else rewinds.before_lsn(consumer, source, lsn))
    assert asked >= number


def test_measured_partitions_are_searched_only_when_they_may_hold_the_point(log: Log) -> None:
    consumer, source = log.consumer(), log.source.pk
    paused = log.consumer(status="paused")
    first = append(log, 1)
    with store_connection() as conn:
        maintain(conn, AT_ONCE)
        maintain(conn, AT_ONCE)
    second = append(log, 2)
    assert fetch("SELECT count(*) FROM log_extent WHERE source = %s", source) == [(1,)], "the first partition is closed"
    [early], [late] = (fetch("SELECT committed_at FROM messages WHERE id = %s", ids[0]) for ids in (first, second))
    fetch("UPDATE messages SET committed_at = committed_at + interval '1 h' WHERE id = %s", second[0])
    assert rewinds.before_time(consumer, source, early[0]) == first[0] - 1
    assert rewinds.before_time(consumer, source, late[0] + timedelta(minutes=30)) == second[0] - 1
    assert lifecycle.waiting(paused) == 2


def test_a_partition_is_not_dropped_under_a_rewind(log: Log) -> None:
    """The dropper saw that nobody needs it; the rewind has not committed yet. Whoever comes second sees the first."""
    consumer = log.consumer()
    ids = append(log, 1, 2)
    claims.ack(consumer, receipts(take(consumer)))
    [(partition,)] = fetch("SELECT name FROM log_partition WHERE from_id <= %s AND to_id > %s", ids[0], ids[0])
    dropped: list[list[str]] = []
    with store_connection() as conn, store_connection() as other:
        thread = threading.Thread(target=lambda: dropped.append(maintain(conn, AT_ONCE)))
        with other.transaction():
            other.execute("SELECT sequin_rewind(%s, %s, gen_random_uuid())", [consumer, ids[0] - 1])
            thread.start()
            wait_until(lambda: waits_for_lock("UPDATE log_floor%"))
        thread.join(60)
    assert dropped and partition not in dropped[0] and keys(take(consumer)) == ['["1"]', '["2"]']


def test_a_rewind_is_refused_while_its_partition_goes(log: Log) -> None:
    consumer = log.consumer()
    ids = append(log, 1, 2)
    claims.ack(consumer, receipts(take(consumer)))
    refused: list[OutOfReach] = []

    def back() -> None:
        try:
            rewind(log, consumer, ids[0] - 1)
        except OutOfReach as error:
            refused.append(error)
        finally:
            connection.close()

    thread = threading.Thread(target=back)
    with store_connection() as conn:
        with conn.transaction():
            conn.execute("UPDATE log_floor SET id = %s", [ids[1] + 1])
            thread.start()
            wait_until(lambda: waits_for_lock("%sequin_rewind%"))
        thread.join(60)
    assert refused and lifecycle.waiting(consumer) == 0


def test_a_point_in_an_earlier_history_brings_all_of_the_later_one_too(log: Log) -> None:
    """The consumer began in the middle of the second history."""
    append(log, 1)
    log.progress = log.progress._replace(epoch=2, system_identifier="2")
    log.appender.begin_history(log.progress)
    append(log, 2)
    consumer = Consumer.objects.create(name="c", source=log.source, kind="pull")
    lifecycle.create_position(consumer.pk, log.source.pk, log.lsn + 1)
    append(log, 3)
    claims.ack(consumer.pk, receipts(take(consumer.pk)))
    rewind(log, consumer.pk, rewinds.beginning())
    assert keys(take(consumer.pk)) == ['["1"]', '["2"]', '["3"]']
