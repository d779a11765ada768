"""Read from the source's catalog what pgoutput does not say: a table's key as it is now, and what the types are made of.

Names come as the bytes they are stored in: whatever the database's encoding, none is refused.
"""
from __future__ import annotations

from typing import Any

import psycopg

from capture.encoder import ArrayOf, Kind
from capture.pgoutput import Type
from capture.shapes import Now
from consumers.encodings import codec_of, readable
from consumers.source_types import ValueTypes

# Built-in types that are not text in JSON. Source: pg_type.dat; to_json's categories in src/backend/utils/adt/json.c.
SCALAR_KINDS: dict[int, Kind] = {
    16: "bool", 20: "number", 21: "number", 23: "number", 700: "number", 701: "number", 1700: "number",
    17: "bytea", 114: "json", 3802: "json", 1114: "timestamp", 1184: "timestamptz", 22: "int_vector", 30: "text_vector",
}  # fmt: skip

_TABLE_SQL = """
    SELECT
      EXISTS (SELECT FROM pg_class WHERE oid = %(oid)s),
      ARRAY(SELECT convert_to(a.attname::text, 'SQL_ASCII')
        FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY k(att, n), pg_attribute a
        WHERE i.indrelid = %(oid)s AND i.indisprimary AND a.attrelid = i.indrelid AND a.attnum = k.att AND k.n <= i.indnkeyatts
        ORDER BY k.n),
      ARRAY(SELECT convert_to(attname::text, 'SQL_ASCII') FROM pg_attribute
        WHERE attrelid = %(oid)s AND attnum > 0 AND NOT attisdropped ORDER BY attnum)
"""
_LISTED_SQL = """
    SELECT count(*) > 0 FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
    WHERE p.pubname = %s AND r.prrelid = %s AND r.prattrs IS NOT NULL
"""
_TYPE_SQL = """
    SELECT t.typtype::text, t.typbasetype::bigint, t.typdelim::text, convert_to(format_type(t.oid, NULL), 'SQL_ASCII'),
           CASE WHEN t.typelem <> 0 AND t.typlen = -1 AND t.typcategory = 'A' THEN t.typelem::bigint ELSE 0 END,
           coalesce((SELECT e.typdelim::text FROM pg_type e WHERE e.oid = t.typelem), ',')
    FROM pg_type t WHERE t.oid = %s
"""


class Catalog:
    """The source's catalog, read when a Relation message comes; types are remembered."""

    def __init__(self, conn: psycopg.Connection[Any], encoding: str, publication: str) -> None:
        """`encoding` is the database's, as Postgres calls it."""
        self._conn = conn
        self._publication = publication
        self._announced: dict[int, tuple[str, str]] = {}
        self._codec = codec_of(encoding)
        self._kinds: dict[int, tuple[Kind, str]] = {}
        self.value_types = ValueTypes(conn)

    @property
    def descriptor(self) -> int:
        """Of the connection's socket."""
        return self._conn.fileno()

    def filled_columns(self, oid: int) -> set[str]:
        """The columns that existing rows have a value in although nobody wrote it: with a default, generated, identity."""
        rows = self._conn.execute(
            "SELECT convert_to(attname::text, 'SQL_ASCII') FROM pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped"
            " AND (atthasdef OR attidentity <> '')",
            [oid],
        ).fetchall()
        return {readable(row[0], self._codec) for row in rows}

    def table(self, oid: int) -> Now:
        """The table as it is now, which need not be as it was when it was changed."""
        row = self._conn.execute(_TABLE_SQL, {"oid": oid}).fetchone()
        assert row is not None
        exists, key, columns = row
        listed = False
        if self._conn.info.server_version >= 150_000:  # which brought column lists
            found = self._conn.execute(_LISTED_SQL, [self._publication, oid]).fetchone()
            listed = found is not None and found[0]
        return Now(exists, self._readable(key), self._readable(columns), listed)

    def announce(self, announced: Type) -> None:
        """What the stream says of a type that is not built in, for the case that it is gone when it is looked up."""
        self._announced[announced.oid] = (announced.schema, announced.name)

    def _readable(self, names: list[bytes]) -> tuple[str, ...]:
        return tuple(readable(name, self._codec) for name in names)

    def kind(self, type_oid: int) -> tuple[Kind, str]:
        """How values of a type become JSON, and the type's name. A domain is what its base type is."""
        known = self._kinds.get(type_oid)
        if known is None:
            known = self._kinds[type_oid] = self._look_up(type_oid)
        return known

    def _look_up(self, type_oid: int) -> tuple[Kind, str]:
        row = self._conn.execute(_TYPE_SQL, [type_oid]).fetchone()
        if row is None:
            return self._gone(type_oid)
        typtype, base, _, raw_name, element, delimiter = row
        name = readable(raw_name, self._codec)
        if type_oid in SCALAR_KINDS:
            return SCALAR_KINDS[type_oid], name
        if typtype == "d" and base:
            return self.kind(base)[0], name
        if element:
            return ArrayOf(self.kind(element)[0], delimiter), name
        return "text", name

    def _gone(self, type_oid: int) -> tuple[Kind, str]:
        """A type that was dropped since. The stream calls a domain by its base type's name, and arrays begin with a `_`."""
        schema, name = self._announced.get(type_oid, ("", f"oid {type_oid}"))
        if schema == "pg_catalog":
            query = "SELECT oid::bigint FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace AND typname = %s"
            base = self._conn.execute(query, [name]).fetchone()
            if base is not None:
                return self.kind(base[0])
        return ArrayOf("text") if name.startswith("_") else "text", name
