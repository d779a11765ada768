"""Claims under random use: nothing lost, no group overtaken, nothing out twice, every count right."""
from __future__ import annotations

import random
from collections import defaultdict
from uuid import UUID

import pytest
from django.db import transaction

from consumers.models import Consumer
from consumers.store import claims, lifecycle
from consumers.store.appender import Appender, ProgressMoved
from consumers.store.types import Failure
from tests.store.world import Log, fetch, receipts, unsent, take, keys, parked_count

pytestmark = pytest.mark.django_db(transaction=True)

def test_messages_come_in_log_order_and_once(log: Log) -> None:
    consumer = log.consumer()
    log.append(*[log.row(key) for key in range(5)])
    first, second = take(consumer, 3), take(consumer, 3)
    assert [m.id for m in [*first.messages, *second.messages]] == [row[0] for row in fetch("SELECT id FROM messages ORDER BY id")]
    assert take(consumer).messages == [] and take(consumer).at_end
    assert claims.ack(consumer, receipts(first)) == (3, 0)
    assert claims.ack(consumer, receipts(first)) == (0, 3)


def test_a_group_that_is_out_is_not_overtaken(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1))
    first = take(consumer)
    log.append(log.row(1), log.row(2))
    assert keys(take(consumer)) == ['["2"]']
    claims.ack(consumer, receipts(first))
    assert keys(take(consumer)) == ['["1"]']


def test_at_end_is_said_only_when_nothing_is_left(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2), log.row(3))
    assert [take(consumer, 1).at_end for _ in range(2)] == [False, False]
    take(consumer, 1)
    assert take(consumer, 1).at_end


def test_max_per_group_holds_the_rest_back(log: Log) -> None:
    consumer = log.consumer(max_per_group=1)
    log.append(log.row(1), log.row(1), log.row(2))
    first = take(consumer)
    assert keys(first) == ['["1"]', '["2"]']
    claims.ack(consumer, receipts(first))
    assert keys(take(consumer)) == ['["1"]']


def test_nack_gives_back_the_later_of_its_group_too(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(1), log.row(2))
    first = take(consumer)
    assert claims.nack(consumer, receipts(first)[:1]) == (1, 0)
    again = take(consumer)
    assert keys(again) == ['["1"]', '["1"]'] and again.messages[0].deliver_count == 2
    assert claims.ack(consumer, receipts(first)) == (1, 2), "only the message of group 2 is still out under the first token"


def test_an_ack_after_the_lease_counts_until_the_next_hand_out(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2))
    first = take(consumer, lease_ms=0)
    assert claims.ack(consumer, receipts(first)[:1]) == (1, 0)
    second = take(consumer, lease_ms=100_000)
    assert keys(second) == ['["2"]'] and second.messages[0].deliver_count == 2
    assert claims.ack(consumer, receipts(first)[1:]) == (0, 1)


def test_an_extend_after_the_lease_counts_until_the_next_hand_out(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2), log.row(2))
    first = take(consumer)
    fetch("UPDATE leases SET until = now()")
    assert keys(take(consumer, 1)) == ['["1"]']  # the other two are parked
    assert claims.extend(consumer, receipts(first), 100_000) == (2, 1)
    assert not take(consumer).messages
    assert claims.ack(consumer, receipts(first)) == (2, 1)
    assert parked_count(consumer) == (0, 0)


def test_what_an_edit_leaves_out_of_a_run_is_dropped_and_counted_once(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1))
    first = take(consumer)
    log.append(*[log.row(1, action=b"ID"[n % 2 : n % 2 + 1]) for n in range(10)])
    assert not take(consumer).messages
    Consumer.objects.filter(pk=consumer).update(actions=["insert"])
    claims.ack(consumer, receipts(first))
    for left in (4, 3, 0):
        got = take(consumer, 1 if left else 100)
        assert parked_count(consumer) == (left, left)
        claims.ack(consumer, receipts(got))


def test_while_a_partition_goes_a_message_in_both_places_comes_once(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1))
    first = take(consumer)
    log.append(log.row(1), log.row(1))
    assert not take(consumer).messages
    fetch("INSERT INTO kept_messages SELECT * FROM messages")
    claims.ack(consumer, receipts(first))
    assert len(take(consumer).messages) == 2


def test_a_void_receipt_never_finishes_what_joined_its_message(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(1), log.row(1))
    first = take(consumer)
    claims.give_back(consumer, unsent(receipts(first)))
    take(consumer, 1)
    log.append(log.row(1), log.row(1))
    take(consumer)  # these join the parked run
    assert claims.ack(consumer, receipts(first)) == (0, 3)
    assert parked_count(consumer) == (4, 4)


