"""Make and inspect what a source needs on its server: publication first, then slot. Nothing of the user's is altered."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from consumers.models import Source
from consumers.preflight import (
    PLUGIN,
    Server,
    check_slot,
    check_wal_level,
    publication_exists,
    published,
    qualified,
    read_server,
    without_identity,
)
from consumers.source_connection import connect, reason_of

SLOT_TIMEOUT_S = 60


class SetupRefused(Exception):
    """The source cannot be set up as asked; `field` is the one to blame, the text says what to do."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(reason)


class Prepared(NamedTuple):
    slot_created: bool
    publication_created: bool


def prepare_source(source: Source) -> Prepared:
    """Use the publication and slot there are, or make them. Raises SourceUnreachable or SetupRefused."""
    with connect(source) as conn:
        server = read_server(conn, source)
        level = check_wal_level(server)
        if not level.ok:
            raise SetupRefused("host", f"{level.text}. {level.sql}")
        publication_made = not publication_exists(conn, source.publication_name)
        if publication_made:
            if server.in_recovery:
                raise SetupRefused(
                    "publication_name",
                    f"the server is a standby and has no publication {source.publication_name}: make it on the primary",
                )
            _create_publication(conn, source)
        try:
            slot_made = _ensure_slot(conn, source, server)
        except (SetupRefused, psycopg.Error):
            if publication_made:
                conn.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(source.publication_name)))
            raise
        return Prepared(slot_made, publication_made)


def source_position(source: Source) -> int:
    """The LSN up to which the source has written; everything committed from now on lies at or beyond it."""
    with connect(source) as conn:
        row = conn.execute(
            "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END"
            " - '0/0'::pg_lsn"
        ).fetchone()
    assert row is not None
    return int(row[0])


def published_tables(source: Source) -> list[str]:
    """The tables the publication publishes, as `schema.table`, sorted."""
    with connect(source) as conn:
        return _published(conn, source.publication_name)


def renew_slot(source: Source) -> None:
    """Drop a lost slot, so that `prepare_source` makes it anew; what it missed is a gap. Raises SourceUnreachable, SetupRefused.

    A lost slot that we did not make is left to its maker.
    """
    with connect(source) as conn:
        server = read_server(conn, source)
        slot = check_slot(conn, source, server)[0]
        if not slot.ok and "is lost" in slot.text:
            if not source.slot_created:
                raise SetupRefused("slot_name", f"{slot.text}, and it is not ours to drop. Run on the source: {slot.sql}")
            conn.execute("SELECT pg_drop_replication_slot(%s)", [source.slot_name])


def all_tables(source: Source) -> list[dict[str, Any]]:
    """Every table that could be published: name, whether it is, primary key, replica identity."""
    with connect(source) as conn:
        published = set(_published(conn, source.publication_name))
        rows = conn.execute(
            "SELECT n.nspname || '.' || c.relname, c.relreplident::text,"
            " coalesce((SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_index i, unnest(i.indkey) WITH ORDINALITY k(att, n)"
            "  JOIN pg_attribute a ON a.attnum = k.att WHERE i.indrelid = c.oid AND i.indisprimary AND a.attrelid = c.oid), '{}')"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p')"
            " AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1"
        ).fetchall()
    identities = {"d": "default", "f": "full", "i": "index", "n": "nothing"}
    return [
        {"name": name, "published": name in published, "primary_key": key, "replica_identity": identities.get(ident, ident)}
        for name, ident, key in rows
    ]


def publish_tables(source: Source, tables: Iterable[str]) -> None:
    """See that the publication publishes these: added when the publication is ours, else refused with the SQL.

    An empty list means all that is published, and is fine unless nothing is.
    """
    wanted = list(tables)
    with connect(source) as conn:
        existing = _existing(conn, wanted)
        for table in wanted:
            if not table.endswith(".*") and table not in existing:
                raise SetupRefused("tables", f"there is no table {table} in the database {source.database}")
        published = set(_published(conn, source.publication_name))
        missing = sorted(existing - published)
        if not missing:
            return
        for table in without_identity(conn, missing):
            raise SetupRefused(
                "tables",
                f"{table} has neither a primary key nor another replica identity: publishing it would make its UPDATEs and"
                f" DELETEs fail. Run on the source: ALTER TABLE {qualified(table).as_string(conn)} REPLICA IDENTITY FULL;",
            )
        statement = sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(
            sql.Identifier(source.publication_name), sql.SQL(", ").join(qualified(table) for table in missing)
        )
        by_hand = f"{statement.as_string(conn)};"
        if not source.publication_created:
            raise SetupRefused(
                "tables",
                f"the publication {source.publication_name} does not publish {', '.join(missing)}, and it is not ours to"
                f" change. Run on the source: {by_hand}",
            )
        try:
            conn.execute(statement)
        except psycopg.Error as error:
            raise SetupRefused("tables", f"{reason_of(error, source)}. Run on the source as the owner: {by_hand}") from None


