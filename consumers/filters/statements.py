"""Make the statements that judge messages of the log by a filter. Pure.

A verdict is one of DROPS, PASSES, UNDECIDED (it hangs on something the message does not carry: let through, and flagged) and
UNFIT (the table has not what the filter names). A message that is not the consumer's has none. `r` is a message's columns as
`rewriting.py` names them, with the types of its relation version, made by one json_to_record of the row and one of its
changes.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

from consumers.filters.rewriting import Column, Fitted, Table

DROPS, PASSES, UNDECIDED, UNFIT, UNHEARD_OF = 0, 1, 2, 3, 4
_ACTION = "CASE w.action WHEN 'I' THEN 'insert' WHEN 'U' THEN 'update' WHEN 'D' THEN 'delete' WHEN 'T' THEN 'truncate' ELSE 'read' END"
PLAIN_TYPES = frozenset({
    "text", "smallint", "integer", "bigint", "numeric", "real", "double precision", "boolean", "uuid", "date", "interval",
    "timestamp with time zone", "timestamp without time zone",
})  # fmt: skip
LOOK_AHEAD = 10_000  # messages, within which a newer state of a row replaces an older


class Scope(NamedTuple):
    """Which messages are a consumer's."""

    schema: str
    """Of the store's tables."""
    consumer_id: UUID
    actions: tuple[str, ...]
    """As the log has them: I, U, D, T."""
    relations: tuple[int, ...] | None
    """The relation versions of its tables; None: all tables are."""
    newest_relation: int
    """The newest one known; a newer one is UNHEARD_OF. Relation versions become known in the order of their ids."""
    start_lsn: int
    start_epoch: int
    group_columns: tuple[str, ...]
    latest: bool
    """Of each row its latest state only."""


def stretch(scope: Scope, judged: Mapping[int, str], otherwise: int) -> str:
    """Judge what lies behind $2 in the log of source $1, $3 messages at most: one row of arrays.

    last id, count, ids, groups and second groups of what is let through, those let through undecided, those dropped, ids,
    groups, second groups and relations of what is unfit, and the relation versions not heard of. `judged`: SQL for the
    verdict on messages of a relation version; on those of other known ones it is `otherwise`.
    """
    inner = _rows(scope, judged, otherwise, f"{scope.schema}.messages m WHERE m.source = $1 AND m.id > $2 ORDER BY m.id LIMIT $3")
    let_through = f"v.verdict IN ({PASSES}, {UNDECIDED})"
    if scope.latest:
        inner = (
            f"SELECT l.*, {let_through.replace('v.', 'l.')} AND lead(l.id) OVER (PARTITION BY l.table_oid, l.key, {let_through.replace('v.', 'l.')}"
            f" ORDER BY l.id) IS NULL AS newest FROM ({inner}) l ORDER BY l.id"
        )
        let_through += " AND v.newest"
    return (
        "SELECT max(v.id), count(*),"
        f" array_agg(v.id) FILTER (WHERE {let_through}), array_agg(v.grp) FILTER (WHERE {let_through}),"
        f" array_agg(v.grp2) FILTER (WHERE {let_through}),"
        f" array_agg(v.id) FILTER (WHERE {let_through} AND v.verdict = {UNDECIDED}),"
        f" array_agg(v.id) FILTER (WHERE v.verdict = {DROPS}),"
        f" array_agg(v.id) FILTER (WHERE v.verdict = {UNFIT}), array_agg(v.grp) FILTER (WHERE v.verdict = {UNFIT}),"
        f" array_agg(v.grp2) FILTER (WHERE v.verdict = {UNFIT}), array_agg(v.relation) FILTER (WHERE v.verdict = {UNFIT}),"
        f" array_agg(v.relation) FILTER (WHERE v.verdict = {UNHEARD_OF})"
        f" FROM ({inner} OFFSET 0) v"  # not pulled up: each verdict is found once
    )


