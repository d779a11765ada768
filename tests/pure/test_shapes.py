"""What is said about a table that changed, and when a backfill is suggested."""
from __future__ import annotations

import pytest

from capture.shapes import Now, differences, primary_key
from consumers.store.types import ColumnShape, RelationShape

INT, TEXT, VARCHAR, NUMERIC = 23, 25, 1043, 1700


def shape(*columns: tuple[str, int, int], oid: int = 1, key: tuple[str, ...] = ("id",), identity: str = "d") -> RelationShape:
    names = {INT: "integer", TEXT: "text", VARCHAR: "character varying", NUMERIC: "numeric"}
    return RelationShape(oid, "public", "t", tuple(ColumnShape(n, t, m, names[t]) for n, t, m in columns), key, identity)


ID, A = ("id", INT, -1), ("a", TEXT, -1)


@pytest.mark.parametrize(
    ("after", "filled", "kind", "backfill"),
    [
        (shape(ID, A, ("b", TEXT, -1)), (), "columns", False),
        (shape(ID, A, ("b", TEXT, -1)), ("b",), "columns", True),
        (shape(ID), (), "columns", False),
        (shape(ID, ("renamed", TEXT, -1)), (), "columns", False),
        (shape(ID, ("a", INT, -1)), (), "type", True),
        (shape(ID, A, oid=2), (), "recreated", True),
        (shape(ID, A, key=()), (), "primary_key", False),
        (shape(ID, A, identity="f"), (), "replica_identity", False),
    ],
)
def test_one_difference(after: RelationShape, filled: tuple[str, ...], kind: str, backfill: bool) -> None:
    (change,) = differences(shape(ID, A), after, filled)
    assert (change.kind, change.backfill) == (kind, backfill)


@pytest.mark.parametrize(("before", "after", "backfill"), [(14, 24, False), (14, -1, False), (24, 14, True)])
def test_a_wider_varchar_rewrites_nothing(before: int, after: int, backfill: bool) -> None:
    (change,) = differences(shape(("v", VARCHAR, before)), shape(("v", VARCHAR, after)))
    assert change.backfill is backfill


def test_a_numeric_of_other_precision_was_rewritten() -> None:
    (change,) = differences(shape(("n", NUMERIC, 655366)), shape(("n", NUMERIC, 655368)))
    assert change.backfill and "n changed" in change.text


def test_nothing_changed() -> None:
    assert differences(shape(ID, A), shape(ID, A)) == []


THEN = RelationShape(7, "public", "t", (ColumnShape("a", 23, -1, "int"), ColumnShape("id", 23, -1, "int")), ("id",), "d")


@pytest.mark.parametrize(
    ("names", "flagged", "identity", "now", "before", "key"),
    [
        (["id", "a", "v"], ["id", "a"], "d", Now(True, ("a", "id"), ("id", "a", "v")), None, ("a", "id")),  # the catalog knows the order
        (["id", "v"], ["id"], "d", Now(True, ("number",), ("number", "v")), None, ("id",)),  # renamed since
        (["id", "a"], ["id", "a"], "d", Now(True, ("y", "x"), ("x", "y")), None, ("a", "id")),  # both of them
        (["a", "id"], ["id"], "d", Now(True, ("a",), ("a",)), THEN, ("id",)),  # another key since
        (["a", "id"], ["id"], "d", Now(False, (), ()), None, ("id",)),  # dropped since
        (["a", "id"], [], "d", Now(True, ("id",), ("a", "id")), None, ("id",)),  # a deferrable key
        (["a", "id"], [], "d", Now(True, (), ("a", "id")), None, ()),
        (["a"], ["a"], "d", Now(True, ("a", "id"), ("a", "id"), listed=True), None, ("a", "id")),  # a part is not published
        (["a", "id"], ["a", "id"], "f", Now(True, ("id",), ("a", "id")), None, ("id",)),
        (["a", "id"], ["a", "id"], "f", Now(True, ("number",), ("a", "number")), None, ("id",)),
        (["a", "id"], ["a", "id"], "f", Now(True, ("number",), ("number",)), THEN, ("id",)),
        (["a", "id"], ["a", "id"], "f", Now(False, (), ()), THEN, ("id",)),
        (["a", "id"], ["a", "id"], "f", Now(False, (), ()), None, ()),
        (["a", "id"], ["a"], "i", Now(True, ("id",), ("a", "id")), None, ("id",)),
        (["a"], ["a"], "i", Now(True, ("id",), ("a", "id"), listed=True), None, ("id",)),
        (["a", "id"], ["a", "id"], "f", Now(True, (), ("a", "id")), THEN, ()),
    ],
)  # fmt: skip
def test_the_key_of_then(
    names: list[str], flagged: list[str], identity: str, now: Now, before: RelationShape | None, key: tuple[str, ...]
) -> None:
    assert primary_key(names, flagged, identity, now, before) == key
