"""The engine under receivers, watchers and editors that all run at once, on leases short enough to end in their hands.

What is checked holds whatever the timing: while a receiver holds a message, nothing earlier of its key is out elsewhere or
parked; an ack that counted was the only one; and in the end everything was acked.
"""
from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg
import pytest
from django.core.exceptions import ValidationError
from django.db import DatabaseError, connection, transaction
from django.utils import timezone

from consumers import changes
from consumers.backfill_rules import Beginning
from consumers.models import Consumer
from consumers.store import claims, hot, lifecycle
from consumers.store.connection import store_connection
from consumers.store.shapes import register_relation
from consumers.store.types import Failure
from tests.conftest import wait_until
from tests.store.world import SHAPE, Log, beginning, fetch, parked_count, unsent, waits_for_lock  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

RECEIVERS, KEYS, ROWS = 5, 30, 500

# While $1 (a token) holds $2 (a message): what of the same key is earlier and neither finished nor under the same token.
OVERTAKEN_SQL = """
    SELECT e.id FROM messages m JOIN messages e ON e.key = m.key AND e.id < m.id
    WHERE m.id = %(id)s AND EXISTS (SELECT FROM leases WHERE token = %(token)s AND %(id)s = ANY (ids))
      AND (EXISTS (SELECT FROM leases l WHERE e.id = ANY (l.ids) AND l.token <> %(token)s)
           OR EXISTS (SELECT FROM parked p WHERE e.id = ANY (p.ids)))
"""