def drop_slot(source: Source) -> None:
    """Drop the slot and the publication, where we made them."""
    with connect(source) as conn:
        if source.slot_created:
            conn.execute(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s AND active",
                [source.slot_name],
            )
            for _ in range(50):
                try:
                    conn.execute(
                        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
                        [source.slot_name],
                    )
                    break
                except psycopg.errors.ObjectInUse:
                    conn.execute("SELECT pg_sleep(0.1)")
        if source.publication_created:
            conn.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(source.publication_name)))


def _create_publication(conn: psycopg.Connection[Any], source: Source) -> None:
    """An empty one: consumers add the tables they name."""
    statement = sql.SQL("CREATE PUBLICATION {}").format(sql.Identifier(source.publication_name))
    try:
        conn.execute(statement)
    except psycopg.Error as error:
        raise SetupRefused(
            "publication_name",
            f"cannot create the publication: {reason_of(error, source)}. As the owner of the tables run on the source:"
            f" {statement.as_string(conn)} FOR TABLE …;",
        ) from None


def _ensure_slot(conn: psycopg.Connection[Any], source: Source, server: Server) -> bool:
    finding = check_slot(conn, source, server)[0]
    if finding.ok:
        return False
    if "there is no slot" not in finding.text:
        raise SetupRefused("slot_name", f"{finding.text}. Choose another slot_name, or run on the source: {finding.sql}")
    if source.slot_failover and server.version < 170_000:
        raise SetupRefused("slot_failover", f"slots that survive a failover need Postgres 17, this is {server.version // 10_000}")
    options = ", false, false, true" if source.slot_failover else ""
    try:
        # It waits for the transactions that are open now to end.
        conn.execute(f"SET statement_timeout = '{SLOT_TIMEOUT_S}s'")
        conn.execute(f"SELECT pg_create_logical_replication_slot(%s, %s{options})", [source.slot_name, PLUGIN])
    except psycopg.errors.QueryCanceled:
        raise SetupRefused("slot_name", _why_slot_waits(conn, server)) from None
    except psycopg.errors.ConfigurationLimitExceeded:
        raise SetupRefused(
            "slot_name",
            "all replication slots of the server are used: drop one that nobody reads (SELECT slot_name, active FROM"
            " pg_replication_slots), or raise max_replication_slots and restart the server",
        ) from None
    except psycopg.Error as error:
        raise SetupRefused("slot_name", f"cannot create the slot: {reason_of(error, source)}. Run on the source: {finding.sql}") from None
    return True


def _why_slot_waits(conn: psycopg.Connection[Any], server: Server) -> str:
    """Who kept the slot from being made: the transactions that have been open all the time."""
    if server.in_recovery:
        return (
            f"the slot could not be made within {SLOT_TIMEOUT_S} s: a standby waits for a snapshot of the primary. Run there:"
            " SELECT pg_log_standby_snapshot(); and save again"
        )
    rows = conn.execute(
        "SELECT pid, extract(epoch FROM now() - xact_start)::int, left(query, 60) FROM pg_stat_activity"
        " WHERE backend_xid IS NOT NULL AND xact_start < now() - %s::int * interval '1 s' ORDER BY xact_start LIMIT 5",
        [SLOT_TIMEOUT_S],
    ).fetchall()
    who = "; ".join(f"process {pid}, open for {age} s: {query}" for pid, age, query in rows)
    return (
        f"the slot could not be made within {SLOT_TIMEOUT_S} s: a transaction on the source has been open all the time"
        + (f" ({who})" if who else "")
        + ". End it (SELECT pg_terminate_backend(pid)) and save again"
    )


def _published(conn: psycopg.Connection[Any], publication: str) -> list[str]:
    return [f"{schema}.{table}" for schema, table in published(conn, publication)]


def _existing(conn: psycopg.Connection[Any], wanted: list[str]) -> set[str]:
    rows = conn.execute(
        "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND NOT c.relispartition"
        " AND n.nspname NOT IN ('pg_catalog', 'information_schema')"
        " AND (n.nspname || '.' || c.relname = ANY (%(wanted)s) OR n.nspname || '.*' = ANY (%(wanted)s))"
        " UNION SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relkind IN ('r', 'p') AND c.relispartition AND n.nspname || '.' || c.relname = ANY (%(wanted)s)",
        {"wanted": wanted},
    ).fetchall()
    return {row[0] for row in rows}
