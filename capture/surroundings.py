"""Look at what surrounds the stream on the source: the slot, the publication's tables, the sender of a dead reader."""
from __future__ import annotations

from typing import Any, NamedTuple

import psycopg

from capture.membership import Member, Publication, Seen
from consumers.encodings import codec_of, readable
from consumers.hosting import readable_bytes, setting_bytes
from consumers.models import Source
from consumers.preflight import PLUGIN, RETAINED_ALARM_BYTES

HEARTBEAT = "sequin:heartbeat"
LOOK_WITHIN_S = 15.0  # longer than the control connection's statements may take when the server is well


class SlotUnusable(Exception):
    """The slot or publication is missing, lost or not ours to use; the text has the SQL that mends it.

    `state` names the trouble: slot_missing, slot_lost, slot_foreign or publication_missing.
    """

    def __init__(self, state: str, text: str) -> None:
        self.state = state
        super().__init__(text)


def publication_missing(name: str) -> SlotUnusable:
    return SlotUnusable(
        "publication_missing",
        f"the publication {name} does not exist. One of ours the console's and the API's recover makes anew; or run on the source:"
        f' CREATE PUBLICATION "{name}" FOR TABLE …; then recover',
    )


class Slot(NamedTuple):
    confirmed_lsn: int
    retained_bytes: int
    source_lsn: int
    next_xid: int
    in_recovery: bool
    warnings: tuple[str, ...]
    """What people should know although all is well."""


def encoding(control: psycopg.Connection[Any]) -> str:
    """The database's, as Postgres calls it."""
    row = control.execute("SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()").fetchone()
    assert row is not None
    return str(row[0])


def started_at(control: psycopg.Connection[Any]) -> str:
    """When the server was started, as its text: another one has another time."""
    row = control.execute("SELECT pg_postmaster_start_time()::text").fetchone()
    assert row is not None
    return str(row[0])


def look_at_slot(control: psycopg.Connection[Any], source: Source) -> Slot:
    """Read the slot's state. Raises SlotUnusable."""
    invalid = "s.invalidation_reason" if control.info.server_version >= 170_000 else "NULL"
    row = control.execute(
        f"SELECT s.plugin::text, s.database::text, s.wal_status, {invalid}::text, s.confirmed_flush_lsn - '0/0'::pg_lsn,"
        " here - s.restart_lsn, here - '0/0'::pg_lsn, txid_snapshot_xmax(txid_current_snapshot()), recovering,"
        " (SELECT setting || coalesce(unit, '') FROM pg_settings WHERE name = 'max_slot_wal_keep_size'),"
        " EXISTS (SELECT FROM pg_publication WHERE pubname = %s)"
        " FROM (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS here,"
        " pg_is_in_recovery() AS recovering) h LEFT JOIN pg_replication_slots s ON s.slot_name = %s",
        [source.publication_name, source.slot_name],
    ).fetchone()
    assert row is not None
    plugin, database, wal_status, why, confirmed, retained, here, xid, recovering, cap, has_publication = row
    name = source.slot_name
    create = f"SELECT pg_create_logical_replication_slot('{name}', '{PLUGIN}');"
    way_back = "The console's and the API's recover makes it anew"
    if plugin is None:
        raise SlotUnusable("slot_missing", f"the slot {name} does not exist. {way_back}; or run on the source: {create}")
    if plugin != PLUGIN or database != source.database:
        raise SlotUnusable(
            "slot_foreign",
            f"the slot {name} is of plugin {plugin} and database {database}; expected {PLUGIN} and {source.database}: choose"
            " another slot_name",
        )
    if wal_status == "lost" or why:
        raise SlotUnusable(
            "slot_lost",
            f"the slot {name} is lost: the server removed WAL that was not read yet{f' ({why})' if why else ''}. {way_back}; or"
            f" run on the source: SELECT pg_drop_replication_slot('{name}'); {create}",
        )
    if not has_publication:
        raise publication_missing(source.publication_name)
    warnings = _retained_warnings(int(retained or 0), wal_status, setting_bytes(cap) if cap else None)
    if warnings and int(here or 0) - int(confirmed or 0) < int(retained or 0) / 2 and (why := _oldest_transaction(control)):
        warnings = (f"{warnings[0]}. {why}", *warnings[1:])
    return Slot(int(confirmed or 0), int(retained or 0), int(here or 0), int(xid), bool(recovering), warnings)


def idle_limit(control: psycopg.Connection[Any]) -> tuple[str, ...]:
    """What people should know who let a slot go unread: Postgres 18 may have a limit for that."""
    row = control.execute(
        "SELECT setting || ' ' || coalesce(unit, '') FROM pg_settings WHERE name = 'idle_replication_slot_timeout' AND setting <> '0'"
    ).fetchone()
    return () if row is None else (f"idle_replication_slot_timeout is {row[0].strip()}: paused for longer, the slot is lost",)


