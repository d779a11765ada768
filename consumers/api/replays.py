"""Deliver again: rewind a consumer to a row, a time, an LSN or the beginning."""
from __future__ import annotations

import re
from typing import Any

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from consumers.api.body import read_object
from consumers.api.errors import BadParameter
from consumers.api.lookup import find_consumer
from consumers.api.messages import moment, row_key
from consumers.changes import InUse
from consumers.models import Consumer
from consumers.store import rewinds
from consumers.store.rewinds import Oldest, OutOfReach

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

    @extend_schema(request=REWIND, responses={200: REWOUND, 409: OpenApiTypes.OBJECT})
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
            done = rewinds.rewind(found.pk, found.source_id, position)
        except OutOfReach as error:
            return _out_of_reach(found, table, error)
        return Response(done._asdict())


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
        return table
    named = consumer.tables and not any(name.endswith(".*") for name in consumer.tables)
    known = consumer.tables if named else rewinds.tables_of(consumer.pk)
    return known[0] if len(known) == 1 else None


def _lsn(text: Any) -> str:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}", text):
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
