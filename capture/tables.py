"""Make relation versions and encoders of the Relation messages that come, and say what happened to the tables meanwhile."""
from __future__ import annotations

import logging
from typing import NamedTuple

from capture import pgoutput, surroundings
from capture.catalog import Catalog
from capture.encoder import MAX_ROW_BYTES, Kind, RowEncoder
from capture.encodings import with_readable_names
from capture.shapes import differences, primary_key
from consumers.source_connection import cut_after
from consumers.store.appender import Appender
from consumers.store.types import ColumnShape, RelationShape

log = logging.getLogger(__name__)


class Table(NamedTuple):
    """A relation version as the reader uses it."""

    version: int
    oid: int
    encoder: RowEncoder
    name: str


def described(catalog: Catalog, relation: pgoutput.Relation) -> tuple[list[Kind], tuple[ColumnShape, ...]]:
    """How a relation's values become JSON, and its columns as a relation version has them."""
    kinds = [catalog.kind(column.type_oid) for column in relation.columns]
    values = [catalog.value_types.of(column.type_oid, column.typmod) for column in relation.columns]
    columns = tuple(
        ColumnShape(column.name, column.type_oid, column.typmod, name, *value)
        for column, (_, name), value in zip(relation.columns, kinds, values, strict=True)
    )
    return [kind for kind, _ in kinds], columns


class Tables(dict[int, Table]):
    """The tables that the stream has announced, by oid, each in its latest shape."""

    def __init__(self, source_name: str, appender: Appender, catalog: Catalog, codec: str | None) -> None:
        """`codec`: reads names and texts that the server does not convert to UTF-8."""
        super().__init__()
        self._source_name = source_name
        self._appender, self._catalog, self._codec = appender, catalog, codec
        self._said: set[tuple[int, str]] = set()  # what is said once for a shape

    def announce_type(self, announced: pgoutput.Type) -> None:
        self._catalog.announce(announced)

    def register(self, relation: pgoutput.Relation, epoch: int, *, known: bool) -> None:
        """Take a table's shape as it is from here on. `known`: this part of the stream was read before, and what happened was said."""
        relation = with_readable_names(relation, self._codec or "utf-8")
        before = self._appender.last_shape(relation.schema, relation.table)
        names = [column.name for column in relation.columns]
        with cut_after(self._catalog.descriptor, surroundings.LOOK_WITHIN_S):
            now = self._catalog.table(relation.oid)
            kinds, columns = described(self._catalog, relation)
        flagged = [column.name for column in relation.columns if column.is_key]
        same = before if before is not None and before.oid == relation.oid else None
        key = primary_key(names, flagged, relation.replica_identity, now, same)
        shape = RelationShape(relation.oid, relation.schema, relation.table, columns, key, relation.replica_identity)
        if before is not None and before != shape and not known:
            self._tell_changes(before, shape)
        encoder = RowEncoder(
            names, kinds, key, codec=self._codec, most_bytes=MAX_ROW_BYTES,
            on_large=lambda left_out: self._tell_large(relation.oid, left_out),
        )  # fmt: skip
        self._said = {(oid, what) for oid, what in self._said if oid != relation.oid}
        version = self._appender.register_relation(epoch, shape)
        self[relation.oid] = Table(version, relation.oid, encoder, f"{shape.schema}.{shape.table}")

    def tell_once(self, table: Table, kind: str, text: str) -> None:
        """Once for each shape of a table."""
        if (table.oid, kind) not in self._said:
            self._said.add((table.oid, kind))
            log.warning("source=%s table=%s: %s", self._source_name, table.name, text)
            self._appender.note(kind, table.name, text)

    def _tell_large(self, oid: int, left_out: list[str]) -> None:
        self.tell_once(
            self[oid], "too_large",
            f"a row is larger than a message can be ({MAX_ROW_BYTES >> 20} MB): {', '.join(left_out)} left out, and named in its"
            " metadata.unchanged_columns",
        )  # fmt: skip

    def _tell_changes(self, before: RelationShape, shape: RelationShape) -> None:
        with cut_after(self._catalog.descriptor, surroundings.LOOK_WITHIN_S):
            filled = self._catalog.filled_columns(shape.oid)
        table = f"{shape.schema}.{shape.table}"
        for change in differences(before, shape, filled):
            log.warning("table changed source=%s table=%s: %s", self._source_name, table, change.text)
            self._appender.note(change.kind, table, change.text, backfill=change.backfill)
