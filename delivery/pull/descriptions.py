"""What the OpenAPI document says of the pull API."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drf_spectacular.utils import OpenApiParameter, extend_schema, inline_serializer
from rest_framework import serializers

RECEIVE_PARAMETERS = [
    OpenApiParameter("batch_size", int, description="1 to 1000, default 1."),
    OpenApiParameter("max_batch_size", int, description="The same."),
    OpenApiParameter("wait_for", str, description='Milliseconds, or "60s", "5m"; 0 to 300000, default 0.'),
]
RECEIVE_BODY = inline_serializer(
    "Receive",
    {
        "batch_size": serializers.IntegerField(required=False, help_text="1 to 1000, default 1."),
        "max_batch_size": serializers.IntegerField(required=False, help_text="The same."),
        "wait_for": serializers.CharField(required=False, help_text='Milliseconds, or "60s", "5m"; 0 to 300000, default 0.'),
    },
)
RECEIVED = inline_serializer(
    "Received",
    {
        "data": inline_serializer(
            "ReceivedMessage",
            {"ack_id": serializers.CharField(), "data": serializers.JSONField(), "deliver_count": serializers.IntegerField()},
            many=True,
        )
    },
)
RECEIPTS = inline_serializer(
    "Receipts",
    {
        "ack_ids": serializers.ListField(child=serializers.CharField(), help_text="1 to 10000; ack_tokens is understood too."),
        "delay_ms": serializers.IntegerField(required=False, help_text="nack only"),
        "ack_wait_ms": serializers.IntegerField(required=False, help_text="extend only"),
    },
)


def settled(word: str) -> Any:
    """`{"success", "acked", "stale"}`."""
    fields: dict[str, Any] = {"success": serializers.BooleanField(), word: serializers.IntegerField()}
    return inline_serializer(word.capitalize(), {**fields, "stale": serializers.IntegerField()})


def described(summary: str, answer: Any, parameters: Any = None, request: Any = None) -> Callable[[Any], Any]:
    return extend_schema(summary=summary, responses=answer, parameters=parameters, request=request)
