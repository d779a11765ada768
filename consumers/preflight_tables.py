"""The part of the pre-flight that looks at the publication, its tables, and what the consumers ask of them."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import psycopg
from psycopg import sql

from consumers.filters.grammar import parse
from consumers.findings import Finding, Server
from consumers.models import Consumer, Source
from consumers.publication import full_identity_sql, identity_problems, missing, published, qualified, without_full_identity

NAMED_TABLES = 20  # in one finding


def check_publication(conn: psycopg.Connection[Any], source: Source, server: Server) -> Iterator[Finding]:
    name = sql.Identifier(source.publication_name).as_string(conn)
    tables = published(conn, source.publication_name)
    row = conn.execute(
        "SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication WHERE pubname = %s", [source.publication_name]
    ).fetchone()
    assert row is not None
    some = ", ".join(tables[:NAMED_TABLES])
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


def check_tables(conn: psycopg.Connection[Any], source: Source, server: Server, consumers: Iterable[Consumer]) -> Iterator[Finding]:
    asked = list(consumers)
    tables = published(conn, source.publication_name)
    yield from _check_identity(conn, source, tables)
    if server.version >= 150_000:
        yield from _check_lists_and_filters(conn, source)
    yield from _check_asked(conn, source, asked)
    yield from _check_old_values(conn, source, tables, asked)
    yield from _check_select(conn, source, tables)


def complaints(conn: psycopg.Connection[Any], source: Source) -> list[str]:
    """What is wrong with the tables while they are captured, one sentence each: asked for and not sent, or updates that fail."""
    consumers = Consumer.objects.filter(source=source.pk).exclude(status="disabled").order_by("name")
    said = [finding.text for finding in _check_asked(conn, source, list(consumers))]
    tables = published(conn, source.publication_name)
    if not said and consumers and not tables:
        said.append(f"the publication {source.publication_name} publishes no table")
    return said + [finding.text for finding in _check_identity(conn, source, tables)]


def _check_identity(conn: psycopg.Connection[Any], source: Source, tables: list[str]) -> Iterator[Finding]:
    for _, why, mend in identity_problems(conn, source.publication_name, tables):
        yield Finding("replica_identity", False, False, f"{why}: its UPDATEs and DELETEs fail while it is published", mend)


def _check_asked(conn: psycopg.Connection[Any], source: Source, consumers: list[Consumer]) -> Iterator[Finding]:
    """Tables that consumers name and that do not arrive under this name."""
    who = defaultdict(list)
    for consumer in consumers:
        for table in consumer.tables:
            who[table].append(consumer.name)
    for one in missing(conn, source.publication_name, sorted(who)) if who else []:
        names = who[one.table] + who[one.table.split(".", 1)[0] + ".*"]
        yield Finding("consumer_tables", False, False, f"{', '.join(names)} asks for {one.table}: {one.text}", one.sql)


def _check_old_values(
    conn: psycopg.Connection[Any], source: Source, tables: list[str], consumers: list[Consumer]
) -> Iterator[Finding]:
    """Tables whose replica identity does not give what a consumer's `where` compares with."""
    asking = [consumer for consumer in consumers if consumer.where and parse(consumer.where).asks_for_old_values]
    wanted = [table for table in tables if any(consumer.takes(table) for consumer in asking)]
    for table in without_full_identity(conn, wanted):
        mend = full_identity_sql(conn, source.publication_name, table)
        yield Finding(
            "old_values", False, False,
            f"{table} does not give its old values, which a consumer's where asks for: those messages are delivered undecided"
            + ("" if mend else ". Its virtual generated columns do not allow REPLICA IDENTITY FULL"),
            mend,
        )  # fmt: skip


def _check_select(conn: psycopg.Connection[Any], source: Source, tables: list[str]) -> Iterator[Finding]:
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
