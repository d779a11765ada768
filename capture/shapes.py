"""Tell what happened to a table between two of its shapes, and whether rows changed that were never sent. Pure.

A rewrite (ALTER TYPE … USING, a new column with a default) changes rows without a word in the stream.
"""
from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from consumers.store.types import RelationShape

VARCHAR = 1043
IDENTITIES = {"d": "DEFAULT", "n": "NOTHING", "f": "FULL", "i": "USING INDEX"}


class Change(NamedTuple):
    """`backfill`: rows the table has now differ from what was sent, and only a backfill brings them."""

    kind: str
    text: str
    backfill: bool


def differences(before: RelationShape, after: RelationShape, filled: Collection[str] = ()) -> list[Change]:
    """What changed. `filled`: columns that existing rows got a value in when they were added (a default, generated)."""
    found: list[Change] = []
    if before.oid != after.oid:
        found.append(Change("recreated", "the table was made anew: what it got before it was published is missing", True))
    old = {column.name: column for column in before.columns}
    new = {column.name: column for column in after.columns}
    added = [name for name in new if name not in old]
    dropped = [name for name in old if name not in new]
    if added or dropped:
        said = [f"added {', '.join(added)}"] if added else []
        said += [f"dropped {', '.join(dropped)}"] if dropped else []
        empty = [name for name in added if name in filled]
        text = f"columns {' and '.join(said)}"
        if empty:
            text += f"; existing rows got values in {', '.join(empty)} that were not sent"
        found.append(Change("columns", text, bool(empty)))
    for name, column in new.items():
        was = old.get(name)
        if was is None or (was.type_oid, was.typmod) == (column.type_oid, column.typmod):
            continue
        widened = column.type_oid == was.type_oid == VARCHAR and (column.typmod == -1 or column.typmod >= was.typmod >= 0)
        if was.type_oid != column.type_oid:
            text = f"the type of {name} became {column.type_name} (was {was.type_name})"
        else:
            text = f"the length or precision of {name} changed"
        found.append(Change("type", text if widened else f"{text}: rows were rewritten and not sent", not widened))
    if before.primary_key != after.primary_key:
        now = f"({', '.join(after.primary_key)})" if after.primary_key else "gone: the table's messages are one group now"
        found.append(Change("primary_key", f"the primary key is {now}", False))
    if before.replica_identity != after.replica_identity:
        name = IDENTITIES.get(after.replica_identity, after.replica_identity)
        found.append(Change("replica_identity", f"the replica identity is {name}", False))
    return found
