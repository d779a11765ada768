"""Give each shape that a table has had an id: messages name the shape they were made by."""
from __future__ import annotations

import hashlib
import json
from typing import Any
from uuid import UUID

import psycopg

from consumers.store.types import RelationShape


def register_relation(conn: psycopg.Connection[Any], source_id: UUID, epoch: int, shape: RelationShape, *, seen: bool) -> int:
    """The id of this shape of the table; the same shape has the same id. `seen`: a change came under it."""
    columns = json.dumps([column._asdict() for column in shape.columns])
    digest = hashlib.sha256(repr(shape).encode()).hexdigest()
    row = conn.execute(
        "SELECT sequin_register_relation(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        [
            source_id, epoch, shape.oid, shape.schema, shape.table, columns, list(shape.primary_key), shape.replica_identity,
            digest, seen,
        ],
    ).fetchone()  # fmt: skip
    assert row is not None
    return int(row[0])
