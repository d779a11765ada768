"""Django's Postgres backend, but its pool hands out no dead connection without asking the server each time.

Django's own health check is a query before each request: half of what a request of the pull API costs. A connection that the
server has closed is known by its socket: something is there to be read.
"""
from __future__ import annotations

import select
from typing import Any

import psycopg
from django.db.backends.postgresql import base


class DatabaseWrapper(base.DatabaseWrapper):
    def get_new_connection(self, conn_params: Any) -> Any:
        connection = super().get_new_connection(conn_params)
        # At most as many as the pool holds: then it makes new ones, or raises.
        while self.pool is not None and _is_gone(connection):
            connection.close()
            self.pool.putconn(connection)
            connection = super().get_new_connection(conn_params)
        return connection


def _is_gone(connection: psycopg.Connection[Any]) -> bool:
    """Nobody listens on these connections, so what can be read is the server's farewell."""
    if connection.closed:
        return True
    poll = select.poll()  # not select(): there may be thousands of files open
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))
