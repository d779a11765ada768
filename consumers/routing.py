"""Judge a consumer's `where` and `transform` before it is saved: against Postgres' grammar, its catalog, and the source's tables."""
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


def check_group_columns(consumer: Any) -> None:
    """A column that is not there would put a whole table into one group. Raises ValidationError.

    Each table that is named must have them; of those that a pattern matches, one. While the source does not answer, which
    only an edit gets past, nothing is judged.
    """
    if not consumer.group_columns:
        return
    try:
        shapes = _shapes(consumer)
    except SourceUnreachable:
        return
    columns = {f"{shape.schema}.{shape.table}": {column.name for column in shape.columns} for shape in shapes}
    problems = []
    for column in consumer.group_columns:
        without = [table for table in consumer.tables if table in columns and column not in columns[table]]
        if without:
            problems.append(f"{', '.join(without)} has no column {column!r}" if len(without) == 1 else f"{', '.join(without)} have no column {column!r}")
        elif columns and not any(column in names for names in columns.values()):
            problems.append(f"none of the tables has a column {column!r}")
    if problems:
        raise ValidationError({"group_columns": problems})


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
