"""Django's Postgres backend, lending connections: what one thread closes is kept open and is the next that any thread gets.

The web server's threads are many and its connections few. Django's own way, psycopg's pool, costs a request of the pull API
a good part of what it costs in all: it takes all its connections in turn, so that the server's processes have nothing at hand
when theirs comes; Django makes each ready anew as if it had just been opened; and asks it whether it lives, or else hands out
dead ones. Here the last one given back is lent first. One that the server has closed is known by its socket: something is
there to be read.
"""
from __future__ import annotations

import select
import time
from collections import deque
from typing import Any, NamedTuple

import psycopg
from django.conf import settings
from django.db.backends.postgresql import base
from psycopg.pq import TransactionStatus

from consumers.queueing import FairSemaphore

WITHIN_S = 10  # a connection becomes free, or there is none
UNUSED_S, OLD_S = 600, 3600  # then it is closed; the server's process for it has grown by then


class Kept(NamedTuple):
    """An open connection that nobody uses."""

    connection: psycopg.Connection[Any]
    opened_at: float
    since: float


_kept: deque[Kept] = deque()  # the last one given back at the right
_places = FairSemaphore(settings.WEB_POOL_SIZE)


class DatabaseWrapper(base.DatabaseWrapper):
    _opened_at = 0.0

    def connect(self) -> None:
        if not _places.acquire(WITHIN_S):
            raise psycopg.OperationalError(f"no connection became free within {WITHIN_S} s")
        try:
            if not self._borrow():
                super().connect()
                self._opened_at = time.monotonic()
        except BaseException:
            connection, self.connection = self.connection, None
            if connection is not None:
                connection.close()
            _places.release()
            raise

    def close(self) -> None:
        if self.connection is None:
            return
        if self.in_atomic_block:
            self.closed_in_transaction = self.needs_rollback = True
        connection, self.connection = self.connection, None
        self.run_on_commit = []
        try:
            now = time.monotonic()
            idle = connection.pgconn.transaction_status == TransactionStatus.IDLE  # not of a closed or broken one
            if idle and connection.autocommit and now - self._opened_at < OLD_S:
                _kept.append(Kept(connection, self._opened_at, now))
            else:
                connection.close()
        finally:
            _places.release()
        _close_unused(now)

    def _borrow(self) -> bool:
        """Take one that is kept. What Django's connect() does with a new one was done, but for the state of this wrapper."""
        while True:
            try:
                kept = _kept.pop()
            except IndexError:
                return False
            if not _is_gone(kept.connection):
                break
            kept.connection.close()
        self.in_atomic_block = False
        self.savepoint_ids = []
        self.atomic_blocks = []
        self.needs_rollback = False
        self.closed_in_transaction = False
        self.errors_occurred = False
        self.health_check_done = True
        self.close_at = kept.since  # long ago: at the end of a request it is closed, which here means given back
        self.run_on_commit = []
        self.autocommit = True
        self.connection, self._opened_at = kept.connection, kept.opened_at
        return True


def _is_gone(connection: psycopg.Connection[Any]) -> bool:
    """Nobody listens on these connections, so what can be read is the server's farewell."""
    if connection.closed:
        return True
    poll = select.poll()  # not select(): there may be thousands of files open
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))


def _close_unused(now: float) -> None:
    """The one at the left is the longest unused. Two threads may look at it at once, and one of them finds another."""
    try:
        if now - _kept[0].since < UNUSED_S:
            return
        oldest = _kept.popleft()
    except IndexError:
        return
    if now - oldest.since < UNUSED_S:
        _kept.appendleft(oldest)
    else:
        oldest.connection.close()
