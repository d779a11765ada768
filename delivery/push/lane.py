"""What a pump keeps of one push consumer: its messages in hand, what is in flight, how its endpoint is doing.

Decides what may be sent next; no I/O, no clock of its own. Messages of one group go out one after another, except inside
one batch, in order.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import NamedTuple
from uuid import UUID

from consumers.envelope import Addressing
from consumers.store.types import ClaimedMessage
from delivery.push import retry
from delivery.push.request import Headers

FIRST_WINDOW = 2
AHEAD, MOST_AHEAD = 40, 400  # messages in hand: so many times what is in flight, while that is little
PROBE_CHOICE = 20  # messages to choose a probe from, so that it need not be one that keeps failing


@dataclass(frozen=True)
class Target:
    """A push consumer's settings, and its endpoint's."""

    consumer_id: UUID
    version: datetime
    """Of the consumer's configuration."""
    consumer_name: str
    source_id: UUID
    tables: tuple[str, ...]
    batch_size: int
    concurrency: int
    endpoint_id: UUID
    url: str
    headers: dict[str, str]
    secret_headers: frozenset[str]
    """The names of those that nobody may read."""
    secrets: str
    timeout_s: float
    transform: str
    to: Addressing

    @property
    def lease_ms(self) -> int:
        """Longer than the endpoint may take; renewed while the pump lives."""
        return int(self.timeout_s * 1000) + 15_000

    @cached_property
    def common(self) -> Headers:
        """The headers of all its requests."""
        return Headers({"Content-Type": "application/json", "User-Agent": "sequin", **self.headers})


class InHand(NamedTuple):
    """A claimed message, the token it was claimed under, and what is sent for it once that is made."""

    token: UUID
    message: ClaimedMessage
    payload: bytes = b""
    key: str = ""
    """Its idempotency key."""

    @property
    def groups(self) -> tuple[int, ...]:
        message = self.message
        return (message.group,) if message.group2 is None else (message.group, message.group2)


@dataclass
class EndpointState:
    """How an endpoint is doing, for all consumers that push to it: its circuit breaker.

    After some failures in a row it is open: one probe at a time, with growing pauses, over all its consumers.
    """

    failures: int = 0  # in a row
    troubles: int = 0  # those of them that were the endpoint's and not perhaps the message's
    hold_until: float = 0.0  # no request before: the breaker's pause, or a Retry-After
    is_open: bool = False
    opened: int = 0  # how often it has opened
    opened_at: float = 0.0
    in_flight: int = 0
    is_slow: bool = True  # its last answer was, or there was none yet

    def may_send(self, now: float) -> bool:
        return now >= self.hold_until and not (self.is_open and self.in_flight)

    def succeeded(self) -> None:
        self.failures = self.troubles = 0
        self.is_open = False

    def failed(self, now: float, status: int | None, sent_at: float) -> None:
        was_open = self.is_open
        if was_open and sent_at < self.opened_at:
            return  # of the same outage, not a probe: as many at a time as fail together, so much longer it would be left alone
        self.failures += 1
        self.troubles += retry.is_trouble(status)
        self.is_open = retry.opens(self.troubles, self.failures)
        if self.is_open and not was_open:
            self.opened, self.opened_at = self.opened + 1, now
        self.hold_until = max(self.hold_until, now + retry.hold_s(self.troubles, self.failures))

    def forget(self) -> None:
        """It was edited: what it did before says nothing any more."""
        self.succeeded()
        self.hold_until = 0.0
        self.is_slow = True

    def hold(self, until: float) -> None:
        self.hold_until = max(self.hold_until, until)


