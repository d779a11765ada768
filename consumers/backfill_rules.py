"""Look on the source whether a table can be backfilled as asked, before anything begins."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import psycopg
from django.db import connection
from psycopg import sql

from consumers.filters import checking
from consumers.filters.column_types import table_of
from consumers.filters.grammar import Refused, parse
from consumers.filters.rewriting import row_condition
from consumers.models import Source
from consumers.publication import published, qualified
from consumers.publishing import SetupRefused
from consumers.routing import told
from consumers.source_connection import connect, reason_of
from consumers.source_tables import read_shapes

QUIET_TRIES, QUIET_PAUSE_S = 5, 0.01
COUNT_WITHIN_MS = 5_000


class Beginning(NamedTuple):
    """A source's state that a consumer begins with which is to get everything: what is seen comes as rows, the rest as changes."""

    xmin: int
    xmax: int
    running: Sequence[int]
    is_standby: bool
    lsn: int
    """Nothing committed below it is unseen. 0: not known."""


def look_at_beginning(source: Source) -> Beginning:
    """Take a snapshot of the source. Raises SourceUnreachable.

    A commit may be in the WAL before a snapshot shows it: while it waits for a standby, say. So an LSN divides what is seen from
    what is not only when nothing was being written in the database; that is tried a few times.
    """
    with connect(source) as conn:
        for _ in range(QUIET_TRIES):
            found = _snapshot(conn)
            if found.lsn:
                break
            conn.execute("SELECT pg_sleep(%s)", [QUIET_PAUSE_S])
    return found


def _snapshot(conn: psycopg.Connection[Any]) -> Beginning:
    is_standby, lsn = conn.execute(
        "SELECT pg_is_in_recovery(), CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn()"
        " END - '0/0'::pg_lsn"
    ).fetchone() or (False, 0)
    elsewhere = _writers_elsewhere(conn)
    conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    found = conn.execute("SELECT txid_current_snapshot()::text").fetchone()
    assert found is not None
    xmin, xmax, listed = str(found[0]).split(":", 2)
    running = [int(xid) for xid in listed.split(",") if xid]
    if not is_standby:
        [own] = conn.execute("SELECT txid_current()").fetchone() or [0]
        elsewhere |= _writers_elsewhere(conn)
        if any(xid & 0xFFFFFFFF not in elsewhere for xid in (*running, *range(int(xmax), own))):
            lsn = 0
    conn.execute("ROLLBACK")
    return Beginning(int(xmin), int(xmax), running, bool(is_standby), int(lsn))


def _writers_elsewhere(conn: psycopg.Connection[Any]) -> set[int]:
    """The transactions, by the 32 bits of their id, that run in other databases of the server."""
    rows = conn.execute(
        "SELECT l.transactionid::text::bigint FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid WHERE l.locktype ="
        " 'transactionid' AND l.mode = 'ExclusiveLock' AND a.datname <> current_database()"
    ).fetchall()
    return {int(row[0]) for row in rows}


def tables_to_backfill(source: Source, tables: Iterable[str]) -> list[str]:
    """The tables that a consumer of these names gets: all that are published, when it names none."""
    named = list(tables)
    with connect(source) as conn:
        found = published(conn, source.publication_name)
    if not named:
        return found
    wild = {name.removesuffix(".*") for name in named if name.endswith(".*")}
    return [name for name in named if not name.endswith(".*")] + [
        name for name in found if name.split(".", 1)[0] in wild and name not in named
    ]


def inspect(source: Source, table: str, *, where: str = "", sort_column: str = "", start_value: str | None = None) -> int:
    """See that the table's rows can be read, these, in this order, from there on. Raises SourceUnreachable, SetupRefused.

    Returns the transaction id below which all have to end before rows are read: what those wrote before the table was published
    is not in the log.
    """
    with connect(source) as conn:
        parts = _parts(conn, source, table)
        conn.execute("SET row_security = off")
        for part in parts:
            _see_readable(conn, source, part)
            _see_sortable(conn, part, sort_column, start_value)
        if where:
            _see_fitting(conn, source, [name for name, _, _ in parts], where)
        return max(_published_by(conn, source, leaf) for _, leaves, _ in parts for leaf in leaves) + 1


