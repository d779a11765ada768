"""Make and inspect what a source needs on its server: publication first, then slot. Nothing of the user's is altered."""
from __future__ import annotations

from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from consumers.findings import Server, read_server
from consumers.models import Source
from consumers.preflight import PLUGIN, check_slot, check_wal_level
from consumers.publication import publication_exists, published
from consumers.publishing import SetupRefused
from consumers.source_connection import connect, reason_of

SLOT_TIMEOUT_S = 60


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
            _create_publication(conn, source, server)
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


def renew_slot(source: Source, *, unreadable: bool = False) -> None:
    """Drop a lost slot, so that `prepare_source` makes it anew; what it missed is a gap. Raises SourceUnreachable, SetupRefused.

    `unreadable`: the server cannot decode what the slot keeps, although it looks well. A slot that we did not make is left to its
    maker.
    """
    with connect(source) as conn:
        slot = check_slot(conn, source, read_server(conn, source))[0]
        if "there is no slot" in slot.text or not (unreadable or "is lost" in slot.text):
            return
        if not source.slot_created:
            by_hand = f"SELECT pg_drop_replication_slot('{source.slot_name}'); then recover"
            raise SetupRefused("slot_name", f"the slot {source.slot_name} is not ours to drop. Run on the source: {by_hand}")
        _drop(conn, source.slot_name)


def all_tables(source: Source) -> list[dict[str, Any]]:
    """Every table that could be published: name, whether it is, primary key, replica identity."""
    with connect(source) as conn:
        members = set(published(conn, source.publication_name))
        rows = conn.execute(
            "SELECT n.nspname || '.' || c.relname, c.relreplident::text,"
            " coalesce((SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_index i, unnest(i.indkey) WITH ORDINALITY k(att, n)"
            "  JOIN pg_attribute a ON a.attnum = k.att WHERE i.indrelid = c.oid AND i.indisprimary AND a.attrelid = c.oid), '{}')"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p')"
            " AND c.relpersistence = 'p' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1"
        ).fetchall()
    identities = {"d": "default", "f": "full", "i": "index", "n": "nothing"}
    return [
        {"name": name, "published": name in members, "primary_key": key, "replica_identity": identities.get(ident, ident)}
        for name, ident, key in rows
    ]


def drop_slot(source: Source) -> None:
    """Drop the slot and the publication, where we made them."""
    with connect(source) as conn:
        if source.slot_created:
            _drop(conn, source.slot_name)
        if source.publication_created:
            conn.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(sql.Identifier(source.publication_name)))


def _drop(conn: psycopg.Connection[Any], slot: str) -> None:
    """Our reader may still be on it."""
    conn.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s AND active", [slot])
    for _ in range(50):
        try:
            conn.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [slot])
            return
        except psycopg.errors.ObjectInUse:
            conn.execute("SELECT pg_sleep(0.1)")
    raise SetupRefused("slot_name", f"the slot {slot} is in use: stop what reads it (SELECT * FROM pg_replication_slots)")


def _create_publication(conn: psycopg.Connection[Any], source: Source, server: Server) -> None:
    """An empty one: consumers add the tables they name. Changes of partitions arrive under the partitioned table's name.

    Rows arrive with their stored generated columns where the server can send them, which spares their UPDATEs from failing, too.
    """
    generated = ", publish_generated_columns = stored" if server.version >= 180_000 else ""
    root = f" WITH (publish_via_partition_root = true{generated})" if server.version >= 130_000 else ""
    statement = sql.SQL("CREATE PUBLICATION {}" + root).format(sql.Identifier(source.publication_name))
    try:
        conn.execute(statement)
    except psycopg.Error as error:
        raise SetupRefused(
            "publication_name",
            f"cannot create the publication: {reason_of(error, source)}. As the owner of the tables run on the source:"
            f" CREATE PUBLICATION {sql.Identifier(source.publication_name).as_string(conn)} FOR TABLE …{root};",
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
