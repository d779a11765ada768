"""Let the publication publish the tables that consumers name, so that no change that is committed from then on is missed."""
from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import psycopg
from django.core.exceptions import ValidationError
from psycopg import sql

from consumers.findings import one
from consumers.models import Source
from consumers.publication import identity_problems, missing, publication_exists, publishes_via_root, qualified, via_root_sql
from consumers.source_connection import SourceUnreachable, connect, reason_of

PUBLICATION_LOCK_CLASS = 0x5EA  # advisory, on the source: one at a time sees to a publication's tables
TURN_WITHIN_S = 60.0
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
    with connect(source) as conn:
        if not publication_exists(conn, source.publication_name):
            raise SetupRefused("source", f"the publication {source.publication_name} does not exist: recover the source first")
        _take_turn(conn, source.publication_name)
        lacking = missing(conn, source.publication_name, wanted)
        for each in lacking:
            if each.why != "unpublished":
                raise SetupRefused("tables", each.text + (f". Run on the source: {each.sql}" if each.sql else ""))
        added = [each.table for each in lacking]
        if added:
            _add(conn, source, added)
        # The others somebody may have published by hand a moment ago, or a process of ours that died of it.
        others = [table for table in wanted if table not in added] if wanted else None
        if writers := _await_writers(conn, others, source.publication_name):
            raise _kept_from_arriving(others or ["tables of the publication"], writers)


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


def _take_turn(conn: psycopg.Connection[Any], publication: str) -> None:
    """Until the connection closes. Who finds a table published by another must not rely on it before that one has seen it through.

    Raises SetupRefused.
    """
    deadline = time.monotonic() + TURN_WITHIN_S
    while not one(conn, "SELECT pg_try_advisory_lock(%s, hashtext(%s))", [PUBLICATION_LOCK_CLASS, publication]):
        if time.monotonic() > deadline:
            raise SetupRefused("tables", f"tables are being added to the publication {publication} at this moment: save again")
        time.sleep(LOOK_EVERY_S)


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
        raise _kept_from_arriving(tables, writers)


def _kept_from_arriving(tables: list[str], writers: list[WriterRow]) -> SetupRefused:
    who = "; ".join(_described(writer) for writer in writers[:5])
    return SetupRefused(
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


def _await_writers(conn: psycopg.Connection[Any], tables: list[str] | None, publication: str | None = None) -> list[WriterRow]:
    """Wait for the transactions that wrote to a table before it was published, which keeps what they wrote from being sent.

    `tables`: None for all of the publication. Whoever comes later is not waited for. Returns those that are still there after WRITERS_WITHIN_S.
    """
    deadline = time.monotonic() + WRITERS_WITHIN_S
    waited_for = {writer.transaction for writer in _writers(conn, tables, publication)}
    while waited_for:
        left = [writer for writer in _writers(conn, tables, publication) if writer.transaction in waited_for]
        if not left or time.monotonic() > deadline:
            return left
        waited_for = {writer.transaction for writer in left}
        time.sleep(LOOK_EVERY_S)
    return []


def _writers(conn: psycopg.Connection[Any], tables: list[str] | None, publication: str | None) -> list[WriterRow]:
    """Who writes takes this lock and keeps it to the end, prepared transactions too.

    `publication`: only those that are older than the transaction by which it publishes the table.
    """
    schemas = (
        " UNION ALL SELECT s.xmin FROM pg_publication_namespace s WHERE s.pnpubid = p.oid AND s.pnnspid = t.relnamespace"
        if conn.info.server_version >= 150_000 else ""
    )  # fmt: skip
    older = (
        " AND EXISTS (SELECT FROM pg_publication p, pg_locks o, LATERAL (SELECT p.xmin WHERE p.puballtables UNION ALL"
        " SELECT r.xmin FROM pg_publication_rel r WHERE r.prpubid = p.oid AND (r.prrelid = t.oid"
        " OR r.prrelid IN (SELECT relid FROM pg_partition_ancestors(t.oid)))" + schemas + ") e WHERE p.pubname = %(publication)s"
        " AND o.virtualtransaction = l.virtualtransaction AND o.locktype = 'transactionid' AND o.mode = 'ExclusiveLock'"
        " AND age(o.transactionid) > age(e.xmin) AND age(e.xmin) >= 0)"
        if publication is not None else ""
    )  # fmt: skip
    rows = conn.execute(
        "SELECT DISTINCT l.virtualtransaction, l.pid, extract(epoch FROM clock_timestamp() - a.xact_start)::int,"
        " coalesce(left(a.query, 60), '') FROM pg_class t JOIN pg_namespace n ON n.oid = t.relnamespace"
        " CROSS JOIN LATERAL (SELECT t.oid AS relid UNION SELECT p.relid::oid FROM pg_partition_tree(t.oid) p) r"
        " JOIN pg_locks l ON l.relation = r.relid AND l.locktype = 'relation' AND l.granted AND l.mode = 'RowExclusiveLock'"
        "  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " LEFT JOIN pg_stat_activity a ON a.pid = l.pid"
        " WHERE (%(tables)s::text[] IS NULL OR n.nspname || '.' || t.relname = ANY (%(tables)s) OR n.nspname || '.*' = ANY (%(tables)s))" + older +
        " ORDER BY 3 DESC NULLS LAST",
        {"tables": tables, "publication": publication},
    ).fetchall()
    return [WriterRow(*row) for row in rows]


def _described(writer: WriterRow) -> str:
    if writer.pid is None:
        return "a prepared transaction, see pg_prepared_xacts"
    return f"process {writer.pid}" + (f", open for {writer.age_s} s" if writer.age_s is not None else "") + (
        f": {writer.query}" if writer.query else ""
    )


