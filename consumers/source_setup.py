"""Make and inspect what a source needs on its server: publication first, then slot. Nothing of the user's is altered."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from consumers.models import Source
from consumers.source_connection import connect, reason_of

PLUGIN = "pgoutput"


class SetupRefused(Exception):
    """The source cannot be set up as asked; `field` is the one to blame, the text says what to do."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(reason)


class Prepared(NamedTuple):
    slot_created: bool
    publication_created: bool


class Finding(NamedTuple):
    """One thing the pre-flight saw. `sql` mends it; a blocking one stops capture."""

    name: str
    ok: bool
    blocking: bool
    text: str
    sql: str = ""


def prepare_source(source: Source) -> Prepared:
    """Use the publication and slot there are, or make them. Raises SourceUnreachable or SetupRefused."""
    with connect(source) as conn:
        _demand_logical(conn)
        publication_made = not _publication_exists(conn, source.publication_name)
        if publication_made:
            _create_publication(conn, source)
        try:
            slot_made = _ensure_slot(conn, source)
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
        for table in missing:
            _demand_identity(conn, table)
        if not missing:
            return
        statement = sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(
            sql.Identifier(source.publication_name), sql.SQL(", ").join(_qualified(table) for table in missing)
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


def check(source: Source) -> list[Finding]:
    """Look at the source before the slot is used. Raises SourceUnreachable."""
    with connect(source) as conn:
        return [
            _check_version(conn), _check_wal_level(conn), _check_role(conn, source), _check_slot(conn, source),
            *_check_publication(conn, source),
        ]  # fmt: skip


def _one(conn: psycopg.Connection[Any], query: str, parameters: list[Any] | None = None) -> Any:
    row = conn.execute(query, parameters).fetchone()
    return None if row is None else row[0]


def _demand_logical(conn: psycopg.Connection[Any]) -> None:
    finding = _check_wal_level(conn)
    if not finding.ok:
        raise SetupRefused("host", f"{finding.text}. {finding.sql}")


def _check_version(conn: psycopg.Connection[Any]) -> Finding:
    version = conn.info.server_version
    return Finding("version", version >= 120_000, True, f"the server is Postgres {version // 10_000}; 12 or newer is needed")


def _check_wal_level(conn: psycopg.Connection[Any]) -> Finding:
    level = _one(conn, "SHOW wal_level")
    return Finding(
        "wal_level", level == "logical", True, f"wal_level is {level}; logical is needed",
        "" if level == "logical" else "ALTER SYSTEM SET wal_level = 'logical'; -- then restart the server",
    )  # fmt: skip


def _check_role(conn: psycopg.Connection[Any], source: Source) -> Finding:
    allowed = _one(
        conn,
        "SELECT rolreplication OR rolsuper OR EXISTS (SELECT FROM pg_roles g WHERE g.rolname IN ('rds_replication',"
        " 'rds_superuser', 'cloudsqlsuperuser', 'azure_pg_admin') AND pg_has_role(current_user, g.oid, 'member'))"
        " FROM pg_roles WHERE rolname = current_user",
    )
    who = psycopg.sql.Identifier(source.username).as_string(conn)
    return Finding(
        "replication", bool(allowed), True,
        f"the role {source.username} {'may' if allowed else 'may not'} replicate",
        "" if allowed else f"ALTER ROLE {who} REPLICATION; -- on RDS: GRANT rds_replication TO {who};",
    )  # fmt: skip


def _check_slot(conn: psycopg.Connection[Any], source: Source) -> Finding:
    row = conn.execute(
        "SELECT plugin, database, wal_status FROM pg_replication_slots WHERE slot_name = %s", [source.slot_name]
    ).fetchone()
    create = f"SELECT pg_create_logical_replication_slot('{source.slot_name}', '{PLUGIN}');"
    if row is None:
        return Finding("slot", False, True, f"there is no slot {source.slot_name}", create)
    plugin, database, wal_status = row
    if plugin != PLUGIN or database != source.database:
        return Finding(
            "slot", False, True,
            f"the slot {source.slot_name} is of plugin {plugin} and database {database}; expected {PLUGIN} and {source.database}",
            create.replace(source.slot_name, source.slot_name + "_2"),
        )  # fmt: skip
    if wal_status == "lost":
        return Finding(
            "slot", False, True, f"the slot {source.slot_name} is lost: the server removed WAL it still needed",
            f"SELECT pg_drop_replication_slot('{source.slot_name}'); {create} -- then backfill",
        )  # fmt: skip
    return Finding("slot", True, True, f"the slot {source.slot_name} is there, wal_status {wal_status or 'unknown'}")


def _check_publication(conn: psycopg.Connection[Any], source: Source) -> list[Finding]:
    name = psycopg.sql.Identifier(source.publication_name).as_string(conn)
    if not _publication_exists(conn, source.publication_name):
        return [
            Finding(
                "publication", False, True, f"there is no publication {source.publication_name}",
                f"CREATE PUBLICATION {name} FOR TABLE …;",
            )
        ]  # fmt: skip
    tables = _published(conn, source.publication_name)
    found = [
        Finding(
            "publication", bool(tables), False, f"the publication {source.publication_name} publishes {len(tables)} tables",
            "" if tables else f"ALTER PUBLICATION {name} ADD TABLE …;",
        )
    ]  # fmt: skip
    for table in tables:
        if not _has_identity(conn, table):
            found.append(
                Finding(
                    "replica_identity", False, False,
                    f"{table} has no replica identity: its UPDATEs and DELETEs fail while it is published",
                    f"ALTER TABLE {_qualified(table).as_string(conn)} REPLICA IDENTITY FULL;",
                )
            )  # fmt: skip
    return found


def _publication_exists(conn: psycopg.Connection[Any], name: str) -> bool:
    return bool(_one(conn, "SELECT count(*) FROM pg_publication WHERE pubname = %s", [name]))


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


def _ensure_slot(conn: psycopg.Connection[Any], source: Source) -> bool:
    finding = _check_slot(conn, source)
    if finding.ok:
        return False
    if "there is no slot" not in finding.text:
        raise SetupRefused("slot_name", f"{finding.text}. Choose another slot_name, or run on the source: {finding.sql}")
    try:
        conn.execute("SET statement_timeout = '60s'")  # it waits for running transactions to end
        conn.execute("SELECT pg_create_logical_replication_slot(%s, %s)", [source.slot_name, PLUGIN])
    except psycopg.errors.QueryCanceled:
        raise SetupRefused(
            "slot_name",
            "the slot could not be made within 60 s: a transaction on the source has been open all the time. End it"
            " (SELECT pid, xact_start, query FROM pg_stat_activity ORDER BY xact_start) and save again",
        ) from None
    except psycopg.Error as error:
        raise SetupRefused("slot_name", f"cannot create the slot: {reason_of(error, source)}. Run on the source: {finding.sql}") from None
    return True


def _published(conn: psycopg.Connection[Any], publication: str) -> list[str]:
    rows = conn.execute(
        "SELECT schemaname || '.' || tablename FROM pg_publication_tables WHERE pubname = %s ORDER BY 1", [publication]
    ).fetchall()
    return [row[0] for row in rows]


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


def _has_identity(conn: psycopg.Connection[Any], table: str) -> bool:
    schema, name = table.split(".", 1)
    return bool(
        _one(
            conn,
            "SELECT c.relreplident = 'f' OR (c.relreplident = 'd' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid"
            " AND i.indisprimary)) OR (c.relreplident = 'i' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND"
            " i.indisreplident)) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relname = %s",
            [schema, name],
        )
    )


def _demand_identity(conn: psycopg.Connection[Any], table: str) -> None:
    if not _has_identity(conn, table):
        raise SetupRefused(
            "tables",
            f"{table} has neither a primary key nor another replica identity: publishing it would make its UPDATEs and"
            f" DELETEs fail. Run on the source: ALTER TABLE {_qualified(table).as_string(conn)} REPLICA IDENTITY FULL;",
        )


def _qualified(table: str) -> sql.Identifier:
    return sql.Identifier(*table.split(".", 1))
