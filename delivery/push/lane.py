"""What a pump keeps of one push consumer: its messages in hand, what is in flight, how its endpoint is doing.

Decides what may be sent next; no I/O, no clock of its own. Messages of one group go out one after another, except inside
one batch, in order.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

from consumers.store.types import ClaimedMessage
from delivery.push import retry

FIRST_WINDOW = 2


@dataclass(frozen=True, slots=True)
class Target:
    """A push consumer's settings, and its endpoint's."""

    consumer_id: UUID
    consumer_name: str
    source_id: UUID
    tables: tuple[str, ...]
    batch_size: int
    concurrency: int
    endpoint_id: UUID
    url: str
    headers: dict[str, str]
    secrets: str
    timeout_s: float
    tail: str

    @property
    def lease_ms(self) -> int:
        """Longer than the endpoint may take; renewed while the pump lives."""
        return int(self.timeout_s * 1000) + 15_000


@dataclass(frozen=True, slots=True)
class InHand:
    """A claimed message and the token it was claimed under."""

    token: UUID
    message: ClaimedMessage

    @property
    def groups(self) -> tuple[int, ...]:
        message = self.message
        return (message.group,) if message.group2 is None else (message.group, message.group2)


@dataclass
class Lane:
    target: Target
    pending: list[InHand] = field(default_factory=list)
    flights: dict[int, list[InHand]] = field(default_factory=dict)
    busy: dict[int, int] = field(default_factory=dict)  # group → requests in flight with it
    window: int = FIRST_WINDOW
    failures: int = 0  # of the endpoint, in a row
    hold_until: float = 0.0
    look_at: float = 0.0  # claim not before; 0: at once
    hungry: bool = True  # there may be something to claim

    def room(self) -> int:
        """How many messages to claim now."""
        if self.failures >= retry.FAILURES_TO_OPEN:
            return 0 if self.pending or self.flights else self.target.batch_size
        wanted = 2 * min(self.target.concurrency, max(self.window, FIRST_WINDOW)) * self.target.batch_size
        held = len(self.pending) + sum(len(batch) for batch in self.flights.values())
        return wanted - held if held * 2 <= wanted else 0

    def next_batch(self) -> list[InHand]:
        """Take the next messages to send together out of `pending`; empty when nothing may go now."""
        if len(self.flights) >= min(self.window, self.target.concurrency):
            return []
        batch: list[InHand] = []
        rest: list[InHand] = []
        waiting: set[int] = set()  # groups of which an earlier message stays behind
        limit = self.target.batch_size
        for number, item in enumerate(self.pending):
            if len(batch) >= limit:
                rest.extend(self.pending[number:])
                break
            fits = min(limit, item.message.max_batch or limit)
            if any(group in self.busy or group in waiting for group in item.groups) or len(batch) >= fits:
                waiting.update(item.groups)
                rest.append(item)
                continue
            limit = fits
            batch.append(item)
        self.pending = rest
        return batch

    def depart(self, number: int, batch: list[InHand]) -> None:
        self.flights[number] = batch
        for group in _groups(batch):
            self.busy[group] = self.busy.get(group, 0) + 1

    def arrive(self, number: int) -> list[InHand]:
        """The batch of a request that is over; empty when it was dropped meanwhile."""
        batch = self.flights.pop(number, [])
        for group in _groups(batch):
            left = self.busy[group] - 1
            if left:
                self.busy[group] = left
            else:
                del self.busy[group]
        return batch

    def succeeded(self) -> None:
        self.failures = 0
        self.window = min(self.window * 2, max(self.target.concurrency, FIRST_WINDOW))

    def failed(self, now: float) -> None:
        self.failures += 1
        self.window = max(1, self.window // 2) if self.failures < retry.FAILURES_TO_OPEN else 1
        self.hold_until = max(self.hold_until, now + retry.hold_s(self.failures))

    def drop_behind(self, batch: list[InHand]) -> None:
        """Forget what the store took back with a failed batch: the later messages of its groups from the same claims."""
        held = {(item.token, group) for item in batch for group in item.groups}
        kept = []
        for item in self.pending:
            if any((item.token, group) in held for group in item.groups):
                held.update((item.token, group) for group in item.groups)
            else:
                kept.append(item)
        self.pending = kept

    def tokens(self) -> set[UUID]:
        return {item.token for item in self.items()}

    def items(self) -> Iterable[InHand]:
        yield from self.pending
        for batch in self.flights.values():
            yield from batch

    def forget_tokens(self, gone: set[UUID]) -> None:
        """These leases are lost: others have the messages. What is in flight is let go."""
        self.pending = [item for item in self.pending if item.token not in gone]
        for number, batch in list(self.flights.items()):
            if any(item.token in gone for item in batch):
                self.arrive(number)


def _groups(batch: list[InHand]) -> set[int]:
    return {group for item in batch for group in item.groups}
