"""Deliver again: rewind a consumer to a row, a time, an LSN or the beginning; republish what matches."""
from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.http import HttpResponse
from drf_spectacular.utils import extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from consumers import replaying
from consumers.api.body import read_object
from consumers.api.errors import BadParameter, Invalid
from consumers.api.lookup import find_consumer
from consumers.api.messages import moment, row_key
from consumers.changes import InUse
from consumers.models import Consumer
from consumers.replaying import Begun, Looked
from consumers.routing import clean_where
from consumers.store import rewinds
from consumers.store.rewinds import Oldest, OutOfReach

POINT: dict[str, serializers.Field[Any, Any, Any, Any]] = {"time": serializers.DateTimeField(), "lsn": serializers.CharField()}
COVERING: dict[str, serializers.Field[Any, Any, Any, Any]] = {"consumer": serializers.CharField(), "table": serializers.CharField()}
BEYOND_THE_LOG = inline_serializer(
    "BeyondTheLog",
    {
        "summary": serializers.CharField(),
        "oldest": inline_serializer("OldestPoint", POINT, allow_null=True, help_text="Where the log begins; null when it is empty."),
        "backfills": inline_serializer("CoveringBackfill", COVERING, many=True, help_text="What would cover it, for POST /api/backfills."),
        "backfill": inline_serializer("CoveringBackfill", COVERING, required=False, help_text="The one, when it is one."),
    },
)
POINTS = '{"table": …, "pk": […]}, {"time": …}, {"lsn": …} or "beginning"'
REWIND = inline_serializer("Rewind", {"to": serializers.JSONField(help_text=POINTS)})
REWOUND = inline_serializer(
    "Rewound",
    {
        "replay_id": serializers.UUIDField(allow_null=True, help_text="In metadata.replay_id of what comes again. Null: nothing moved."),
        "position": serializers.IntegerField(),
        "messages_estimate": serializers.IntegerField(),
        "first_commit_timestamp": serializers.DateTimeField(allow_null=True),
    },
)


class RewindView(APIView):
    """Deliver again, in order, everything from a point on. What is out becomes stale; what is parked from there on goes.

    A point ahead of the position moves nothing. 409 when the log begins later: with the oldest point there is, and the
    backfill that would cover it.
    """

    @extend_schema(request=REWIND, responses={200: REWOUND, 409: BEYOND_THE_LOG})
    def post(self, request: Request, consumer: str) -> Response:
        found = find_consumer(consumer, request.user)  # type: ignore[arg-type]
        given = read_object(request)
        if set(given) != {"to"}:
            raise BadParameter(f"expected an object with to: {POINTS}")
        if found.status == "disabled":
            raise InUse(f"{found.name} is disabled and collects nothing: enable it first")
        table = _table_of(found, given["to"])
        try:
            position = _position(found, given["to"], table)
            done = replaying.rewind(found, position, given["to"])
        except OutOfReach as error:
            return _out_of_reach(found, table, error)
        return Response(done._asdict())


REPUBLISH = inline_serializer(
    "Republish",
    {
        "where": serializers.CharField(required=False, help_text="SQL, as in a consumer's where. Empty: everything."),
        "table": serializers.CharField(required=False, help_text="Only of this one of the consumer's tables."),
        "from": serializers.ChoiceField(["log", "table"], required=False, help_text="As it was then, or as it is now. Default: log."),
        "since": serializers.DateTimeField(required=False, help_text="Of the log: committed then or later."),
        "until": serializers.DateTimeField(required=False, help_text="Of the log: committed before."),
        "dry_run": serializers.BooleanField(required=False, help_text="Count and show some; deliver nothing."),
    },
)
BEGUN = inline_serializer(
    "Begun", {"replay_id": serializers.UUIDField(), "backfills": serializers.ListField(child=serializers.UUIDField())}
)
LOOKED = inline_serializer(
    "Looked",
    {"count": serializers.IntegerField(), "is_exact": serializers.BooleanField(), "sample": serializers.ListField(child=serializers.JSONField())},
)
FIELDS = ("where", "table", "from", "since", "until", "dry_run")


