"""Connections to the store on which filters run: a role that may only read messages, a time limit, settings pinned.

Whatever an expression tries, here it can read nothing else, write nothing, and not for long.
"""
from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import tuple_row
from psycopg_pool import ConnectionPool

from consumers.store.connection import store_parameters

log = logging.getLogger(__name__)

ROLE = "sequin_filter"
TIMEOUT_MS = 500
CONNECTIONS = 8
SETTINGS = {
    "statement_timeout": str(TIMEOUT_MS), "default_transaction_read_only": "on", "search_path": "pg_catalog", "TimeZone": "UTC",
    "DateStyle": "ISO", "IntervalStyle": "postgres", "jit": "off", "plan_cache_mode": "force_generic_plan", "enable_seqscan": "off",
    "enable_bitmapscan": "off", "idle_in_transaction_session_timeout": "10s",
}  # fmt: skip

_lock = threading.Lock()
_pool: ConnectionPool[psycopg.Connection[Any]] | None = None
_owner = 0
_warned = False


@contextmanager
def filtering() -> Iterator[psycopg.RawCursor[Any]]:
    """A cursor with `$1` parameters, in autocommit. Raises psycopg's errors."""
    with _connections().connection() as conn, psycopg.RawCursor(conn, row_factory=tuple_row) as cursor:
        yield cursor


def _connections() -> ConnectionPool[psycopg.Connection[Any]]:
    global _pool, _owner
    with _lock:
        if _pool is None or _owner != os.getpid():
            # Nothing is shared over a fork: the parent's connections are the parent's.
            _owner = os.getpid()
            _pool = ConnectionPool(
                kwargs=store_parameters("sequin filter"), configure=_configure, check=ConnectionPool.check_connection,
                min_size=0, max_size=CONNECTIONS, timeout=10, max_idle=60, name="filters", open=True,
            )  # fmt: skip
        return _pool


def _configure(conn: psycopg.Connection[Any]) -> None:
    global _warned
    conn.prepare_threshold = 0
    for name, value in SETTINGS.items():
        conn.execute("SELECT set_config(%s, %s, false)", [name, value])
    try:
        conn.execute(f"SET ROLE {ROLE}")
    except psycopg.Error as error:
        if not _warned:
            _warned = True
            log.warning("filters run without a role of their own: %s", " ".join(str(error).split()))


def close() -> None:
    """End this process's connections."""
    global _pool
    with _lock:
        if _pool is not None and _owner == os.getpid():
            _pool.close(timeout=1)
        _pool = None
