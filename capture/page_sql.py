"""The SQL that reads one page of a table: where it begins, how far it may go, and in which order. Pure.

Names, types and expressions come from the source's catalog as SQL, in the database's own encoding; values as texts in the
same. So all of it is bytes. Rows are compared by the columns' own types and collations, on the source.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NULL = b"\\N"  # COPY's text format


class SortColumn(NamedTuple):
    """A column that rows are read in the order of, as SQL."""

    name: bytes
    type: bytes
    not_null: bool
    collation: int = 0
    """Its oid."""


class TableSql(NamedTuple):
    """A published table, as SQL."""

    table: bytes
    """With ONLY, unless rows of its partitions count as its own."""
    columns: tuple[bytes, ...]
    row_filter: bytes | None
    sort: tuple[SortColumn, ...]
    """Together they tell rows apart. `ctid` alone where there is no key."""

    @property
    def by_place(self) -> bool:
        """Read in the order rows are stored in: by ctid alone."""
        return len(self.sort) == 1 and self.sort[0].name == b"ctid"


Values = Sequence[bytes | None]


class Bounds(NamedTuple):
    """What of the table is left to read. Values are of the sort columns."""

    after: Values | None
    """The last row read."""
    last: Values | None
    """The last row there was when the reading began: what came later is in the log."""
    start: bytes | None
    """Of the first sort column, inclusive."""


def page_sql(table: TableSql, bounds: Bounds, limit: int, condition: bytes | None = None) -> bytes:
    """A COPY of up to `limit` rows: the sort columns, then whether the row is wanted, then its columns.

    The rows that the publication's filter or `condition` leave out are among the rows counted, so that a page ends in time
    whatever they leave out; only their sort columns are sent.
    """
    wanted = [b"(%b)" % part for part in (table.row_filter, condition) if part]
    keys = [b"s%d" % number for number in range(len(table.sort))]
    columns = [b"c%d" % number for number in range(len(table.columns))]
    named = [
        *(b"t.%b AS %b" % (column.name, alias) for column, alias in zip(table.sort, keys, strict=True)),
        b"(%b) IS TRUE AS wanted" % b" AND ".join(wanted) if wanted else b"true AS wanted",
        *(b"t.%b AS %b" % pair for pair in zip(table.columns, columns, strict=True)),
    ]
    order = b"" if table.by_place else b" ORDER BY " + b", ".join(b"t." + column.name for column in table.sort)
    scan = b"SELECT %b FROM %b AS t%b%b LIMIT %d" % (
        b", ".join(named), table.table, _where(_bounds_sql(table.sort, bounds)), order, limit,
    )  # fmt: skip
    if wanted:
        columns = [b"CASE WHEN wanted THEN %b END" % name for name in columns]
    return b"COPY (SELECT %b FROM (%b) AS page) TO STDOUT" % (b", ".join([*keys, b"wanted", *columns]), scan)


def order_of(table: TableSql, files: bytes) -> bytes:
    """What decides the order that rows are read in: a place in one order is none in another. `files`: what the table is stored in."""
    columns = b", ".join(b"%b %b %d" % (column.name, column.type, column.collation) for column in table.sort)
    return columns + b" of " + files if table.sort[-1].name == b"ctid" else columns


def last_row_sql(table: TableSql) -> bytes:
    """The sort columns of the last row."""
    names = b", ".join(b"t." + column.name for column in table.sort)
    order = b", ".join(b"t." + column.name + b" DESC" for column in table.sort)
    return b"COPY (SELECT %b FROM %b AS t ORDER BY %b LIMIT 1) TO STDOUT" % (names, table.table, order)


def count_sql(table: TableSql, bounds: Bounds, condition: bytes | None = None) -> bytes:
    """The planner's idea of how many rows there are to read."""
    parts = [_bounds_sql(table.sort, bounds), *(b"(%b)" % part for part in (table.row_filter, condition) if part)]
    return b"EXPLAIN (FORMAT JSON) SELECT FROM %b AS t%b" % (table.table, _where(b" AND ".join(part for part in parts if part)))


def quoted(value: bytes) -> bytes:
    """A literal, whatever standard_conforming_strings says."""
    return b"E'" + value.replace(b"\\", b"\\\\").replace(b"'", b"''") + b"'"


def _where(condition: bytes) -> bytes:
    return b" WHERE " + condition if condition else b""


def _bounds_sql(sort: Sequence[SortColumn], bounds: Bounds) -> bytes:
    parts = []
    if bounds.after is not None:
        parts.append(_after(sort, bounds.after, with_nulls=bounds.start is None))
    elif bounds.start is not None:
        parts.append(b"t.%b >= %b" % (sort[0].name, _literal(sort[0], bounds.start)))
    if bounds.last is not None:
        parts.append(b"%b <= %b" % (_row(sort), _literals(sort, bounds.last)))
    return b" AND ".join(parts)


def _after(sort: Sequence[SortColumn], after: Values, *, with_nulls: bool) -> bytes:
    """Beyond the row `after`. Nulls come last; only the first sort column may be null."""
    first, rest = sort[0], sort[1:]
    if after[0] is None:
        return b"t.%b IS NULL AND %b > %b" % (first.name, _row(rest), _literals(rest, after[1:]))
    beyond = b"%b > %b" % (_row(sort), _literals(sort, after))
    return beyond if first.not_null or not with_nulls else b"(%b OR t.%b IS NULL)" % (beyond, first.name)


def _row(sort: Sequence[SortColumn]) -> bytes:
    return b"(" + b", ".join(b"t." + column.name for column in sort) + b")"


def _literals(sort: Sequence[SortColumn], values: Values) -> bytes:
    return b"(" + b", ".join(_literal(column, value) for column, value in zip(sort, values, strict=True)) + b")"


def _literal(column: SortColumn, value: bytes | None) -> bytes:
    assert value is not None, "only the first sort column may be null, and is dealt with"
    return quoted(value) + b"::" + column.type
