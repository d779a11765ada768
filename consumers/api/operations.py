"""What is done to sources and consumers besides configuring them: check, tables, pause, resume."""
from __future__ import annotations

from drf_spectacular.utils import extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from consumers import changes, source_setup
from consumers.api.configuration import SavedConsumerShape, save, whole
from consumers.api.lookup import demand_all, find, find_consumer
from consumers.api.shapes import SourceShape
from consumers.changes import InUse
from consumers.preflight import findings
from consumers.models import Consumer, Source, SourceEvent

FINDING = inline_serializer(
    "Finding",
    {
        "name": serializers.CharField(),
        "ok": serializers.BooleanField(),
        "blocking": serializers.BooleanField(),
        "text": serializers.CharField(),
        "sql": serializers.CharField(help_text="What mends it; empty when nothing does or nothing must."),
    },
    many=True,
)
TABLE = inline_serializer(
    "Table",
    {
        "name": serializers.CharField(),
        "published": serializers.BooleanField(),
        "primary_key": serializers.ListField(child=serializers.CharField()),
        "replica_identity": serializers.CharField(),
    },
    many=True,
)


EVENT = inline_serializer(
    "Event",
    {
        "at": serializers.DateTimeField(),
        "kind": serializers.CharField(),
        "table": serializers.CharField(allow_null=True),
        "text": serializers.CharField(),
        "backfill": serializers.BooleanField(help_text="A backfill of the table brings what was not sent."),
    },
    many=True,
)


class SourceCheckView(APIView):
    """The pre-flight: what is right and wrong with a source, each with the SQL that mends it."""

    @extend_schema(request=None, responses=inline_serializer("Check", {"ok": serializers.BooleanField(), "data": FINDING}))
    def post(self, request: Request, name: str) -> Response:
        demand_all(request.user)  # type: ignore[arg-type]
        found = findings(find(Source, name))
        ok = all(finding.ok or not finding.blocking for finding in found)
        return Response({"ok": ok, "data": [finding._asdict() for finding in found]})


class AcknowledgeGapView(APIView):
    """Somebody knows that changes may be missing: health no longer fails for it."""

    @extend_schema(request=None, responses=inline_serializer("Acknowledged", {"acknowledged": serializers.BooleanField()}))
    def post(self, request: Request, name: str) -> Response:
        demand_all(request.user)  # type: ignore[arg-type]
        return Response({"acknowledged": changes.acknowledge_gap(find(Source, name))})


class RecoverView(APIView):
    """Make a lost or missing slot anew. What was missed shows as a gap, which a backfill fills."""

    @extend_schema(request=None, responses=SourceShape)
    def post(self, request: Request, name: str) -> Response:
        demand_all(request.user)  # type: ignore[arg-type]
        source = find(Source, name)
        changes.recover(source)
        return Response(SourceShape(source).data)


class SourceEventsView(APIView):
    """What happened to a source: gaps, changed tables, rows rewritten without being sent. The newest 500."""

    @extend_schema(responses=inline_serializer("Events", {"data": EVENT, "next": serializers.CharField(allow_null=True)}))
    def get(self, request: Request, name: str) -> Response:
        demand_all(request.user)  # type: ignore[arg-type]
        found = SourceEvent.objects.filter(source=find(Source, name).pk)[:500]
        shown = [
            {"at": event.at, "kind": event.kind, "table": event.table_name, "text": event.text, "backfill": event.backfill}
            for event in found
        ]
        return Response({"data": shown, "next": None})


class SourceTablesView(APIView):
    """The tables of a source that can be published, and whether they are."""

    @extend_schema(responses=inline_serializer("Tables", {"data": TABLE, "next": serializers.CharField(allow_null=True)}))
    def get(self, request: Request, name: str) -> Response:
        demand_all(request.user)  # type: ignore[arg-type]
        return Response({"data": source_setup.all_tables(find(Source, name)), "next": None})


class PauseView(APIView):
    """Stop delivering and go on collecting."""

    @extend_schema(request=None, responses=SavedConsumerShape)
    def post(self, request: Request, name: str) -> Response:
        consumer = find_consumer(name, request.user)  # type: ignore[arg-type]
        return Response(whole(set_status(consumer, "paused")))


class ResumeView(APIView):
    """Deliver again, what was collected first."""

    @extend_schema(request=None, responses=SavedConsumerShape)
    def post(self, request: Request, name: str) -> Response:
        consumer = find_consumer(name, request.user)  # type: ignore[arg-type]
        return Response(whole(set_status(consumer, "active")))


def set_status(consumer: Consumer, status: str) -> Consumer:
    """Pause or resume. A disabled consumer collects nothing, so there is nothing to pause or resume: InUse."""
    if consumer.status == "disabled":
        raise InUse(f"{consumer.name} is disabled: enable it with PATCH status, then it begins at the end of the log")
    if consumer.status != status:
        consumer.status = status
        save(consumer)
    return consumer