def _oldest_transaction(control: psycopg.Connection[Any]) -> str | None:
    """Who keeps WAL although all of it was read: an open transaction may still be committed, and is sent only then."""
    row = control.execute(
        "SELECT pid, extract(epoch FROM clock_timestamp() - xact_start)::int FROM pg_stat_activity WHERE backend_xid IS NOT NULL"
        " AND datname = current_database() ORDER BY xact_start LIMIT 1"
    ).fetchone()
    return None if row is None else f"A transaction of process {row[0]} has been open for {row[1]} s: until it ends the server keeps it"


def _retained_warnings(retained: int, wal_status: str | None, cap: int | None) -> tuple[str, ...]:
    held = f"the slot holds back {readable_bytes(retained)} of WAL on the source's disk"
    if wal_status == "unreserved":
        return (f"{held} and is about to be lost: the server may remove that WAL at its next checkpoint",)
    if cap is not None and retained > cap / 2:
        return (f"{held}, more than half of max_slot_wal_keep_size ({readable_bytes(cap)}); past it the slot is lost",)
    return (held,) if retained > RETAINED_ALARM_BYTES else ()


def end_own_sender(control: psycopg.Connection[Any], pid: int, application_name: str) -> None:
    """End the server's process of a reader of ours that is gone, which the server has not noticed yet.

    The store's lock makes us the only reader of this source; a process of any other name is left alone.
    """
    try:
        control.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s AND application_name = %s",
            [pid, application_name],
        )
    except psycopg.Error:
        pass  # not permitted: the server ends it by itself after wal_sender_timeout


def beat(control: psycopg.Connection[Any]) -> None:
    """Write a message of ours into the source's WAL, which lets the slot move on."""
    try:
        control.execute("SELECT pg_logical_emit_message(true, %s, '')", [HEARTBEAT])
    except psycopg.Error:
        pass  # not permitted, or too old: keepalives do it too, only later


# The publication's tables ----------------------------------------------------------------------------------------

_TABLES_SQL = """
    WITH pub AS (SELECT oid, puballtables FROM pg_publication WHERE pubname = %(publication)s),
    member AS (
        SELECT DISTINCT t.relid FROM pg_get_publication_tables(%(publication)s) g,
        LATERAL (SELECT coalesce(x.relid::oid, g.relid) AS relid FROM (SELECT) one LEFT JOIN pg_partition_tree(g.relid) x ON true) t
    )
    SELECT c.oid::bigint, convert_to(n.nspname || '.' || c.relname, 'SQL_ASCII'),
        CASE WHEN m.relid IS NOT NULL THEN coalesce(
            (SELECT max(r.oid)::bigint FROM pg_publication_rel r, pub WHERE r.prpubid = pub.oid
             AND (r.prrelid = c.oid OR c.relispartition AND r.prrelid IN (SELECT relid FROM pg_partition_ancestors(c.oid)))),
            {schemas} 0) END,
        pg_relation_size(c.oid) > 0, coalesce(pg_relation_filenode(c.oid), 0)::bigint, coalesce(d.shape, ''),
        coalesce(d.rewritten, ''), c.relispartition
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN member m ON m.relid = c.oid
    LEFT JOIN LATERAL (
        SELECT md5(string_agg(concat_ws(' ', convert_to(a.attname::text, 'SQL_ASCII'), a.atttypid, a.atttypmod), ',' ORDER BY a.attnum))
                   AS shape,
               md5(string_agg(concat_ws(' ', a.xmin, x.xmin), ',' ORDER BY a.attnum)) AS rewritten
        FROM pg_attribute a LEFT JOIN pg_attrdef x ON x.adrelid = a.attrelid AND x.adnum = a.attnum AND a.attgenerated <> ''
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND m.relid IS NOT NULL
    ) d ON true
    WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND (m.relid IS NOT NULL OR c.oid = ANY (%(before)s) OR pg_relation_size(c.oid) > 0)
"""
_SCHEMAS_SQL = "(SELECT max(s.oid)::bigint FROM pg_publication_namespace s, pub WHERE s.pnpubid = pub.oid AND s.pnnspid = n.oid),"


def look_at_tables(
    control: psycopg.Connection[Any], publication: str, encoding: str, before: Seen | None
) -> Seen:
    """The publication and the database's tables; partitioned ones count as their partitions, for that is what rows are in.

    Of the tables that are not published those that have rows, and those that were `before`. Raises SlotUnusable.
    """
    codec = codec_of(encoding)
    row = control.execute(
        "SELECT oid::bigint, xmin::text, concat(CASE WHEN pubinsert THEN 'i' END, CASE WHEN pubupdate THEN 'u' END,"
        " CASE WHEN pubdelete THEN 'd' END, CASE WHEN pubtruncate THEN 't' END), pubviaroot FROM pg_publication WHERE pubname = %s",
        [publication],
    ).fetchone()
    if row is None:
        raise publication_missing(publication)
    schemas = _SCHEMAS_SQL if control.info.server_version >= 150_000 else ""
    found = control.execute(
        _TABLES_SQL.format(schemas=schemas),  # type: ignore[arg-type]
        {"publication": publication, "before": list(before.tables) if before else []},
    ).fetchall()
    return Seen(Publication(publication, *row), {oid: Member(readable(name, codec), *rest) for oid, name, *rest in found})
