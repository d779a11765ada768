"""Read what a publication publishes, under which names it arrives, and what it leaves out. Nothing is changed here."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from consumers.encodings import codec_of, readable
from consumers.findings import one

KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence", "i": "an index", "c": "a type"}


class Missing(NamedTuple):
    """A table whose changes do not arrive under the name that was asked for. `sql` mends it, where something does.

    `why` is absent, not_logged, unpublished, as_partitions (they arrive under the partitions' names) or as_root.
    """

    table: str
    why: str
    text: str
    sql: str = ""


def publication_exists(conn: psycopg.Connection[Any], name: str) -> bool:
    return bool(one(conn, "SELECT count(*) FROM pg_publication WHERE pubname = %s", [name]))


def publishes_via_root(conn: psycopg.Connection[Any], name: str) -> bool:
    """Whether changes of partitions arrive under the name of the partitioned table."""
    return bool(one(conn, "SELECT pubviaroot FROM pg_publication WHERE pubname = %s", [name]))


def published(conn: psycopg.Connection[Any], publication: str) -> list[str]:
    """The names under which changes arrive, as `schema.table`, sorted."""
    rows = conn.execute(
        "SELECT convert_to(schemaname || '.' || tablename, 'SQL_ASCII') FROM pg_publication_tables WHERE pubname = %s", [publication]
    ).fetchall()
    codec = _codec(conn)
    return sorted(readable(row[0], codec) for row in rows)


def _codec(conn: psycopg.Connection[Any]) -> str:
    """Of the database's names, which are read as they are stored: whatever its encoding, none is refused."""
    return codec_of(one(conn, "SELECT getdatabaseencoding()"))


_LEAVES_SQL = """
    SELECT DISTINCT c.oid, n.nspname || '.' || c.relname AS name, c.relreplident,
        ARRAY(SELECT k.att FROM pg_index i, unnest(i.indkey::int2[]) k(att) WHERE i.indrelid = c.oid AND i.indimmediate
              AND ((c.relreplident = 'd' AND i.indisprimary) OR (c.relreplident = 'i' AND i.indisreplident))) AS key
    FROM pg_class t JOIN pg_namespace s ON s.oid = t.relnamespace
    CROSS JOIN LATERAL (SELECT t.oid AS relid WHERE t.relkind = 'r'
                        UNION SELECT p.relid::oid FROM pg_partition_tree(t.oid) p WHERE p.isleaf AND t.relkind = 'p') leaf
    JOIN pg_class c ON c.oid = leaf.relid AND c.relkind = 'r' JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE s.nspname || '.' || t.relname = ANY (%(tables)s)
"""


def without_identity(conn: psycopg.Connection[Any], tables: Collection[str]) -> list[str]:
    """Those of the tables, or of their partitions, whose UPDATEs and DELETEs fail once published: no key identifies a row.

    A deferrable key does not count: the server does not take it for one.
    """
    rows = conn.execute(
        f"SELECT name FROM ({_LEAVES_SQL}) l WHERE relreplident <> 'f' AND key = '{{}}' ORDER BY 1", {"tables": list(tables)}
    ).fetchall()
    return [row[0] for row in rows]


def without_full_identity(conn: psycopg.Connection[Any], tables: Collection[str]) -> list[str]:
    """Those of the tables, or of their partitions, whose updates and deletes do not carry the row as it was."""
    rows = conn.execute(f"SELECT name FROM ({_LEAVES_SQL}) l WHERE relreplident <> 'f' ORDER BY 1", {"tables": list(tables)}).fetchall()
    return [row[0] for row in rows]


class Generated(NamedTuple):
    """A table, or partition, with generated columns that the publication does not send."""

    table: str
    columns: list[str]
    in_identity: bool
    """They are of its replica identity: then its UPDATEs and DELETEs fail once it is published."""
    stored: bool
    """All of them are, so that the publication could send them."""


def unsent_generated(conn: psycopg.Connection[Any], publication: str, tables: Collection[str]) -> list[Generated]:
    """Tables whose generated columns the publication does not send. Postgres 18 minds that, the older ones do not: then none."""
    if conn.info.server_version < 180_000:
        return []
    rows = conn.execute(
        f"""
        SELECT l.name, array_agg(a.attname::text ORDER BY a.attnum), bool_or(l.relreplident = 'f' OR a.attnum = ANY (l.key)),
               bool_and(a.attgenerated = 's')
        FROM ({_LEAVES_SQL}) l JOIN pg_attribute a ON a.attrelid = l.oid AND a.attgenerated <> '' AND NOT a.attisdropped
        JOIN pg_publication p ON p.pubname = %(publication)s
        LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = l.oid
        WHERE a.attgenerated = 'v' OR (p.pubgencols = 'n' AND NOT coalesce(a.attnum = ANY (r.prattrs::int2[]), false))
        GROUP BY l.name ORDER BY 1
        """,
        {"tables": list(tables), "publication": publication},
    ).fetchall()
    return [Generated(*row) for row in rows]


def full_identity_sql(conn: psycopg.Connection[Any], publication: str, table: str) -> str:
    """The SQL that lets a table's updates carry the row as it was, and does not make them fail; empty where there is none."""
    full = f"ALTER TABLE {qualified(table).as_string(conn)} REPLICA IDENTITY FULL;"
    unsent = unsent_generated(conn, publication, [table])
    if not unsent:
        return full
    name = sql.Identifier(publication).as_string(conn)
    return f"ALTER PUBLICATION {name} SET (publish_generated_columns = stored); {full}" if unsent[0].stored else ""


def identity_problems(conn: psycopg.Connection[Any], publication: str, tables: Collection[str]) -> list[tuple[str, str, str]]:
    """The tables whose UPDATEs and DELETEs fail once published, why, and the SQL that mends it."""
    found = []
    for table in without_identity(conn, tables):
        mend = full_identity_sql(conn, publication, table)
        why = f"{table} has neither a primary key nor another replica identity (a deferrable key is none)"
        found.append((table, why, mend or f"ALTER TABLE {qualified(table).as_string(conn)} ADD PRIMARY KEY (…);"))
    name = sql.Identifier(publication).as_string(conn)
    for unsent in unsent_generated(conn, publication, tables):
        if unsent.in_identity:
            columns = ", ".join(unsent.columns)
            why = f"the replica identity of {unsent.table} has generated columns that the publication does not send ({columns})"
            mend = (
                f"ALTER PUBLICATION {name} SET (publish_generated_columns = stored);" if unsent.stored
                else f"ALTER TABLE {qualified(unsent.table).as_string(conn)} REPLICA IDENTITY DEFAULT;"
            )  # fmt: skip
            found.append((unsent.table, why, mend))
    return found


def missing(conn: psycopg.Connection[Any], publication: str, wanted: Iterable[str]) -> list[Missing]:
    """Those of the tables (`schema.table`, or all there are for `schema.*`) that do not arrive under these names, and why."""
    names = list(wanted)
    rows = conn.execute(
        """
        WITH arriving AS (SELECT DISTINCT relid FROM pg_get_publication_tables(%(publication)s))
        SELECT convert_to(n.nspname || '.' || c.relname, 'SQL_ASCII'), c.relkind::text, c.relpersistence::text,
               n.nspname || '.' || c.relname = ANY (%(wanted)s),
               c.relkind = 'p' AND (EXISTS (SELECT FROM pg_partition_tree(c.oid) t JOIN arriving a ON a.relid = t.relid)
                 OR EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                            WHERE p.pubname = %(publication)s AND r.prrelid = c.oid)),
               (SELECT convert_to(m.nspname || '.' || root.relname, 'SQL_ASCII') FROM pg_partition_ancestors(c.oid) t JOIN arriving a ON a.relid = t.relid
                JOIN pg_class root ON root.oid = t.relid JOIN pg_namespace m ON m.oid = root.relnamespace
                WHERE c.relispartition AND t.relid <> c.oid LIMIT 1),
               EXISTS (SELECT FROM arriving a WHERE a.relid = c.oid)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname || '.' || c.relname = ANY (%(wanted)s)
           OR (n.nspname || '.*' = ANY (%(wanted)s) AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND NOT c.relispartition)
        ORDER BY 1
        """,
        {"publication": publication, "wanted": names},
    ).fetchall()
    codec = _codec(conn)
    there = {readable(row[0], codec) for row in rows}
    found = [
        Missing(name, "absent", f"there is no table {name}") for name in names if not name.endswith(".*") and name not in there
    ]
    for raw, kind, persistence, by_name, as_partitions, root, arrives in rows:
        if not arrives and (by_name or not as_partitions):
            table, through = readable(raw, codec), None if root is None else readable(root, codec)
            found.append(_why(conn, publication, table, kind, persistence, as_partitions, through))
    return found


def _why(
    conn: psycopg.Connection[Any], publication: str, table: str, kind: str, persistence: str, as_partitions: bool, root: str | None
) -> Missing:
    name = sql.Identifier(publication).as_string(conn)
    if kind not in "rp" or persistence != "p":
        what = KINDS.get(kind, "no table") if kind not in "rp" else "an unlogged table" if persistence == "u" else "a temporary table"
        mend = f"ALTER TABLE {qualified(table).as_string(conn)} SET LOGGED;" if kind == "r" and persistence == "u" else ""
        return Missing(table, "not_logged", f"{table} is {what}: its changes are not in the WAL", mend)
    if root is not None:
        return Missing(table, "as_root", f"the changes of {table} arrive as {root}: name that table instead")
    if as_partitions:
        return Missing(
            table, "as_partitions", f"{table} is published as its partitions: its changes arrive under their names", via_root_sql(name)
        )
    text = f"the publication {publication} does not publish {table}"
    return Missing(table, "unpublished", text, f"ALTER PUBLICATION {name} ADD TABLE {qualified(table).as_string(conn)};")


def via_root_sql(quoted_publication: str) -> str:
    return f"ALTER PUBLICATION {quoted_publication} SET (publish_via_partition_root = true);"


def qualified(table: str) -> sql.Identifier:
    """`schema.table` as an identifier. A schema's name holds no dot here, as validate_table demands."""
    return sql.Identifier(*table.split(".", 1))
