"""Parse a `where` with Postgres' own grammar and refuse what may not stand in one. Pure.

What passes is an expression over columns, literals, operators, casts and functions by name; whether those functions may be
called, and whether the types fit, is Postgres' to say (`checking.py`). The text itself never runs: what `rewriting.py`
makes of the tree does.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import postgast
from google.protobuf.message import DecodeError
from postgast import pg_query_pb2 as pg

MAX_CHARACTERS = 10_000
MAX_TYPMOD = 10_000  # varchar(n), bit(n): more is a way to use memory up
MAX_PADDING = 10_000
PREFIX = "SELECT 1 WHERE (\n"
SUFFIX = "\n)"  # the line break ends a comment

# Types of Postgres' own whose values depend on nothing but their text. No reg*, no money, no xml, no pseudo-types.
DATE_TYPES = frozenset({"date", "time", "timetz", "timestamp", "timestamptz"})
CAST_TYPES = DATE_TYPES | {
    "bool", "int2", "int4", "int8", "float4", "float8", "numeric", "text", "varchar", "bpchar", "char", "name", "uuid", "interval",
    "json", "jsonb", "jsonpath", "bytea", "bit", "varbit", "inet", "cidr", "macaddr", "macaddr8", "oid", "pg_lsn", "point", "line",
    "lseg", "box", "path", "polygon", "circle", "int4range", "int8range", "numrange", "tsrange", "tstzrange", "daterange",
    "int4multirange", "int8multirange", "nummultirange", "tsmultirange", "tstzmultirange", "datemultirange", "tsvector", "tsquery",
}  # fmt: skip
# Immutable, and yet a way to use memory up, or to read what is not the row.
REFUSED_FUNCTIONS = re.compile(r"repeat|array_fill|xml\w*|xpath\w*|\w+_to_xml\w*|.*(recv|send|in|out)_internal|pg_\w+|lo_\w+|ts_rewrite")
PADDING_FUNCTIONS = ("lpad", "rpad")
MOVING_DATES = re.compile(r"\b(now|today|tomorrow|yesterday)\b", re.IGNORECASE)

_EXPRESSION_KINDS = frozenset(
    pg.A_Expr_Kind.Value(f"AEXPR_{kind}")
    for kind in (
        "OP", "OP_ANY", "OP_ALL", "DISTINCT", "NOT_DISTINCT", "NULLIF", "IN", "LIKE", "ILIKE", "SIMILAR", "BETWEEN", "NOT_BETWEEN",
        "BETWEEN_SYM", "NOT_BETWEEN_SYM",
    )
)  # fmt: skip
_WHAT = {
    "SubLink": "a subquery", "ParamRef": "a parameter", "RowExpr": "a row", "SQLValueFunction": "what depends on when or by whom it is run",
    "A_Star": "*", "GroupingFunc": "grouping", "XmlExpr": "XML", "XmlSerialize": "XML", "SetToDefault": "DEFAULT",
    "NamedArgExpr": "an argument by name", "JsonIsPredicate": "IS JSON", "MultiAssignRef": "an assignment",
}  # fmt: skip


class Refused(Exception):
    """A `where` that may not be saved. `position`: the character of the text it is about, from 0, None when none can be told."""

    def __init__(self, reason: str, position: int | None = None) -> None:
        self.reason, self.position = reason, position
        super().__init__(reason)


class Reference(NamedTuple):
    """A name in the text: one part (a column or a built-in), or two (`new.`, `old.`, `message.`)."""

    parts: tuple[str, ...]
    node: Any
    position: int


class Condition:
    """A parsed `where`: the tree of its expression."""

    def __init__(self, text: str, tree: Any) -> None:
        self.text = text
        self.tree = tree

    @property
    def expression(self) -> Any:
        """The node below WHERE. Changing it changes this condition: work on a `copy`."""
        return self.tree.stmts[0].stmt.select_stmt.where_clause

    def copy(self) -> Condition:
        tree = pg.ParseResult()
        tree.CopyFrom(self.tree)
        return Condition(self.text, tree)

    def references(self) -> list[Reference]:
        """Every name, in the order of the text."""
        found = [
            Reference(tuple(field.string.sval for field in node.fields), node, self.position(node.location))
            for node in nodes(self.expression)
            if isinstance(node, pg.ColumnRef)
        ]
        return sorted(found, key=lambda reference: reference.position)

    @property
    def asks_for_old_values(self) -> bool:
        """It names the row before: `old.x`."""
        return any(reference.parts[0] == "old" and len(reference.parts) == 2 for reference in self.references())

    def position(self, location: int) -> int:
        """A node's place in bytes of what was parsed, as a character of the text."""
        return len((PREFIX + self.text).encode()[:location].decode("utf-8", "ignore")) - len(PREFIX)

    def deparsed(self) -> str:
        """The expression as text again. Raises Refused when it would not be the same expression."""
        text = postgast.deparse(self.tree)
        again = postgast.parse(text)
        if _bare(again) != _bare(self.tree):
            raise Refused("this expression cannot be written back as it was understood: write it in a simpler way")
        expression = text.removeprefix("SELECT 1 WHERE ")
        return f"({expression})"


