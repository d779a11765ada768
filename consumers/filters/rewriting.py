"""Put a message's columns where a `where` names them, and keep what is unknown apart from what is null. Pure.

A name becomes a column of `r`: n1, n2, … of the row as it is now, o1, o2, … of the row before, and beside each of them un1 or
uo1, true when the message does not carry it. Strict operators pass a null on, as they should an unknown value; whatever
looks at nulls (IS NULL, IS DISTINCT FROM, coalesce, CASE …) is wrapped, so that it answers null too when it met an unknown
one. So the whole is null and names something unknown exactly when the answer hangs on it.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import postgast
from postgast import pg_query_pb2 as pg

from consumers.filters.grammar import Condition, Reference, Refused, nodes

BUILT_INS = ("action", "table_schema", "table_name")
# Functions of Postgres' own that look at nulls: pg_proc, not proisstrict, immutable.
NOT_STRICT = frozenset({
    "array_append", "array_cat", "array_position", "array_positions", "array_prepend", "array_remove", "array_replace", "daterange",
    "int4range", "int8range", "jsonb_set_lax", "num_nonnulls", "num_nulls", "numrange", "overlaps", "quote_nullable",
    "similar_escape", "string_to_array", "tsrange", "tstzrange",
})  # fmt: skip
NOT_STRICT_OPERATORS = frozenset({"||"})  # of arrays


class Column(NamedTuple):
    """A column of a table as a filter sees it."""

    name: str
    type: str
    """The store's type for it, as SQL: `numeric(10,2)`."""
    exact: bool
    """False: the source's type is not one of Postgres' own, and its text is compared."""
    is_key: bool = False
    """Its value before an update is known whatever the replica identity."""


class Table(NamedTuple):
    schema: str
    name: str
    columns: tuple[Column, ...]

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


class Fitted(NamedTuple):
    """A condition over one table."""

    expression: str
    """SQL over `r`."""
    now: tuple[Column, ...]
    """The columns behind n1, n2, …"""
    before: tuple[Column, ...]
    """The columns behind o1, o2, …"""
    names: tuple[str, ...]
    """What each name of the text became, in its order: `r.n1`."""


class Name(NamedTuple):
    """What a reference means: a column now or before, or a built-in."""

    kind: str  # now, before, built_in
    name: str


def meaning(reference: Reference, table: Table) -> Name:
    """Raises Refused when the table has no such column."""
    names = {column.name for column in table.columns}
    parts = reference.parts
    if len(parts) == 1:
        if parts[0] in names:
            return Name("now", parts[0])
        if parts[0] in BUILT_INS:
            return Name("built_in", parts[0])
        if parts[0] in ("new", "old"):
            raise Refused(f"{parts[0]}: name a column of it, such as {parts[0]}.id", reference.position)
    elif parts[0] == "message":
        if parts[1] in BUILT_INS:
            return Name("built_in", parts[1])
        raise Refused(f"message.{parts[1]}: expected message.{', message.'.join(BUILT_INS)}", reference.position)
    elif parts[1] in names:
        return Name("now" if parts[0] == "new" else "before", parts[1])
    column = parts[-1]
    alike = [name for name in sorted(names) if name.lower() == column.lower()]
    more = f'; it has "{alike[0]}", which needs the quotes' if alike else ""
    raise Refused(f"{table} has no column {column!r}{more}", reference.position)


def fit(condition: Condition, table: Table) -> Fitted:
    """The condition over the columns of one table. Raises Refused."""
    condition = condition.copy()
    columns = {column.name: column for column in table.columns}
    numbers: dict[str, dict[str, int]] = {"now": {}, "before": {}}
    names = []
    for reference in condition.references():
        name = meaning(reference, table)
        if name.kind == "built_in":
            new = name.name
        else:
            known = numbers[name.kind]
            new = f"{'n' if name.kind == 'now' else 'o'}{known.setdefault(name.name, len(known) + 1)}"
        _rename(reference.node, new)
        names.append(f"r.{new}")
    _guard(condition.expression)
    return Fitted(
        condition.deparsed(),
        tuple(columns[name] for name in numbers["now"]),
        tuple(columns[name] for name in numbers["before"]),
        tuple(names),
    )


def row_condition(condition: Condition, table: Table, alias: str) -> str:
    """The condition over rows of the table itself, on the source: SQL with its columns behind `alias`. Raises Refused.

    A row that is read has no row before it.
    """
    condition = condition.copy()
    for reference in condition.references():
        name = meaning(reference, table)
        if name.kind == "now":
            _rename(reference.node, name.name, alias)
            continue
        value = {"action": "read", "table_schema": table.schema, "table_name": table.name}.get(name.name) if name.kind == "built_in" else None
        _replace(condition, reference.node, _constant(value))
    return condition.deparsed()


# Nulls and the unknown ----------------------------------------------------------------------------------------------


def _guard(wrapped: Any) -> None:
    """Wrap what looks at nulls, from the inside out. `wrapped` is a Node and is changed in place."""
    node = postgast.unwrap_node(wrapped)
    for child in _children(node):
        _guard(child)
    whole = pg.Node()
    whole.CopyFrom(wrapped)
    if isinstance(node, pg.CaseExpr):
        _guard_case(node)
        return
    looked_at = _looked_at(node)
    tests = [test for test in map(_is_unknown, looked_at) if test is not None]
    if tests:
        wrapped.CopyFrom(_case([(_any(tests), _constant(None))], whole))