def test_a_revived_dead_letter_goes_before_what_follows_it_in_either_of_its_groups(log: Log) -> None:
    consumer = log.consumer(max_deliver=1)
    log.append(log.row(2, old_key=1))
    claims.nack(consumer, receipts(take(consumer)))
    Consumer.objects.filter(pk=consumer).update(max_deliver=None)
    log.append(log.row(1))
    claims.nack(consumer, receipts(take(consumer)))
    assert lifecycle.retry(consumer, state="dead") == 1
    revived = take(consumer)
    assert keys(revived) == ['["2"]']
    claims.ack(consumer, receipts(revived))
    assert keys(take(consumer)) == ['["1"]']


@pytest.mark.parametrize("limit", [1, 10])
def test_what_is_given_back_again_and_again_keeps_nobody_from_the_rest(log: Log, limit: int) -> None:
    consumer = log.consumer()
    log.append(*[log.row(key) for key in range(40)])
    done = 0
    for _ in range(500):  # by chance it is one or the other: enough for any chance
        claim = take(consumer, limit)
        bad = [(claim.token, m.id) for m in claim.messages if int(m.key[2:-2]) < 20]
        claims.nack(consumer, bad)
        done += claims.ack(consumer, [receipt for receipt in receipts(claim) if receipt not in bad]).done
        if done == 20:
            return
    pytest.fail(f"{done} of 20 came beside 20 that were always given back")


def test_max_deliver_makes_a_dead_letter_and_frees_the_group(log: Log) -> None:
    consumer = log.consumer(max_deliver=2)
    log.append(log.row(1), log.row(1))
    for _ in range(2):
        claim = take(consumer, 1)
        claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 0, "answered 500", 500)])
    assert lifecycle.backlog(consumer).dead == 1
    assert take(consumer).messages[0].record == '{"id":1,"n":1020}'
    assert lifecycle.retry(consumer, state="dead") == 1 and lifecycle.backlog(consumer).dead == 0


def test_max_ack_pending_limits_what_is_out(log: Log) -> None:
    consumer = log.consumer(max_ack_pending=3)
    log.append(*[log.row(key) for key in range(5)])
    first = take(consumer)
    assert len(first.messages) == 3 and take(consumer).messages == []
    claims.ack(consumer, receipts(first)[:1])
    assert len(take(consumer).messages) == 1


def test_extend_of_a_part_leaves_the_rest_to_expire(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2))
    first = take(consumer, lease_ms=0)
    assert claims.extend(consumer, receipts(first)[:1], 100_000) == (1, 0)
    assert keys(take(consumer)) == ['["2"]']
    assert claims.ack(consumer, receipts(first)[:1]) == (1, 0)


def test_an_update_of_the_key_waits_for_both_groups(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2))
    first = take(consumer)
    log.append(log.row(2, old_key=1), log.row(1), log.row(2))
    assert take(consumer).messages == []
    claims.ack(consumer, receipts(first)[:1])
    assert take(consumer).messages == []
    claims.ack(consumer, receipts(first)[1:])
    moved = take(consumer)
    assert len(moved.messages) >= 1 and moved.messages[0].action == "update"


def test_filters_skip_and_never_stop_the_search(log: Log) -> None:
    consumer = log.consumer(actions=["delete"])
    log.append(*[log.row(key) for key in range(500)])
    log.append(log.row(7, action=b"D"))
    assert [m.action for m in take(consumer).messages] == ["delete"]
    assert log.consumer(tables=["public.customers"]) and take(log.consumer(tables=["other.*"])).at_end


def test_nothing_before_the_start_is_handed_out(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2))
    fetch("UPDATE consumer_position SET start_lsn = %s WHERE consumer = %s", log.lsn, consumer)
    assert keys(take(consumer)) == ['["2"]']


def test_two_appenders_never_both_store(log: Log) -> None:
    before = log.progress
    log.append(log.row(1))
    with Appender(log.source.pk) as other, pytest.raises(ProgressMoved):
        other.append([log.row(2)], before, before._replace(stored_lsn=9_999))
    assert len(fetch("SELECT 1 FROM messages")) == 1


def test_one_reader_holds_the_source(log: Log) -> None:
    assert log.appender.lock_source()
    with Appender(log.source.pk) as other:
        assert not other.lock_source()


def test_disabling_drops_and_enabling_begins_at_the_end(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2))
    take(consumer, 1)
    lifecycle.disable(consumer)
    lifecycle.enable(consumer)
    assert take(consumer).messages == []
    log.append(log.row(3))
    assert keys(take(consumer)) == ['["3"]']


