"""Serve many push consumers at once: claim, send, settle. One pump per worker slot.

A pump holds the turns of its share of the consumers. Nothing blocks its loop but the store: requests run in the transport,
which the loop drives itself, also while it waits for the store. Notices come from a listening thread, and what transforms
have made from theirs.
"""
from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
from django.conf import settings
from django.db import DatabaseError, connection, transaction
from psycopg import waiting
from psycopg.abc import PQGen
from psycopg.waiting import Ready, Wait

from consumers.backoff import delay_ms
from consumers.envelope import Addressing, addressing, idempotency_key, render
from consumers.fields import MASK
from consumers.lua.types import LuaError
from consumers.models import Consumer
from consumers.store import claims, lifecycle, turns
from consumers.store.connection import store_connection, why_away
from consumers.store.interest import concerns
from consumers.store.lifecycle import Attempt
from consumers.store.types import ClaimedMessage, Failure
from delivery.push import retry, signing
from delivery.push.lane import EndpointState, InHand, Lane, Target
from delivery.push.transport import Outcome, Request, Transport
from delivery.transforming import Made, make, settle

log = logging.getLogger(__name__)

TICK_S = 0.25
RENEW_TURNS_S = 1.0
RENEW_LEASES_S = 4.0
SWEEP_S = 1.0
SLOW_S = 0.5  # an answer that takes longer is awaited before a slice ends, while the other lanes go on
WIND_DOWN_S = 30.0  # but awaited no longer than so
LAST_ANSWERS_S = 4.0
ACKS_EVERY_S = 0.003
ACKS_AT_ONCE = 200
TRANSFORM_S = 5.0  # of one batch; what is not begun by then goes back
TRANSFORMS = 256  # that run at once, one a consumer: a slow one holds up no other
LEASE_MESSAGES = 200  # under one lease, when batches are smaller
ATTEMPTS_EVERY_S = 0.25
HEADER_CHARACTERS = 200  # kept of a header's value, for people
SUCCESSES_A_ROUND = 50  # of one consumer, that are kept of those in ATTEMPTS_EVERY_S, for people
CHANNELS = ("sequin_log", "sequin_consumer", "sequin_config", "sequin_turns", "sequin_stop")


class Notice(NamedTuple):
    channel: str
    payload: str


class Flight(NamedTuple):
    """The tag of a request: whose, which, and what it was sent with."""

    lane: Lane
    number: int
    target: Target
    webhook_id: str
    sent_at: int


class Transformed(NamedTuple):
    """A transform has run on some messages of a consumer."""

    consumer_id: UUID
    version: datetime
    """Of the configuration whose function it was."""
    items: list[InHand]
    made: Made