def _guard_case(node: Any) -> None:
    """A branch that hangs on an unknown value is neither taken nor passed by: the answer is null."""
    branches = [postgast.unwrap_node(branch) for branch in node.args]
    guarded: list[Any] = []
    for branch in branches:
        looked_at = [branch.expr, node.arg] if node.HasField("arg") else [branch.expr]
        own = pg.Node()
        own.case_when.CopyFrom(branch)
        if node.HasField("arg"):
            # CASE x WHEN v: as CASE WHEN x = v, so that every branch is a condition of its own.
            own.case_when.expr.CopyFrom(_equals(node.arg, branch.expr))
        tests = [test for test in map(_is_unknown, looked_at) if test is not None]
        if tests:
            guarded.append(_when(_any(tests), _constant(None)))
        guarded.append(own)
    node.ClearField("arg")
    del node.args[:]
    node.args.extend(guarded)


def _looked_at(node: Any) -> list[Any]:
    """The parts of a node whose nulls it looks at."""
    if isinstance(node, pg.NullTest | pg.BooleanTest):
        return [node.arg]
    if isinstance(node, pg.CoalesceExpr):
        return list(node.args)[:-1]
    if isinstance(node, pg.MinMaxExpr):
        return list(node.args)
    if isinstance(node, pg.A_ArrayExpr):
        return list(node.elements)
    if isinstance(node, pg.FuncCall):
        return list(node.args) if node.funcname[-1].string.sval in NOT_STRICT else []
    if isinstance(node, pg.A_Expr):
        kinds = (pg.AEXPR_DISTINCT, pg.AEXPR_NOT_DISTINCT, pg.AEXPR_NULLIF)
        if node.kind in kinds or (node.kind == pg.AEXPR_OP and node.name[-1].string.sval in NOT_STRICT_OPERATORS):
            return [part for part in (node.lexpr, node.rexpr) if part.WhichOneof("node")]
    return []


def _is_unknown(wrapped: Any) -> Any | None:
    """Does this part hang on something unknown? It is null, and names a column that is not carried. None: it names none."""
    node = postgast.unwrap_node(wrapped)
    flags = sorted({f"u{name}" for name in _columns_of(node)})
    if not flags:
        return None
    unknown = _any([_column(flag) for flag in flags])
    # What holds a guard already is not written twice: nested ones would double with each level.
    if isinstance(node, pg.ColumnRef) or any(name in flags for name in _names(node)):
        return unknown
    null = pg.Node()
    null.null_test.arg.CopyFrom(wrapped)
    null.null_test.nulltesttype = pg.IS_NULL
    both = pg.Node()
    both.bool_expr.boolop = pg.AND_EXPR
    both.bool_expr.args.extend([null, unknown])
    return both


def _columns_of(node: Any) -> list[str]:
    """n1, o2, …: what the part names, the flags of inner guards left out."""
    return [name for name in _names(node) if name[0] in "no" and name[1:].isdigit()]


def _names(node: Any) -> list[str]:
    return [found.fields[-1].string.sval for found in nodes(node) if isinstance(found, pg.ColumnRef)]


# Nodes ----------------------------------------------------------------------------------------------------------------


def _children(node: Any) -> list[Any]:
    """The Nodes directly below: fields that hold one, or several."""
    found: list[Any] = []
    for field, value in node.ListFields():
        if field.message_type is None or field.message_type.name != "Node":
            continue
        found.extend([value] if isinstance(value, pg.Node) else value)
    if isinstance(node, pg.A_Indirection):
        for part in node.indirection:
            found.extend(side for side in (part.a_indices.lidx, part.a_indices.uidx) if side.WhichOneof("node"))
    return found


def _rename(node: Any, name: str, qualifier: str = "r") -> None:
    """Let a ColumnRef name something else."""
    del node.fields[:]
    for part in (qualifier, name):
        field = pg.Node()
        field.string.sval = part
        node.fields.append(field)


def _replace(condition: Condition, target: Any, replacement: Any) -> None:
    """Put a Node in the place of a ColumnRef."""

    def visit(wrapped: Any) -> bool:
        if wrapped.WhichOneof("node") == "column_ref" and wrapped.column_ref is target:
            wrapped.CopyFrom(replacement)
            return True
        return any(visit(child) for child in _children(postgast.unwrap_node(wrapped)))

    assert visit(condition.expression)


def _column(name: str) -> Any:
    node = pg.Node()
    _rename(node.column_ref, name)
    return node


def _constant(value: str | None) -> Any:
    """A text, or null."""
    node = pg.Node()
    if value is None:
        node.a_const.isnull = True
        return node
    cast = pg.Node()
    node.a_const.sval.sval = value
    cast.type_cast.arg.CopyFrom(node)
    name = pg.Node()
    name.string.sval = "text"
    cast.type_cast.type_name.names.append(name)
    cast.type_cast.type_name.typemod = -1
    return cast


def _any(tests: Sequence[Any]) -> Any:
    if len(tests) == 1:
        return tests[0]
    node = pg.Node()
    node.bool_expr.boolop = pg.OR_EXPR
    node.bool_expr.args.extend(tests)
    return node


def _equals(left: Any, right: Any) -> Any:
    node = pg.Node()
    node.a_expr.kind = pg.AEXPR_OP
    name = pg.Node()
    name.string.sval = "="
    node.a_expr.name.append(name)
    node.a_expr.lexpr.CopyFrom(left)
    node.a_expr.rexpr.CopyFrom(right)
    return node


def _when(test: Any, result: Any) -> Any:
    node = pg.Node()
    node.case_when.expr.CopyFrom(test)
    node.case_when.result.CopyFrom(result)
    return node


def _case(branches: Sequence[tuple[Any, Any]], otherwise: Any) -> Any:
    node = pg.Node()
    node.case_expr.args.extend(_when(test, result) for test, result in branches)
    node.case_expr.defresult.CopyFrom(otherwise)
    return node