def _published_by(conn: psycopg.Connection[Any], source: Source, table: int) -> int:
    """The transaction, 64 bits of its id, that let the publication publish a table: younger ones are in the stream whole."""
    schemas = (
        " UNION ALL SELECT s.xmin FROM pg_publication_namespace s JOIN pg_class c ON c.relnamespace = s.pnnspid AND c.oid = %(table)s"
        " WHERE s.pnpubid = p.oid"
        if conn.info.server_version >= 150_000 else ""
    )  # fmt: skip
    row = conn.execute(
        "SELECT coalesce(max(x + (xmax >> 32 << 32) - CASE WHEN x > (xmax & 4294967295) THEN 4294967296 ELSE 0 END), 0)"
        " FROM (SELECT e.xmin::text::bigint AS x, txid_snapshot_xmax(txid_current_snapshot()) AS xmax FROM pg_publication p,"
        " LATERAL (SELECT p.xmin WHERE p.puballtables UNION ALL SELECT r.xmin FROM pg_publication_rel r WHERE r.prpubid = p.oid"
        " AND (r.prrelid = %(table)s OR r.prrelid IN (SELECT relid FROM pg_partition_ancestors(%(table)s)))" + schemas + ") e"
        " WHERE p.pubname = %(publication)s) y",
        {"table": table, "publication": source.publication_name},
    ).fetchone()
    return int(row[0]) if row else 0


class Rows(NamedTuple):
    """What of a table would be read."""

    total: int
    is_exact: bool
    """False: counting took too long, and it is the planner's idea."""
    sample: list[bytes]


def look_at_rows(source: Source, table: str, where: str, sample: int) -> Rows:
    """Count the rows that match, and take some. Raises SourceUnreachable, SetupRefused."""
    total, is_exact = 0, True
    found: list[bytes] = []
    with connect(source, statement_timeout_ms=COUNT_WITHIN_MS) as conn:
        shapes = {
            f"{shape.schema}.{shape.table}": shape for shape in read_shapes(conn, source.publication_name, [name for name, _, _ in _parts(conn, source, table)])
        }
        connection.ensure_connection()
        conn.execute("SET row_security = off")
        for name, shape in shapes.items():
            condition = row_condition(parse(where), table_of(connection.connection, shape), "t") if where else "true"
            origin = sql.SQL("FROM {} AS t WHERE {}").format(qualified(name), sql.SQL(condition))
            columns = sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(column.name)) for column in shape.columns)
            try:
                rows = conn.execute(
                    sql.SQL("SELECT row_to_json(x)::text FROM (SELECT {} {} LIMIT {}) x").format(columns, origin, max(0, sample - len(found)))
                ).fetchall()
                found += [b'{"record":%b,"action":"read"}' % row[0].encode() for row in rows]
                number, exact = _count(conn, origin)
            except psycopg.Error as error:
                raise SetupRefused("where" if where else "table", f"{name}: {reason_of(error, source)}") from None
            total += number
            is_exact = is_exact and exact
    return Rows(total, is_exact, found)


def _count(conn: psycopg.Connection[Any], origin: sql.Composed) -> tuple[int, bool]:
    try:
        row = conn.execute(sql.SQL("SELECT count(*) ") + origin).fetchone()
        return (int(row[0]) if row else 0), True
    except psycopg.errors.QueryCanceled:
        row = conn.execute(sql.SQL("EXPLAIN (FORMAT JSON) SELECT ") + origin).fetchone()
        return (int(row[0][0]["Plan"]["Plan Rows"]) if row else 0), False


