"""Look at a source before and while its slot is used: what is right, what is wrong, and the SQL that mends it.

Nothing is changed here. A blocking finding keeps capture from working; the others cost something later, and say what.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg import pq, sql

from consumers import hosting
from consumers.findings import Finding, Server, one, read_server
from consumers.hosting import readable_bytes
from consumers.models import Consumer, Source, is_local_host
from consumers.preflight_tables import check_publication, check_tables
from consumers.publication import publication_exists
from consumers.source_connection import SourceUnreachable, conninfo, connect, reason_of

PLUGIN = "pgoutput"
OLDEST = 130_000
SLOTS_SPARE = 2
LOCK_WITHIN_MS = 2_000
RETAINED_ALARM_BYTES = 10**9


def check(source: Source) -> list[Finding]:
    """Every finding about the source. Raises SourceUnreachable."""
    with connect(source, lock_timeout_ms=LOCK_WITHIN_MS) as conn:
        server = read_server(conn, source)
        found = [
            *_check_server(conn, source, server), *_check_role(conn, source, server), *_check_replication(conn, source, server),
            *_check_capacity(conn, source, server), *check_slot(conn, source, server), *_check_other_slots(conn, source, server),
            *_check_settings(server),
        ]  # fmt: skip
        if not publication_exists(conn, source.publication_name):
            name = sql.Identifier(source.publication_name).as_string(conn)
            text = f"there is no publication {source.publication_name}"
            return [*found, Finding("publication", False, True, text, f"CREATE PUBLICATION {name} FOR TABLE …;")]
        consumers = Consumer.objects.filter(source=source.pk).exclude(status="disabled").order_by("name")
        return [*found, *check_publication(conn, source, server), *check_tables(conn, source, server, consumers)]


def findings(source: Source) -> list[Finding]:
    """What `check` finds; a source that does not answer is one finding too."""
    try:
        reached = Finding("reachable", True, True, f"{source.host}:{source.port} answers")
        return [reached, *check(source)]
    except SourceUnreachable as error:
        return [Finding("reachable", False, True, str(error))]
    except psycopg.Error as error:
        more = ": a table is locked, try again" if isinstance(error, psycopg.errors.LockNotAvailable) else ""
        return [Finding("checked", False, False, f"the check could not be finished ({reason_of(error, source)}){more}")]


def check_wal_level(server: Server) -> Finding:
    level = server.setting("wal_level")
    good = level == "logical"
    return Finding("wal_level", good, True, f"wal_level is {level}; logical is needed", "" if good else server.provider.logical)


def check_slot(conn: psycopg.Connection[Any], source: Source, server: Server) -> list[Finding]:
    """The slot: there, of the right plugin and database, with its WAL; and how much WAL it holds back."""
    reason = "invalidation_reason" if server.version >= 170_000 else "NULL"
    row = conn.execute(
        "SELECT s.plugin::text, s.database::text, s.wal_status, s.active, s.active_pid, a.application_name,"
        f" {reason}::text, h.here - s.restart_lsn, s.safe_wal_size, s.temporary"
        " FROM (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS here) h,"
        " pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = %s",
        [source.slot_name],
    ).fetchone()
    create = f"SELECT pg_create_logical_replication_slot('{source.slot_name}', '{PLUGIN}');"
    if row is None:
        return [Finding("slot", False, True, f"there is no slot {source.slot_name}", create)]
    plugin, database, wal_status, active, pid, application, invalid, retained, safe, _ = row
    if plugin != PLUGIN or database != source.database:
        text = f"the slot {source.slot_name} is of plugin {plugin} and database {database}; expected {PLUGIN} and {source.database}"
        return [Finding("slot", False, True, text, create.replace(source.slot_name, source.slot_name + "_2"))]
    if wal_status == "lost" or invalid:
        text = f"the slot {source.slot_name} is lost: the server removed WAL it still needed" + (f" ({invalid})" if invalid else "")
        return [Finding("slot", False, True, text, f"SELECT pg_drop_replication_slot('{source.slot_name}'); {create} -- then backfill")]
    used = ""
    if active:
        ours = str(application or "").startswith("sequin")
        used = f", read by process {pid}" + ("" if ours else f" ({application or 'without application_name'}), which is not ours")
    found = [Finding("slot", True, True, f"the slot {source.slot_name} is there, wal_status {wal_status or 'unknown'}{used}")]
    found.append(_check_retained(int(retained or 0), wal_status, safe, server))
    return found


def _check_retained(retained: int, wal_status: str | None, safe: Any, server: Server) -> Finding:
    cap = server.setting_bytes("max_slot_wal_keep_size")
    text = f"the slot holds back {readable_bytes(retained)} of WAL on the server's disk"
    urgent = wal_status == "unreserved"
    if urgent:
        text += ", and the server may remove it at the next checkpoint: let capture run at once"
    elif cap is not None and retained > cap / 2:
        text += f", more than half of max_slot_wal_keep_size ({readable_bytes(cap)}): past it the slot is lost"
        urgent = True
    elif retained > RETAINED_ALARM_BYTES:
        text += ": capture is behind or stopped"
        urgent = True
    if urgent and safe is not None and int(safe) > 0:
        text += f"; {readable_bytes(int(safe))} are left"
    return Finding("retained_wal", not urgent, False, text)


def _check_other_slots(conn: psycopg.Connection[Any], source: Source, server: Server) -> Iterator[Finding]:
    """Slots that nobody reads hold back WAL too: of a source that was deleted or moved, say."""
    if server.in_recovery:
        return  # a standby keeps slots in step for the primary
    ours = set(Source.objects.filter(host=source.host, port=source.port).values_list("slot_name", flat=True)) | {source.slot_name}
    rows = conn.execute(
        "SELECT s.slot_name::text, h.here - s.restart_lsn FROM pg_replication_slots s, (SELECT pg_current_wal_lsn() AS here) h"
        " WHERE s.database = current_database() AND NOT s.active AND NOT s.temporary AND s.restart_lsn IS NOT NULL ORDER BY 1"
    ).fetchall()
    for name, retained in rows:
        if name not in ours:
            yield Finding(
                "other_slot", False, False,
                f"the slot {name}, which no source here reads, is read by nobody and holds back {readable_bytes(int(retained))} of WAL",
                f"SELECT pg_drop_replication_slot('{name}'); -- if nobody needs it",
            )  # fmt: skip


# The server and the role ------------------------------------------------------------------------------------------


def _check_server(conn: psycopg.Connection[Any], source: Source, server: Server) -> Iterator[Finding]:
    name = hosting.version_name(server.version)
    where = f" at {server.provider.name}" if server.provider.name else ""
    yield Finding("version", server.version >= OLDEST, True, f"the server is Postgres {name}{where}; 13 or newer is needed")
    yield check_wal_level(server)
    if problem := hosting.pooler_problem(source.host, source.port, source.username):
        yield Finding("pooler", False, True, problem)
    if not is_local_host(source.host):
        encrypted = bool(conn.pgconn.ssl_in_use)
        text = f"the connection is {'' if encrypted else 'not '}encrypted, sslmode {source.effective_sslmode}"
        yield Finding("ssl", encrypted, False, text, "" if encrypted else "-- set the source's sslmode to require or verify-full")
    if server.in_recovery:
        able = server.version >= 160_000
        text = "the server is a standby: Postgres 16 or newer decodes there; make the publication on the primary"
        yield Finding("standby", able, True, text, "" if able else "-- use the primary's address")
        feedback = server.setting("hot_standby_feedback") == "on"
        if not feedback:
            yield Finding(
                "hot_standby_feedback", False, False,
                "hot_standby_feedback is off: a vacuum on the primary may invalidate the slot of this standby",
                "ALTER SYSTEM SET hot_standby_feedback = on; SELECT pg_reload_conf();",
            )  # fmt: skip
    encoding = one(conn, "SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()")
    if encoding == "SQL_ASCII":
        yield Finding("encoding", False, False, "the database is SQL_ASCII: text that is not UTF-8 arrives with its bytes as \\x escapes")


def _check_role(conn: psycopg.Connection[Any], source: Source, server: Server) -> Iterator[Finding]:
    row = conn.execute(
        "SELECT rolsuper, rolreplication OR rolsuper OR EXISTS (SELECT FROM pg_roles g WHERE g.rolname IN ('rds_replication',"
        " 'rds_superuser', 'azure_pg_admin', 'neon_superuser') AND pg_has_role(current_user, g.oid, 'member'))"
        " FROM pg_roles WHERE rolname = current_user"
    ).fetchone()
    superuser, allowed = row if row is not None else (False, False)
    who = sql.Identifier(source.username).as_string(conn)
    mend = "" if allowed else server.provider.replication.format(role=who)
    yield Finding("replication", bool(allowed), True, f"the role {source.username} {'may' if allowed else 'may not'} replicate", mend)
    if superuser and not server.provider.name and not is_local_host(source.host):
        yield Finding(
            "superuser", False, False,
            f"the role {source.username} is a superuser, which is more than capture needs",
            "CREATE ROLE sequin LOGIN REPLICATION PASSWORD '…'; GRANT SELECT ON ALL TABLES IN SCHEMA public TO sequin;",
        )  # fmt: skip


def _check_replication(conn: psycopg.Connection[Any], source: Source, server: Server) -> Iterator[Finding]:
    """Whether a replication connection comes about at all: poolers, limits and pg_hba.conf show only there."""
    probe = pq.PGconn.connect(conninfo(source, replication=True).encode())
    try:
        if probe.status != pq.ConnStatus.OK:
            reason = reason_of(Exception(probe.error_message.decode(errors="replace")), source)
        else:
            answer = probe.exec_(b"IDENTIFY_SYSTEM")
            if answer.status == pq.ExecStatus.TUPLES_OK:
                yield Finding("replication_connection", True, True, "a replication connection comes about")
                return
            reason = reason_of(Exception(answer.error_message.decode(errors="replace")), source)
    finally:
        probe.finish()
    more = hosting.hint(reason, source.host, source.port)
    text = f"no replication connection: {reason}" + (f". {more[0].upper()}{more[1:]}" if more else "")
    yield Finding("replication_connection", False, True, text)


def _check_capacity(conn: psycopg.Connection[Any], source: Source, server: Server) -> Iterator[Finding]:
    ours = bool(one(conn, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", [source.slot_name]))
    for name, query, what in (
        ("max_replication_slots", "SELECT count(*) FROM pg_replication_slots", "replication slots"),
        ("max_wal_senders", "SELECT count(*) FROM pg_stat_replication", "WAL senders"),
    ):
        limit = int(server.setting(name) or 0)
        used = int(one(conn, query) or 0)
        needed = 0 if ours else 1
        full = used + needed > limit
        tight = limit - used - needed < SLOTS_SPARE
        text = f"{used} of {limit} {what} are used" + (f"; raise {name} to leave some for standbys and backups" if tight else "")
        mend = f"ALTER SYSTEM SET {name} = {max(limit * 2, 10)}; -- then restart the server" if tight else ""
        yield Finding(name, not tight, full, text, mend)


def _check_settings(server: Server) -> Iterator[Finding]:
    if server.version >= 130_000:
        cap = server.setting_bytes("max_slot_wal_keep_size")
        if cap is None:
            yield Finding(
                "max_slot_wal_keep_size", False, False,
                "max_slot_wal_keep_size is unlimited: while capture is stopped, WAL grows until the server's disk is full. A limit"
                " protects the disk; past it the slot is lost and a backfill is needed",
                "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf();",
            )  # fmt: skip
        else:
            text = f"max_slot_wal_keep_size is {readable_bytes(cap)}: a slot that falls behind further is lost"
            yield Finding("max_slot_wal_keep_size", True, False, text)
    idle = server.setting("idle_replication_slot_timeout")
    if idle not in (None, "0"):
        unit = server.settings["idle_replication_slot_timeout"][1]
        yield Finding(
            "idle_replication_slot_timeout", False, False,
            f"idle_replication_slot_timeout is {idle} {unit}: a source paused, or capture stopped, for longer loses its slot",
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();",
        )  # fmt: skip