def some(scope: Scope, judged: Mapping[int, str], otherwise: int) -> str:
    """Judge the messages $2 of source $1, wherever they are kept: id, verdict, relation of each."""
    found = (
        f"(SELECT * FROM {scope.schema}.messages x WHERE x.source = $1 AND x.id = ANY ($2)"
        f" UNION ALL SELECT * FROM {scope.schema}.kept_messages x WHERE x.source = $1 AND x.id = ANY ($2)) m"
    )
    return f"SELECT v.id, v.verdict, v.relation FROM ({_rows(scope._replace(start_lsn=0), judged, otherwise, found)} OFFSET 0) v"


def one(scope: Scope) -> str:
    """The message behind $2 in the log of source $1, not judged: id, group, second group."""
    return f"SELECT m.id, {_groups(scope)} FROM {scope.schema}.messages m WHERE m.source = $1 AND m.id > $2 ORDER BY m.id LIMIT 1"


def judgement(schema: str, fitted: Fitted, table: Table) -> str:
    """SQL for the verdict on a message `w` of this table."""
    row, old = _document(schema, "w.record"), _old(schema)
    flags = [f"r.un{number}" for number, _ in enumerate(fitted.now, 1)] + [f"r.uo{number}" for number, _ in enumerate(fitted.before, 1)]
    otherwise = f"CASE WHEN {' OR '.join(flags)} THEN {UNDECIDED} ELSE {DROPS} END" if flags else str(DROPS)
    # Only what is named: tables that look alike to the filter have one verdict, however many there are.
    built_ins = {"action": _ACTION, "table_schema": f"{_literal(table.schema)}::text", "table_name": f"{_literal(table.name)}::text"}
    columns = [f"{value} AS {name}" for name, value in built_ins.items() if f"r.{name}" in fitted.names]
    needed = {column.name: column for column in (*fitted.now, *fitted.before)}
    sources = []
    if len(needed) == 1 and not fitted.before and _reads_once(fitted):
        (column,) = needed.values()
        value = f"({row} ->> {_literal(column.name)})::{column.type}"
        columns += [f"{value} AS n1", f"{value} IS NULL AND {row} -> {_literal(column.name)} IS NULL AS un1"]
    else:
        columns += [*_now(fitted.now, row), *_before(fitted.before, row, old)]
        if needed:
            sources.append(f"json_to_record({row}) AS n({_definitions(needed.values())})")
        if fitted.before:
            sources.append(f"json_to_record({old}) AS o({_definitions(fitted.before)})")
    origin = f" FROM {', '.join(sources)}" if sources else ""
    return (
        f"(SELECT CASE {fitted.expression} WHEN true THEN {PASSES} WHEN false THEN {DROPS} ELSE {otherwise} END"
        f" FROM (SELECT {', '.join(columns)}{origin}) r)"
    )


def empty_row(fitted: Fitted, expression: str) -> str:
    """The expression over a row of nulls with the table's types: what Postgres is asked about before a filter is saved."""
    columns = ["NULL::text AS action", "NULL::text AS table_schema", "NULL::text AS table_name"]
    for prefix, used in (("n", fitted.now), ("o", fitted.before)):
        for number, column in enumerate(used, 1):
            columns += [f"NULL::{column.type} AS {prefix}{number}", f"false AS u{prefix}{number}"]
    return f"SELECT ({expression}\n) AS verdict FROM (SELECT {', '.join(columns)}) AS r"


