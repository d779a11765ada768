"""Read from a source's catalog what shape the tables of a consumer have now, as capture will store it."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psycopg

from consumers.source_types import ValueTypes
from consumers.store.types import ColumnShape, RelationShape

# Columns that are published: from Postgres 15 on the publication may name them; generated ones it leaves out before 18.
_TABLES_SQL = """
    SELECT c.oid::bigint, n.nspname::text, c.relname::text, c.relreplident::text,
           coalesce((SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_index i, unnest(i.indkey) WITH ORDINALITY k(att, n)
                     JOIN pg_attribute a ON a.attnum = k.att WHERE i.indrelid = c.oid AND i.indisprimary AND a.attrelid = c.oid), '{{}}'),
           coalesce((SELECT json_agg(json_build_array(a.attname, a.atttypid::bigint, a.atttypmod, format_type(a.atttypid, NULL))
                            ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                      AND CASE WHEN p.attnames IS NULL THEN a.attgenerated = '' ELSE a.attname = ANY (p.attnames) END), '[]')
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN (SELECT schemaname, tablename, {attnames} AS attnames FROM pg_publication_tables WHERE pubname = %(publication)s) p
           ON p.schemaname = n.nspname AND p.tablename = c.relname
    WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND CASE WHEN cardinality(%(tables)s::text[]) = 0
          THEN p.tablename IS NOT NULL ELSE n.nspname || '.' || c.relname = ANY (%(tables)s)
               OR n.nspname || '.*' = ANY (%(tables)s) AND (p.tablename IS NOT NULL OR NOT c.relispartition) END
    ORDER BY 2, 3
"""


def read_shapes(conn: psycopg.Connection[Any], publication: str, tables: Iterable[str]) -> list[RelationShape]:
    """The tables that `tables` name or match (all published ones when it is empty), with the columns that are sent."""
    attnames = "attnames" if conn.info.server_version >= 150_000 else "NULL::name[]"
    rows = conn.execute(_TABLES_SQL.format(attnames=attnames), {"publication": publication, "tables": list(tables)}).fetchall()
    types = ValueTypes(conn)
    return [
        RelationShape(
            oid, schema, table,
            tuple(ColumnShape(name, type_oid, typmod, type_name, *types.of(type_oid, typmod)) for name, type_oid, typmod, type_name in columns),
            tuple(key), identity,
        )
        for oid, schema, table, identity, key, columns in rows
    ]  # fmt: skip