@dataclass(eq=False)
class Lane:
    target: Target
    endpoint: EndpointState
    pending: list[InHand] = field(default_factory=list)
    in_making: list[InHand] = field(default_factory=list)  # in the consumer's transform
    flights: dict[int, list[InHand]] = field(default_factory=dict)
    departed: dict[int, float] = field(default_factory=dict)  # when, of each flight
    busy: dict[int, int] = field(default_factory=dict)  # group → requests in flight with it
    window: int = FIRST_WINDOW  # requests at a time, at most the consumer's concurrency
    gained: int = 0  # successes towards the next request at a time, on the ramp after an outage
    on_ramp: bool = False
    opened: int = 0  # the endpoint's `opened` that this lane knows of
    acks: list[tuple[UUID, int]] = field(default_factory=list)  # of what was answered well, not written yet
    leases: dict[UUID, list[int]] = field(default_factory=dict)  # the messages of each claim, while none is settled in the store
    is_contended: bool = False  # the last claim had messages that an earlier one of their group had held up
    shown: int = 0  # successes kept lately, for people
    look_at: float = 0.0  # claim not before; 0: at once
    hungry: bool = True  # there may be something to claim
    paused: bool = False
    leaving: bool = False  # the turn is given up as soon as everything in flight is answered

    @property
    def is_quiet(self) -> bool:
        """It sends nothing more, for now."""
        return self.paused or self.leaving

    def room(self) -> int:
        """How many messages to claim now."""
        if self.is_quiet or self.in_making:
            return 0
        if self.endpoint.is_open:
            return 0 if self.pending or self.flights else PROBE_CHOICE
        at_once = min(self.target.concurrency, max(self.window, FIRST_WINDOW)) * self.target.batch_size
        wanted = 2 * at_once
        if self.window >= self.target.concurrency:
            wanted = max(wanted, min(AHEAD * at_once, MOST_AHEAD))  # all goes well: fewer, larger claims and acks
        held = len(self.pending) + sum(len(batch) for batch in self.flights.values())
        return wanted - held if held * 2 <= wanted else 0

    def next_batch(self, now: float) -> list[InHand]:
        """Take the next messages to send together out of `pending`; empty when nothing may go now."""
        if not self.pending or self.is_quiet or not self.endpoint.may_send(now):
            return []
        if self.opened != self.endpoint.opened:
            # After an outage not everything at once: the endpoint has just come back.
            self.opened, self.window, self.gained, self.on_ramp = self.endpoint.opened, 1, 0, True
        if len(self.flights) >= min(self.window, self.target.concurrency):
            return []
        limit = self.target.batch_size
        if self.endpoint.is_open:
            limit = 1
            self._bring_forward_a_probe()
        shut = set(self.busy)  # groups in flight, and those of which an earlier message stays behind
        if limit == 1:
            for number, item in enumerate(self.pending):
                groups = item.groups
                if shut.isdisjoint(groups):
                    return [self.pending.pop(number)]
                shut.update(groups)
            return []
        batch: list[InHand] = []
        rest: list[InHand] = []
        for number, item in enumerate(self.pending):
            if len(batch) >= limit:
                rest.extend(self.pending[number:])
                break
            groups, fits = item.groups, min(limit, item.message.max_batch or limit)
            if len(batch) >= fits or not shut.isdisjoint(groups):
                shut.update(groups)
                rest.append(item)
                continue
            limit = fits
            batch.append(item)
        self.pending = rest
        return batch

    def depart(self, number: int, batch: list[InHand], now: float) -> None:
        self.flights[number] = batch
        self.departed[number] = now
        self.endpoint.in_flight += 1
        for group in _groups(batch):
            self.busy[group] = self.busy.get(group, 0) + 1

    def arrive(self, number: int) -> list[InHand]:
        """The batch of a request that is over; empty when it was dropped meanwhile."""
        batch = self.flights.pop(number, [])
        if not batch:
            return batch
        del self.departed[number]
        self.endpoint.in_flight -= 1
        for group in _groups(batch):
            left = self.busy[group] - 1
            if left:
                self.busy[group] = left
            else:
                del self.busy[group]
        return batch

    def waits_for_answers(self, now: float, longer_than_s: float) -> bool:
        """Something is in flight for so long already, or may be, at an endpoint that does answer."""
        return not self.endpoint.is_open and any(self.endpoint.is_slow or now - at > longer_than_s for at in self.departed.values())

    def succeeded(self) -> None:
        """A request was answered well: more at a time, doubling at first, one by one on the ramp."""
        self.endpoint.succeeded()
        most = max(self.target.concurrency, FIRST_WINDOW)
        if not self.on_ramp:
            self.window = min(self.window * 2, most)
            return
        self.gained += 1
        if self.gained >= self.window:
            self.gained = 0
            self.window += 1
            self.on_ramp = self.window < most

    def failed(self, now: float, status: int | None, sent_at: float) -> None:
        self.endpoint.failed(now, status, sent_at)
        if self.endpoint.is_open:
            self.window = 1
        elif retry.is_trouble(status):
            self.window = max(1, self.window // 2)

    def claimed(self, token: UUID, messages: list[ClaimedMessage]) -> None:
        self.leases[token] = [message.id for message in messages]
        self.is_contended = any(message.is_fresh for message in messages)

    def take_acks(self, *, may_wait: bool) -> list[list[tuple[UUID, int]]]:
        """The acks to write now, each list in one call.

        A whole lease costs the store least. So what is answered of the last two may wait for the rest of them, unless
        groups return so often that messages would be held up by it.
        """
        by_token: dict[UUID, list[int]] = {}
        last: UUID | None = None
        for token, number in self.acks:
            if token is not last:
                last, ids = token, by_token.setdefault(token, [])
            ids.append(number)
        waiting = set(list(self.leases)[-2:]) if may_wait and not self.is_contended else set()
        taken, parts = [], []
        self.acks = []
        for token, ids in by_token.items():
            lease = self.leases.get(token, [])
            if len(lease) == len(ids):
                taken.append([(token, number) for number in lease])
                del self.leases[token]
            elif token in waiting:
                self.acks += [(token, number) for number in ids]
            else:
                parts += [(token, number) for number in ids]
                self.leases.pop(token, None)
        return [*taken, parts] if parts else taken

    def close(self) -> None:
        """The lane goes: nothing that it has is its own any more, also when a last answer lets it look for what to send."""
        self.endpoint.in_flight -= len(self.flights)
        self.pending, self.in_making = [], []
        self.flights, self.departed, self.busy = {}, {}, {}

    def drop_behind(self, batch: list[InHand]) -> None:
        """Forget what the store took back with a failed batch: the later messages of its groups from the same claims."""
        held = {(item.token, group) for item in batch for group in item.groups}
        self.pending = _without(self.pending, held)
        self.in_making = _without(self.in_making, held)

    def tokens(self) -> set[UUID]:
        return {item.token for item in self.items()}

    def items(self) -> Iterable[InHand]:
        yield from self.pending
        yield from self.in_making
        for batch in self.flights.values():
            yield from batch

    def forget_tokens(self, gone: set[UUID]) -> None:
        """These leases are lost: others have the messages. What is in flight is let go."""
        self.pending = [item for item in self.pending if item.token not in gone]
        self.in_making = [item for item in self.in_making if item.token not in gone]
        for number, batch in list(self.flights.items()):
            if any(item.token in gone for item in batch):
                self.arrive(number)

    def _bring_forward_a_probe(self) -> None:
        """The least tried of those that lead their groups: a poison message says nothing about the endpoint."""
        leading: list[InHand] = []
        seen: set[int] = set()
        for item in self.pending:
            if not any(group in seen or group in self.busy for group in item.groups):
                leading.append(item)
            seen.update(item.groups)
        if leading:
            probe = min(leading, key=lambda item: item.message.deliver_count)
            self.pending.remove(probe)
            self.pending.insert(0, probe)


def _without(items: Iterable[InHand], held: set[tuple[UUID, int]]) -> list[InHand]:
    """The items that stand behind none of these (token, group) pairs."""
    kept = []
    for item in items:
        if any((item.token, group) in held for group in item.groups):
            held.update((item.token, group) for group in item.groups)
        else:
            kept.append(item)
    return kept


def _groups(batch: list[InHand]) -> Iterable[int]:
    if len(batch) == 1:
        return batch[0].groups
    return {group for item in batch for group in item.groups}
