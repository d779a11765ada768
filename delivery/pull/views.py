"""The pull API: receive, ack, nack, extend. The least per request; stored JSON is passed through, never decoded."""
from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple, cast
from uuid import UUID

from django.conf import settings
from django.db import connection
from django.http import HttpResponse
from rest_framework.views import APIView

from consumers.api.body import read_object
from consumers.store import claims, lifecycle
from consumers.store.types import Settled
from consumers.tokens import Caller
from delivery.pull.descriptions import RECEIPTS, RECEIVE_BODY, RECEIVE_PARAMETERS, RECEIVED, described, settled
from delivery.pull import directory, parameters
from delivery.pull.directory import Receiver
from delivery.pull.gates import one_of_few
from delivery.pull.waiting import room
from delivery.transforming import Outgoing, make, settle

TRANSFORM_S = 5.0  # of one receive, and at most a quarter of the time the messages are out; what is left goes back

LOOKED_AT = 500  # messages at once, when a function drops what it gets

# Claims take turns for connections, so that a thousand waiters leave some to everybody else.
_claiming = threading.BoundedSemaphore(max(1, settings.WEB_POOL_SIZE - 6))


class PullView(APIView):
    """A call on one pull consumer."""

    required_scope = "pull"
    http_method_names = ["get", "post"]  # no HEAD: it would take messages and give them to nobody

    def receiver(self, name_or_id: str) -> Receiver:
        room.listen()
        return directory.find(name_or_id, cast(Caller, self.request.user))

    def settle(self, name_or_id: str, what: str, action: Any) -> HttpResponse:
        receiver = self.receiver(name_or_id)
        given = read_object(self.request)
        ack_ids = parameters.ack_ids(given)
        receipts = claims.decode_receipts(ack_ids)
        with one_of_few(receiver.id):
            done = action(receiver, given, receipts).done
        return _json(f'{{"success":true,"{what}":{done},"stale":{len(ack_ids) - done}}}'.encode())


class ReceiveView(PullView):
    """Hand out messages, waiting for the first when asked to."""

    @described("Receive messages", RECEIVED, RECEIVE_PARAMETERS)
    def get(self, request: Any, consumer: str) -> HttpResponse:
        return self._receive(consumer, request.query_params)

    @described("Receive messages", RECEIVED, RECEIVE_PARAMETERS, RECEIVE_BODY)
    def post(self, request: Any, consumer: str) -> HttpResponse:
        return self._receive(consumer, {**request.query_params.dict(), **read_object(request)})

    def _receive(self, name_or_id: str, given: Any) -> HttpResponse:
        receiver = self.receiver(name_or_id)
        size, wait_ms = parameters.batch_size(given), parameters.wait_ms(given)
        deadline = time.monotonic() + wait_ms / 1000
        taken = _take(receiver, size)
        if not taken.ready and not taken.at_end and wait_ms == 0:
            taken = _search_on(receiver, size)
        if not taken.ready and wait_ms > 0:
            taken = self._wait(receiver, name_or_id, size, deadline)
        return _json(_body(taken))

    def _wait(self, receiver: Receiver, name_or_id: str, size: int, deadline: float) -> Taken:
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
                    receiver = self._admit_again(name_or_id)
        finally:
            connection.close()
            room.leave(waiter, more=hand_on or waiter.event.is_set())

    def _admit_again(self, name_or_id: str) -> Receiver:
        """Minutes may have passed: the token may be revoked by now, the consumer deleted or changed."""
        request = self.initialize_request(self.request._request)
        self.perform_authentication(request)
        self.check_permissions(request)
        return directory.find(name_or_id, cast(Caller, request.user))


class AckView(PullView):
    @described("Acknowledge messages", settled("acked"), request=RECEIPTS)
    def post(self, request: Any, consumer: str) -> HttpResponse:
        return self.settle(consumer, "acked", lambda receiver, given, receipts: claims.ack(receiver.id, receipts))


class NackView(PullView):
    @described("Give messages back", settled("nacked"), request=RECEIPTS)
    def post(self, request: Any, consumer: str) -> HttpResponse:
        def nack(receiver: Receiver, given: Any, receipts: Any) -> Settled:
            return claims.nack(receiver.id, receipts, parameters.delay_ms(given))

        return self.settle(consumer, "nacked", nack)


class ExtendView(PullView):
    @described("Keep messages longer", settled("extended"), request=RECEIPTS)
    def post(self, request: Any, consumer: str) -> HttpResponse:
        def extend(receiver: Receiver, given: Any, receipts: Any) -> Settled:
            settled = claims.extend(receiver.id, receipts, parameters.ack_wait_ms(given, receiver.ack_wait_ms))
            if settled.done:
                lifecycle.wake(receiver.id)  # the next lease may now end earlier than the waiters think
            return settled

        return self.settle(consumer, "extended", extend)


class Taken(NamedTuple):
    """What one claim gave, ready for the answer. Empty and not at_end: there may be more, ask again."""

    token: UUID | None
    ready: list[Outgoing]
    at_end: bool
    next_due_ms: int | None


def _take(receiver: Receiver, size: int, looked_at: int = 0) -> Taken:
    """`looked_at`: how many messages to look at, where a function drops most: what is too much goes back."""
    try:
        with one_of_few(receiver.id), _claiming:
            claim = claims.claim(receiver.id, max(size, looked_at), lease_ms=receiver.ack_wait_ms)
            if claim.token is None:
                return Taken(None, [], claim.at_end, claim.next_due_ms)
            connection.close()
        if claim.version != receiver.version:
            directory.forget()  # it was edited a moment ago
            receiver = directory.load(str(receiver.id))
            connection.close()
        made = make(receiver.id, receiver.transform, receiver.to, claim.messages, min(TRANSFORM_S, receiver.ack_wait_ms / 4000))
        ready = settle(receiver.id, claim.token, made)
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
    token = taken.token
    return (
        b'{"data":['
        + b",".join(
            b'{"ack_id":"%b","data":%b,"deliver_count":%d}'
            % (claims.encode_receipt(token, item.message.id).encode(), item.payload, item.message.deliver_count)
            for item in taken.ready
        )
        + b"]}"
    )


def _json(body: bytes) -> HttpResponse:
    return HttpResponse(body, content_type="application/json")
