"""Look at a source before and while its slot is used: what is right, what is wrong, and the SQL that mends it.

Nothing is changed here. A blocking finding keeps capture from working; the others cost something later, and say what.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
from psycopg import pq, sql

from consumers import hosting
from consumers.hosting import Provider, readable_bytes
from consumers.models import Source, is_local_host
from consumers.source_connection import SourceUnreachable, conninfo, connect, reason_of

PLUGIN = "pgoutput"
OLDEST = 120_000
SLOTS_SPARE = 2
RETAINED_ALARM_BYTES = 10**9
NAMED_TABLES = 20  # in one finding


class Finding(NamedTuple):
    """One thing the pre-flight saw. `sql` mends it; a blocking one stops capture."""

    name: str
    ok: bool
    blocking: bool
    text: str
    sql: str = ""


class Server(NamedTuple):
    """What the checks need to know of the server, read once."""

    version: int
    provider: Provider
    settings: dict[str, tuple[str, str]]
    in_recovery: bool

    def setting(self, name: str) -> str | None:
        found = self.settings.get(name)
        return None if found is None else found[0]

    def setting_bytes(self, name: str) -> int | None:
        found = self.settings.get(name)
        return None if found is None else hosting.setting_bytes(*found)


def check(source: Source, needs_old_values: tuple[str, ...] = ()) -> list[Finding]:
    """Every finding about the source. Raises SourceUnreachable.

    `needs_old_values`: tables, as `schema.table`, of which some consumer asks for old values.
    """
    with connect(source) as conn:
        server = read_server(conn, source)
        found = [
            *_check_server(conn, source, server), *_check_role(conn, source, server), *_check_replication(conn, source, server),
            *_check_capacity(conn, source, server), *check_slot(conn, source, server), *_check_settings(server),
        ]  # fmt: skip
        published = publication_exists(conn, source.publication_name)
        if not published:
            name = sql.Identifier(source.publication_name).as_string(conn)
            text = f"there is no publication {source.publication_name}"
            return [*found, Finding("publication", False, True, text, f"CREATE PUBLICATION {name} FOR TABLE …;")]
        return [*found, *_check_publication(conn, source, server), *_check_tables(conn, source, server, needs_old_values)]


def findings(source: Source, needs_old_values: tuple[str, ...] = ()) -> list[Finding]:
    """What `check` finds; a source that does not answer is one finding too."""
    try:
        reached = Finding("reachable", True, True, f"{source.host}:{source.port} answers")
        return [reached, *check(source, needs_old_values)]
    except SourceUnreachable as error:
        return [Finding("reachable", False, True, str(error))]


def read_server(conn: psycopg.Connection[Any], source: Source) -> Server:
    rows = conn.execute("SELECT name, setting, coalesce(unit, '') FROM pg_settings").fetchall()
    settings = {name: (value, unit) for name, value, unit in rows}
    roles = {row[0] for row in conn.execute("SELECT rolname::text FROM pg_roles").fetchall()}
    recovering = bool(one(conn, "SELECT pg_is_in_recovery()"))
    return Server(conn.info.server_version, hosting.provider_of(source.host, settings, roles), settings, recovering)


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


def publication_exists(conn: psycopg.Connection[Any], name: str) -> bool:
    return bool(one(conn, "SELECT count(*) FROM pg_publication WHERE pubname = %s", [name]))


def published(conn: psycopg.Connection[Any], publication: str) -> list[tuple[str, str]]:
    """The tables of the publication as (schema, table), sorted."""
    return [
        (schema, table)
        for schema, table in conn.execute(
            "SELECT schemaname::text, tablename::text FROM pg_publication_tables WHERE pubname = %s ORDER BY 1, 2", [publication]
        ).fetchall()
    ]


def without_identity(conn: psycopg.Connection[Any], tables: list[str]) -> list[str]:
    """Those of the tables whose UPDATEs and DELETEs fail once they are published: no key that identifies a row."""
    rows = conn.execute(
        "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname || '.' || c.relname = ANY (%s) AND NOT (c.relreplident = 'f'"
        " OR (c.relreplident = 'd' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary))"
        " OR (c.relreplident = 'i' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident)))"
        " ORDER BY 1",
        [tables],
    ).fetchall()
    return [row[0] for row in rows]


def one(conn: psycopg.Connection[Any], query: str, parameters: list[Any] | None = None) -> Any:
    row = conn.execute(query, parameters).fetchone()
    return None if row is None else row[0]


def qualified(table: str) -> sql.Identifier:
    """`schema.table` as an identifier. A schema's name holds no dot here, as validate_table demands."""
    return sql.Identifier(*table.split(".", 1))


# The server and the role ------------------------------------------------------------------------------------------


def _check_server(conn: psycopg.Connection[Any], source: Source, server: Server) -> Iterator[Finding]:
    name = hosting.version_name(server.version)
    where = f" at {server.provider.name}" if server.provider.name else ""
    yield Finding("version", server.version >= OLDEST, True, f"the server is Postgres {name}{where}; 12 or newer is needed")
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


# The publication and its tables ------------------------------------------------------------------------------------


