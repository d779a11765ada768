"""Backfills: list, begin, look at, pause, resume, cancel."""
from __future__ import annotations

from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from drf_spectacular.utils import OpenApiParameter, extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.exceptions import NotFound
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from consumers import changes, replaying
from consumers.api import pages
from consumers.api.body import read_object
from consumers.api.configuration import PAGING, listing_of, typed
from consumers.api.errors import BadParameter, Invalid
from consumers.api.lookup import by_name_or_id
from consumers.api.shapes import Named, OptionalText, Shape, Text
from consumers.changes import InUse
from consumers.models import Backfill, Consumer
from consumers.store import backfills


class Value(OptionalText):
    """A value of any column, as its text; numbers may be written as such."""

    def validate_empty_values(self, data: Any) -> tuple[bool, Any]:
        return (True, None) if data is None else serializers.CharField.validate_empty_values(self, data)

    def to_internal_value(self, data: Any) -> str:
        return super().to_internal_value(str(data) if isinstance(data, (int, float)) and not isinstance(data, bool) else data)

    def to_representation(self, value: Any) -> Any:
        return value


class BackfillShape(Shape):
    name = None  # type: ignore[assignment]
    updated_at = None  # type: ignore[assignment]
    consumer = Named(queryset=Consumer.objects.all(), required=True)  # type: ignore[assignment]
    consumer_id = serializers.UUIDField(read_only=True)
    kind = serializers.CharField(read_only=True, help_text="backfill or republish")
    replay_id = serializers.UUIDField(read_only=True, allow_null=True, source="replay", help_text="Of a republish.")
    table = Text(required=True)
    where = OptionalText()
    sort_column = OptionalText()
    start_value = Value()
    status = serializers.CharField(read_only=True, help_text="running, paused, completed, cancelled or failed")
    reason = serializers.CharField(read_only=True, help_text="Why it failed, or what it waits for.")
    rows_done = serializers.IntegerField(read_only=True)
    rows_left_out = serializers.IntegerField(
        read_only=True, help_text="Of rows_done: those that came as a change meanwhile, and not as a row read."
    )
    rows_estimated = serializers.IntegerField(read_only=True, allow_null=True)
    rows_per_second = serializers.FloatField(read_only=True, allow_null=True, source="rate")
    seconds_left = serializers.FloatField(read_only=True, allow_null=True)
    ended_at = serializers.DateTimeField(read_only=True, allow_null=True)

    class Meta:
        model = Backfill
        fields = [
            "id", "consumer", "consumer_id", "kind", "replay_id", "table", "where", "sort_column", "start_value", "status", "reason", "rows_done",
            "rows_left_out", "rows_estimated", "rows_per_second", "seconds_left", "created_at", "ended_at",
        ]  # fmt: skip


# What setting the status to this does, and the word for it.
WAYS = {"paused": ("pause", "paused"), "running": ("resume", "resumed"), "cancelled": ("cancel", "cancelled")}
STATUS = inline_serializer("BackfillStatus", {"status": serializers.ChoiceField(list(WAYS))})
FIXED = "is not changed: cancel the backfill and begin another"


def reachable(request: Any) -> QuerySet[Backfill]:
    """The backfills of the consumers that the caller's token reaches."""
    found = Backfill.objects.select_related("consumer")
    return found if request.user.consumers is None else found.filter(consumer__in=request.user.consumers)


def find(request: Any, backfill_id: str) -> Backfill:
    try:
        found = reachable(request).filter(pk=UUID(backfill_id)).first()
    except ValueError:
        found = None
    if found is None:
        raise NotFound(f"there is no backfill {backfill_id!r}")
    return found


@extend_schema(
    operation_id="backfills_list", responses=listing_of(BackfillShape, "Backfill"), methods=["GET"],
    parameters=[*PAGING, OpenApiParameter("consumer", str, description="Of this consumer only."), OpenApiParameter("status", str)],
)  # fmt: skip
@extend_schema(request=BackfillShape, responses={201: BackfillShape}, methods=["POST"])
class BackfillsView(APIView):
    """All backfills, in order of creation; begin one."""

    def get(self, request: Request) -> Response:
        found = reachable(request)
        if name := request.query_params.get("consumer"):
            consumer = by_name_or_id(Consumer, name)
            found = found.filter(consumer=consumer) if consumer is not None else found.none()
        if status := request.query_params.get("status"):
            if status not in Backfill.STATUSES:
                raise BadParameter(f"status: expected one of {', '.join(Backfill.STATUSES)}, got {status!r}")
            found = found.filter(status=status)
        page, cursor = pages.page(found, request.query_params)
        return Response({"data": BackfillShape(page, many=True).data, "next": cursor})

    def post(self, request: Request) -> Response:
        given = typed(BackfillShape(data=read_object(request)))
        if not request.user.reaches(given["consumer"].pk):  # type: ignore[union-attr]
            raise Invalid({"consumer": ["there is none with this name or id"]})
        backfill = Backfill(**given)
        changes.save(backfill)
        return Response(BackfillShape(backfill).data, status=201)


@extend_schema(responses=BackfillShape, methods=["GET"])
@extend_schema(request=STATUS, responses=BackfillShape, methods=["PATCH"])
@extend_schema(responses={204: None}, methods=["DELETE"])
class BackfillView(APIView):
    """One backfill. Its status alone can be changed, which is what pause, resume and cancel do.

    Deleting one that runs cancels it; what it has brought stays.
    """

    def get(self, request: Request, backfill: str) -> Response:
        return Response(BackfillShape(find(request, backfill)).data)

    def patch(self, request: Request, backfill: str) -> Response:
        found, given = find(request, backfill), read_object(request)
        shown = BackfillShape(found).data
        status = given.pop("status", found.status)
        errors = {name: [FIXED] for name, value in given.items() if name not in shown or shown[name] != value}
        if status != found.status and (not isinstance(status, str) or status not in WAYS):
            errors["status"] = [f"expected {', '.join(WAYS)}, got {status!r}"]
        if errors:
            raise Invalid(errors)
        if status != found.status:
            act(found, *WAYS[status])
        return Response(BackfillShape(found).data)

    def delete(self, request: Request, backfill: str) -> Response:
        backfills.forget(find(request, backfill).pk)
        return Response(status=204)


def act(backfill: Backfill, what: str, verb: str) -> None:
    """Pause, resume or cancel; `backfill` is then as it is. Raises InUse."""
    done = replaying.act(backfill, what)
    backfill.refresh_from_db()
    if not done:
        raise InUse(f"the backfill is {backfill.status} and cannot be {verb}")


class ActView(APIView):
    """Answers the backfill as it is then; 409 when it is not in a state for that."""

    what = ""
    verb = ""

    @extend_schema(request=None, responses=BackfillShape)
    def post(self, request: Request, backfill: str) -> Response:
        found = find(request, backfill)
        act(found, self.what, self.verb)
        return Response(BackfillShape(found).data)


class PauseView(ActView):
    """Stop where it is; what it has brought is delivered."""

    what, verb = "pause", "paused"


class ResumeView(ActView):
    """Go on where it stopped or failed."""

    what, verb = "resume", "resumed"


class CancelView(ActView):
    """End it; what it has brought stays."""

    what, verb = "cancel", "cancelled"
