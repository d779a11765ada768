"""Erase one key of one table out of the log, parked rows and attempts: the one exception to a log that is never updated.

What identified a person is overwritten, the messages stay in their places: order, positions and idempotency keys hold. A
message of the key that is still to be delivered arrives empty. Backups and the source itself are not ours to erase.
"""
from __future__ import annotations

from collections.abc import Iterator
from secrets import token_hex
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql

from consumers.store.connection import store_connection
from consumers.store.locks import SEQUENCE_LOCK

KEPT = "kept_messages"
ERASED = "erased"
WAIT_FOR_LOCKS = "10s"


class Erased(NamedTuple):
    """How much holds, or held, the key."""

    messages: int
    attempts: int
    parked: int


def count(source_id: UUID, table: str, key: str) -> Erased:
    """What `erase` would overwrite. `table`: schema.table; `key`: as capture writes it. Reads the whole log once."""
    with store_connection(application_name="sequin erasure") as conn:
        ids = [row[0] for name in _places(conn) for row in conn.execute(_find(name), _chosen(source_id, table, key)).fetchall()]
        attempts = _count(conn, "attempts", "message_id = ANY (%s::bigint[])", source_id, ids)
        return Erased(len(ids), attempts, _count(conn, "parked", "ids && %s::bigint[]", source_id, ids))


def erase(source_id: UUID, table: str, key: str) -> Erased:
    """Overwrite every message of the key, and every update that changed it into another or from another."""
    given = {**_chosen(source_id, table, key), "new": f'["erased-{token_hex(6)}"]'}
    messages = attempts = parked = 0
    with store_connection(application_name="sequin erasure") as conn:
        conn.execute(f"SET lock_timeout = '{WAIT_FOR_LOCKS}'")
        for name in _one_after_another(conn):
            try:
                with conn.transaction():
                    if name == KEPT:
                        conn.execute("SELECT FROM log_floor FOR SHARE")  # the copies of a partition that goes are here by then
                    ids = [row[0] for row in conn.execute(_overwrite(name), given).fetchall()]
                    attempts += conn.execute(
                        "UPDATE attempts SET response = NULL, headers = NULL, error = CASE WHEN error IS NOT NULL THEN %s END"
                        " WHERE source = %s AND message_id = ANY (%s::bigint[])", [ERASED, source_id, ids],
                    ).rowcount  # fmt: skip
                    parked += conn.execute(
                        "UPDATE parked SET last_error = CASE WHEN last_error IS NOT NULL THEN %s END WHERE source = %s AND ids && %s::bigint[]",
                        [ERASED, source_id, ids],
                    ).rowcount
                messages += len(ids)
                if ids:
                    conn.execute(sql.SQL("VACUUM {}").format(sql.Identifier(name)))  # the old rows go from the file too
            except psycopg.errors.UndefinedTable:
                continue  # the partition has gone
    return Erased(messages, attempts, parked)


def _one_after_another(conn: psycopg.Connection[Any]) -> Iterator[str]:
    """The places, and once more where copies may have come to meanwhile: a republish may have read what was not overwritten yet."""
    row = conn.execute("SELECT last_value FROM messages_id").fetchone()
    assert row is not None
    yield from _places(conn)[:-1]
    with conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(%s)", [SEQUENCE_LOCK])  # those that were under way have ended
    yield from _places(conn, row[0])


def _places(conn: psycopg.Connection[Any], last: int = -1) -> list[str]:
    """`last`: only where larger ids may be."""
    rows = conn.execute(
        "SELECT name FROM log_partition WHERE to_regclass(name) IS NOT NULL AND to_id > %s ORDER BY from_id", [last]
    ).fetchall()
    return [*(row[0] for row in rows), KEPT]


def _chosen(source_id: UUID, table: str, key: str) -> dict[str, Any]:
    schema, _, name = table.partition(".")
    return {"source": source_id, "schema": schema, "table": name, "key": key}


_WHICH = sql.SQL(
    "WHERE m.source = %(source)s AND (m.key = %(key)s OR m.old_key = %(key)s) AND m.relation IN (SELECT id FROM relation_version"
    " WHERE source = %(source)s AND schema_name = %(schema)s AND table_name = %(table)s)"
)


def _find(name: str) -> sql.Composed:
    return sql.SQL("SELECT m.id FROM {} m {}").format(sql.Identifier(name), _WHICH)


def _overwrite(name: str) -> sql.Composed:
    return sql.SQL(
        "UPDATE {} m SET record = '{{}}', changes = CASE WHEN changes IS NOT NULL THEN '{{}}' END, unchanged = NULL,"
        " annotations = NULL, key = CASE WHEN key = %(key)s THEN %(new)s ELSE key END,"
        " old_key = CASE WHEN old_key = %(key)s THEN %(new)s ELSE old_key END {} RETURNING m.id"
    ).format(sql.Identifier(name), _WHICH)


def _count(conn: psycopg.Connection[Any], table: str, which: str, source_id: UUID, ids: list[int]) -> int:
    row = conn.execute(f"SELECT count(*) FROM {table} WHERE source = %s AND {which}", [source_id, ids]).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return int(row[0])
