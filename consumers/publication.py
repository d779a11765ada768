"""Read what a publication publishes, under which names it arrives, and what it leaves out. Nothing is changed here."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

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
        "SELECT schemaname || '.' || tablename FROM pg_publication_tables WHERE pubname = %s ORDER BY 1", [publication]
    ).fetchall()
    return [row[0] for row in rows]


def without_identity(conn: psycopg.Connection[Any], tables: Collection[str]) -> list[str]:
    """Those of the tables, or of their partitions, whose UPDATEs and DELETEs fail once published: no key identifies a row."""
    rows = conn.execute(
        "SELECT DISTINCT n.nspname || '.' || c.relname FROM pg_class t JOIN pg_namespace s ON s.oid = t.relnamespace"
        " CROSS JOIN LATERAL (SELECT t.oid AS relid WHERE t.relkind = 'r' UNION"
        "  SELECT p.relid::oid FROM pg_partition_tree(t.oid) p WHERE p.isleaf AND t.relkind = 'p') leaf"
        " JOIN pg_class c ON c.oid = leaf.relid AND c.relkind = 'r' JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE s.nspname || '.' || t.relname = ANY (%s) AND NOT (c.relreplident = 'f'"
        " OR (c.relreplident = 'd' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary))"
        " OR (c.relreplident = 'i' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident)))"
        " ORDER BY 1",
        [list(tables)],
    ).fetchall()
    return [row[0] for row in rows]


def missing(conn: psycopg.Connection[Any], publication: str, wanted: Iterable[str]) -> list[Missing]:
    """Those of the tables (`schema.table`, or all there are for `schema.*`) that do not arrive under these names, and why."""
    names = list(wanted)
    rows = conn.execute(
        """
        WITH arriving AS (SELECT DISTINCT relid FROM pg_get_publication_tables(%(publication)s))
        SELECT n.nspname || '.' || c.relname, c.relkind::text, c.relpersistence::text,
               n.nspname || '.' || c.relname = ANY (%(wanted)s),
               c.relkind = 'p' AND (EXISTS (SELECT FROM pg_partition_tree(c.oid) t JOIN arriving a ON a.relid = t.relid)
                 OR EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                            WHERE p.pubname = %(publication)s AND r.prrelid = c.oid)),
               (SELECT m.nspname || '.' || root.relname FROM pg_partition_ancestors(c.oid) t JOIN arriving a ON a.relid = t.relid
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
    there = {row[0] for row in rows}
    found = [
        Missing(name, "absent", f"there is no table {name}") for name in names if not name.endswith(".*") and name not in there
    ]
    for table, kind, persistence, by_name, as_partitions, root, arrives in rows:
        if not arrives and (by_name or not as_partitions):
            found.append(_why(conn, publication, table, kind, persistence, as_partitions, root))
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
