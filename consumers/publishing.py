"""Let the publication publish the tables that consumers name, so that no change that is committed from then on is missed."""
from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import psycopg
from django.core.exceptions import ValidationError
from psycopg import sql

from consumers.models import Source
from consumers.publication import identity_problems, missing, publication_exists, publishes_via_root, qualified, via_root_sql
from consumers.source_connection import SourceUnreachable, connect, reason_of

WRITERS_WITHIN_S = 30.0
LOOK_EVERY_S = 0.1


class SetupRefused(Exception):
    """The source cannot be set up as asked; `field` is the one to blame, the text says what to do."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(reason)


def as_validation(error: SourceUnreachable | SetupRefused, unreachable: str) -> ValidationError:
    """The error of a field: of `unreachable` when the source does not answer."""
    return ValidationError({error.field: error.reason} if isinstance(error, SetupRefused) else {unreachable: str(error)})


class WriterRow(NamedTuple):
    """A transaction that has written to a table, and still may commit that."""

    transaction: str
    pid: int | None
    age_s: int | None
    query: str


def publish_tables(source: Source, tables: Iterable[str]) -> None:
    """See that the publication publishes these: added when the publication is ours, else refused with the SQL.

    An empty list means all that is published. Raises SourceUnreachable, SetupRefused.
    """
    wanted = list(tables)
    if not wanted:
        return
    with connect(source) as conn:
        if not publication_exists(conn, source.publication_name):
            raise SetupRefused("source", f"the publication {source.publication_name} does not exist: recover the source first")
        lacking = missing(conn, source.publication_name, wanted)
        for one in lacking:
            if one.why != "unpublished":
                raise SetupRefused("tables", one.text + (f". Run on the source: {one.sql}" if one.sql else ""))
        if lacking:
            _add(conn, source, [one.table for one in lacking])


def demand_publication(source: Source, tables: Collection[str]) -> None:
    """One that is gone and was not ours is its maker's to make again: what it published is not ours to guess. Raises SetupRefused."""
    with connect(source) as conn:
        if source.publication_created or publication_exists(conn, source.publication_name):
            return
        named = ", ".join(qualified(table).as_string(conn) for table in tables if not table.endswith(".*")) or "…"
        name = sql.Identifier(source.publication_name).as_string(conn)
        raise SetupRefused(
            "publication_name",
            f"the publication {source.publication_name} does not exist, and it was not ours. Run on the source: CREATE PUBLICATION"
            f" {name} FOR TABLE {named}; then recover",
        )


def _add(conn: psycopg.Connection[Any], source: Source, tables: list[str]) -> None:
    _demand_identity(conn, source.publication_name, tables)
    _demand_root(conn, source, tables)
    publication = sql.Identifier(source.publication_name)
    named = sql.SQL(", ").join(qualified(table) for table in tables)
    statement = sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(publication, named)
    by_hand = f"{statement.as_string(conn)};"
    if not source.publication_created:
        raise SetupRefused(
            "tables",
            f"the publication {source.publication_name} does not publish {', '.join(tables)}, and it is not ours to change. Run on"
            f" the source: {by_hand}",
        )
    try:
        conn.execute(statement)
    except psycopg.Error as error:
        raise SetupRefused("tables", f"{reason_of(error, source)}. Run on the source as the owner: {by_hand}") from None
    if writers := _await_writers(conn, tables):
        conn.execute(sql.SQL("ALTER PUBLICATION {} DROP TABLE {}").format(publication, named))
        who = "; ".join(_described(writer) for writer in writers[:5])
        raise SetupRefused(
            "tables",
            f"a transaction that has written to {', '.join(tables)} has been open all the time ({who}): what it wrote would not"
            " arrive when it commits. End it (SELECT pg_terminate_backend(pid)) and save again",
        )


def _demand_identity(conn: psycopg.Connection[Any], publication: str, tables: list[str]) -> None:
    if problems := identity_problems(conn, publication, tables):
        raise SetupRefused(
            "tables",
            f"{'; '.join(why for _, why, _ in problems)}: publishing would make UPDATEs and DELETEs there fail. Run on the source:"
            f" {' '.join(dict.fromkeys(mend for _, _, mend in problems))}",
        )


def _demand_root(conn: psycopg.Connection[Any], source: Source, tables: list[str]) -> None:
    """A partitioned table that is published as its partitions would not arrive under its own name."""
    partitioned = conn.execute(
        "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relkind = 'p' AND n.nspname || '.' || c.relname = ANY (%s) ORDER BY 1",
        [tables],
    ).fetchall()
    if partitioned and not publishes_via_root(conn, source.publication_name):
        name = sql.Identifier(source.publication_name).as_string(conn)
        text = f"{partitioned[0][0]} is partitioned, and the publication publishes partitions under their own names"
        raise SetupRefused("tables", f"{text}. Run on the source: {via_root_sql(name)}")


# The transactions that are older than the publishing ---------------------------------------------------------------


def _await_writers(conn: psycopg.Connection[Any], tables: list[str]) -> list[WriterRow]:
    """Wait for the transactions that wrote to a table before it was published, which keeps what they wrote from being sent.

    Whoever comes later is not waited for. Returns those that are still there after WRITERS_WITHIN_S.
    """
    deadline = time.monotonic() + WRITERS_WITHIN_S
    waited_for = {writer.transaction for writer in _writers(conn, tables)}
    while waited_for:
        left = [writer for writer in _writers(conn, tables) if writer.transaction in waited_for]
        if not left or time.monotonic() > deadline:
            return left
        waited_for = {writer.transaction for writer in left}
        time.sleep(LOOK_EVERY_S)
    return []


def _writers(conn: psycopg.Connection[Any], tables: list[str]) -> list[WriterRow]:
    """Who writes takes this lock and keeps it to the end, prepared transactions too."""
    rows = conn.execute(
        "SELECT DISTINCT l.virtualtransaction, l.pid, extract(epoch FROM clock_timestamp() - a.xact_start)::int,"
        " coalesce(left(a.query, 60), '') FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace"
        " CROSS JOIN LATERAL (SELECT t.oid AS relid UNION SELECT p.relid::oid FROM pg_partition_tree(t.oid) p) r"
        " JOIN pg_locks l ON l.relation = r.relid AND l.locktype = 'relation' AND l.granted AND l.mode = 'RowExclusiveLock'"
        "  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " LEFT JOIN pg_stat_activity a ON a.pid = l.pid WHERE n.nspname || '.' || t.relname = ANY (%s) ORDER BY 3 DESC NULLS LAST",
        [tables],
    ).fetchall()
    return [WriterRow(*row) for row in rows]


def _described(writer: WriterRow) -> str:
    if writer.pid is None:
        return "a prepared transaction, see pg_prepared_xacts"
    return f"process {writer.pid}" + (f", open for {writer.age_s} s" if writer.age_s is not None else "") + (
        f": {writer.query}" if writer.query else ""
    )


