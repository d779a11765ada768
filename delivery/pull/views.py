"""The pull API as DRF knows it: the OpenAPI document, and the answers to what is no call of it, such as a HEAD.

The calls themselves are answered in front of Django (`shortcut.py`), by the same functions.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

from django.http import HttpResponse
from rest_framework.views import APIView

from consumers.tokens import Caller
from delivery.pull import calls
from delivery.pull.descriptions import RECEIPTS, RECEIVE_BODY, RECEIVE_PARAMETERS, RECEIVED, described, settled


class PullView(APIView):
    """A call on one pull consumer."""

    required_scope = calls.SCOPE
    http_method_names = ["get", "post"]  # no HEAD: it would take messages and give them to nobody
    call: ClassVar[Callable[[Any, Caller, str], bytes]]

    def answer(self, request: Any, consumer: str) -> HttpResponse:
        body = type(self).call(request, cast(Caller, request.user), consumer)
        return HttpResponse(body, content_type="application/json")


class ReceiveView(PullView):
    call = calls.receive

    @described("Receive messages", RECEIVED, RECEIVE_PARAMETERS)
    def get(self, request: Any, consumer: str) -> HttpResponse:
        return self.answer(request, consumer)

    @described("Receive messages", RECEIVED, RECEIVE_PARAMETERS, RECEIVE_BODY)
    def post(self, request: Any, consumer: str) -> HttpResponse:
        return self.answer(request, consumer)


class AckView(PullView):
    call = calls.ack

    @described("Acknowledge messages", settled("acked"), request=RECEIPTS)
    def post(self, request: Any, consumer: str) -> HttpResponse:
        return self.answer(request, consumer)


class NackView(PullView):
    call = calls.nack

    @described("Give messages back", settled("nacked"), request=RECEIPTS)
    def post(self, request: Any, consumer: str) -> HttpResponse:
        return self.answer(request, consumer)


class ExtendView(PullView):
    call = calls.extend

    @described("Keep messages longer", settled("extended"), request=RECEIPTS)
    def post(self, request: Any, consumer: str) -> HttpResponse:
        return self.answer(request, consumer)
