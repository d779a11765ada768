"""Send requests and report what became of them: `submit(request)`, then an Outcome arrives in the queue given.

One thread drives all requests over libcurl, with connections kept alive. Every socket goes to an address vetted at the
moment of dialling; name, Host and certificate stay those of the URL. No redirects, no proxies from the environment, no
cookies. `delivery/push/names.py` finds what a name's addresses are, `delivery/push/exchange.py` is one request and its answer.
"""
from __future__ import annotations

import logging
import math
import queue
import resource
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import pycurl

from consumers.addresses import Network
from delivery.push.exchange import Exchange, Outcome, Request
from delivery.push.names import Name, Names

__all__ = ["Outcome", "Request", "Transport"]

log = logging.getLogger(__name__)

MAX_FLIGHTS = 4096  # at a time, and at most half of the files the process may open
IDLE_EXCHANGES = 256
CLOSE_S = 1.0

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_INTEREST = {pycurl.POLL_IN: _READ, pycurl.POLL_OUT: _WRITE, pycurl.POLL_INOUT: _READ | _WRITE}
_READY = {_READ: pycurl.CSELECT_IN, _WRITE: pycurl.CSELECT_OUT, _READ | _WRITE: pycurl.CSELECT_IN | pycurl.CSELECT_OUT}


class Transport:
    """Sends as many requests at a time as MAX_FLIGHTS allows; later ones wait, and their time begins when they are sent."""

    def __init__(self, outcomes: queue.SimpleQueue[Any], allowed: Sequence[Network]) -> None:
        self._outcomes = outcomes
        self._allowed = allowed
        self._submitted: deque[Request] = deque()
        self._found: deque[Name] = deque()
        self._names = Names(self._name_found)
        self._flying: dict[Any, Exchange] = {}  # by curl's handle
        self._unresolved: set[Exchange] = set()
        self._overdue_at = math.inf  # when the first of them is
        self._idle: list[Exchange] = []
        self._interest: dict[int, int] = {}  # by file number: what curl waits for
        self._due = math.inf  # when curl wants to be called without any socket being ready
        self._asleep = False
        self._closing = False
        self._max_flights = _max_flights()
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, _READ)
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, self._max_flights)
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Begin to send; never blocks."""
        self._submitted.append(request)
        self._wake()

    def close(self) -> None:
        """Drop every request and end the thread."""
        self._closing = True
        self._asleep = True
        self._wake()
        self._thread.join(CLOSE_S)

    def _wake(self) -> None:
        if self._asleep:
            self._asleep = False
            try:
                self._waker.send(b"\0")
            except OSError:
                pass  # enough is waiting to be read there, or it is closed

    def _name_found(self, name: Name) -> None:
        self._found.append(name)
        self._wake()

    # On the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    self._step()
                except Exception:
                    log.exception("push transport: a step failed")
        finally:
            self._shut()

    def _step(self) -> None:
        """Begin what was submitted, let curl do what it can, report what is over, wait."""
        while self._found:
            self._go_on(self._found.popleft())
        while self._submitted and self._has_room():
            self._begin(self._submitted.popleft())
        now = time.monotonic()
        if now >= self._due:
            self._due = math.inf
            self._act(pycurl.SOCKET_TIMEOUT, 0)
        self._gather()
        if now >= self._overdue_at:
            self._end_overdue(now)
        for key, mask in self._wait(now):
            if key.fd in self._interest:
                self._act(key.fd, _READY[mask])
            elif key.fileobj is self._woken:
                self._woken.recv(4096)
        self._gather()

    def _wait(self, now: float) -> list[tuple[selectors.SelectorKey, int]]:
        due = min(self._due, self._overdue_at)
        self._asleep = True
        # Whoever adds something from here on sends a byte.
        if self._closing or self._found or (self._submitted and self._has_room()):
            due = now
        ready = self._selector.select(max(0.0, due - now) if due < math.inf else None)
        self._asleep = False
        return ready

    def _has_room(self) -> bool:
        return len(self._flying) + len(self._unresolved) < self._max_flights

    def _begin(self, request: Request) -> None:
        exchange = self._idle.pop() if self._idle else Exchange(self._allowed)
        now = time.monotonic()
        exchange.take(request, now)
        name = self._names.get(request.url, now)
        if name is None or name.is_usable(now):
            self._send(exchange, name.entry if name else "", now)
        else:
            name.waiting.append(exchange)
            self._unresolved.add(exchange)
            self._overdue_at = min(self._overdue_at, exchange.deadline)

    def _go_on(self, name: Name) -> None:
        """A name was looked up: send what waited for it."""
        now = time.monotonic()
        name.looking = False
        if name.entry:
            name.found_at = now
        waiting, name.waiting = name.waiting, []
        for exchange in waiting:
            if exchange not in self._unresolved:
                continue  # it was overdue
            self._unresolved.discard(exchange)
            if name.entry:
                self._send(exchange, name.entry, now)
            else:
                self._report(exchange, exchange.unresolved(name.error))

    def _send(self, exchange: Exchange, entry: str, now: float) -> None:
        try:
            exchange.prepare(entry, now)
            self._multi.add_handle(exchange.curl)
        except (pycurl.error, ValueError, TypeError) as error:
            self._report(exchange, exchange.failed(str(error)))
        else:
            self._flying[exchange.curl] = exchange

    def _act(self, fd: int, ready: int) -> None:
        try:
            self._multi.socket_action(fd, ready)
        except pycurl.error as error:
            log.warning("push transport: %s", error)

    def _gather(self) -> None:
        left = 1
        while left:
            left, done, failed = self._multi.info_read()
            for curl in done:
                self._end(curl, 0, "")
            for curl, code, text in failed:
                self._end(curl, code, text)

    def _end(self, curl: Any, code: int, text: str) -> None:
        exchange = self._flying.pop(curl)
        self._multi.remove_handle(curl)
        self._report(exchange, exchange.outcome(code, text))

    def _end_overdue(self, now: float) -> None:
        for exchange in [one for one in self._unresolved if now >= one.deadline]:
            self._unresolved.discard(exchange)
            self._outcomes.put(exchange.unresolved(f"no answer within {exchange.request.timeout_s:g} s"))
        self._overdue_at = min((one.deadline for one in self._unresolved), default=math.inf)

    def _report(self, exchange: Exchange, outcome: Outcome) -> None:
        if len(self._idle) < IDLE_EXCHANGES:
            self._idle.append(exchange)
        self._outcomes.put(outcome)

    def _watch(self, what: int, fd: int, multi: Any, _data: Any) -> None:
        """Curl says what it waits for on a socket."""
        wanted = _INTEREST.get(what, 0)
        before = self._interest.get(fd, 0)
        if wanted == before:
            return
        if not wanted:
            del self._interest[fd]
            self._selector.unregister(fd)
        else:
            self._interest[fd] = wanted
            (self._selector.modify if before else self._selector.register)(fd, wanted)

    def _set_timer(self, wait_ms: int) -> None:
        self._due = math.inf if wait_ms < 0 else time.monotonic() + wait_ms / 1000

    def _shut(self) -> None:
        self._names.close()
        for curl in self._flying:
            self._multi.remove_handle(curl)
        self._multi.close()
        for exchange in (*self._flying.values(), *self._unresolved, *self._idle):
            exchange.curl.close()
        self._selector.close()
        self._waker.close()
        self._woken.close()


def _max_flights() -> int:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_FLIGHTS if files == resource.RLIM_INFINITY else min(MAX_FLIGHTS, files // 2)
