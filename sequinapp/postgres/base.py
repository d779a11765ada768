"""Django's Postgres backend with a pool that costs a request little: no query to see whether a connection lives, nothing set twice.

Django's own health check is a query before each request: half of what a request of the pull API costs. A connection that the
server has closed is known by its socket: something is there to be read. And Django goes through all it does with a new
connection whenever one comes from the pool, which cost half as much again.
"""
from __future__ import annotations

import select
import time
from typing import Any

import psycopg
from django.db.backends.postgresql import base


class DatabaseWrapper(base.DatabaseWrapper):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lender: Any = None
        """The pool, once this thread has had a connection of it the long way."""

    def connect(self) -> None:
        if self._lender is None:
            super().connect()
            self._lender = self.pool
            return
        # What Django's connect() does anew each time, as far as it is not the same each time.
        self.in_atomic_block = False
        self.savepoint_ids = []
        self.atomic_blocks = []
        self.needs_rollback = False
        self.closed_in_transaction = False
        self.errors_occurred = False
        self.health_check_done = True
        self.close_at = time.monotonic()  # CONN_MAX_AGE is 0 with a pool
        self.run_on_commit = []
        self.connection = self._borrow()
        if not self.connection.autocommit:  # it was given back in the middle of a transaction
            self.connection.autocommit = True
        self.autocommit = True

    def close(self) -> None:
        if self._lender is None or self.in_atomic_block:
            super().close()
        elif self.connection is not None:
            connection, self.connection = self.connection, None
            self.run_on_commit = []
            with self.wrap_database_errors:
                self._lender.putconn(connection)

    def get_new_connection(self, conn_params: Any) -> Any:
        connection = super().get_new_connection(conn_params)
        return connection if self.pool is None else self._living(connection)

    def _borrow(self) -> psycopg.Connection[Any]:
        return self._living(self._lender.getconn())

    def _living(self, connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
        """This one of the pool, or another when the server has closed it."""
        # At most as many as the pool holds: then it makes new ones, or raises.
        while _is_gone(connection):
            connection.close()
            self.pool.putconn(connection)
            connection = self.pool.getconn()
        return connection


def _is_gone(connection: psycopg.Connection[Any]) -> bool:
    """Nobody listens on these connections, so what can be read is the server's farewell."""
    if connection.closed:
        return True
    poll = select.poll()  # not select(): there may be thousands of files open
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))