def parse(text: str) -> Condition:
    """Raises Refused."""
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"expected at most {MAX_CHARACTERS} characters, got {len(text)}")
    if "\0" in text:
        raise Refused("may not contain a NUL character", text.index("\0"))
    try:
        tree = postgast.parse(PREFIX + text + SUFFIX)
    except postgast.PgQueryError as error:
        position = error.cursorpos - 1 - len(PREFIX) if error.cursorpos else None
        if position is not None and position >= len(text):
            raise Refused("the expression ends too early, or opens a parenthesis or quote that it does not close", len(text)) from None
        raise Refused(error.message, position) from None
    except DecodeError:
        raise Refused("the expression is nested too deeply: expected at most some forty levels") from None
    condition = Condition(text, tree)
    _demand_one_expression(condition)
    _Walk(condition).expression(condition.expression)
    return condition


def nodes(node: Any) -> Iterator[Any]:
    """A node and every node below it, without the wrappers."""
    for _, found in postgast.walk(node):
        yield found


def _demand_one_expression(condition: Condition) -> None:
    """`x) UNION SELECT (y` and the like parse: only SELECT 1 WHERE expression may have come of it."""
    if len(condition.tree.stmts) != 1 or condition.tree.stmts[0].stmt.WhichOneof("node") != "select_stmt":
        raise Refused("expected one expression, not statements")
    select = condition.tree.stmts[0].stmt.select_stmt
    got = {field.name for field, _ in select.ListFields()}
    if select.op != pg.SETOP_NONE or got != {"target_list", "where_clause", "limit_option", "op"}:
        raise Refused("expected one boolean expression, as it would stand behind WHERE")


