"""What the four calls do: receive, ack, nack, extend. The least per request; stored JSON is passed through, never decoded.

Each takes a request (of which it reads `META` and the body), the caller, the consumer's name or id, and returns the answer's
body. `shortcut.py` calls them for the web server, `views.py` for Django.
"""
from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

from django.conf import settings
from django.db import connection
from django.http import QueryDict
from rest_framework.exceptions import PermissionDenied

from consumers.api.body import read_object
from consumers.queueing import FairSemaphore
from consumers.store import claims, lifecycle
from consumers.tokens import Caller, recognise
from delivery.pull import directory, parameters, receipts
from delivery.pull.directory import Receiver
from delivery.pull.gates import ACKS, AtStore
from delivery.pull.waiting import room
from delivery.transforming import Outgoing, make, settle

SCOPE = "pull"
TRANSFORM_S = 5.0  # of one receive, and at most a quarter of the time the messages are out; what is left goes back
LOOKED_AT = 500  # messages at once, when a function drops what it gets

# Claims take turns for connections, so that a thousand waiters leave some to everybody else.
_claiming = FairSemaphore(max(1, settings.WEB_POOL_SIZE - 6))


def admit(request: Any) -> Caller:
    """Who calls. Raises what DRF answers as 401, 403 and 429."""
    caller = recognise(request)
    if not caller.may(SCOPE):
        raise PermissionDenied
    return caller


def receive(request: Any, caller: Caller, consumer: str) -> bytes:
    """Hand out messages, waiting for the first when asked to."""
    receiver = _find(consumer, caller)
    given = _given(request)
    size, wait_ms = parameters.batch_size(given), parameters.wait_ms(given)
    deadline = time.monotonic() + wait_ms / 1000
    taken = _take(receiver, size)
    if not taken.ready and not taken.at_end and wait_ms == 0:
        taken = _search_on(receiver, size)
    if not taken.ready and wait_ms > 0:
        taken = _wait(request, receiver, consumer, size, deadline)
    return _body(taken)


def ack(request: Any, caller: Caller, consumer: str) -> bytes:
    receiver = _find(consumer, caller)
    ack_ids = parameters.ack_ids(read_object(request))
    held = receipts.decode(ack_ids)
    with AtStore(receiver.id, ACKS):
        done = claims.ack(receiver.id, held).done
    return _settled("acked", done, len(ack_ids))


def nack(request: Any, caller: Caller, consumer: str) -> bytes:
    receiver = _find(consumer, caller)
    given = read_object(request)
    ack_ids, delay_ms = parameters.ack_ids(given), parameters.delay_ms(given)
    held = receipts.decode(ack_ids)
    with AtStore(receiver.id):
        done = claims.nack(receiver.id, held, delay_ms).done
    return _settled("nacked", done, len(ack_ids))


def extend(request: Any, caller: Caller, consumer: str) -> bytes:
    receiver = _find(consumer, caller)
    given = read_object(request)
    ack_ids, ack_wait_ms = parameters.ack_ids(given), parameters.ack_wait_ms(given, receiver.ack_wait_ms)
    held = receipts.decode(ack_ids)
    with AtStore(receiver.id):
        done = claims.extend(receiver.id, held, ack_wait_ms).done
        if done:
            lifecycle.wake(receiver.id)  # the next lease may now end earlier than the waiters think
    return _settled("extended", done, len(ack_ids))


def _find(name_or_id: str, caller: Caller) -> Receiver:
    room.listen()
    return directory.find(name_or_id, caller)


def _given(request: Any) -> Mapping[str, Any]:
    """What the query and the body say; the body wins."""
    body = {} if request.META["REQUEST_METHOD"] == "GET" else read_object(request)
    query = request.META.get("QUERY_STRING")
    return {**QueryDict(query.encode("latin-1")).dict(), **body} if query else body


def _wait(request: Any, receiver: Receiver, consumer: str, size: int, deadline: float) -> Taken:
    waiter = room.enter(receiver)
    hand_on = True  # unless a claim ended well and found the end: then nobody else need look
    try:
        while True:
            hand_on = True
            taken = _take(receiver, size)
            hand_on = len(taken.ready) >= size or not taken.at_end
            left = deadline - time.monotonic()
            if taken.ready or left <= 0 or room.is_closed:
                return taken
            if taken.at_end:
                room.rearm(waiter, taken.next_due_ms)
                if not waiter.event.wait(left) or room.is_closed:
                    return taken
                hand_on = True
                waiter.event.clear()
                # Minutes may have passed: the token may be revoked by now, the consumer deleted or changed.
                receiver = directory.find(consumer, admit(request))
                room.know(receiver)
    finally:
        connection.close()
        room.leave(waiter, more=hand_on)


class Taken(NamedTuple):
    """What one claim gave, ready for the answer. Empty and not at_end: there may be more, ask again."""

    token: UUID | None
    ready: list[Outgoing]
    at_end: bool
    next_due_ms: int | None


def _take(receiver: Receiver, size: int, looked_at: int = 0) -> Taken:
    """`looked_at`: how many messages to look at, where a function drops most: what is too much goes back."""
    try:
        with AtStore(receiver.id), _claiming:
            claim = claims.claim(receiver.id, max(size, looked_at), lease_ms=receiver.ack_wait_ms)
        if claim.version is not None and claim.version != receiver.version:
            directory.forget()  # it was edited a moment ago
            receiver = directory.load(str(receiver.id))
            connection.close()
            room.know(receiver)
        if claim.token is None:
            return Taken(None, [], claim.at_end, claim.next_due_ms)
        made = make(receiver.id, receiver.transform, receiver.to, claim.messages, min(TRANSFORM_S, receiver.ack_wait_ms / 4000))
        ready = settle(receiver.id, claim.token, made, receiver.version)
        if len(ready) > size:
            claims.give_back(receiver.id, [(claim.token, item.message) for item in ready[size:]])
        return Taken(claim.token, ready[:size], claim.at_end and len(ready) == len(claim.messages) <= size, None)
    finally:
        connection.close()  # back to the pool before anybody waits


def _search_on(receiver: Receiver, size: int) -> Taken:
    """An empty answer has to mean empty: go on until there is a message or the end of the log."""
    looked_at = size
    while True:
        looked_at = min(2 * looked_at, LOOKED_AT) if receiver.transform else size
        taken = _take(receiver, size, looked_at)
        if taken.ready or taken.at_end:
            return taken


def _body(taken: Taken) -> bytes:
    if taken.token is None:
        return b'{"data":[]}'
    pieces = [b'{"data":[']
    comma = b""
    ack_ids = receipts.encode(taken.token, [message.id for message, _ in taken.ready])
    for ack_id, (message, payload) in zip(ack_ids, taken.ready, strict=True):
        # Formatting would copy the payload several times over.
        pieces += (b'%b{"ack_id":"%b","data":' % (comma, ack_id), payload, b',"deliver_count":%d}' % message.deliver_count)
        comma = b","
    pieces.append(b"]}")
    return b"".join(pieces)


def _settled(what: str, done: int, asked: int) -> bytes:
    return f'{{"success":true,"{what}":{done},"stale":{asked - done}}}'.encode()
