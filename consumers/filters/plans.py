"""What of the log a consumer lets through: its filter, compiled for each shape of its tables as the shapes turn up.

A plan belongs to one configuration of the consumer, named by its version; an edit makes another.
"""
from __future__ import annotations

import json
import logging
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connection

from consumers.filters import statements
from consumers.filters.column_types import table_of
from consumers.filters.grammar import Condition, Refused, parse
from consumers.filters.rewriting import Column, Fitted, Name, Table, fit, meaning
from consumers.filters.statements import PASSES, UNFIT, UNHEARD_OF, Scope
from consumers.store.types import RelationShape, stored_shape

log = logging.getLogger(__name__)

LETTERS = {"insert": "I", "update": "U", "delete": "D", "truncate": "T"}
ROW_ACTIONS = ("I", "U")  # a stream of rows has no deletes

_CONSUMER_SQL = """
    SELECT c.name, c.updated_at, c.source_id, c.stream, c.tables, c.actions, c.group_columns, c."where", p.position, p.start_lsn,
           p.start_epoch, quote_ident(k.relnamespace::regnamespace::text)
    FROM consumers_consumer c JOIN consumer_position p ON p.consumer = c.id, pg_class k
    WHERE c.id = %s AND k.oid = 'messages'::regclass
"""
_RELATIONS_SQL = """
    SELECT coalesce(max(r.id), 0), array_agg(r.id) FILTER (WHERE r.schema_name || '.' || r.table_name = ANY (%(tables)s)
                                                              OR r.schema_name || '.*' = ANY (%(tables)s))
    FROM relation_version r WHERE r.source = %(source)s AND r.id > %(known)s
"""
_SHAPES_SQL = """
    SELECT id, oid, schema_name, table_name, columns::text, primary_key, replica_identity FROM relation_version WHERE id = ANY (%s)
"""


class Unfit(NamedTuple):
    """Why messages of a relation version cannot be judged."""

    reason: str


class Plan:
    """Not thread-safe. Uses Django's connection to learn, never to judge."""

    def __init__(self, consumer_id: UUID, row: tuple[Any, ...]) -> None:
        (
            self.name, self.version, self.source_id, stream, tables, actions, group_columns, where, self.position, start_lsn,
            start_epoch, schema,
        ) = row  # fmt: skip
        self._condition: Condition | None = parse(where) if where else None
        self._tables = list(tables)
        letters = tuple(LETTERS[action] for action in actions)
        latest = stream == "rows"
        self._scope = Scope(
            schema, consumer_id, tuple(letter for letter in letters if letter in ROW_ACTIONS) if latest else letters, () if tables else None, 0,
            start_lsn, start_epoch, tuple(group_columns), latest,
        )  # fmt: skip
        self._references = self._condition.references() if self._condition else []
        self._fitted: dict[tuple[tuple[Name, Column | None], ...], Fitted] = {}
        self._judged: dict[int, str] = {}
        self.unfit: dict[int, str] = {}
        self._texts: dict[str, str] = {}
        self.learn_relations()

    @property
    def looks_ahead(self) -> bool:
        return self._scope.latest

    @property
    def stretch(self) -> str:
        return self._text("stretch")

    @property
    def some(self) -> str:
        return self._text("some")

    @property
    def one(self) -> str:
        if "one" not in self._texts:
            self._texts["one"] = statements.one(self._scope)
        return self._texts["one"]

    def learn_relations(self) -> None:
        """Look which relation versions there are that were not known yet, and which are of the consumer's tables."""
        scope = self._scope
        with connection.cursor() as cursor:
            cursor.execute(_RELATIONS_SQL, {"tables": self._tables, "source": self.source_id, "known": scope.newest_relation})
            newest, ours = cursor.fetchone()
        relations = scope.relations if scope.relations is None else (*scope.relations, *sorted(ours or ()))
        self._scope = scope._replace(relations=relations, newest_relation=max(newest, scope.newest_relation))
        self._texts.clear()

    def learn_shapes(self, relations: list[int]) -> None:
        """Compile the filter for relation versions that turned up."""
        if max(relations) > self._scope.newest_relation:
            self.learn_relations()
        if self._condition is None:
            return
        with connection.cursor() as cursor:
            cursor.execute(_SHAPES_SQL, [relations])
            rows = cursor.fetchall()
            for number, oid, schema, table, columns, primary_key, identity in rows:
                shape = stored_shape(oid, schema, table, json.loads(columns), primary_key, identity)
                self._judged[number] = self._judgement(number, shape)
        self._texts.clear()

    def _judgement(self, number: int, shape: RelationShape) -> str:
        table = table_of(connection.connection, shape)
        try:
            return statements.judgement(self._scope.schema, self._fit(table), table)
        except Refused as refused:
            self.unfit[number] = f"where does not fit {table}: {refused.reason}"
            log.warning("messages are held consumer=%s: %s", self.name, self.unfit[number])
            return str(UNFIT)

    def _fit(self, table: Table) -> Fitted:
        """The filter over one table, made once for all that look alike to it. Raises Refused."""
        assert self._condition is not None
        columns = {column.name: column for column in table.columns}
        named = tuple((name, columns.get(name.name)) for name in (meaning(reference, table) for reference in self._references))
        if named not in self._fitted:
            self._fitted[named] = fit(self._condition, table)
        return self._fitted[named]

    def _text(self, name: str) -> str:
        if name not in self._texts:
            make = getattr(statements, name)
            self._texts[name] = make(self._scope, self._judged, PASSES if self._condition is None else UNHEARD_OF)
        return self._texts[name]


def load(consumer_id: UUID) -> Plan | None:
    """The plan of a consumer that needs one: with a filter, or of rows. None for any other."""
    with connection.cursor() as cursor:
        cursor.execute(_CONSUMER_SQL, [consumer_id])
        row = cursor.fetchone()
    if row is None or not (row[7] or row[3] == "rows"):
        return None
    return Plan(consumer_id, row)


def republished(consumer_id: UUID, where: str, table: str) -> Plan:
    """What of the log a consumer would get once more: of its tables (or of one) and actions, from before its start too."""
    with connection.cursor() as cursor:
        cursor.execute(_CONSUMER_SQL, [consumer_id])
        name, version, source_id, _, tables, actions, groups, _, position, _, epoch, schema = cursor.fetchone()
    return Plan(consumer_id, (name, version, source_id, "changes", [table] if table else tables, actions, groups, where, position, 0, epoch, schema))


def version_of(plan: Plan | None) -> datetime | None:
    return None if plan is None else plan.version
