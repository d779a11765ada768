"""Look at what surrounds the stream on the source: the slot, the publication's tables, the sender of a dead reader."""
from __future__ import annotations

from typing import Any, NamedTuple

import psycopg

from capture.encodings import codec_of, readable
from consumers.hosting import readable_bytes, setting_bytes
from consumers.models import Source
from consumers.preflight import PLUGIN, RETAINED_ALARM_BYTES

HEARTBEAT = "sequin:heartbeat"


class SlotUnusable(Exception):
    """The slot or publication is missing, lost or not ours to use; the text has the SQL that mends it.

    `state` names the trouble: slot_missing, slot_lost, slot_foreign or publication_missing.
    """

    def __init__(self, state: str, text: str) -> None:
        self.state = state
        super().__init__(text)


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
        raise SlotUnusable(
            "publication_missing",
            f"the publication {source.publication_name} does not exist. Run on the source: CREATE PUBLICATION"
            f' "{source.publication_name}" FOR TABLE …;',
        )
    warnings = _retained_warnings(int(retained or 0), wal_status, setting_bytes(cap) if cap else None)
    return Slot(int(confirmed or 0), int(retained or 0), int(here or 0), int(xid), bool(recovering), warnings)


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


class Tables(NamedTuple):
    """The tables of the database by oid: those whose own changes are published, and the others."""

    published: dict[int, str]
    filled: dict[int, str]
    """Not published, and not empty."""

    def as_json(self) -> dict[str, list[int]]:
        return {"published": sorted(self.published), "filled": sorted(self.filled)}


class Membership(NamedTuple):
    kind: str
    table: str
    text: str
    backfill: bool


def look_at_tables(control: psycopg.Connection[Any], publication: str, encoding: str) -> Tables:
    """Partitioned tables count as their partitions: those are what rows are in."""
    codec = codec_of(encoding)
    found = control.execute(
        "SELECT c.oid::bigint, convert_to(n.nspname || '.' || c.relname, 'SQL_ASCII'), p.oid IS NOT NULL FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " LEFT JOIN (SELECT DISTINCT t.relid AS oid FROM pg_get_publication_tables(%s) g,"
        "  LATERAL (SELECT coalesce(x.relid, g.relid) AS relid FROM (SELECT) one LEFT JOIN pg_partition_tree(g.relid) x ON true) t"
        " ) p ON p.oid = c.oid"
        " WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog', 'information_schema')"
        " AND (p.oid IS NOT NULL OR pg_relation_size(c.oid) > 0)",
        [publication],
    ).fetchall()
    rows = [(oid, readable(name, codec), member) for oid, name, member in found]
    published = {oid: name for oid, name, member in rows if member}
    return Tables(published, {oid: name for oid, name, member in rows if not member})


def membership_changes(before: dict[str, list[int]] | None, now: Tables) -> list[Membership]:
    """Who joined and who left since `before`. One that joined with rows in it needs a backfill: these were not sent."""
    if before is None:
        return []
    found = []
    was, filled = set(before["published"]), set(before["filled"])
    for oid, name in sorted(now.published.items()):
        if oid not in was:
            text = "is published now"
            if oid in filled:
                text += "; the rows it had before were not sent"
            found.append(Membership("published", name, text, oid in filled))
    for oid in sorted(was - set(now.published)):
        if oid in now.filled:
            found.append(Membership("unpublished", now.filled[oid], "is no longer published: its changes do not arrive", False))
    return found
