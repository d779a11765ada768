"""Run a `where` and a `transform` on messages before they are saved: recent ones of the log, or pasted ones.

Nothing is handed out or counted. The same code judges and transforms as for deliveries.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psycopg
from django.core.exceptions import ValidationError
from django.db import connection, transaction

from consumers.envelope import Addressing, addressing, metadata, render
from consumers.filters import statements
from consumers.filters.checking import Notice
from consumers.filters.column_types import table_of
from consumers.filters.filtering import TIMEOUT_MS, filtering
from consumers.filters.grammar import Condition, Refused, parse
from consumers.filters.rewriting import fit
from consumers.filters.statements import DROPS, PASSES, UNDECIDED
from consumers.lua.pool import Pool
from consumers.lua.types import Call, LuaError, Result
from consumers.models import Consumer
from consumers.routing import check_where, clean_transform, clean_where
from consumers.source_connection import connect
from consumers.source_tables import read_shapes
from consumers.store.types import ACTIONS, ClaimedMessage, RelationShape, stored_shape

MOST = 100
LOOK_BACK = 100_000  # messages of the log, for recent ones
_pool = Pool(live=8)

_COLUMNS = """
    SELECT m.id, m.action::text, r.schema_name, r.table_name, m.record, m.changes, m.key, m.commit_lsn, m.commit_idx,
           to_char(m.committed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), m.epoch, m.unchanged, m.old_values_known,
           m.annotations, m.source, m.backfill, r.oid, r.columns::text, r.primary_key, r.replica_identity
"""
_RECENT_SQL = f"""{_COLUMNS}
    FROM messages m JOIN relation_version r ON r.id = m.relation
    WHERE m.source = %(source)s AND m.id > (SELECT coalesce(max(id), 0) FROM messages WHERE source = %(source)s) - %(back)s
      AND (m.consumer IS NULL OR m.consumer = %(consumer)s)
      AND CASE m.action WHEN 'I' THEN 'insert' WHEN 'U' THEN 'update' WHEN 'D' THEN 'delete' WHEN 'T' THEN 'truncate' ELSE 'read' END
          = ANY (%(actions)s::text[] || 'read'::text)
      AND (%(tables)s::text[] = '{{}}' OR r.schema_name || '.' || r.table_name = ANY (%(tables)s) OR r.schema_name || '.*' = ANY (%(tables)s))
    ORDER BY m.id DESC LIMIT %(count)s
"""
_STORED_SQL = f"""{_COLUMNS}
    FROM (SELECT * FROM messages x WHERE x.source = %(source)s AND x.id = %(id)s
          UNION ALL SELECT * FROM kept_messages x WHERE x.source = %(source)s AND x.id = %(id)s LIMIT 1) m
    JOIN relation_version r ON r.id = m.relation
"""
_SHAPE_SQL = """
    SELECT oid, schema_name, table_name, columns::text, primary_key, replica_identity FROM relation_version
    WHERE source = %s AND schema_name = %s AND table_name = %s ORDER BY seen_at DESC, id DESC LIMIT 1
"""


class Sample(NamedTuple):
    """A message to try with, as JSON texts."""

    action: str
    record: str
    changes: str | None
    metadata: str
    whole: bytes
    old_values_known: bool
    shape: RelationShape
    undecided: tuple[str, bytes]
    """`metadata` and `whole` as they are when the filter lets it through undecided."""


class Problem(NamedTuple):
    """Why the filter or the function failed on a message; `line` of the function's text, from 1."""

    message: str
    line: int | None


class Tried(NamedTuple):
    """What would become of one message. `matched` None: the filter failed; `payload` None: nothing would be delivered."""

    matched: bool | None
    undecided: bool
    before: bytes
    payload: bytes | None
    error: Problem | None


