"""Tell what a table's primary key was when a change was made, and what happened to the table between two of its shapes. Pure.

A rewrite (ALTER TYPE … USING, a new column with a default) changes rows without a word in the stream. The stream says what a table
looked like when the change was made, the catalog what it looks like now: after a DDL the two differ until we have caught up.
"""
from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from consumers.store.types import RelationShape

VARCHAR = 1043
IDENTITIES = {"d": "DEFAULT", "n": "NOTHING", "f": "FULL", "i": "USING INDEX"}


class Change(NamedTuple):
    """`backfill`: rows the table has now differ from what was sent, and only a backfill brings them."""

    kind: str
    text: str
    backfill: bool


class Now(NamedTuple):
    """What the catalog says of a table now. `exists`: it is there at all; `listed`: the publication has a column list for it."""

    exists: bool
    primary_key: tuple[str, ...]
    columns: tuple[str, ...]
    listed: bool = False


def primary_key(names: Sequence[str], flagged: Sequence[str], identity: str, now: Now, before: RelationShape | None) -> tuple[str, ...]:
    """The key, in its order, of a relation that the stream announced with these columns.

    `flagged`: the columns that the stream calls the replica identity. Under DEFAULT they are the key of then, in no order.
    `before`: the same table's shape when it was last announced.
    """
    last, old = ((), ()) if before is None else (before.primary_key, tuple(column.name for column in before.columns))
    known = [last, _renamed(last, old, names)]
    if now.exists:
        known = [now.primary_key, last, _renamed(now.primary_key, now.columns, names), known[1]]
    if identity == "d" and flagged:  # none are of a key that is deferrable
        for key in known:
            if set(key) == set(flagged):
                return key
        if now.listed and set(flagged) < set(now.primary_key):
            return now.primary_key  # the publication leaves out a part of the key
        return tuple(flagged)
    if now.exists and (not now.primary_key or now.listed):
        return now.primary_key
    return next((key for key in known if key and set(key) <= set(names)), now.primary_key)


def _renamed(key: Sequence[str], columns: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The key under the names that its columns have, or had, at the same places; () when that cannot be told."""
    if len(columns) != len(names) or not set(key) <= set(columns):
        return ()
    return tuple(names[columns.index(name)] for name in key)


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
