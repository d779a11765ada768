"""Make what is delivered out of claimed messages: the message itself, or what the consumer's Lua function returns.

A function that returns nil drops the message, an error fails it: `settle` tells the store. For the pull view and the pump.
"""
from __future__ import annotations

import random
import time
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from consumers.backoff import delay_ms
from consumers.envelope import Addressing, metadata, render
from consumers.lua.pool import Pool
from consumers.lua.types import Call, LuaError, Result
from consumers.store import claims
from consumers.store.types import ClaimedMessage, Failure, part_failed

AT_ONCE = 50  # messages, between looks at the clock
pool = Pool()


class Outgoing(NamedTuple):
    """A message and what is delivered for it."""

    message: ClaimedMessage
    payload: bytes


class Made(NamedTuple):
    """What became of some claimed messages. All of them are in one of these, but for followers of what failed."""

    ready: list[Outgoing]
    dropped: list[ClaimedMessage]
    failed: list[tuple[ClaimedMessage, LuaError]]
    left: list[ClaimedMessage]
    """Not looked at: the time was over."""


def make(consumer_id: UUID, transform: str, to: Addressing, messages: Sequence[ClaimedMessage], budget_s: float) -> Made:
    """Never raises for what the function does. `budget_s`: afterwards no further messages are begun."""
    if not transform:
        return Made([Outgoing(message, render(message, to)) for message in messages], [], [], [])
    made = Made([], [], [], [])
    end = time.monotonic() + budget_s
    for at in range(0, len(messages), AT_ONCE):
        some = messages[at : at + AT_ONCE]
        if at and time.monotonic() >= end:
            made.left.extend(messages[at:])
            break
        for message, result in zip(some, _run(consumer_id, transform, [call(message, to) for message in some]), strict=True):
            if isinstance(result, LuaError):
                made.failed.append((message, result))
            elif result is None:
                made.dropped.append(message)
            else:
                made.ready.append(Outgoing(message, result))
    return made


def call(message: ClaimedMessage, to: Addressing) -> Call:
    """The arguments of the function, as JSON."""
    changes = None if message.changes is None else message.changes.encode()
    return Call(b'"%b"' % message.action.encode(), message.record.encode(), changes, metadata(message, to).encode())


def _run(consumer_id: UUID, transform: str, calls: list[Call]) -> list[Result]:
    try:
        return pool.run(consumer_id, transform, calls)
    except OSError as error:  # no process can be started now: tried again as after any failure
        return [LuaError(f"cannot be run: {error.strerror or error}", None)] * len(calls)


def settle(consumer_id: UUID, token: UUID, made: Made, version: datetime) -> list[Outgoing]:
    """Tell the store what is not delivered now. Returns what is: without what follows a failed message in its group.

    `version`: of the configuration whose function was run.
    """
    if not (made.dropped or made.failed or made.left):
        return made.ready
    errors = {message.id: error for message, error in made.failed}
    everything = [item.message for item in made.ready] + made.dropped + made.left + [message for message, _ in made.failed]
    going, failing = part_failed(sorted(everything, key=lambda message: message.id), errors)
    goes = {message.id for message in going}
    dropped = [(token, message.id) for message in made.dropped if message.id in goes]
    left = [(token, message) for message in made.left if message.id in goes]
    if dropped:
        claims.drop(consumer_id, dropped)
    if left:
        claims.give_back(consumer_id, left)
    if failing:
        claims.fail(consumer_id, [_failure(token, message, errors[message.id]) for message in failing], version)
    return [item for item in made.ready if item.message.id in goes]


def _failure(token: UUID, message: ClaimedMessage, error: LuaError) -> Failure:
    delay = delay_ms(message.deliver_count, random.uniform(-1, 1))
    return Failure(token, message.id, delay, f"transform: {error}", reason="error")