class Threads:
    """Run until stopped; the first error of any of them is raised at the end."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def go(self, step: Callable[[random.Random], Any]) -> None:
        def run(seed: int) -> None:
            chance = random.Random(seed)
            try:
                while not self.stopping.is_set():
                    step(chance)
            except BaseException as error:  # noqa: BLE001  (shown by `finish`)
                self.errors.append(error)
            finally:
                connection.close()

        thread = threading.Thread(target=run, args=(len(self._threads),))
        self._threads.append(thread)
        thread.start()

    def finish(self) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join(120)
        if self.errors:
            raise self.errors[0]


@pytest.mark.parametrize("acked", [0, 1000], ids=["timed acks", "acks that wait for nobody"])
def test_receivers_editors_and_watchers_at_once(log: Log, monkeypatch: pytest.MonkeyPatch, acked: int) -> None:  # noqa: F811
    monkeypatch.setattr(hot, "DEAD_SHARE", 0)
    consumer = log.consumer(acked, max_ack_pending=40, tables=["public.orders"])
    threads = Threads()
    acks: Counter[int] = Counter()
    lock = threading.Lock()
    unclear: set[int] = set()

    def ack(token: UUID, id_: int) -> None:
        if claims.ack(consumer, [(token, id_)]).done:
            with lock:
                acks[id_] += 1

    def receive(chance: random.Random) -> None:
        claim = claims.claim(consumer, chance.choice([1, 3, 10]), lease_ms=chance.choice([5, 30, 300]))
        if claim.token is None:
            threads.stopping.wait(0.002)
            return
        named = [(claim.token, message.id) for message in claim.messages]
        with connection.cursor() as cursor:
            cursor.execute(OVERTAKEN_SQL, {"token": claim.token, "id": chance.choice(claim.messages).id})
            assert not cursor.fetchall(), "a key was overtaken"
        if chance.random() < 0.1:
            threads.stopping.wait(chance.choice([0.004, 0.01, 0.05]))  # longer than some leases: the ack comes late
        what = chance.random()
        if what < 0.06:
            claims.nack(consumer, named, chance.choice([0, 0, 5]))
        elif what < 0.12:
            claims.fail(consumer, [Failure(token, id_, 1, "answered 500", 500) for token, id_ in named])
        elif what < 0.18:
            claims.give_back(consumer, unsent(named))
        elif what < 0.24:
            claims.extend(consumer, named, chance.choice([200, 1]))
        elif what < 0.3:
            pass  # a receiver that died: its lease ends
        elif what < 0.65:
            done = claims.ack(consumer, named).done
            if done == len(named):
                with lock:
                    acks.update(id_ for _, id_ in named)
            else:
                # Too late for some: those come again, and which they are is known from what is left.
                with lock:
                    unclear.update(id_ for _, id_ in named)
        else:
            if what < 0.8:
                chance.shuffle(named)
                named = named[: max(1, len(named) // 2)]
            for token, id_ in named:  # one at a time: whether that one counted is known for certain
                ack(token, id_)

    def edit(chance: random.Random) -> None:
        Consumer.objects.filter(pk=consumer).update(
            status=chance.choice(["active"] * 4 + ["paused"]), max_ack_pending=chance.choice([2, 40, 400]), max_per_group=chance.choice([None, 1, 2])
        )  # fmt: skip
        if not acked:  # else what is parked has to become due by itself
            lifecycle.retry(consumer, state="parked")
        lifecycle.backlog(consumer)
        with store_connection() as conn, suppress(psycopg.errors.LockNotAvailable):
            hot.rewrite(conn, dict.fromkeys(hot.GROUPS[0], 0))
        claims.renew([row[0] for row in fetch("SELECT token FROM leases WHERE consumer = %s LIMIT 1", consumer)], 50)
        threads.stopping.wait(0.02)

    appended = 0
    for _ in range(RECEIVERS):
        threads.go(receive)
    threads.go(edit)
    chance = random.Random(99)
    try:
        while appended < ROWS and not threads.errors:
            count = chance.randrange(1, 60)
            log.alter()
            log.append(*[log.row(chance.randrange(KEYS)) for _ in range(count)])
            appended += count
            threads.stopping.wait(0.005)
        wait_until(lambda: threads.errors or len(acks) > appended // 2, 60, "half of it to be acked")
    finally:
        threads.finish()
    _work_off(consumer, ack)
    everything = [row[0] for row in fetch("SELECT id FROM messages ORDER BY id")]
    assert {*acks} | unclear == {*everything}, "every message was acked"
    assert {count for id_, count in acks.items() if id_ not in unclear} == {1}, "no ack counted twice"
    assert parked_count(consumer) == (0, 0)
    assert fetch("SELECT out_count, acked_count FROM consumer_standing WHERE consumer = %s", consumer)[0] == (0, acked + len(everything))


def test_an_ack_waits_for_no_claim_and_frees_what_was_parked_behind_it_meanwhile(log: Log) -> None:  # noqa: F811
    """Three moments of a claim: before it looks at what is out, while it holds that, and when it has ended."""
    consumer = log.consumer(acked=1000)
    log.append(log.row(1), log.row(2), log.row(1), log.row(3))
    first = claims.claim(consumer, 1, lease_ms=60_000)
    second = claims.claim(consumer, 1, lease_ms=60_000)
    settled: list[Any] = []

    def settle() -> None:
        settled.append(ack_without_timing(consumer, first))

    with store_connection(autocommit=False) as conn:
        conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [str(consumer)])
        assert ack_without_timing(consumer, second) == (1, 0), "a claim is under way, and the ack is done"
        claimed = conn.execute("SELECT id FROM sequin_claim(%s, 1, 60000, NULL, 100, 1000000)", [consumer]).fetchall()
        assert [row[0] for row in claimed] == [first.messages[0].id + 3], "the second of key 1 is parked behind the first"
        acking = beginning(settle)
        wait_until(lambda: waits_for_lock("%sequin_ack%"), 10, "the ack to wait")
    acking.join(60)
    assert settled == [(1, 0)]
    assert [message.id for message in claims.claim(consumer, 10, lease_ms=60_000).messages] == [first.messages[0].id + 2]


def ack_without_timing(consumer: UUID, claim: Any) -> Any:
    """Whether an ack is timed is left to chance, and such a one waits: this one is not."""
    fetch("SELECT setseed(0.5)")
    assert fetch("SELECT random() >= 0.0625")[0][0]
    fetch("SELECT setseed(0.5)")
    return claims.ack(consumer, [(claim.token, message.id) for message in claim.messages])


def test_group_columns_are_not_changed_behind_a_claim(log: Log) -> None:  # noqa: F811
    """The edit finds nothing out, and a claim is faster than its saving."""
    consumer = log.consumer()
    log.append(log.row(1))
    errors: list[Exception] = []
    edited = Consumer.objects.get(pk=consumer)
    edited.group_columns = ["n"]

    def save() -> None:
        try:
            changes.save(edited)
        except ValidationError as error:
            errors.append(error)

    with store_connection(autocommit=False) as conn:
        conn.execute("SELECT * FROM sequin_claim(%s, 1, 60000, NULL, 100, 1000000)", [consumer])
        saver = beginning(save)
        wait_until(lambda: waits_for_lock("%pg_advisory_xact_lock%"), 10, "the edit to wait")
    saver.join(60)
    assert len(errors) == 1 and "1 are out" in str(errors[0])
    assert Consumer.objects.get(pk=consumer).group_columns == []


@pytest.mark.parametrize("edit", [{"group_columns": ["n"]}, {"status": "disabled"}, {"transform": "function transform() return nil end"}], ids=lambda edit: str(*edit))
def test_a_claim_that_waited_for_an_edit_goes_by_it(log: Log, edit: dict[str, Any]) -> None:  # noqa: F811
    consumer = log.consumer()
    log.append(log.row(1))
    claimed: list[Any] = []
    edited = Consumer.objects.get(pk=consumer)
    for name, value in edit.items():
        setattr(edited, name, value)
    with transaction.atomic():
        changes.save(edited)
        claiming = beginning(lambda: claimed.append(claims.claim(consumer, 1, lease_ms=60_000)))
        wait_until(lambda: fetch("SELECT 1 FROM pg_locks WHERE NOT granted"), 10, "the claim to wait")
    claiming.join(60)
    assert claimed[0].version == Consumer.objects.get(pk=consumer).updated_at


@pytest.mark.parametrize("acked", [0, 1], ids=["one is out", "one is parked"])
def test_a_tables_first_message_comes_while_a_claim_is_under_way(log: Log, acked: int) -> None:  # noqa: F811
    """The claim has read its configuration, and waits for what is out, when a shape that nobody knew yet arrives."""
    consumer = log.consumer(tables=["public.orders"], max_ack_pending=3)
    log.append(log.row(1), log.row(2))
    first = claims.claim(consumer, 2, lease_ms=60_000)
    if acked:
        claims.nack(consumer, [(first.token, first.messages[1].id)], 60_000)
    claimed: list[Any] = []
    with store_connection(autocommit=False) as conn:
        conn.execute("SELECT FROM leases WHERE consumer = %s FOR UPDATE", [consumer])
        claiming = beginning(lambda: claimed.append(claims.claim(consumer, 2, lease_ms=60_000)))
        wait_until(lambda: waits_for_lock("%sequin_claim%"), 10, "the claim to wait")
        log.alter()
        log.append(log.row(3))
    claiming.join(60)
    assert [message.key for message in claimed[0].messages] == ['["3"]']


@pytest.mark.parametrize("edit", [{"actions": ["insert", "delete"]}, {"tables": []}], ids=lambda edit: str(*edit))
def test_what_comes_after_an_edit_is_taken_by_it_although_a_claim_is_under_way(
    log: Log, monkeypatch: pytest.MonkeyPatch, edit: dict[str, Any]  # noqa: F811
) -> None:
    """The claim has read its configuration, and waits for what is out, when somebody asks for more."""
    monkeypatch.setattr(changes, "publish_tables", lambda source, tables: None)
    consumer = log.consumer(tables=["public.others"], actions=["insert"], max_ack_pending=3)
    orders = log.relation
    log.relation = log.appender.register_relation(1, SHAPE._replace(table="others"))
    log.append(log.row(1), log.row(2))
    claims.claim(consumer, 2, lease_ms=60_000)
    claimed: list[Any] = []
    edited = Consumer.objects.get(pk=consumer)
    for name, value in edit.items():
        setattr(edited, name, value)

    def save() -> None:
        changes.save(edited)
        if "tables" in edit:
            log.relation = orders
        log.append(log.row(3, action=b"D" if "actions" in edit else b"I"))

    with store_connection(autocommit=False) as conn:
        conn.execute("SELECT FROM leases WHERE consumer = %s FOR UPDATE", [consumer])
        claiming = beginning(lambda: claimed.append(claims.claim(consumer, 2, lease_ms=60_000)))
        wait_until(lambda: waits_for_lock("%sequin_claim%"), 10, "the claim to wait")
        saving = beginning(save)
        wait_until(lambda: not saving.is_alive() or waits_for_lock("%pg_advisory_xact_lock%"), 10, "the edit")
    claiming.join(60)
    saving.join(60)
    got = [*claimed[0].messages, *claims.claim(consumer, 2, lease_ms=60_000).messages]
    assert [message.key for message in got] == ['["3"]']


def test_an_edit_and_a_rewind_wait_for_each_other_in_one_order(log: Log) -> None:  # noqa: F811
    consumer = log.consumer()
    log.append(log.row(1))
    (message,) = claims.claim(consumer, 1, lease_ms=60_000).messages
    failed: list[Exception] = []

    def save() -> None:
        try:
            edited = Consumer.objects.get(pk=consumer)
            edited.status = "disabled"
            changes.save(edited)
        except DatabaseError as error:
            failed.append(error)

    with store_connection(autocommit=False) as conn:
        conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [str(consumer)])
        saving = beginning(save)
        wait_until(lambda: waits_for_lock("%pg_advisory_xact_lock%"), 10, "the edit to wait")
        assert conn.execute("SELECT moved FROM sequin_rewind(%s, %s, gen_random_uuid())", [consumer, message.id - 1]).fetchall() == [(True,)]
    saving.join(60)
    assert not failed and Consumer.objects.get(pk=consumer).status == "disabled"


@pytest.mark.parametrize("start_from", ["now", "beginning"])
def test_a_consumer_that_is_made_while_its_source_fails_over(log: Log, monkeypatch: pytest.MonkeyPatch, start_from: str) -> None:  # noqa: F811
    """The server that says where it is goes away, and capture follows to one that is not so far yet."""
    log.append(log.row(1))

    def follow(answer: Any) -> Any:
        log.progress = log.progress._replace(epoch=2, timeline=2)
        log.appender.begin_history(log.progress)
        log.relation = log.appender.register_relation(2, SHAPE)
        return answer

    monkeypatch.setattr(changes, "publish_tables", lambda source, tables: None)
    monkeypatch.setattr(changes, "source_position", lambda source: follow(1_000_000))
    monkeypatch.setattr(changes, "look_at_beginning", lambda source: follow(Beginning(8, 8, (), False, 1_000_000)))
    monkeypatch.setattr(changes, "tables_to_backfill", lambda source, tables: [])
    consumer = Consumer(name="c", source=log.source, kind="pull", start_from=start_from)
    changes.save(consumer)
    log.append(log.row(2))
    assert [message.key for message in claims.claim(consumer.pk, 10, lease_ms=60_000).messages] == ['["2"]']


@pytest.mark.parametrize("fields", [{}, {"where": "id >= 0"}, {"stream": "rows"}, {"group_columns": ["n"]}], ids=lambda fields: " ".join(fields) or "plain")
def test_a_table_that_is_altered_all_the_time_loses_nothing(log: Log, fields: dict[str, Any]) -> None:  # noqa: F811
    consumer = log.consumer(tables=["public.orders"], **fields)
    threads = Threads()
    got: list[int] = []

    def receive(chance: random.Random) -> None:
        claim = claims.claim(consumer, 10, lease_ms=60_000)
        if claim.token is not None:
            got.extend(message.id for message in claim.messages)
            claims.ack(consumer, [(claim.token, message.id) for message in claim.messages])

    for _ in range(3):
        threads.go(receive)
    try:
        for key in range(200):
            log.alter()
            log.append(log.row(key))
        wait_until(lambda: threads.errors or len(got) >= 200, 20, "all of it")
    finally:
        threads.finish()
    assert sorted(got) == [row[0] for row in fetch("SELECT id FROM messages ORDER BY id")]


def test_what_a_filter_could_not_judge_is_due_when_that_was_mended_meanwhile(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """It was handed out and judged by the filter of before, is parked until that is mended, and it has just been mended."""
    monkeypatch.setattr(changes, "check_where", lambda consumer: [])
    consumer = log.consumer(where="id >= 0")
    log.append(log.row(1), log.row(1))
    first = claims.claim(consumer, 1, lease_ms=60_000)
    assert not claims.claim(consumer, 1, lease_ms=60_000).messages, "the second is parked behind it"
    Consumer.objects.filter(pk=consumer).update(where="nowhere > 1", updated_at=timezone.now())
    claims.ack(consumer, [(first.token, message.id) for message in first.messages])
    mended: list[Any] = []
    fail = claims.fail

    def after_an_edit(*given: Any) -> Any:
        if not mended:
            edited = Consumer.objects.get(pk=consumer)
            edited.where = "id >= 0"
            mended.append(changes.save(edited))
        return fail(*given)

    monkeypatch.setattr(claims, "fail", after_an_edit)
    came = [message.key for _ in range(2) for message in claims.claim(consumer, 1, lease_ms=60_000).messages]
    assert mended and came == ['["1"]']


def test_shapes_become_known_in_the_order_of_their_ids(log: Log) -> None:  # noqa: F811
    """Capture and a backfill come upon one each: a filter that knows the newer one would never ask about the older."""
    made: list[int] = []

    def register() -> None:
        log.alter()
        made.append(log.relation)

    with store_connection(autocommit=False) as conn:
        first = register_relation(conn, log.source.pk, 1, SHAPE._replace(table="others"), seen=False)
        again = register_relation(conn, log.source.pk, 1, SHAPE, seen=False)
        registering = beginning(register)
        wait_until(lambda: waits_for_lock("%sequin_register_relation%"), 10, "the other one to wait")
    registering.join(60)
    assert made and made[0] > first > again


def _work_off(consumer: UUID, ack: Callable[[UUID, int], None]) -> None:
    """Everything left comes to one receiver, once all leases and delays are over."""
    Consumer.objects.filter(pk=consumer).update(status="active", max_ack_pending=10_000, max_per_group=None)
    fetch("UPDATE leases SET until = now() WHERE consumer = %s", consumer)

    def step() -> bool:
        claim = claims.claim(consumer, 1000, lease_ms=60_000)
        if claim.token is None:
            return claim.at_end and claim.next_due_ms is None
        for message in claim.messages:
            ack(claim.token, message.id)
        return False

    wait_until(step, 60, "the rest to be worked off")

