"""Run the statements that every message costs: prepared on the server, and without a cursor.

A cursor of psycopg's is made for any statement and any client: nearly half the time of a small claim went into it. This is for
functions of our own, on Django's connection; inside a transaction an ordinary cursor runs the same.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from django.db import DEFAULT_DB_ALIAS, connections
from psycopg import generators
from psycopg.adapt import Transformer
from psycopg.pq import ConnStatus, ExecStatus

Row = tuple[Any, ...]
Connection = psycopg.Connection[Any]

_GOOD = (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK)


class _Session:
    """What is known of one connection."""

    def __init__(self) -> None:
        self.prepared: set[bytes] = set()
        self.loads = Transformer()  # psycopg's own loaders: Django's for times is Python code. What it finds out of types it keeps


_sessions: WeakKeyDictionary[Connection, _Session] = WeakKeyDictionary()


class Statement:
    """One statement with `$1`, `$2`, …; its parameters are given as Postgres reads them, in text."""

    def __init__(self, name: str, text: str) -> None:
        self._name = f"sequin_{name}".encode()
        self._text = text

    def rows(self, parameters: Sequence[bytes | None]) -> list[Row]:
        """Execute it. Raises Django's database errors."""
        wrapper = connections[DEFAULT_DB_ALIAS]  # once: looking it up takes four calls
        if wrapper.connection is None:
            wrapper.ensure_connection()
        raw: Connection = wrapper.connection
        try:
            return self._execute(raw, parameters) if raw.autocommit else self._within_transaction(raw, parameters)
        except psycopg.Error:
            with wrapper.wrap_database_errors:
                raise

    def _execute(self, raw: Connection, parameters: Sequence[bytes | None]) -> list[Row]:
        session = _sessions.get(raw)
        if session is None:
            session = _sessions[raw] = _Session()
        if self._name not in session.prepared:
            session.prepared.add(self._name)
            self._prepare(raw)
        try:
            result = self._run(raw, parameters)
        except psycopg.errors.InvalidSqlStatementName:
            # After a ROLLBACK, as after much else, psycopg deallocates all there is on the server. Nothing was executed.
            self._prepare(raw)
            result = self._run(raw, parameters)
        session.loads.set_pgresult(result)
        rows = session.loads.load_rows(0, result.ntuples, tuple)
        session.loads.set_pgresult(None)
        return rows

    def _prepare(self, raw: Connection) -> None:
        _good(raw, raw.pgconn.prepare(self._name, self._text.encode()))

    def _run(self, raw: Connection, parameters: Sequence[bytes | None]) -> Any:
        raw.pgconn.send_query_prepared(self._name, parameters)
        # Not pgconn.exec_prepared: who waits for the connection may have something else to do meanwhile, as a pump has.
        return _good(raw, raw.wait(generators.execute(raw.pgconn))[-1])

    def _within_transaction(self, raw: Connection, parameters: Sequence[bytes | None]) -> list[Row]:
        texts = [None if value is None else value.decode() for value in parameters]
        return psycopg.RawCursor(raw).execute(self._text.encode(), texts).fetchall()


def array(values: Iterable[object]) -> bytes:
    """Numbers, or UUIDs, as an array."""
    return f"{{{','.join(map(str, values))}}}".encode()


def _good(raw: Connection, result: Any) -> Any:
    if result.status in _GOOD:
        return result
    if raw.pgconn.status == ConnStatus.BAD:
        raise psycopg.OperationalError(f"the connection is lost: {result.get_error_message()}")
    raise psycopg.errors.error_from_result(result, encoding="utf-8")