def _check_publication(conn: psycopg.Connection[Any], source: Source, server: Server) -> Iterator[Finding]:
    name = sql.Identifier(source.publication_name).as_string(conn)
    tables = published(conn, source.publication_name)
    row = conn.execute(
        "SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication WHERE pubname = %s", [source.publication_name]
    ).fetchone()
    assert row is not None
    some = ", ".join(f"{schema}.{table}" for schema, table in tables[:NAMED_TABLES])
    more = f" and {len(tables) - NAMED_TABLES} more" if len(tables) > NAMED_TABLES else ""
    yield Finding(
        "publication", bool(tables), False,
        f"the publication {source.publication_name} publishes {len(tables)} tables" + (f": {some}{more}" if tables else ""),
        "" if tables else f"ALTER PUBLICATION {name} ADD TABLE …;",
    )  # fmt: skip
    left_out = [action for action, on in zip(("insert", "update", "delete", "truncate"), row, strict=True) if not on]
    if left_out:
        yield Finding(
            "publication_actions", False, False,
            f"the publication {source.publication_name} leaves out {', '.join(left_out)}: these never arrive",
            f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate');",
        )  # fmt: skip


def _check_tables(
    conn: psycopg.Connection[Any], source: Source, server: Server, needs_old_values: tuple[str, ...]
) -> Iterator[Finding]:
    tables = [f"{schema}.{table}" for schema, table in published(conn, source.publication_name)]
    for table in without_identity(conn, tables):
        yield Finding(
            "replica_identity", False, False,
            f"{table} has no replica identity: its UPDATEs and DELETEs fail while it is published",
            f"ALTER TABLE {qualified(table).as_string(conn)} REPLICA IDENTITY FULL;",
        )  # fmt: skip
    if server.version >= 150_000:
        yield from _check_lists_and_filters(conn, source)
    if needs_old_values:
        weak = conn.execute(
            "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname || '.' || c.relname = ANY (%s) AND c.relreplident <> 'f' ORDER BY 1",
            [list(needs_old_values)],
        ).fetchall()
        for (table,) in weak:
            yield Finding(
                "old_values", False, False,
                f"{table} does not give its old values, which a consumer's where asks for: those messages are delivered undecided",
                f"ALTER TABLE {qualified(table).as_string(conn)} REPLICA IDENTITY FULL;",
            )  # fmt: skip
    unreadable = conn.execute(
        "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname || '.' || c.relname = ANY (%s)"
        " AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')) ORDER BY 1",
        [tables],
    ).fetchall()
    if unreadable:
        names = [row[0] for row in unreadable]
        shown = ", ".join(names[:NAMED_TABLES])
        who = sql.Identifier(source.username).as_string(conn)
        grants = " ".join(f"GRANT SELECT ON {qualified(name).as_string(conn)} TO {who};" for name in names[:NAMED_TABLES])
        yield Finding("select", False, False, f"the role may not read {shown}: changes arrive, backfills do not", grants)


def _check_lists_and_filters(conn: psycopg.Connection[Any], source: Source) -> Iterator[Finding]:
    """Column lists and row filters that make UPDATEs fail: they must cover the replica identity, or be covered by it."""
    rows = conn.execute(
        """
        SELECT n.nspname || '.' || c.relname, c.relreplident::text, r.prattrs IS NOT NULL, r.prqual IS NOT NULL,
               coalesce((SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a
                         WHERE a.attrelid = c.oid AND a.attnum = ANY (i.keys) AND r.prattrs IS NOT NULL
                           AND NOT a.attnum = ANY (r.prattrs::int2[])), '{}'),
               coalesce((SELECT array_agg(DISTINCT a.attname::text) FROM pg_depend d JOIN pg_attribute a
                           ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                         WHERE r.prqual IS NOT NULL AND d.classid = 'pg_publication_rel'::regclass AND d.objid = r.oid
                           AND d.refobjid = c.oid AND d.refobjsubid > 0 AND c.relreplident <> 'f'
                           AND NOT a.attnum = ANY (i.keys) AND (r.prattrs IS NULL OR NOT a.attnum = ANY (r.prattrs::int2[]))), '{}')
        FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid
        JOIN pg_namespace n ON n.oid = c.relnamespace
        CROSS JOIN LATERAL (SELECT coalesce((SELECT x.indkey::int2[] FROM pg_index x WHERE x.indrelid = c.oid
             AND ((c.relreplident = 'd' AND x.indisprimary) OR (c.relreplident = 'i' AND x.indisreplident)) LIMIT 1), '{}') AS keys) i
        WHERE p.pubname = %s AND (p.pubupdate OR p.pubdelete) ORDER BY 1
        """,
        [source.publication_name],
    ).fetchall()
    for table, identity, listed, _, uncovered, unidentified in rows:
        quoted = qualified(table).as_string(conn)
        if listed and identity == "f":
            yield Finding(
                "column_list", False, False,
                f"{table} has REPLICA IDENTITY FULL and a column list in the publication: its UPDATEs and DELETEs fail",
                f"ALTER TABLE {quoted} REPLICA IDENTITY DEFAULT; -- or publish all columns",
            )  # fmt: skip
        elif uncovered:
            yield Finding(
                "column_list", False, False,
                f"the publication's column list leaves out {', '.join(uncovered)} of {table}'s replica identity: its UPDATEs and"
                " DELETEs fail",
                f"-- add {', '.join(uncovered)} to the column list of {quoted}",
            )  # fmt: skip
        if unidentified:
            yield Finding(
                "row_filter", False, False,
                f"the publication's row filter on {table} uses {', '.join(unidentified)}, which the replica identity lacks: its"
                " UPDATEs and DELETEs fail",
                f"ALTER TABLE {quoted} REPLICA IDENTITY FULL;",
            )  # fmt: skip
