"""Ask Postgres about a `where` before it is saved: names, types, a boolean, and nothing whose result may change.

The expression becomes a view over an empty row of the table, in a transaction that is rolled back. The view's stored tree names
every function and operator that Postgres chose, implicit casts included; the catalog says of each whether it is immutable.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import postgast
import psycopg
from postgast import pg_query_pb2 as pg

from consumers.filters import statements
from consumers.filters.filtering import TIMEOUT_MS, filtering
from consumers.filters.grammar import MOVING_DATES, PREFIX, Condition, Refused, moving_date, nodes
from consumers.filters.rewriting import Column, Fitted, Table, fit, meaning
from consumers.store.connection import store_connection

UNDECIDED = "with metadata.where_undecided"
LARGE_TYPES = ("text", "character varying", "bytea", "json", "jsonb", "tsvector")
LARGE_CHARACTERS = 500  # of four bytes each: below, a value stays in its row
_VIEW = "CREATE TEMP VIEW sequin_check AS "
_PINNED = {"statement_timeout": "2000", "search_path": "pg_catalog", "TimeZone": "UTC", "DateStyle": "ISO"}
# Of the stable functions those whose result is fixed in UTC with ISO dates: of dates and times to texts, numbers and each other.
_REFUSED_SQL = """
    WITH dates(oid) AS (SELECT unnest('{date,time,timetz,timestamp,timestamptz,interval}'::regtype[])::oid)
    SELECT p.oid::regprocedure::text, p.provolatile::text, (SELECT o.oprname::text FROM pg_operator o WHERE o.oprcode = p.oid LIMIT 1)
    FROM pg_proc p
    WHERE p.oid = ANY (%s::oid[]) AND (p.prokind <> 'f' OR p.proretset OR p.provolatile <> 'i' AND NOT (p.provolatile = 's' AND (
        p.proname IN ('date_trunc', 'date_part', 'extract', 'to_char')
        OR (SELECT bool_and(a IN (SELECT oid FROM dates)) FROM unnest(p.proargtypes::oid[]) a)
            AND (EXISTS (SELECT FROM pg_cast c WHERE c.castfunc = p.oid) OR EXISTS (SELECT FROM pg_operator o WHERE o.oprcode = p.oid)))))
    ORDER BY 1 LIMIT 1
"""
# Constants of these types stand for catalog entries; a text search configuration is one that every server has.
_CATALOG_TYPES_SQL = """
    SELECT format_type(t.oid, NULL) FROM pg_type t
    WHERE t.oid = ANY (%s::oid[]) AND (t.typname ~ '^_?reg' AND t.typname <> 'regconfig' OR t.typtype = 'p' OR t.typname ~ '^_?(money|xml)$')
    LIMIT 1
"""


class Notice(NamedTuple):
    """What somebody who saves a filter should know. `sql` mends it, on the source."""

    text: str
    sql: str = ""


def check(condition: Condition, tables: Sequence[Table]) -> None:
    """Raises Refused, naming the table where there are several."""
    with store_connection(application_name="sequin filter check") as conn:
        schema = conn.execute("SELECT quote_ident(relnamespace::regnamespace::text) FROM pg_class WHERE oid = 'messages'::regclass").fetchone()
        assert schema is not None
        for table in tables:
            try:
                _check_table(conn, schema[0], condition, table)
            except Refused as refused:
                several = f"{table}: " if len(tables) > 1 and str(table) not in refused.reason else ""
                raise Refused(several + refused.reason, refused.position) from None


def notices(condition: Condition, tables: Iterable[Table], identities: dict[str, str], actions: Sequence[str]) -> list[Notice]:
    """Where the filter will not be exact. `identities`: each table's replica identity, as pg_class has it."""
    found = []
    for table in tables:
        used = [meaning(reference, table) for reference in condition.references()]
        columns = {column.name: column for column in table.columns}
        inexact = sorted({name.name for name in used if name.kind != "built_in" and not columns[name.name].exact})
        if inexact:
            found.append(Notice(f"{table}: {', '.join(inexact)} compares as text: its type is known to the source only"))
        if "truncate" in actions and any(name.kind == "now" for name in used):
            found.append(Notice(f"{table}: a truncate carries no row, so where the filter hangs on one it is delivered {UNDECIDED}"))
        if identities.get(str(table)) == "f":
            continue
        unknown = []
        large = sorted({name.name for name in used if name.kind == "now" and _may_be_large(columns[name.name])})
        if "update" in actions and large:
            unknown.append(f"updates that leave a large (TOASTed) value of {', '.join(large)} as it is")
        if "update" in actions and any(name.kind == "before" and not columns[name.name].is_key for name in used):
            unknown.append("updates, whose old values are not known")
        if "delete" in actions and any(name.kind != "built_in" and not columns[name.name].is_key for name in used):
            unknown.append("deletes, which carry the key only")
        if unknown:
            found.append(
                Notice(
                    f"{table}: where the filter hangs on what is not there, messages are delivered {UNDECIDED}: " + " and ".join(unknown),
                    f"ALTER TABLE {table_name(table)} REPLICA IDENTITY FULL;",
                )
            )
    return found


def _may_be_large(column: Column) -> bool:
    """Whether its values may be stored apart, and an update then does not bring one that it leaves alone."""
    if column.is_key or not column.exact:
        return False
    limit = re.fullmatch(r"(?:character varying|character)\((\d+)\)", column.type)
    if limit is not None:
        return int(limit[1]) > LARGE_CHARACTERS
    return column.type in LARGE_TYPES or column.type.endswith("[]")


