"""Hold long polls, and wake as many as there is work for: one thread per process listens for all of them.

A waiter is a parked thread without a database connection. Whoever is woken and may leave more behind wakes the next, so a
notice costs as many claims as there are batches, not as many as there are waiters. A lost notice costs a second: the sweep
sees that the log has grown, or that something fell due. When the server stops, all polls are answered at once with what
they have: nothing.
"""
from __future__ import annotations

import json
import logging
import signal
import socket
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any
from uuid import UUID

import psycopg
from django.conf import settings
from django.db import DatabaseError, close_old_connections, connection

from consumers import tokens
from consumers.api.errors import TooMany
from consumers.store.connection import store_connection, why_away
from consumers.store.hot import keep_small
from consumers.store.interest import concerns
from delivery.pull import directory
from delivery.pull.directory import Receiver

log = logging.getLogger(__name__)

SWEEP_S = 1.0
TICK_S = 0.25
CHANNELS = ("sequin_log", "sequin_consumer", "sequin_config")
# A store that vanished without a word is noticed by the next sweep within this time; on Unix sockets it means nothing.
DEAD_AFTER_MS = 10_000
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Which of these consumers have a lease that ended or a parked message that fell due.
_DUE_SQL = """
    SELECT c FROM unnest(%s::uuid[]) c
    WHERE EXISTS (SELECT FROM leases l WHERE l.consumer = c AND l.until <= clock_timestamp() AND l.id >= (
              SELECT p.lease_floor FROM consumer_position p WHERE p.consumer = c ORDER BY p.version DESC LIMIT 1))
       OR EXISTS (SELECT FROM parked p WHERE p.consumer = c AND p.due_at <= clock_timestamp())
"""


class Waiter:
    """One long poll."""

    __slots__ = ("event", "receiver")

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.event = threading.Event()


