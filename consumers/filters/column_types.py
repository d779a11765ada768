"""Tell with which of the store's types a column of a source is compared. Asks the store's catalog, and remembers."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import psycopg

from consumers.filters.grammar import CAST_TYPES
from consumers.filters.rewriting import Column, Table
from consumers.store.types import ColumnShape, RelationShape

_SQL = """
    SELECT u.oid, u.typmod, format_type(u.oid, u.typmod), ltrim(t.typname::text, '_')
    FROM unnest(%s::oid[], %s::integer[]) u(oid, typmod) JOIN pg_type t ON t.oid = u.oid
"""
_known: dict[tuple[int, int], str | None] = {}  # (oid, typmod) → SQL, None: text stands in; types of Postgres' own never change


def table_of(conn: psycopg.Connection[Any], shape: RelationShape) -> Table:
    """The table as a filter sees it."""
    _learn(conn, shape.columns)
    # What identifies a row comes with every update, or has not changed.
    keys = set(shape.primary_key) if shape.replica_identity == "d" else set()
    return Table(shape.schema, shape.table, tuple(_column(column, column.name in keys) for column in shape.columns))


def _column(shape: ColumnShape, is_key: bool) -> Column:
    found = _known[_value_type(shape)]
    if found is None:
        return Column(shape.name, "text", False, is_key)
    return Column(shape.name, found, shape.value_is_exact, is_key)


def _value_type(shape: ColumnShape) -> tuple[int, int]:
    return (shape.value_oid, shape.value_typmod) if shape.value_oid else (shape.type_oid, shape.typmod)


def _learn(conn: psycopg.Connection[Any], columns: Iterable[ColumnShape]) -> None:
    missing: Sequence[tuple[int, int]] = sorted({_value_type(column) for column in columns} - _known.keys())
    if not missing:
        return
    rows = conn.execute(_SQL, [[oid for oid, _ in missing], [typmod for _, typmod in missing]]).fetchall()
    types = {(oid, typmod): name if base in CAST_TYPES else None for oid, typmod, name, base in rows}
    for wanted in missing:
        _known[wanted] = types.get(wanted)