class _Walk:
    """Visits every node there is; one without a method of its own is refused."""

    def __init__(self, condition: Condition) -> None:
        self._position = condition.position

    def expression(self, wrapped: Any) -> None:
        node = postgast.unwrap_node(wrapped)
        name = type(node).__name__
        visit: Callable[[Any], None] | None = getattr(self, f"_{name}", None)
        if visit is None:
            raise Refused(f"{_WHAT.get(name, name)} is not allowed in a filter", self._at(node))
        visit(node)

    def all(self, wrapped: Any) -> None:
        for each in wrapped:
            self.expression(each)

    def _at(self, node: Any) -> int | None:
        for found in nodes(node):
            location = getattr(found, "location", 0)
            if location > 0:
                return self._position(location)
        return None

    def _A_Const(self, node: Any) -> None:
        pass

    def _List(self, node: Any) -> None:
        self.all(node.items)

    def _BoolExpr(self, node: Any) -> None:
        self.all(node.args)

    def _NullTest(self, node: Any) -> None:
        self.expression(node.arg)

    def _BooleanTest(self, node: Any) -> None:
        self.expression(node.arg)

    def _CoalesceExpr(self, node: Any) -> None:
        self.all(node.args)

    def _MinMaxExpr(self, node: Any) -> None:
        self.all(node.args)

    def _A_ArrayExpr(self, node: Any) -> None:
        self.all(node.elements)

    def _A_Expr(self, node: Any) -> None:
        if node.kind not in _EXPRESSION_KINDS:
            raise Refused("this operator is not allowed in a filter", self._at(node))
        names = [name.string.sval for name in node.name]
        if len(names) > 1 and names[0] != "pg_catalog":
            raise Refused("only Postgres' own operators are allowed in a filter", self._at(node))
        if node.HasField("lexpr"):
            self.expression(node.lexpr)
        self.expression(node.rexpr)

    def _CaseExpr(self, node: Any) -> None:
        if node.HasField("arg"):
            self.expression(node.arg)
        self.all(node.args)
        if node.HasField("defresult"):
            self.expression(node.defresult)

    def _CaseWhen(self, node: Any) -> None:
        self.expression(node.expr)
        self.expression(node.result)

    def _A_Indirection(self, node: Any) -> None:
        self.expression(node.arg)
        for part in node.indirection:
            if part.WhichOneof("node") != "a_indices":
                raise Refused("a field of a composite value is not allowed in a filter: it compares as text", self._at(node))
            for side in ("lidx", "uidx"):
                if part.a_indices.HasField(side):
                    self.expression(getattr(part.a_indices, side))

    def _ColumnRef(self, node: Any) -> None:
        if any(field.WhichOneof("node") != "string" for field in node.fields):
            raise Refused("* is not allowed in a filter: name the columns", self._at(node))
        parts = [field.string.sval for field in node.fields]
        if len(parts) > 2 or (len(parts) == 2 and parts[0] not in ("new", "old", "message")):
            raise Refused(
                f"{'.'.join(parts)}: expected a column by its bare name, new.column, old.column or message.action", self._at(node)
            )

    def _CollateClause(self, node: Any) -> None:
        self.expression(node.arg)
        names = [name.string.sval for name in node.collname]
        if len(names) > 1 and names[0] != "pg_catalog":
            raise Refused("only Postgres' own collations are allowed in a filter", self._at(node))

    def _TypeCast(self, node: Any) -> None:
        self.expression(node.arg)
        names = [name.string.sval for name in node.type_name.names]
        if (len(names) > 1 and names[0] != "pg_catalog") or names[-1] not in CAST_TYPES or node.type_name.setof or node.type_name.pct_type:
            raise Refused(f"a cast to {'.'.join(names)} is not allowed in a filter", self._at(node))
        for typmod in node.type_name.typmods:
            value = postgast.unwrap_node(typmod)
            if not isinstance(value, pg.A_Const) or value.ival.ival > MAX_TYPMOD:
                raise Refused(f"expected at most {MAX_TYPMOD} in the length or precision of a type", self._at(node))
        literal = postgast.unwrap_node(node.arg)
        if names[-1] in DATE_TYPES and isinstance(literal, pg.A_Const) and MOVING_DATES.search(literal.sval.sval):
            raise moving_date(literal.sval.sval, self._at(node))

    def _FuncCall(self, node: Any) -> None:
        names = [name.string.sval for name in node.funcname]
        name = names[-1]
        if len(names) > 1 and names[0] != "pg_catalog":
            raise Refused(f"{'.'.join(names)}: only Postgres' own functions are allowed in a filter", self._at(node))
        if node.agg_star or node.agg_distinct or node.agg_order or node.HasField("agg_filter") or node.agg_within_group:
            raise Refused(f"{name}: an aggregate is not allowed in a filter: it judges one row", self._at(node))
        if node.HasField("over"):
            raise Refused(f"{name}: a window function is not allowed in a filter: it judges one row", self._at(node))
        if node.func_variadic or REFUSED_FUNCTIONS.fullmatch(name):
            raise Refused(f"{name} is not allowed in a filter", self._at(node))
        self.all(node.args)
        if name in PADDING_FUNCTIONS and len(node.args) > 1:
            width = postgast.unwrap_node(node.args[1])
            if not isinstance(width, pg.A_Const) or not 0 <= width.ival.ival <= MAX_PADDING:
                raise Refused(f"{name}: expected a length written as a number of at most {MAX_PADDING}", self._at(node))


def moving_date(literal: str, position: int | None) -> Refused:
    return Refused(f"'{literal}' means another moment whenever it is read: write the date itself", position)


def _bare(tree: Any) -> str:
    """The tree without what only tells how it was written."""
    copy = pg.ParseResult()
    copy.CopyFrom(tree)
    for node in nodes(copy):
        for field in ("location", "stmt_location", "stmt_len", "rexpr_list_start", "rexpr_list_end", "list_start", "list_end", "funcformat"):
            if field in node.DESCRIPTOR.fields_by_name:
                node.ClearField(field)
    return str(copy)
