"""`POST /api/consumers/{c}/test`: a `where` and a `transform` on recent or pasted messages, before anything is saved."""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from django.http import HttpResponse
from drf_spectacular.utils import extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.views import APIView

from consumers import trying
from consumers.api.body import Numbers, read_object
from consumers.api.errors import BadParameter
from consumers.api.lookup import find_consumer
from consumers.models import Consumer
from consumers.trying import MOST, Tried

RECENT = 10
FIELDS = ("where", "transform", "messages", "recent")
TRIAL = inline_serializer(
    "Trial",
    {
        "where": serializers.CharField(required=False, help_text="Instead of the consumer's; null or empty: none."),
        "transform": serializers.CharField(required=False, help_text="Instead of the consumer's; null or empty: none."),
        "messages": serializers.ListField(child=serializers.JSONField(), required=False, help_text="As they are delivered; `record` at least."),
        "recent": serializers.IntegerField(required=False, help_text=f"Instead: so many of the newest, at most {MOST}."),
    },
)


TRIED = inline_serializer(
    "Tried",
    {
        "data": inline_serializer(
            "TriedMessage",
            {
                "matched": serializers.BooleanField(allow_null=True, help_text="null: the filter failed; error says why."),
                "undecided": serializers.BooleanField(),
                "error": inline_serializer(
                    "Problem", {"message": serializers.CharField(), "line": serializers.IntegerField(allow_null=True)}, allow_null=True
                ),
                "message": serializers.JSONField(),
                "payload": serializers.JSONField(allow_null=True, help_text="What would be delivered; null: nothing."),
            },
            many=True,
        ),
        "notices": inline_serializer("Notice", {"text": serializers.CharField(), "sql": serializers.CharField()}, many=True),
    },
)


class TestView(APIView):
    """Nothing is delivered or saved. An invalid `where` or `transform` is a 422, as when it is saved."""

    @extend_schema(request=TRIAL, responses=TRIED)
    def post(self, request: Request, consumer: str) -> HttpResponse:
        found = find_consumer(consumer, request.user)  # type: ignore[arg-type]
        numbers = Numbers()
        given = read_object(request, numbers)
        return HttpResponse(answer(found, given, numbers.written), content_type="application/json")


def answer(consumer: Consumer, given: dict[str, Any], written: Callable[[Any], str]) -> bytes:
    """Try what a request gives on a consumer, which is not saved. `written` makes JSON of a part of it again."""
    if unknown := sorted(set(given) - set(FIELDS)):
        raise BadParameter(f"{', '.join(unknown)}: not a field; expected some of {', '.join(FIELDS)}")
    for field in ("where", "transform"):
        if field in given:
            text = given[field] or ""
            if not isinstance(text, str):
                raise BadParameter(f"{field}: expected a text")
            setattr(consumer, field, text.strip() and text)
    notices = trying.check(consumer)
    messages, recent = given.get("messages"), given.get("recent", RECENT)
    if messages is not None:
        if not isinstance(messages, list) or len(messages) > MOST:
            raise BadParameter(f"messages: expected a list of at most {MOST} messages")
        samples = trying.pasted(consumer, messages, written)
    else:
        if isinstance(recent, bool) or not isinstance(recent, int) or not 1 <= recent <= MOST:
            raise BadParameter(f"recent: expected a number from 1 to {MOST}")
        samples = trying.recent(consumer, recent)
    rows = b",".join(map(_row, trying.run(consumer, samples)))
    told = json.dumps([notice._asdict() for notice in notices], ensure_ascii=False).encode()
    return b'{"data":[%b],"notices":%b}' % (rows, told)


def _row(tried: Tried) -> bytes:
    head = {"matched": tried.matched, "undecided": tried.undecided, "error": None if tried.error is None else tried.error._asdict()}
    return b'{%b,"message":%b,"payload":%b}' % (json.dumps(head, ensure_ascii=False).encode()[1:-1], tried.before, tried.payload or b"null")