@pytest.mark.parametrize("seed", range(8))
def test_random_use_loses_nothing_and_keeps_order(log: Log, seed: int) -> None:
    """Receive, ack, nack, fail, extend, expire, undo at random, against what must always hold."""
    chance = random.Random(seed)
    two_groups, key_count = chance.choice([0, 0, 0.2]), chance.choice([3, 20, 1000])
    consumer = log.consumer(max_per_group=chance.choice([None, None, 1, 3]), max_ack_pending=chance.choice([50, 10_000]))
    done: set[int] = set()
    out: dict[int, UUID] = {}
    members: dict[int, list[int]] = defaultdict(list)  # group → message ids, in log order

    def leased() -> set[tuple[UUID, int]]:
        return set(fetch("SELECT token, unnest(ids) FROM leases WHERE consumer = %s", consumer))  # type: ignore[arg-type]

    def forget_lost() -> None:
        still = leased()
        for message in [m for m, held in out.items() if (held, m) not in still]:
            del out[message]

    def check_counts() -> None:
        counted = fetch("SELECT out_count, parked_count, dead_count FROM consumer_standing WHERE consumer = %s", consumer)[0]
        real = fetch(
            "SELECT (SELECT coalesce(sum(cardinality(ids)), 0) FROM leases WHERE consumer = %s),"
            " (SELECT coalesce(sum(cardinality(ids)), 0) FROM parked WHERE consumer = %s AND reason <> 'dead'),"
            " (SELECT count(*) FROM parked WHERE consumer = %s AND reason = 'dead')", consumer, consumer, consumer,
        )[0]  # fmt: skip
        assert tuple(map(int, counted)) == tuple(map(int, real))

    def receive(limit: int, lease_ms: int) -> None:
        claim = take(consumer, limit, lease_ms)
        forget_lost()
        batch = [m.id for m in claim.messages]
        assert batch == sorted(batch)
        for message in claim.messages:
            assert message.id not in done and message.id not in out
            for group in {message.group, message.group2} - {None}:
                earlier = [m for m in members[group] if m < message.id]  # type: ignore[index]
                assert all(m in done or m in batch for m in earlier), "a group was overtaken"
            out[message.id] = claim.token

    def append() -> None:
        count = chance.randrange(1, 40)
        rows = [log.row(chance.randrange(key_count), chance.randrange(key_count) if chance.random() < two_groups else None) for _ in range(count)]
        log.append(*rows)
        for group, old, message in fetch(
            "SELECT hashtextextended(key, table_oid), hashtextextended(old_key, table_oid), id FROM messages ORDER BY id DESC LIMIT %s", count
        )[::-1]:
            for one in {group, old} - {None}:
                members[one].append(message)

    for _ in range(120):
        dice = chance.random()
        if dice < 0.2 or not members:
            append()
        elif dice < 0.55:
            receive(chance.choice([1, 3, 20, 100]), chance.choice([100_000, 100_000, 1]))
        elif out:
            chosen = chance.sample(sorted(out), min(len(out), chance.choice([1, 2, 10, 500])))
            named = [(out[m], m) for m in chosen]
            what = chance.random()
            if what < 0.6:
                assert claims.ack(consumer, named).done == len(chosen)
                done.update(chosen)
            elif what < 0.75:
                claims.nack(consumer, named, chance.choice([0, 0, 5]))
            elif what < 0.85:
                claims.fail(consumer, [Failure(held, m, 1, "answered 500", 500) for held, m in named])
            elif what < 0.92:
                claims.extend(consumer, named, chance.choice([1, 100_000]))
            else:
                claims.give_back(consumer, unsent(named))
            forget_lost()
        check_counts()
    fetch("UPDATE leases SET until = now() WHERE consumer = %s", consumer)
    out.clear()
    for _ in range(5_000):
        claim = take(consumer)
        if claim.messages:
            assert claims.ack(consumer, receipts(claim)).done == len(claim.messages)
            done.update(m.id for m in claim.messages)
        elif claim.at_end and claim.next_due_ms is None:
            break
    check_counts()
    assert done == {row[0] for row in fetch("SELECT id FROM messages")}


@pytest.mark.parametrize("looked_at_meanwhile", [False, True])
def test_a_stream_of_rows_skips_what_waits_for_what_the_log_has_newer(log: Log, looked_at_meanwhile: bool) -> None:
    consumer = log.consumer(stream="rows")
    for key in range(12):  # whether the log or the parked ones are looked at first is chance
        log.append(log.row(key))
        first = take(consumer)
        if looked_at_meanwhile:
            log.append(log.row(key))
            assert take(consumer).messages == []
        log.append(log.row(key))
        claims.nack(consumer, receipts(first))
        second = take(consumer)
        assert [m.id for m in second.messages] == [fetch("SELECT max(id) FROM messages")[0][0]]
        assert claims.ack(consumer, receipts(second)) == (1, 0)
        assert take(consumer).messages == [] and parked_count(consumer) == (0, 0)


def test_claims_and_acks_go_on_after_psycopg_has_deallocated_what_was_prepared(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1))
    claims.nack(consumer, receipts(take(consumer)))  # by a cursor, which prepares too
    with pytest.raises(RuntimeError), transaction.atomic():
        fetch("SELECT 1")
        raise RuntimeError
    assert fetch("SELECT name FROM pg_prepared_statements WHERE name LIKE 'sequin%%'") == []
    claim = take(consumer)
    assert claims.ack(consumer, receipts(claim)) == (1, 0)