class Pump:
    """Runs until its slice is over, or until told to stop."""

    def __init__(self, stopping: Callable[[], bool] = lambda: False) -> None:
        self.holder = uuid4()
        self._stopping = stopping
        self._stopped = False
        self._cluster = os.environ.get("SEQUIN_CLUSTER", "")
        self._retired = False  # the slice is over: the other pumps share without this one
        self._ending = False  # nothing is sent and no turns are taken any more
        self._drained = False  # a lane that sends no more has had its last answer
        self._look_for_turns = False  # somebody gave turns up, or began or ceased to share
        self._events: deque[Notice | Transformed] = deque()
        self._transforms = ThreadPoolExecutor(TRANSFORMS, "transform")
        self._transport = Transport(settings.SEQUIN_ALLOWED_NETWORKS)
        self._lanes: dict[UUID, Lane] = {}
        self._endpoints: dict[UUID, EndpointState] = defaultdict(EndpointState)
        self._arrived: list[Outcome] = []  # while the store worked, not settled yet
        self._sends_meanwhile = False  # while the store works
        self._hooked: psycopg.Connection[Any] | None = None
        self._settled: list[Lane] = []  # those with acks that are not written yet
        self._gathered = 0  # such acks
        self._attempts: list[Attempt] = []
        self._number = 0
        self._clock_ahead_s = 0.0  # the store's clock, which times everything, against this machine's
        self._turns_until = 0.0  # so long they are ours at least
        self._renewed_at = self._leases_at = self._swept_at = self._attempts_at = 0.0
        self._stored: dict[UUID, int] = {}

    def run(self, slice_s: float) -> None:
        end = time.monotonic() + slice_s
        threading.Thread(target=self._listen, name="push-listener", daemon=True).start()
        threading.Thread(target=self._transport.attend, name="push-attendant", daemon=True).start()
        try:
            turns.join(self._cluster)
            while self._may_run() and time.monotonic() < end:
                self._round()
            self._wind_down()
        finally:
            self._stopped = True
            try:
                self._finish()
            finally:
                if self._hooked is not None:
                    del self._hooked.wait

    def _may_run(self) -> bool:
        return not self._stopped and not self._stopping()

    def _round(self) -> None:
        """Hold turns, claim, send, then take in what has happened."""
        now = time.monotonic()
        self._hook()
        self._hold_on(now)
        if now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            self._sweep()
        if now - self._attempts_at >= ATTEMPTS_EVERY_S:
            self._attempts_at = now
            self._record()
            self._acknowledge()
        for lane in list(self._lanes.values()):
            if lane.pending:
                self._send(lane, now)
            if (lane.hungry or lane.look_at) and self._fill(lane, now):
                self._send(lane, now)
        # Acks are gathered while answers keep coming in, and written before anybody waits.
        happened = self._take_in(ACKS_EVERY_S if self._settled else TICK_S)
        if not happened or self._gathered >= ACKS_AT_ONCE:
            with self._sending_meanwhile():
                self._acknowledge(may_wait=happened)
        if self._drained:
            self._release_quiet()

    # Turns and leases ---------------------------------------------------------------------------------------------

    def _hold_on(self, now: float) -> None:
        """Renew turns and leases when it is time."""
        if now - self._renewed_at >= RENEW_TURNS_S:
            self._renewed_at = now
            self._hold_turns()
        elif self._look_for_turns and not self._ending:
            self._share()
            self._release_quiet()
        if now - self._leases_at >= RENEW_LEASES_S:
            self._leases_at = now
            self._renew_leases()

    def _hold_turns(self) -> None:
        turns.beat(self._cluster, ending=self._retired)
        self._clock_ahead_s = lifecycle.clock().timestamp() - time.time()
        until = time.monotonic() + turns.TURN_S
        held = turns.renew(self.holder)
        self._turns_until = until
        for consumer_id, lane in list(self._lanes.items()):
            if held.get(consumer_id) not in ("active", "paused"):
                self._let_go(consumer_id)
                continue
            was_paused, lane.paused = lane.paused, held[consumer_id] == "paused"
            if lane.paused:
                self._hand_back_pending(lane)
            lane.hungry = lane.hungry or was_paused
        # Those of disabled consumers, which nobody else could take: renewing is by holder, whatever is served.
        if idle := held.keys() - self._lanes.keys():
            turns.release(self.holder, idle)
        if not self._ending:
            self._share()
        self._release_quiet()

    def _share(self) -> None:
        """As many consumers as each pump should serve: give turns up, or take some."""
        self._look_for_turns = False
        active, pumps = turns.shares()
        if self._retired and pumps:
            return  # there are others to take what is free
        share = -(-active // max(pumps, 1))
        mine = [lane for lane in self._lanes.values() if not lane.is_quiet]
        if len(mine) > share:
            for lane in sorted(mine, key=lambda lane: len(lane.flights))[: len(mine) - share]:
                self._leave(lane)
        elif len(mine) < share:
            for target in _load_targets(set(turns.take(self.holder, share - len(mine)))):
                self._lanes[target.consumer_id] = Lane(target, self._endpoints[target.endpoint_id])

    def _leave(self, lane: Lane) -> None:
        """Send nothing more there. What is in flight is answered first: given back, it would be sent twice at once."""
        lane.leaving = True
        self._hand_back_pending(lane)

    def _release_quiet(self) -> None:
        """Give up the turns of lanes that are to go and have nothing in flight any more."""
        self._drained = False
        done = [consumer_id for consumer_id, lane in self._lanes.items() if lane.is_quiet and not lane.flights]
        if done:
            self._acknowledge()
            for consumer_id in done:
                del self._lanes[consumer_id]
            turns.release(self.holder, done)

    def _hand_back_pending(self, lane: Lane) -> None:
        pending = lane.pending + lane.in_making
        lane.pending, lane.in_making = [], []
        _hand_back(lane, pending)

    def _let_go(self, consumer_id: UUID) -> None:
        """The turn is gone: what is not answered yet goes back."""
        self._acknowledge()
        lane = self._lanes.pop(consumer_id, None)
        if lane is not None:
            items = list(lane.items())
            lane.close()
            _hand_back(lane, items)

    def _renew_leases(self) -> None:
        for lane in self._lanes.values():
            tokens = lane.tokens()
            lane.leases = {token: ids for token, ids in lane.leases.items() if token in tokens}
            if tokens:
                gone = tokens - claims.renew(tokens, lane.target.lease_ms)
                if gone:
                    lane.forget_tokens(gone)

    # Claiming and sending -------------------------------------------------------------------------------------------

    def _fill(self, lane: Lane, now: float) -> bool:
        """Claim when there is room and reason, whole batches under a lease. True when something can be sent."""
        due = lane.hungry or (lane.look_at and now >= lane.look_at)
        room = lane.room()
        if not due or room <= 0 or not lane.endpoint.may_send(now):
            return False
        lane.look_at = 0.0
        size = lane.target.batch_size * max(1, LEASE_MESSAGES // lane.target.batch_size)
        first = True
        while first or room >= size:
            first = False
            with self._sending_meanwhile():
                # First what is done: a group that counts as out would be parked behind itself.
                self._acknowledge(may_wait=True)
                claim = claims.claim(lane.target.consumer_id, min(size, room), lease_ms=lane.target.lease_ms, holder=self.holder)
            if claim.token is None:
                lane.hungry = not claim.at_end or bool(lane.acks)  # what was answered meanwhile may have held others back
                if claim.next_due_ms is not None:
                    lane.look_at = now + claim.next_due_ms / 1000 + 0.005
                break
            if claim.version != lane.target.version:
                self._reconfigure()  # it was edited a moment ago
            lane.hungry = True
            lane.claimed(claim.token, claim.messages)
            room -= len(claim.messages)
            if lane.target.transform:
                self._transform(lane, [InHand(claim.token, message) for message in claim.messages])
                break
            lane.pending.extend(_in_hand(claim.token, claim.messages, lane.target.to))
            if claim.at_end:
                break
        return bool(lane.pending)

    def _transform(self, lane: Lane, items: list[InHand]) -> None:
        """Let a thread run the consumer's function; the loop hears of it as of an answer."""
        lane.in_making = items
        target, messages = lane.target, [item.message for item in items]

        def run() -> None:
            try:
                made = make(target.consumer_id, target.transform, target.to, messages, TRANSFORM_S)
            except Exception as error:  # the machine has run out of something; the lane would wait for this for ever
                log.exception("transform cannot be run consumer=%s", target.consumer_name)
                made = Made([], [], [(message, LuaError(f"cannot be run: {error}"[:300], None)) for message in messages], [])
            self._tell(Transformed(target.consumer_id, target.version, items, made))

        self._transforms.submit(run)

    def _transformed(self, event: Transformed) -> None:
        lane = self._lanes.get(event.consumer_id)
        if lane is None:
            return  # the turn is gone, and its messages went back
        ours = {item.message.id: item for item in lane.in_making if item in event.items}
        lane.in_making = [item for item in lane.in_making if item.message.id not in ours]
        if not ours:
            return  # they went back: it was paused or edited meanwhile, or their lease was lost
        made = event.made
        still = Made(
            [item for item in made.ready if item.message.id in ours], [message for message in made.dropped if message.id in ours],
            [(message, error) for message, error in made.failed if message.id in ours], [m for m in made.left if m.id in ours],
        )  # fmt: skip
        token = next(iter(ours.values())).token
        going = settle(event.consumer_id, token, still, event.version)
        lane.claimed(token, [item.message for item in going])
        lane.pending.extend(InHand(token, item.message, item.payload, idempotency_key(item.message)) for item in going)
        lane.hungry = True

    def _send(self, lane: Lane, now: float) -> None:
        if time.monotonic() >= self._turns_until:
            return  # the store let us wait: until the turn is renewed, another pump may have it and what is in hand
        now_s = int(time.time() + self._clock_ahead_s)
        while batch := lane.next_batch(now):
            self._number += 1
            lane.depart(self._number, batch, now)
            self._transport.submit(_request(lane, batch, self._number, now_s))

    # What happened ----------------------------------------------------------------------------------------------------

    def _tell(self, event: Notice | Transformed) -> None:
        """Let the loop take this in. From any thread."""
        self._events.append(event)
        self._transport.wake()

    def _take_in(self, wait_s: float) -> bool:
        """Wait for something to happen, then take in all of it; false when nothing has."""
        if wait_s and self._transport_is_idle():
            wait_s = self._until_due(wait_s)
        arrived, self._arrived = self._arrived, []
        outcomes = arrived + self._transport.step(0.0 if arrived or self._events else wait_s)
        happened = bool(outcomes or self._events)
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Transformed):
                self._transformed(event)
            else:
                self._hear(event)
        if outcomes:
            self._settle(outcomes)
        return happened

    def _hook(self) -> None:
        """Let waiting for the store be `_wait`."""
        raw = connection.connection
        if raw is not None and raw is not self._hooked:
            self._hooked = raw
            raw.wait = self._wait

    def _wait(self, query: PQGen[Any], interval: float = TICK_S, timeout: float | None = None) -> Any:
        """As psycopg's Connection.wait, but requests go on while the store works."""
        assert self._hooked is not None
        fd = self._hooked.pgconn.socket
        try:
            wants = next(query)
            while wants == Wait.R and timeout is None:
                is_ready, outcomes = self._transport.step_beside(fd, interval)
                self._arrived += outcomes
                if self._sends_meanwhile and self._arrived:
                    self._go_on()
                wants = query.send(Ready.R if is_ready else Ready.NONE)
        except StopIteration as ended:
            return ended.value
        return waiting.wait(query, fd, interval, timeout)

    @contextmanager
    def _sending_meanwhile(self) -> Iterator[None]:
        """While the store works in here, the next requests may be sent: nothing it is asked changes what those are."""
        self._sends_meanwhile = True
        try:
            yield
        finally:
            self._sends_meanwhile = False

    def _go_on(self) -> None:
        """Settle what arrived, but for failures, which the store is told at once, and send what comes next."""
        good = [outcome for outcome in self._arrived if outcome.ok]
        self._arrived = [outcome for outcome in self._arrived if not outcome.ok]
        self._settle(good)
        now = time.monotonic()
        for lane in {outcome.tag.lane for outcome in good}:
            self._send(lane, now)

    def _transport_is_idle(self) -> bool:
        return not any(lane.flights for lane in self._lanes.values())

    def _awaits_answers(self) -> bool:
        """A probe of an endpoint that has failed again and again is not waited for: it would hold up all the others."""
        return any(lane.flights and not lane.endpoint.is_open for lane in self._lanes.values())

    def _until_due(self, longest: float) -> float:
        now = time.monotonic()
        due = [lane.look_at - now for lane in self._lanes.values() if lane.look_at]
        return min([longest, *(max(0.001, wait) for wait in due)])

    def _settle(self, outcomes: list[Outcome]) -> None:
        now = time.monotonic()
        for outcome in outcomes:
            lane = outcome.tag.lane
            sent_at = lane.departed.get(outcome.tag.number, now)
            batch = lane.arrive(outcome.tag.number)
            if not batch:
                continue  # the lease was lost meanwhile; whoever has it now delivers again
            lane.hungry = True
            lane.endpoint.is_slow = outcome.duration_ms > SLOW_S * 1000
            self._drained = self._drained or (lane.is_quiet and not lane.flights)
            if not outcome.ok:
                self._failed(lane, batch, outcome, sent_at, now)
                self._attempts.extend(_attempts(batch, outcome))
                continue
            lane.succeeded()
            if not lane.acks:
                self._settled.append(lane)
            lane.acks.extend([(item.token, item.message.id) for item in batch])
            self._gathered += len(batch)
            if lane.shown < SUCCESSES_A_ROUND:
                shown = batch[: SUCCESSES_A_ROUND - lane.shown]
                lane.shown += len(shown)
                self._attempts.extend(_attempts(shown, outcome))

    def _acknowledge(self, *, may_wait: bool = False) -> None:
        """Write the acks gathered so far. `may_wait`: those of leases that are answered in part may come later."""
        self._gathered = 0
        for _ in range(len(self._settled)):  # not those that come meanwhile
            lane = self._settled.pop(0)
            taken = lane.take_acks(may_wait=may_wait)
            if lane.acks:
                self._settled.append(lane)
            for receipts in taken:
                claims.ack(lane.target.consumer_id, receipts)

    def _record(self) -> None:
        attempts, self._attempts = self._attempts, []
        for lane in self._lanes.values():
            lane.shown = 0
        lifecycle.record_attempts(attempts)

    def _failed(self, lane: Lane, batch: list[InHand], outcome: Outcome, sent_at: float, now: float) -> None:
        asked = None
        if outcome.status is not None:
            asked = retry.retry_after_s(outcome.status, outcome.retry_after, time.time() + self._clock_ahead_s)
        if asked is not None:
            lane.endpoint.hold(now + asked)
            lane.look_at = now + asked
        lane.failed(now, outcome.status, sent_at)
        max_batch = -(-len(batch) // 2) if len(batch) > 1 else None
        error = outcome.error or "failed"
        failures = []
        for item in batch:
            delay = delay_ms(item.message.deliver_count, random.uniform(-1, 1))
            if asked is not None:
                delay = int(asked * 1000)
            failures.append(Failure(item.token, item.message.id, delay, error, outcome.status, "retry", max_batch))
        claims.fail(lane.target.consumer_id, failures)
        lane.drop_behind(batch)
        if lane.endpoint.is_open:
            self._hand_back_pending(lane)  # the next probe is chosen from others
        if outcome.status == retry.GONE:
            self._pause(lane)

    def _pause(self, lane: Lane) -> None:
        """410: the endpoint is gone for good, so nothing more is sent until somebody resumes the consumer."""
        lane.paused = True
        with transaction.atomic():
            consumer = Consumer.objects.select_for_update().filter(pk=lane.target.consumer_id, status="active").first()
            if consumer is None:
                return  # deleted, or somebody was faster
            consumer.status = "paused"
            consumer.status_reason = "its endpoint answered 410 Gone, which means: never again"
            consumer.save(update_fields=["status", "status_reason", "updated_at"])
        log.warning("paused consumer=%s: its endpoint answered 410 Gone", lane.target.consumer_name)

    def _hear(self, notice: Notice) -> None:
        if notice.channel == "sequin_config":
            self._reconfigure()
        elif notice.channel == "sequin_turns":
            self._look_for_turns = True
        elif notice.channel == "sequin_stop":
            self._stopped = self._stopped or notice.payload == os.environ.get("SEQUIN_CLUSTER")
        else:
            try:
                self._wake(notice)
            except (ValueError, KeyError, TypeError, AttributeError):
                log.warning("not a notice of ours: channel=%s payload=%.100r", notice.channel, notice.payload)

    def _wake(self, notice: Notice) -> None:
        if notice.channel == "sequin_log":
            told = json.loads(notice.payload)
            self._wake_source(UUID(told["source"]), told["relations"])
        else:
            lane = self._lanes.get(UUID(notice.payload))
            if lane is not None:
                lane.hungry = True

    def _reconfigure(self) -> None:
        """Something was edited, or leases were ended by a rewind: what is not sent yet goes by what holds now."""
        self._renewed_at = self._leases_at = 0.0
        for target in _load_targets(set(self._lanes)):
            lane = self._lanes[target.consumer_id]
            if target.endpoint_id != lane.target.endpoint_id or (target.url, target.headers) != (lane.target.url, lane.target.headers):
                # Another endpoint, or a mended one: what it did before says nothing any more.
                moved = self._endpoints[target.endpoint_id]
                moved.forget()
                lane.endpoint.in_flight -= len(lane.flights)
                moved.in_flight += len(lane.flights)
                lane.endpoint = moved
            if target.version != lane.target.version:
                self._hand_back_pending(lane)  # claimed anew, they go by the new settings
            lane.target = target
            lane.hungry = True

    def _wake_source(self, source_id: UUID, relations: list[int]) -> None:
        for lane in self._lanes.values():
            if lane.target.source_id == source_id and not lane.hungry and concerns(relations, lane.target.tables):
                lane.hungry = True

    def _sweep(self) -> None:
        """Find what a lost notice would have told."""
        with connection.cursor() as cursor:
            cursor.execute("SELECT source, stored_lsn + part_changes FROM capture_progress")
            for source_id, stored in cursor.fetchall():
                if self._stored.get(source_id) != stored:
                    self._stored[source_id] = stored
                    self._wake_source(source_id, [])

    def _listen(self) -> None:
        while not self._stopped:
            try:
                with store_connection(application_name="sequin push listener") as conn:
                    for channel in CHANNELS:
                        conn.execute(f"LISTEN {channel}")
                    self._tell(Notice("sequin_config", ""))
                    while not self._stopped:
                        for notice in conn.notifies(timeout=0.5, stop_after=1):
                            self._tell(Notice(notice.channel, notice.payload))
            except (psycopg.Error, OSError) as error:
                log.warning("push listener lost the store: %s", why_away(error))
                time.sleep(0.5)

    def _wind_down(self) -> None:
        """The slice is over: let slow answers come, while the other lanes go on, so that none is cut off and sent again."""
        self._retire()
        deadline = time.monotonic() + WIND_DOWN_S
        while self._may_run() and (now := time.monotonic()) < deadline:
            slow = [lane for lane in self._lanes.values() if lane.waits_for_answers(now, SLOW_S)]
            if not slow:
                return
            for lane in slow:
                self._leave(lane)
            self._round()

    def _retire(self) -> None:
        if not self._retired:
            self._retired = True
            turns.retire(self._cluster)
            self._renewed_at = 0.0

    def _finish(self) -> None:
        """Leave nothing behind: what was not sent, or not answered, goes back. Each turn goes as soon as it can."""
        try:
            self._ending = True
            self._retire()
            for lane in self._lanes.values():
                self._leave(lane)
            self._take_in(0.0)
            self._release_quiet()
            # What is in flight may be answered in a moment; given back, it would be sent twice.
            deadline = time.monotonic() + LAST_ANSWERS_S
            while self._awaits_answers() and (left := deadline - time.monotonic()) > 0:
                self._take_in(min(left, TICK_S))
                self._release_quiet()
                self._hold_on(time.monotonic())
            self._acknowledge()
            self._record()
            for consumer_id in list(self._lanes):
                self._let_go(consumer_id)
            turns.release(self.holder)
            turns.forget_pump()
        except DatabaseError as error:
            log.warning("the pump could not give its messages back; their leases will end: %s", str(error)[:200])
            connection.close()
        self._transport.close()
        self._transforms.shutdown(wait=False, cancel_futures=True)


def _hand_back(lane: Lane, items: list[InHand]) -> None:
    if items:
        claims.give_back(lane.target.consumer_id, [(item.token, item.message) for item in items])


def _load_targets(consumer_ids: set[UUID]) -> list[Target]:
    if not consumer_ids:
        return []
    found = Consumer.objects.filter(pk__in=consumer_ids, kind="push").select_related("source", "endpoint")
    targets = []
    for consumer in found:
        source, endpoint = consumer.source, consumer.endpoint
        if endpoint is None:
            continue
        targets.append(
            Target(
                consumer.pk, consumer.updated_at, consumer.name, consumer.source_id, tuple(consumer.tables), consumer.batch_size,
                consumer.concurrency, endpoint.pk, endpoint.url + consumer.path, {**endpoint.headers, **endpoint.secret_headers},
                frozenset(endpoint.secret_headers), endpoint.signing_secret, endpoint.timeout_ms / 1000, consumer.transform,
                addressing(
                    consumer_id=consumer.pk, consumer_name=consumer.name, source_id=source.pk, source_name=source.name,
                    database=source.database, stream=consumer.stream,
                ),
            )
        )  # fmt: skip
    return targets


def _in_hand(token: UUID, messages: list[ClaimedMessage], to: Addressing) -> list[InHand]:
    made = []
    for message in messages:
        key = idempotency_key(message)
        made.append(InHand(token, message, render(message, to, key), key))
    return made


def _request(lane: Lane, batch: list[InHand], number: int, now_s: int) -> Request:
    """One POST, signed now: a retry is signed anew, with the same id. `now_s`: by the store's clock."""
    target = lane.target
    if target.batch_size == 1:
        body, webhook_id = batch[0].payload, batch[0].key
    else:
        body = b'{"data":[' + b",".join([item.payload for item in batch]) + b"]}"
        webhook_id = signing.batch_id([item.key for item in batch])
    own = (
        "webhook-id: " + webhook_id,
        f"webhook-timestamp: {now_s}",
        "webhook-signature: " + signing.signature(target.secrets, webhook_id, now_s, body),
    )
    return Request(target.url, target.common, body, target.timeout_s, Flight(lane, number, target, webhook_id, now_s), own)


def _attempts(batch: list[InHand], outcome: Outcome) -> list[Attempt]:
    """What is kept of a request: where it went and with which headers, whatever the endpoint has become meanwhile."""
    flight: Flight = outcome.tag
    target = flight.target
    own = {name: MASK if name in target.secret_headers else value[:HEADER_CHARACTERS] for name, value in target.headers.items()}
    headers = json.dumps(
        {"webhook-id": flight.webhook_id, "webhook-timestamp": str(flight.sent_at), "webhook-signature": MASK, **own}, ensure_ascii=False
    )
    return [
        Attempt(
            target.consumer_id, target.source_id, item.message.id, outcome.ok, outcome.status, outcome.error,
            outcome.duration_ms, outcome.response or None, target.url, item.message.deliver_count, headers,
        )
        for item in batch
    ]  # fmt: skip