def check(consumer: Consumer) -> list[Notice]:
    """What saving would say of its `where` and `transform`. Raises ValidationError."""
    errors: dict[str, Any] = {}
    for field, clean in (("where", clean_where), ("transform", clean_transform)):
        try:
            if getattr(consumer, field):
                clean(getattr(consumer, field))
        except ValidationError as error:
            errors[field] = error.messages
    if errors:
        raise ValidationError(errors)
    return check_where(consumer)


def recent(consumer: Consumer, count: int) -> list[Sample]:
    """The newest messages of its tables and actions, in the order of the log, whatever its filter says."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT set_config('statement_timeout', '5000', true)")
        cursor.execute(
            _RECENT_SQL,
            {
                "source": consumer.source_id, "consumer": consumer.pk, "actions": consumer.actions, "tables": consumer.tables,
                "count": count, "back": LOOK_BACK,
            },
        )  # fmt: skip
        rows = cursor.fetchall()
    return [_sample(row, address_of(consumer)) for row in reversed(rows)]


def stored(consumer: Consumer, message_id: int) -> Sample | None:
    """One message of the log, whoever it is for; None when it is not there."""
    with connection.cursor() as cursor:
        cursor.execute(_STORED_SQL, {"source": consumer.source_id, "id": message_id})
        row = cursor.fetchone()
    return None if row is None else _sample(row, address_of(consumer))


def _sample(row: tuple[Any, ...], to: Addressing) -> Sample:
    (
        number, action, schema, table, record, changes, key, lsn, index, at, epoch, unchanged, known, notes, source, backfill, oid, columns,
        primary_key, identity,
    ) = row  # fmt: skip
    message = ClaimedMessage(
        number, 1, 0, None, None, ACTIONS[action], schema, table, record, changes, key, lsn, index, at, epoch, unchanged, known,
        notes, source, backfill,
    )  # fmt: skip
    shape = stored_shape(oid, schema, table, json.loads(columns), primary_key, identity)
    unsure = message._replace(where_undecided=True)
    return Sample(
        message.action, record, changes, metadata(message, to), render(message, to), known, shape, (metadata(unsure, to), render(unsure, to))
    )


def pasted(consumer: Consumer, messages: Sequence[Any], written: Callable[[Any], str]) -> list[Sample]:
    """Messages as they were delivered once, or as somebody wrote them: `record` at least. Raises ValidationError.

    `written` makes a part of them JSON again, with all the digits it came with.
    """
    samples = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("record"), dict):
            raise ValidationError({"messages": f"message {number}: expected an object with a record, as it is delivered"})
        metadata_of = message.get("metadata")
        about: dict[str, Any] = metadata_of if isinstance(metadata_of, dict) else {}
        action = message.get("action") or ("update" if message.get("changes") else "insert")
        if action not in ACTIONS.values():
            raise ValidationError({"messages": f"message {number}: action: expected one of {', '.join(ACTIONS.values())}"})
        record, changes = written(message["record"]), message.get("changes")
        unsure = {**about, "where_undecided": True}
        whole, whole_unsure = (
            f'{{"record":{record},"metadata":{written(told)}}}' if consumer.stream == "rows" else written({**message, **extra})
            for told, extra in ((about, {}), (unsure, {"metadata": unsure}))
        )
        samples.append(
            Sample(
                action, record, written(changes) if isinstance(changes, dict) else None, written(about), whole.encode(),
                about.get("old_values_known", True) is True, _shape_of(consumer, about, number), (written(unsure), whole_unsure.encode()),
            )
        )  # fmt: skip
    return samples


def run(consumer: Consumer, samples: Sequence[Sample]) -> list[Tried]:
    """Judge and transform each sample by the consumer's `where` and `transform`."""
    condition = parse(consumer.where) if consumer.where else None
    verdicts = [_judge(condition, sample) for sample in samples]
    chosen = [number for number, verdict in enumerate(verdicts) if verdict in (PASSES, UNDECIDED)]
    delivered = [_delivered(samples[number], verdicts[number] == UNDECIDED) for number in chosen]
    results: list[Result] = [sample.whole for sample in delivered]
    if consumer.transform:
        results = _pool.run("trying", consumer.transform, [_call(sample) for sample in delivered])
    made = dict(zip(chosen, results, strict=True))
    return [_tried(sample, verdict, made.get(number)) for number, (sample, verdict) in enumerate(zip(samples, verdicts, strict=True))]


