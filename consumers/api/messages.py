"""A consumer's messages: look at them by state, retry or discard the parked ones."""
from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.http import HttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from consumers import audit
from consumers.api import message_log, pages
from consumers.api.body import read_object
from consumers.api.configuration import PAGING
from consumers.api.errors import BadParameter
from consumers.api.lookup import find_consumer
from consumers.api.message_log import STATES, ListedMessage
from consumers.envelope import addressing, render
from consumers.models import Consumer
from consumers.store import lifecycle
from consumers.store.types import key_text

MAX_IDS = 10_000
MAX_ID = 2**63 - 1
CHOSEN = ("ids", "state", "since", "until", "pk")
REDRIVE = inline_serializer(
    "Chosen",
    {
        "ids": serializers.ListField(child=serializers.IntegerField(), required=False),
        "state": serializers.ChoiceField(["parked", "dead"], required=False),
        "since": serializers.DateTimeField(required=False),
        "until": serializers.DateTimeField(required=False),
        "pk": serializers.ListField(child=serializers.CharField(), required=False),
    },
)
LISTED = inline_serializer(
    "Messages",
    {
        "data": inline_serializer(
            "Message",
            {
                "id": serializers.IntegerField(),
                "state": serializers.ChoiceField(STATES),
                "reason": serializers.ChoiceField(["retry", "blocked", "error"], allow_null=True, help_text="Of parked ones."),
                "deliver_count": serializers.IntegerField(),
                "last_error": serializers.CharField(allow_null=True),
                "last_status": serializers.IntegerField(allow_null=True),
                "due_at": serializers.DateTimeField(allow_null=True, help_text="When it is tried again, or its lease ends."),
                "message": serializers.JSONField(help_text="As it is delivered, before the transform."),
            },
            many=True,
        ),
        "next": serializers.CharField(allow_null=True),
    },
)
COUNT = inline_serializer("Count", {"count": serializers.IntegerField()})


class MessagesView(APIView):
    """`?state=&pk=&since=`, each of them optional. In the order of the log; passed ones alone newest first."""

    @extend_schema(
        parameters=[
            OpenApiParameter("state", str, enum=STATES, description="Default: all of them."),
            OpenApiParameter("pk", str, many=True, description="Once for each key column."),
            OpenApiParameter("since", OpenApiTypes.DATETIME),
            *PAGING,
        ],
        responses=LISTED,
    )
    def get(self, request: Request, consumer: str) -> HttpResponse:
        found = find_consumer(consumer, request.user)  # type: ignore[arg-type]
        given = request.query_params
        size = pages.limit(given)
        state = given.get("state") or None
        if state is not None and state not in STATES:
            raise BadParameter(f"state: expected one of {', '.join(STATES)}, got {state!r}")
        keys = given.getlist("pk")
        since = given.get("since") or None
        try:
            listed = message_log.list_messages(
                found.pk, state, after=_after(given), key=row_key("pk", keys) if keys else None,
                since=None if since is None else moment("since", since), limit=size + 1,
            )  # fmt: skip
        except message_log.TooSlow:
            raise BadParameter("the search took too long: narrow it with since") from None
        cursor = pages.encode(listed[size - 1].id) if len(listed) > size else None
        return _answer(found, listed[:size], cursor)


class RedriveView(APIView):
    """`{"ids": […]}` or `{"state": "dead", "since", "until", "pk"}`."""

    act: Any = None
    action = ""  # in the audit log

    @extend_schema(request=REDRIVE, responses=COUNT)
    def post(self, request: Request, consumer: str) -> Response:
        found = find_consumer(consumer, request.user)  # type: ignore[arg-type]
        ids, chosen = _chosen(read_object(request))
        count = type(self).act(found.pk, ids, **chosen)
        # A key may be what somebody asks to have erased: it is not written down anew.
        audit.record(self.action, found, count, **{name: value for name, value in chosen.items() if name != "key"})
        return Response({"count": count})


class RetryView(RedriveView):
    """Deliver parked messages and dead letters again, now."""

    act = staticmethod(lifecycle.retry)
    action = "retry"


class DiscardView(RedriveView):
    """Drop parked messages and dead letters."""

    act = staticmethod(lifecycle.discard)
    action = "discard"


def moment(name: str, text: Any) -> datetime:
    """An ISO 8601 moment with its offset."""
    try:
        found = datetime.fromisoformat(text.replace(" ", "+"))  # a + in a query string arrives as a space
    except (ValueError, AttributeError):
        found = None
    if found is None or found.tzinfo is None:
        raise BadParameter(f'{name}: expected ISO 8601 with an offset, such as "2026-11-24T10:00:00Z", got {text!r}')
    return found


def row_key(name: str, values: Any) -> str:
    """A row's key as capture writes it."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadParameter(f"{name}: expected a list of texts, got {values!r}")
    text = key_text(values)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadParameter(f"{name}: is not a text") from None
    return text


def _chosen(given: Mapping[str, Any]) -> tuple[list[int] | None, dict[str, Any]]:
    unknown = [name for name in given if name not in CHOSEN]
    if unknown:
        raise BadParameter(f"{', '.join(unknown)}: expected ids, or state with since, until and pk")
    ids, state = given.get("ids"), given.get("state")
    if (ids is None) == (state is None):
        raise BadParameter("expected either ids or state")
    if ids is not None:
        if len(given) > 1:
            raise BadParameter("ids: since, until and pk go with state")
        return _ids(ids), {}
    if state not in ("parked", "dead"):
        raise BadParameter(f"state: expected parked or dead, got {state!r}")
    chosen: dict[str, Any] = {"state": state}
    for name in ("since", "until"):
        if given.get(name) is not None:
            chosen[name] = moment(name, given[name])
    pk = given.get("pk")
    if pk is not None:
        row_key("pk", pk)
        chosen["key"] = pk
    return None, chosen


def _ids(ids: Any) -> list[int]:
    valid = isinstance(ids, list) and all(
        not isinstance(item, bool) and isinstance(item, int) and 0 <= item <= MAX_ID for item in ids
    )
    if not valid or not 1 <= len(ids) <= MAX_IDS:
        raise BadParameter(f"ids: expected 1 to {MAX_IDS} whole numbers, the `id` of messages")
    return list(ids)


def _after(given: Mapping[str, str]) -> int | None:
    place = pages.decode(given)
    if place is None:
        return None
    if len(place) != 1 or isinstance(place[0], bool) or not isinstance(place[0], int) or not 0 <= place[0] <= MAX_ID:
        raise BadParameter("cursor: expected the `next` of an earlier answer")
    return place[0]


def _answer(consumer: Consumer, listed: list[ListedMessage], cursor: str | None) -> HttpResponse:
    source = consumer.source
    to = addressing(
        consumer_id=consumer.pk, consumer_name=consumer.name, source_id=source.pk, source_name=source.name,
        database=source.database, stream=consumer.stream,
    )  # fmt: skip
    rows = b",".join(
        b'{%b,"message":%b}' % (json.dumps(_standing(message))[1:-1].encode(), render(message, to)) for message in listed
    )
    body = b'{"data":[%b],"next":%b}' % (rows, json.dumps(cursor).encode())
    return HttpResponse(body, content_type="application/json")


def _standing(message: ListedMessage) -> dict[str, Any]:
    return {
        "id": message.id,
        "state": message.state,
        "reason": message.reason if message.state == "parked" else None,
        "deliver_count": message.deliver_count,
        "last_error": message.last_error,
        "last_status": message.last_status,
        "due_at": message.due_at.isoformat() if message.due_at else None,
    }
