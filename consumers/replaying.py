"""What people do to deliver again: rewind, republish, and act on backfills. The one path of API and console, with its audit entries."""
from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from django.core.exceptions import ValidationError
from django.db import connection, transaction

from consumers import audit, republishing, trying
from consumers.backfill_rules import inspect, look_at_rows, tables_to_backfill
from consumers.filters import checking
from consumers.filters.column_types import table_of
from consumers.filters.grammar import Refused, parse
from consumers.models import Backfill, Consumer
from consumers.publishing import SetupRefused, as_validation
from consumers.routing import told
from consumers.source_connection import SourceUnreachable
from consumers.store import backfills, rewinds
from consumers.store.rewinds import Rewound
from consumers.store.types import stored_shape

SAMPLE = 10
_SHAPES_SQL = """
    SELECT DISTINCT ON (r.schema_name, r.table_name) r.oid, r.schema_name, r.table_name, r.columns::text, r.primary_key, r.replica_identity
    FROM relation_version r WHERE r.source = %(source)s AND (%(tables)s::text[] = '{}'
      OR r.schema_name || '.' || r.table_name = ANY (%(tables)s) OR r.schema_name || '.*' = ANY (%(tables)s))
    ORDER BY r.schema_name, r.table_name, r.seen_at DESC, r.id DESC
"""
ACTS: dict[str, Callable[[UUID], bool]] = {"pause": backfills.pause, "resume": backfills.resume, "cancel": backfills.cancel}


class Looked(NamedTuple):
    """What a republish would bring."""

    total: int
    is_exact: bool
    sample: list[bytes]
    """Messages, or rows of the table, as JSON."""


class Begun(NamedTuple):
    replay_id: UUID
    backfills: list[UUID]
    """What workers get on with: one from the log, or one a table."""


def rewind(consumer: Consumer, position: int, to: Any) -> Rewound:
    """Deliver again everything beyond `position`, which is where `to` was found. Raises OutOfReach."""
    with transaction.atomic():
        done = rewinds.rewind(consumer.pk, consumer.source_id, position)
        if done.replay_id is not None:
            # A key may be what somebody asks to have erased: it is not written down anew.
            told_to = {name: value for name, value in to.items() if name != "pk"} if isinstance(to, dict) else to
            audit.record("rewind", consumer, done.messages_estimate, to=told_to, replay_id=done.replay_id)
    return done


def act(backfill: Backfill, what: str) -> bool:
    """Pause, resume or cancel. False when it is not in a state for that."""
    with transaction.atomic():
        done = ACTS[what](backfill.pk)
        if done:
            audit.record(f"{what} backfill", backfill.consumer, backfill=backfill.pk, table=backfill.table)
    return done


def republish_from_log(consumer: Consumer, where: str, since: datetime | None, until: datetime | None, table: str | None) -> Begun:
    """Deliver once more what matches of the log as it is now. Raises ValidationError."""
    _check_in_log(consumer, where, table)
    begun = Begun(uuid4(), [uuid4()])
    with transaction.atomic():
        backfills.begin(
            begun.backfills[0], consumer_id=consumer.pk, source_id=consumer.source_id, table=table or "", where=where, since=since,
            until=until, replay_id=begun.replay_id, from_log=True,
        )  # fmt: skip
        audit.record("republish", consumer, where=where, since=since, until=until, table=table, replay_id=begun.replay_id)
    return begun


def republish_messages(consumer: Consumer, ids: list[int]) -> int:
    """Deliver these messages of the log once more. Returns how many the log still has."""
    replay_id = uuid4()
    with transaction.atomic():
        audit.record("republish", consumer, len(ids), ids=ids[:20], replay_id=replay_id)
        return rewinds.copy(consumer.pk, consumer.source_id, ids, replay_id)


def republish_from_table(consumer: Consumer, where: str, table: str | None) -> Begun:
    """Deliver the rows that match of the consumer's tables, or of one, as they are now. Raises ValidationError."""
    begun = Begun(uuid4(), [])
    try:
        found = [(name, inspect(consumer.source, name, where=where)) for name in _tables(consumer, table)]
    except (SourceUnreachable, SetupRefused) as error:
        raise as_validation(error, "consumer") from None
    with transaction.atomic():
        for name, barrier in found:
            begun.backfills.append(uuid4())
            backfills.begin(
                begun.backfills[-1], consumer_id=consumer.pk, source_id=consumer.source_id, table=name, where=where,
                barrier_xid=barrier, replay_id=begun.replay_id,
            )  # fmt: skip
        audit.record("republish", consumer, where=where, tables=[name for name, _ in found], replay_id=begun.replay_id)
    return begun


def look_in_log(consumer: Consumer, where: str, since: datetime | None, until: datetime | None, table: str | None) -> Looked:
    """Count what `republish_from_log` would bring, and show some. Raises ValidationError."""
    _check_in_log(consumer, where, table)
    try:
        found = republishing.look(consumer.pk, consumer.source_id, where, table or "", since, until, SAMPLE)
    except republishing.CannotJudge as error:
        raise ValidationError({"where": str(error)}) from None
    samples = [sample for number in found.sample if (sample := trying.stored(consumer, number)) is not None]
    return Looked(found.matching, found.is_complete, [sample.whole for sample in samples])


def look_in_tables(consumer: Consumer, where: str, table: str | None) -> Looked:
    """Count what `republish_from_table` would bring, and show some rows. Raises ValidationError."""
    total, is_exact = 0, True
    sample: list[bytes] = []
    try:
        for name in _tables(consumer, table):
            inspect(consumer.source, name, where=where)
            rows = look_at_rows(consumer.source, name, where, SAMPLE - len(sample))
            total += rows.total
            is_exact = is_exact and rows.is_exact
            sample += rows.sample
    except (SourceUnreachable, SetupRefused) as error:
        raise as_validation(error, "consumer") from None
    return Looked(total, is_exact, sample)


def _tables(consumer: Consumer, table: str | None) -> list[str]:
    tables = tables_to_backfill(consumer.source, consumer.tables)
    if table is None:
        return tables
    if table not in tables:
        raise ValidationError({"table": f"{table} is not one of the consumer's tables: expected one of {', '.join(tables)}"})
    return [table]


def _check_in_log(consumer: Consumer, where: str, table: str | None) -> None:
    """Against the tables as the log has them last: the source need not answer."""
    names = consumer.tables if table is None else [table]
    with connection.cursor() as cursor:
        cursor.execute(_SHAPES_SQL, {"source": consumer.source_id, "tables": names})
        rows = cursor.fetchall()
    if table is not None and not rows:
        raise ValidationError({"table": f"the log has nothing of {table}"})
    if not where:
        return
    tables = [
        table_of(connection.connection, stored_shape(oid, schema, name, json.loads(columns), key, identity))
        for oid, schema, name, columns, key, identity in rows
    ]
    try:
        checking.check(parse(where), tables)
    except Refused as refused:
        raise ValidationError({"where": told(refused, where)}) from None
