"""Which of Postgres' own types the values of a source's type are made of: a domain's base, an array's elements.

Their oids are the same in every server, so the store knows them too; what only the source knows (enum, composite, the types of
extensions) is text to the store.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import psycopg

FIRST_OWN_OID = 16_384  # from here on oids are a database's own: FirstNormalObjectId
TEXT, TEXT_ARRAY = 25, 1009


class ValueType(NamedTuple):
    """A type of Postgres' own. `exact` False: it stands in for one that only the source knows."""

    oid: int
    typmod: int
    exact: bool


class ValueTypes:
    """Looks types up in one source's catalog, and remembers them."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self._conn = conn
        self._known: dict[int, ValueType] = {}

    def of(self, type_oid: int, typmod: int) -> ValueType:
        if type_oid < FIRST_OWN_OID:
            return ValueType(type_oid, typmod, True)
        found = self._known.get(type_oid)
        if found is None:
            found = self._known[type_oid] = self._look_up(type_oid)
        return found

    def _look_up(self, type_oid: int) -> ValueType:
        row = self._conn.execute(
            "SELECT t.typtype = 'd', t.typbasetype::bigint, t.typtypmod,"
            " CASE WHEN t.typelem <> 0 AND t.typlen = -1 AND t.typcategory = 'A' THEN t.typelem::bigint ELSE 0 END"
            " FROM pg_type t WHERE t.oid = %s",
            [type_oid],
        ).fetchone()
        if row is None:
            return ValueType(TEXT, -1, False)
        is_domain, base, typmod, element = row
        if is_domain:
            return self.of(base, typmod)
        if not element:
            return ValueType(TEXT, -1, False)
        inner = self.of(element, -1)
        array = self._conn.execute("SELECT typarray::bigint FROM pg_type WHERE oid = %s", [inner.oid]).fetchone()
        return ValueType(array[0] if array and array[0] else TEXT_ARRAY, inner.typmod, inner.exact)