def table_name(table: Table) -> str:
    return ".".join('"' + part.replace('"', '""') + '"' for part in (table.schema, table.name))


def _check_table(conn: psycopg.Connection[Any], schema: str, condition: Condition, table: Table) -> None:
    fitted = fit(condition, table)
    _demand_fixed_dates(conn, condition, table)
    written = _Written(condition, fitted)
    statement = statements.empty_row(fitted, written.expression)
    try:
        tree, type_name = _tree(conn, statement)
    except psycopg.Error as error:
        at = error.diag.statement_position
        position = written.position(int(at) - 1 - len(_VIEW) - statement.index(written.expression)) if at else None
        hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
        raise Refused(f"{error.diag.message_primary or error}{hint}", position) from None
    if type_name != "boolean":
        raise Refused(f"expected an expression that is true or false, got one of type {type_name}")
    if re.search(r"\{(SQLVALUEFUNCTION|SUBLINK|PARAM|AGGREF|WINDOWFUNC) ", tree):
        raise Refused("only what depends on nothing but the row is allowed in a filter")
    row = conn.execute(_REFUSED_SQL, [_oids("funcid|opfuncid", tree)]).fetchone()
    if row is not None:
        raise Refused(_why_refused(*row))
    row = conn.execute(_CATALOG_TYPES_SQL, [_oids("consttype|resulttype|funcresulttype", tree)]).fetchone()
    if row is not None:
        raise Refused(f"values of type {row[0]} are not allowed in a filter")
    _try(schema, fitted, table)


def _oids(names: str, tree: str) -> list[int]:
    return sorted({int(oid) for oid in re.findall(rf":(?:{names}) (\d+)", tree)})


def _why_refused(function: str, volatility: str, operator: str | None) -> str:
    if volatility == "v":
        return f"{function} is volatile: a filter may not call what does something, or answers otherwise each time"
    what = f"the operator {operator} ({function})" if operator else function
    return f"{what} is not immutable: its result depends on more than its arguments. A cast to text may help"


def _tree(conn: psycopg.Connection[Any], statement: str) -> tuple[str, str]:
    """Postgres' own tree of a statement, and the type of its column. Raises psycopg's errors."""
    with conn.transaction(force_rollback=True), psycopg.RawCursor(conn) as cursor:
        for name, value in _PINNED.items():
            cursor.execute("SELECT set_config($1, $2, true)", [name, value])
        cursor.execute(_VIEW + statement)  # type: ignore[call-overload]
        row = cursor.execute(
            "SELECT r.ev_action::text, format_type(a.atttypid, a.atttypmod) FROM pg_rewrite r, pg_attribute a"
            " WHERE r.ev_class = 'pg_temp.sequin_check'::regclass AND a.attrelid = r.ev_class AND a.attnum = 1"
        ).fetchone()
    assert row is not None
    return str(row[0]), str(row[1])


def _demand_fixed_dates(conn: psycopg.Connection[Any], condition: Condition, table: Table) -> None:
    """A text such as 'today' is refused where Postgres would read it as a date: there 'notadate' is an error."""
    for node in nodes(condition.expression):
        if not isinstance(node, pg.A_Const) or not MOVING_DATES.search(node.sval.sval):
            continue
        other = condition.copy()
        for twin in nodes(other.expression):
            if isinstance(twin, pg.A_Const) and twin.location == node.location:
                twin.sval.sval = MOVING_DATES.sub("notadate", twin.sval.sval)
        fitted = fit(other, table)
        try:
            _tree(conn, statements.empty_row(fitted, fitted.expression))
        except psycopg.errors.InvalidDatetimeFormat:
            raise moving_date(node.sval.sval, condition.position(node.location)) from None
        except psycopg.Error:
            pass  # said with the text itself


def _try(schema: str, fitted: Fitted, table: Table) -> None:
    """Let a row be judged, as far as planning it: what fails for every row, such as 1/0, fails there."""
    row = "SELECT 'I'::text AS action, '{}'::text AS record, NULL::text AS changes, true AS known"
    try:
        with filtering() as cursor:
            cursor.execute(f"EXPLAIN SELECT {statements.judgement(schema, fitted, table)} FROM ({row}) w")  # type: ignore[call-overload]
    except psycopg.errors.QueryCanceled:
        raise Refused(f"took longer than {TIMEOUT_MS} ms before it had seen a row") from None
    except (psycopg.DataError, psycopg.ProgrammingError) as error:
        raise Refused(f"fails for every row: {error.diag.message_primary or error}") from None


class _Written:
    """The user's own text with the names of `r` put in, and where each character of it comes from."""

    def __init__(self, condition: Condition, fitted: Fitted) -> None:
        raw = (PREFIX + condition.text).encode()
        tokens = list(postgast.scan(raw.decode()).tokens)
        starts = {token.start: number for number, token in enumerate(tokens)}
        self._moved: list[tuple[int, int]] = []  # (here, in the text): from this character on
        text, at = "", len(PREFIX.encode())
        for reference, name in zip(condition.references(), fitted.names, strict=True):
            first = starts[reference.node.location]
            last = tokens[first + 2 * (len(reference.parts) - 1)]
            text += raw[at : reference.node.location].decode()
            self._moved.append((len(text), reference.position))
            text += name
            at = last.end
            self._moved.append((len(text), len(raw[:at].decode()) - len(PREFIX)))
        self.expression = text + raw[at:].decode()

    def position(self, here: int) -> int:
        """The character of the user's text behind a character of `expression`."""
        start, theirs = 0, 0
        for moved, original in self._moved:
            if moved > here:
                return min(theirs + here - start, original)
            start, theirs = moved, original
        return theirs + here - start
