"""Look at a table as the publication publishes it: its columns and rows, its key, what to read it by. `pages` reads it."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg

from capture.catalog import Catalog
from capture.encoder import RowEncoder
from capture.page_sql import SortColumn, TableSql
from capture.pgoutput import Relation, RelationColumn
from capture.tables import described
from consumers.encodings import SQL_ASCII, UTF8, codec_of, readable
from consumers.store.types import RelationShape

CTID = SortColumn(b"ctid", b"tid", True)

_TABLE_SQL = """
    SELECT c.relkind::text, c.relreplident::text, convert_to(n.nspname::text, 'SQL_ASCII'), convert_to(c.relname::text, 'SQL_ASCII'),
           convert_to(quote_ident(n.nspname) || '.' || quote_ident(c.relname), %(sent_in)s)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %(oid)s
"""
_COLUMNS_SQL = """
    SELECT a.attnum::int, convert_to(a.attname::text, 'SQL_ASCII'), convert_to(quote_ident(a.attname), %(sent_in)s), a.atttypid::bigint,
           a.atttypmod, convert_to(format_type(a.atttypid, a.atttypmod), %(sent_in)s), a.attnotnull, a.attgenerated::text <> '',
           convert_to(quote_ident(n.nspname), %(sent_in)s), a.attcollation::bigint
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace n ON n.oid = t.typnamespace
    WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""


class NotReadable(Exception):
    """The rows of a table cannot be read; the text says why and what to do."""


@dataclass(frozen=True)
class Published:
    """A table ready to be read."""

    shape: RelationShape
    encoder: RowEncoder = field(compare=False)
    sql: TableSql
    search_path: bytes
    """Where the operators of the sort columns' types are found."""


class Part(NamedTuple):
    """A relation under which rows are published, or a partition whose rows are published as the relation's."""

    oid: int
    table: str
    leaf: int | None = None
    """The partition, where rows have no key: a place is one within a partition."""


class _Column(NamedTuple):
    number: int
    raw_name: bytes
    name: bytes
    type_oid: int
    typmod: int
    type: bytes
    not_null: bool
    is_generated: bool
    type_schema: bytes
    collation: int


def parts_of(control: psycopg.Connection[Any], encoding: str, publication: str, table: str) -> list[Part]:
    """What a table's rows are published as, in the order it is read. Raises NotReadable."""
    rows = control.execute(
        "SELECT p.relid::bigint, convert_to(n.nspname || '.' || c.relname, 'SQL_ASCII'), CASE WHEN c.relkind = 'p' AND NOT EXISTS (SELECT"
        " FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary) THEN array(SELECT x.relid::bigint FROM pg_partition_tree(c.oid) x"
        " WHERE x.isleaf ORDER BY 1) END FROM pg_get_publication_tables(%(publication)s) p"
        " JOIN pg_class c ON c.oid = p.relid JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname || '.' || c.relname = %(table)s OR p.relid IN (SELECT x.relid FROM pg_class r JOIN pg_namespace m ON m.oid ="
        " r.relnamespace, pg_partition_tree(r.oid) x WHERE r.relkind = 'p' AND m.nspname || '.' || r.relname = %(table)s) ORDER BY 2",
        {"publication": publication, "table": table},
    ).fetchall()
    if not rows:
        raise NotReadable(f"{table} is not published by {publication}: add it to the consumer's tables, or to the publication")
    codec = codec_of(encoding)
    return [Part(oid, readable(name, codec), leaf) for oid, name, leaves in rows for leaf in (leaves or [None])]