def _rows(scope: Scope, judged: Mapping[int, str], otherwise: int, origin: str) -> str:
    """Messages with their verdicts. `origin`: what stands behind FROM, the messages as m."""
    ours = "" if scope.relations is None else f" AND (m.relation = ANY ({_integers(scope.relations)}) OR m.relation > {scope.newest_relation})"
    hit = (
        f"(m.consumer = {_literal(str(scope.consumer_id))}::uuid OR m.consumer IS NULL AND m.action::text = ANY ({_texts(scope.actions)}){ours}"
        f" AND (m.epoch <> {scope.start_epoch} OR m.commit_lsn >= {scope.start_lsn}))"
    )
    alike: dict[str, list[int]] = defaultdict(list)
    for relation, sql in judged.items():
        alike[sql].append(relation)
    branches = "".join(f" WHEN w.relation = ANY ({_integers(relations)}) THEN {sql}" for sql, relations in alike.items())
    verdict = f"CASE WHEN w.relation > {scope.newest_relation} THEN {UNHEARD_OF}{branches} ELSE {otherwise} END"
    return (
        f"SELECT w.id, w.grp, w.grp2, w.relation, w.table_oid, w.key, CASE WHEN w.hit THEN {verdict} END AS verdict FROM ("
        f"SELECT m.id, {_groups(scope)}, m.relation, m.table_oid, m.key, m.action::text AS action, m.record, m.changes,"
        f" m.old_values_known AS known, {hit} AS hit FROM {origin}) w"
    )


def _groups(scope: Scope) -> str:
    if not scope.group_columns:
        return "hashtextextended(m.key, m.table_oid) AS grp, CASE WHEN m.old_key IS NOT NULL THEN hashtextextended(m.old_key, m.table_oid) END AS grp2"
    group = f"{scope.schema}.sequin_group(m.record, m.changes, {_texts(scope.group_columns)}, m.table_oid, "
    return f"{group}false) AS grp, CASE WHEN m.action::text = 'U' THEN {group}true) END AS grp2"


def _document(schema: str, column: str) -> str:
    return f"(CASE WHEN strpos({column}, '\\u') > 0 THEN {schema}.sequin_readable({column}) ELSE {column} END)::json"


def _old(schema: str) -> str:
    return f"(CASE WHEN w.action = 'U' AND w.changes IS NOT NULL THEN {_document(schema, 'w.changes')} ELSE '{{}}' END)"


def _reads_once(fitted: Fitted) -> bool:
    """One plain value, named once: then looking it up is cheaper than making a record."""
    return fitted.now[0].type.partition("(")[0] in PLAIN_TYPES and fitted.expression.count("r.n1") == 1


def _now(columns: Sequence[Column], row: str) -> Iterable[str]:
    """A column as it is now, and whether it is null because the message does not carry it."""
    for number, column in enumerate(columns, 1):
        name, key = _identifier(column.name), _literal(column.name)
        yield f"n.{name} AS n{number}"
        yield f"n.{name} IS NULL AND {row} -> {key} IS NULL AS un{number}"


def _before(columns: Sequence[Column], row: str, old: str) -> Iterable[str]:
    """A column as it was. What an update did not change is as it is now, when the old values are known at all."""
    for number, column in enumerate(columns, 1):
        name, key = _identifier(column.name), _literal(column.name)
        known = "true" if column.is_key else "w.known"
        yield (
            f"CASE w.action WHEN 'U' THEN CASE WHEN o.{name} IS NOT NULL THEN o.{name} WHEN {old} -> {key} IS NOT NULL THEN NULL"
            f" WHEN {known} THEN n.{name} END WHEN 'D' THEN n.{name} END AS o{number}"
        )
        yield (
            f"CASE w.action WHEN 'U' THEN {old} -> {key} IS NULL AND (NOT {known} OR n.{name} IS NULL AND {row} -> {key} IS NULL)"
            f" WHEN 'D' THEN n.{name} IS NULL AND {row} -> {key} IS NULL ELSE false END AS uo{number}"
        )


def _definitions(columns: Iterable[Column]) -> str:
    return ", ".join(f"{_identifier(column.name)} {column.type}" for column in columns)


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _texts(values: Iterable[str]) -> str:
    return f"ARRAY[{', '.join(map(_literal, values))}]::text[]"


def _integers(values: Iterable[int]) -> str:
    return f"'{{{','.join(map(str, values))}}}'::integer[]"