class WaitingRoom:
    """All long polls of this process, by consumer, in the order they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[UUID, OrderedDict[Waiter, None]] = defaultdict(OrderedDict)
        self._receivers: dict[UUID, Receiver] = {}  # of those that wait, as they were last seen
        self._due: dict[UUID, float] = {}
        self._count = 0
        self._listener: threading.Thread | None = None
        self._stopping = threading.Event()

    @property
    def is_closed(self) -> bool:
        return self._stopping.is_set()

    def enter(self, receiver: Receiver) -> Waiter:
        """Begin to wait. Claim again after this: a notice may have come before. Raises TooMany."""
        self.listen()
        waiter = Waiter(receiver)
        with self._lock:
            if self._count >= settings.SEQUIN_MAX_WAITERS:
                raise TooMany(f"{self._count} long polls are waiting already (SEQUIN_MAX_WAITERS)")
            self._count += 1
            self._waiters[receiver.id][waiter] = None
        self.know(receiver)
        return waiter

    def know(self, receiver: Receiver) -> None:
        """The consumer was looked up: it may have been edited since its polls began, and wait for other tables."""
        with self._lock:
            known = self._receivers.get(receiver.id)
            if receiver.id in self._waiters and (known is None or known.version < receiver.version):
                self._receivers[receiver.id] = receiver

    def leave(self, waiter: Waiter, *, more: bool) -> None:
        """Stop waiting. `more`: there may be work for another one; so there may when it was woken, up to this moment."""
        consumer = waiter.receiver.id
        with self._lock:
            more = more or waiter.event.is_set()
            self._count -= 1
            queue = self._waiters[consumer]
            queue.pop(waiter, None)
            if not queue:
                del self._waiters[consumer]
                self._receivers.pop(consumer, None)
                self._due.pop(consumer, None)
        if more:
            self.wake(consumer)

    def rearm(self, waiter: Waiter, next_due_ms: int | None) -> None:
        """Nothing was there: note when something falls due."""
        if next_due_ms is None:
            return
        due = time.monotonic() + next_due_ms / 1000
        with self._lock:
            known = self._due.get(waiter.receiver.id)
            if known is None or due < known:
                self._due[waiter.receiver.id] = due

    def wake(self, consumer: UUID) -> None:
        """Wake the longest waiting poll of this consumer that is not awake yet."""
        with self._lock:
            for waiter in self._waiters.get(consumer, ()):
                if not waiter.event.is_set():
                    waiter.event.set()
                    return

    def close(self) -> None:
        """The server stops: let every poll end now, and later ones at once."""
        with self._lock:
            self._stopping.set()
            for queue in self._waiters.values():
                for waiter in queue:
                    waiter.event.set()

    def listen(self) -> None:
        """Start the listener, once per process."""
        if self.is_closed or (self._listener is not None and self._listener.is_alive()):
            return
        with self._lock:
            if self._listener is None or not self._listener.is_alive():
                self._listener = threading.Thread(target=self._run, name="pull-listener", daemon=True)
                self._listener.start()
                threading.Thread(target=keep_small, name="housekeeping", args=(self._stopping,), daemon=True).start()

    def _run(self) -> None:
        pause = 0.1
        while not self.is_closed:
            try:
                with store_connection(application_name="sequin pull listener", tcp_user_timeout=DEAD_AFTER_MS) as conn:
                    for channel in CHANNELS:
                        conn.execute(f"LISTEN {channel}")
                    # What changed while nobody listened.
                    directory.forget()
                    tokens.forget()
                    self._wake_all()
                    pause = 0.1
                    self._serve(conn)
            except (psycopg.Error, DatabaseError, OSError) as error:
                log.warning("pull listener lost the store: %s", why_away(error))
            except Exception:
                # Without this thread nobody is woken: whatever it was, begin again.
                log.exception("pull listener failed")
            finally:
                close_old_connections()
            time.sleep(pause)
            pause = min(pause * 2, 2.0)

    def _serve(self, conn: psycopg.Connection[Any]) -> None:
        seen: dict[UUID, int] = {}
        swept = time.monotonic()
        while not self.is_closed:
            self._hear_all(conn.notifies(timeout=TICK_S, stop_after=1))
            now = time.monotonic()
            self._wake_due(now)
            if now - swept >= SWEEP_S:
                swept = now
                self._sweep(conn, seen)

    def _hear_all(self, notices: Iterable[psycopg.Notify]) -> None:
        for notice in notices:
            try:
                self._hear(notice.channel, notice.payload)
            except (ValueError, KeyError, TypeError, AttributeError):
                log.warning("not a notice of ours: channel=%s payload=%.100r", notice.channel, notice.payload)

    def _hear(self, channel: str, payload: str) -> None:
        if channel == "sequin_config":
            directory.forget()
            tokens.forget()
            kind, _, name = payload.partition(":")
            if kind == "consumer":
                self.wake(UUID(name))
        elif channel == "sequin_consumer":
            self.wake(UUID(payload))
        else:
            notice = json.loads(payload)
            self._wake_source(UUID(notice["source"]), notice["relations"])

    def _wake_source(self, source: UUID, relations: list[int]) -> None:
        for receiver in self._known():
            if receiver.source_id == source and concerns(relations, receiver.tables):
                self.wake(receiver.id)
        connection.close()  # back to the pool

    def _known(self) -> list[Receiver]:
        with self._lock:
            return list(self._receivers.values())

    def _wake_due(self, now: float) -> None:
        with self._lock:
            due = [consumer for consumer, at in self._due.items() if at <= now]
            for consumer in due:
                del self._due[consumer]
        for consumer in due:
            self.wake(consumer)

    def _wake_all(self) -> None:
        for receiver in self._known():
            self.wake(receiver.id)

    def _sweep(self, conn: psycopg.Connection[Any], seen: dict[UUID, int]) -> None:
        found = conn.execute("SELECT source, stored_lsn + part_changes FROM capture_progress").fetchall()
        # What was changed before that was told before: who may have it no more gets nothing of it.
        self._hear_all(conn.notifies(timeout=0))
        for source, stored in found:
            if seen.get(source) != stored:
                self._wake_source(source, [])
            seen[source] = stored
        with self._lock:
            waiting = list(self._waiters)
        if waiting:
            for (consumer,) in conn.execute(_DUE_SQL, [waiting]).fetchall():
                self.wake(consumer)


room = WaitingRoom()


def close_on_stop_signal() -> None:
    """Close the room as soon as this process is told to stop. Outside the main thread, where no signal arrives, nothing.

    The web server sets its own signal handlers later and then waits for the requests that are under way, long polls
    among them. Python writes a signal's number to the wakeup descriptor whoever handles it, so a thread can watch.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, writer), name="pull-stop-watch", daemon=True).start()


def _watch(reader: socket.socket, writer: socket.socket) -> None:  # `writer` is kept open by being passed
    while numbers := reader.recv(64):
        if any(number in STOP_SIGNALS for number in numbers):
            room.close()