def look(
    control: psycopg.Connection[Any], catalog: Catalog, encoding: str, publication: str, part: Part, sort_column: str, *, converted: bool
) -> Published:
    """The table that a part is of. Raises NotReadable.

    `converted`: SQL is sent in UTF-8; if not, in the database's encoding.
    """
    codec = codec_of(encoding)
    oid = part.oid
    named = {"oid": oid, "sent_in": UTF8 if converted else SQL_ASCII}
    found = control.execute(_TABLE_SQL, named).fetchone()
    if found is None:
        raise NotReadable("the table was dropped or made anew while it was read: start another backfill")
    relkind, identity, raw_schema, raw_table, table_sql = found
    if part.leaf is not None:
        leaf = control.execute(_TABLE_SQL, {**named, "oid": part.leaf}).fetchone()
        if leaf is None:
            raise NotReadable("a partition was dropped while it was read: start another backfill")
        relkind, table_sql = leaf[0], leaf[4]
    columns = [_Column(*row) for row in control.execute(_COLUMNS_SQL, named).fetchall()]
    numbers, row_filter = _published(
        control, publication, oid, f"{readable(raw_schema, codec)}.{readable(raw_table, codec)}", named["sent_in"]
    )
    sent = [column for column in columns if (column.number in numbers if numbers is not None else not column.is_generated)]
    relation = Relation(
        oid,
        readable(raw_schema, codec),
        readable(raw_table, codec),
        identity,
        tuple(RelationColumn(False, readable(c.raw_name, codec), c.type_oid, c.typmod) for c in sent),
    )
    kinds, described_columns = described(catalog, relation)
    shape = RelationShape(oid, relation.schema, relation.table, described_columns, catalog.table(oid).primary_key, identity)
    encoder = RowEncoder(
        [column.name for column in relation.columns], kinds, shape.primary_key, codec=None if converted else codec
    )
    by_name = {readable(column.raw_name, codec): column for column in columns}
    sort = _sort(by_name, shape.primary_key, sort_column)
    if relkind == "p" and sort[-1] is CTID:
        raise NotReadable("the partitioned table has lost its primary key while it was read: start another backfill")
    schemas = {by_name[name].type_schema for name in [sort_column, *shape.primary_key] if name in by_name} - {b"pg_catalog"}
    return Published(
        shape,
        encoder,
        TableSql(
            table_sql if relkind == "p" else b"ONLY " + table_sql, tuple(column.name for column in sent), row_filter, tuple(sort)
        ),
        b", ".join([b"pg_catalog", *sorted(schemas)]),
    )


def _published(
    control: psycopg.Connection[Any], publication: str, oid: int, name: str, sent_in: Any
) -> tuple[set[int] | None, bytes | None]:
    """The numbers of the columns that the publication sends, None for all that are not generated; and its row filter."""
    if control.info.server_version < 150_000:
        query = "SELECT NULL, NULL FROM pg_get_publication_tables(%(publication)s) p WHERE p.relid = %(oid)s"
    else:
        query = (
            "SELECT p.attrs::int2[]::int[], convert_to(pg_get_expr(p.qual, p.relid), %(sent_in)s)"
            " FROM pg_get_publication_tables(%(publication)s) p WHERE p.relid = %(oid)s"
        )
    row = control.execute(query, {"publication": publication, "oid": oid, "sent_in": sent_in}).fetchone()
    if row is None:
        raise NotReadable(f"{name} is no longer published by {publication}")
    return None if row[0] is None else set(row[0]), row[1]


def _sort(columns: dict[str, _Column], primary_key: tuple[str, ...], sort_column: str) -> list[SortColumn]:
    """The sort column, or the primary key, and what tells rows apart besides."""

    def sql(name: str) -> SortColumn:
        column = columns[name]
        return SortColumn(column.name, column.type, column.not_null, column.collation)

    if sort_column and sort_column not in columns:
        raise NotReadable(f"there is no column {sort_column} any more")
    missing = [name for name in primary_key if name not in columns]
    if missing:
        raise NotReadable(f"the primary key's column {missing[0]} cannot be found")
    key = [sql(name) for name in primary_key if name != sort_column] or ([] if sort_column in primary_key else [CTID])
    return [sql(sort_column), *key] if sort_column else [sql(name) for name in primary_key] or [CTID]
