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
        with connect(consumer.source) as conn:
            shapes = read_shapes(conn, consumer.source.publication_name, consumer.tables)
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


def told(refused: Refused, text: str) -> str:
    """The reason, with the place in the text as people count."""
    if refused.position is None:
        return refused.reason
    before = text[: refused.position]
    line = before.count("\n") + 1
    column = len(before) - (before.rfind("\n") + 1) + 1
    return f"line {line}, column {column}: {refused.reason}"