class RepublishView(APIView):
    """Deliver once more what matches: of the log as it was then, or rows of the tables as they are now.

    Answers `replay_id`, and the ids below /api/backfills by which it is watched, paused and cancelled. With `dry_run` it answers
    `count`, whether that `is_exact`, and a `sample`.
    """

    @extend_schema(request=REPUBLISH, responses={201: BEGUN, 200: LOOKED})
    def post(self, request: Request, consumer: str) -> HttpResponse:
        found = find_consumer(consumer, request.user)  # type: ignore[arg-type]
        given = read_object(request)
        if unknown := [name for name in given if name not in FIELDS]:
            raise BadParameter(f"{', '.join(unknown)}: expected some of {', '.join(FIELDS)}")
        if found.status == "disabled":
            raise InUse(f"{found.name} is disabled and drops what comes: enable it first")
        where, table = _text(given, "where").strip(), _text(given, "table") or None
        origin = given.get("from", "log")
        if origin not in ("log", "table"):
            raise BadParameter(f"from: expected log or table, got {origin!r}")
        dry_run = given.get("dry_run", False)
        if not isinstance(dry_run, bool):
            raise BadParameter(f"dry_run: expected true or false, got {dry_run!r}")
        since, until = (None if given.get(name) is None else moment(name, given[name]) for name in ("since", "until"))
        if origin == "table" and (since or until):
            raise BadParameter("since, until: go with from: log; a table has its rows as they are now")
        if where:
            _grammatical(where)
        if origin == "log":
            if dry_run:
                return _looked(replaying.look_in_log(found, where, since, until, table))
            return _begun(replaying.republish_from_log(found, where, since, until, table))
        if dry_run:
            return _looked(replaying.look_in_tables(found, where, table))
        return _begun(replaying.republish_from_table(found, where, table))


def _grammatical(where: str) -> None:
    try:
        clean_where(where)
    except ValidationError as error:
        raise Invalid({"where": error.messages}) from None


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise BadParameter(f"{name}: expected a text, got {value!r}")
    return value


def _looked(found: Looked) -> HttpResponse:
    body = b'{"count":%d,"is_exact":%b,"sample":[%b]}' % (found.total, b"true" if found.is_exact else b"false", b",".join(found.sample))
    return HttpResponse(body, content_type="application/json")


def _begun(begun: Begun) -> Response:
    return Response({"replay_id": begun.replay_id, "backfills": begun.backfills}, status=201)


def _position(consumer: Consumer, to: Any, table: str | None) -> int:
    if to == "beginning":
        return rewinds.beginning()
    if not isinstance(to, dict):
        raise BadParameter(f"to: expected {POINTS}, got {to!r}")
    names = set(to)
    if names == {"time"}:
        return rewinds.before_time(consumer.pk, consumer.source_id, moment("to.time", to["time"]))
    if names == {"lsn"}:
        return rewinds.before_lsn(consumer.pk, consumer.source_id, _lsn(to["lsn"]))
    if "pk" not in names or names - {"table", "pk", "occurrence"}:
        raise BadParameter(f"to: expected {POINTS}, got {', '.join(sorted(map(str, names))) or 'nothing'}")
    occurrence = to.get("occurrence", "first")
    if occurrence not in ("first", "last"):
        raise BadParameter(f"to.occurrence: expected first or last, got {occurrence!r}")
    if table is None:
        raise BadParameter(f"to.table: is needed, because {consumer.name} has more than one table")
    row_key("to.pk", to["pk"])
    return rewinds.before_row(consumer.pk, consumer.source_id, table, to["pk"], last=occurrence == "last")


def _table_of(consumer: Consumer, to: Any) -> str | None:
    """The table named, or the only one there is."""
    table = to.get("table") if isinstance(to, dict) else None
    if table is not None:
        if not isinstance(table, str) or "." not in table or "\0" in table:
            raise BadParameter(f'to.table: expected "schema.table", got {table!r}')
        if not consumer.takes(table):
            raise BadParameter(f"to.table: {consumer.name} takes {', '.join(consumer.tables)}, and not {table}")
        return table
    named = consumer.tables and not any(name.endswith(".*") for name in consumer.tables)
    known = consumer.tables if named else rewinds.tables_of(consumer.pk)
    return known[0] if len(known) == 1 else None


def _lsn(text: Any) -> str:
    if not isinstance(text, str) or not rewinds.LSN.fullmatch(text):
        raise BadParameter(f'to.lsn: expected an LSN such as "0/1A2B", got {text!r}')
    return text


def _out_of_reach(consumer: Consumer, table: str | None, error: OutOfReach) -> Response:
    tables = [table] if table is not None else list(consumer.tables)
    oldest = error.oldest
    began = f"; it begins at {oldest.committed_at.isoformat()}" if oldest else "; it is empty"
    body = {
        "summary": f"{error}{began}. A backfill brings the rows as they are now",
        "oldest": _point(oldest),
        "backfills": [{"consumer": consumer.name, "table": name} for name in tables if not name.endswith(".*")],
    }
    if len(tables) == 1:
        body["backfill"] = {"consumer": consumer.name, "table": tables[0]}
    return Response(body, status=409)


def _point(oldest: Oldest | None) -> dict[str, Any] | None:
    if oldest is None:
        return None
    return {"time": oldest.committed_at, "lsn": oldest.lsn}