def _delivered(sample: Sample, undecided: bool) -> Sample:
    return sample._replace(metadata=sample.undecided[0], whole=sample.undecided[1]) if undecided else sample


def _tried(sample: Sample, verdict: int | Problem, result: Result) -> Tried:
    if isinstance(verdict, Problem):
        return Tried(None, False, sample.whole, None, verdict)
    matched, undecided = verdict != DROPS, verdict == UNDECIDED
    if isinstance(result, LuaError):
        return Tried(matched, undecided, sample.whole, None, Problem(*result))
    return Tried(matched, undecided, sample.whole, result, None)


def address_of(consumer: Consumer) -> Addressing:
    source = consumer.source
    return addressing(
        consumer_id=consumer.pk, consumer_name=consumer.name, source_id=source.pk, source_name=source.name, database=source.database,
        stream=consumer.stream,
    )  # fmt: skip


def _judge(condition: Condition | None, sample: Sample) -> int | Problem:
    if condition is None:
        return PASSES
    with connection.cursor() as cursor:
        cursor.execute("SELECT quote_ident(relnamespace::regnamespace::text) FROM pg_class WHERE oid = 'messages'::regclass")
        schema = cursor.fetchone()
    assert schema is not None
    table = table_of(connection.connection, sample.shape)
    letter = next(letter for letter, action in ACTIONS.items() if action == sample.action)
    try:
        judgement = statements.judgement(schema[0], fit(condition, table), table)
        with filtering() as cursor:
            row = cursor.execute(
                f"SELECT {judgement} FROM (SELECT $1::text AS action, $2::text AS record, $3::text AS changes, $4::boolean AS known) w",  # type: ignore[call-overload]
                [letter, sample.record, sample.changes, sample.old_values_known],
            ).fetchone()
    except Refused as refused:
        return Problem(f"where: {refused.reason}", None)
    except psycopg.errors.QueryCanceled:
        return Problem(f"where took longer than {TIMEOUT_MS} ms", None)
    except (psycopg.DataError, psycopg.ProgrammingError) as error:
        return Problem(f"where: {error.diag.message_primary or error}", None)
    assert row is not None
    return int(row[0])


def _call(sample: Sample) -> Call:
    changes = None if sample.changes is None else sample.changes.encode()
    return Call(json.dumps(sample.action).encode(), sample.record.encode(), changes, sample.metadata.encode())


def _shape_of(consumer: Consumer, about: dict[str, Any], number: int) -> RelationShape:
    """The table's shape when it was last seen, or as the source has it now."""
    named = f"{about.get('table_schema', 'public')}.{about['table_name']}" if isinstance(about.get("table_name"), str) else None
    if named is None:
        plain = [table for table in consumer.tables if not table.endswith(".*")]
        if len(plain) != 1:
            raise ValidationError({"messages": f"message {number}: expected metadata.table_schema and metadata.table_name"})
        named = plain[0]
    schema, _, table = named.partition(".")
    with connection.cursor() as cursor:
        cursor.execute(_SHAPE_SQL, [consumer.source_id, schema, table])
        row = cursor.fetchone()
    if row is not None:
        oid, schema, table, columns, primary_key, identity = row
        return stored_shape(oid, schema, table, json.loads(columns), primary_key, identity)
    with connect(consumer.source) as conn:
        found = read_shapes(conn, consumer.source.publication_name, [named])
    if not found:
        raise ValidationError({"messages": f"message {number}: there is no table {named} in {consumer.source.database}"})
    return found[0]