Part = tuple[str, list[int], list[str] | None]
"""A relation under which rows are published: its name, the tables they are in, its columns (None: all)."""


def _parts(conn: psycopg.Connection[Any], source: Source, table: str) -> list[Part]:
    columns = "p.attrs::int2[]" if conn.info.server_version >= 150_000 else "NULL::int2[]"
    rows = conn.execute(
        "SELECT n.nspname || '.' || c.relname, c.oid::bigint, array(SELECT x.relid::bigint FROM pg_partition_tree(c.oid) x WHERE x.isleaf),"
        f" (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum = ANY ({columns}))"
        " FROM pg_get_publication_tables(%(publication)s) p JOIN pg_class c ON c.oid = p.relid JOIN pg_namespace n ON n.oid ="
        " c.relnamespace WHERE n.nspname || '.' || c.relname = %(table)s OR p.relid IN (SELECT x.relid FROM pg_class r JOIN pg_namespace m"
        " ON m.oid = r.relnamespace, pg_partition_tree(r.oid) x WHERE r.relkind = 'p' AND m.nspname || '.' || r.relname = %(table)s)",
        {"publication": source.publication_name, "table": table},
    ).fetchall()
    if not rows:
        raise SetupRefused("table", f"{table} is not published by {source.publication_name}: add it to the consumer's tables first")
    return [(name, leaves or [oid], columns) for name, oid, leaves, columns in rows]


def _see_readable(conn: psycopg.Connection[Any], source: Source, part: Part) -> None:
    name, _, columns = part
    wanted = sql.SQL("*") if columns is None else sql.SQL(", ").join(map(sql.Identifier, columns))
    try:
        conn.execute(sql.SQL("SELECT {} FROM {} LIMIT 0").format(wanted, qualified(name)))
    except psycopg.errors.InsufficientPrivilege as error:
        role = sql.Identifier(source.username).as_string(conn)
        table = qualified(name).as_string(conn)
        mend = f"ALTER ROLE {role} BYPASSRLS;" if "row-level security" in str(error) else f"GRANT SELECT ON {table} TO {role};"
        raise SetupRefused("table", f"{name} cannot be read: {reason_of(error, source)}. Run on the source: {mend}") from None


def _see_fitting(conn: psycopg.Connection[Any], source: Source, names: list[str], where: str) -> None:
    shapes = read_shapes(conn, source.publication_name, names)
    connection.ensure_connection()
    try:
        checking.check(parse(where), [table_of(connection.connection, shape) for shape in shapes])
    except Refused as refused:
        raise SetupRefused("where", told(refused, where)) from None


def _see_sortable(conn: psycopg.Connection[Any], part: Part, sort_column: str, start_value: str | None) -> None:
    name = part[0]
    row = conn.execute(
        "SELECT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]"
        " WHERE i.indisprimary AND i.indrelid = to_regclass(%s)",
        [qualified(name).as_string(conn)],
    ).fetchone()
    first = sort_column or (row[0] if row else "")
    if not first:
        if start_value is not None:
            raise SetupRefused("start_value", f"{name} has no primary key: name the sort_column that it is of")
        return
    column = sql.Identifier(first)
    kind = conn.execute(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s AND attnum > 0",
        [qualified(name).as_string(conn), first],
    ).fetchone()
    if kind is None:
        raise SetupRefused("sort_column", f"there is no column {first} in {name}")
    try:
        conn.execute(sql.SQL("SELECT {} FROM {} ORDER BY {} LIMIT 0").format(column, qualified(name), column))
    except psycopg.Error as error:
        raise SetupRefused("sort_column", f"rows cannot be read in the order of {first}: {reason_of(error)}") from None
    if start_value is not None:
        try:
            conn.execute(sql.SQL("SELECT %s::text::{}").format(sql.SQL(kind[0])), [start_value])
        except psycopg.Error as error:
            raise SetupRefused("start_value", f"is no value of {first}: {reason_of(error)}") from None
