"""Judge a consumer's `where`, `transform` and `group_columns` before it is saved: against Postgres' grammar, its catalog, and
the source's tables.
"""
from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.db import connection

from consumers.filters import checking
from consumers.filters.checking import Notice
from consumers.filters.column_types import table_of
from consumers.filters.grammar import Refused, parse
from consumers.lua import transformer
from consumers.source_connection import SourceUnreachable, connect
from consumers.source_tables import read_shapes
from consumers.store.types import RelationShape


def clean_where(text: str) -> None:
    """What can be said of the text alone. Raises ValidationError."""
    try:
        parse(text)
    except Refused as refused:
        raise ValidationError(told(refused, text)) from None


def clean_transform(text: str) -> None:
    """Compile it, in a process of its own. Raises ValidationError, with the line."""
    if problem := transformer.check(text):
        raise ValidationError(str(problem))


def check_where(consumer: Any) -> list[Notice]:
    """Ask Postgres about the filter over each of the consumer's tables. Raises ValidationError.

    Answers what somebody who saves it should know: where it compares texts, and where it cannot be decided.
    """
    if not consumer.where:
        return []
    try:
        shapes = _shapes(consumer)
    except SourceUnreachable as error:
        raise ValidationError({"where": f"{error}. A filter is checked against the tables, so the source must answer"}) from None
    connection.ensure_connection()
    tables = [table_of(connection.connection, shape) for shape in shapes]
    try:
        condition = parse(consumer.where)
        checking.check(condition, tables)
    except Refused as refused:
        raise ValidationError({"where": told(refused, consumer.where)}) from None
    identities = {f"{shape.schema}.{shape.table}": shape.replica_identity for shape in shapes}
    return checking.notices(condition, tables, identities, consumer.actions)


def check_groups(consumer: Any) -> list[Notice]:
    """A column that no table has would put each table into one group. Raises ValidationError.

    Answers which of the tables lack one. While the source does not answer, which only an edit gets past, nothing is judged.
    """
    if not consumer.group_columns:
        return []
    try:
        shapes = _shapes(consumer)
    except SourceUnreachable:
        return []
    lacking = {f"{shape.schema}.{shape.table}": set(consumer.group_columns) - {column.name for column in shape.columns} for shape in shapes}
    whose = next(iter(lacking), "") if len(lacking) == 1 else "none of the tables"
    nowhere = [column for column in consumer.group_columns if lacking and all(column in columns for columns in lacking.values())]
    problems = [f"{whose} has {'a' if len(lacking) > 1 else 'no'} column {column!r}" for column in nowhere]
    if problems:
        raise ValidationError({"group_columns": problems})
    return [
        Notice(f"{table} has no {', '.join(sorted(columns))}: in its groups that counts as NULL, so more of its rows wait for each other")
        for table, columns in lacking.items() if columns
    ]  # fmt: skip


def _shapes(consumer: Any) -> list[RelationShape]:
    with connect(consumer.source) as conn:
        return read_shapes(conn, consumer.source.publication_name, consumer.tables)


def told(refused: Refused, text: str) -> str:
    """The reason, with the place in the text as people count."""
    if refused.position is None:
        return refused.reason
    before = text[: refused.position]
    line = before.count("\n") + 1
    column = len(before) - (before.rfind("\n") + 1) + 1
    return f"line {line}, column {column}: {refused.reason}"
