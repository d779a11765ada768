"""Send requests and report what became of them: `submit(request)`, and `step` gives the outcomes.

Runs on its caller's thread, over libcurl, with connections kept alive; `attend` helps while the caller is busy elsewhere.
Every socket goes to an address vetted at the moment of dialling; name, Host and certificate stay those of the URL. No
redirects, no proxies from the environment, no cookies. `delivery/push/names.py` finds what a name's addresses are,
`delivery/push/exchange.py` is one request and its answer.
"""
from __future__ import annotations

import logging
import math
import resource
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import pycurl

from consumers.addresses import Network
from delivery.push.exchange import Exchange
from delivery.push.names import Name, Names
from delivery.push.request import Headers, Outcome, Request

__all__ = ["Headers", "Outcome", "Request", "Transport"]

log = logging.getLogger(__name__)

MAX_FLIGHTS = 4096  # at a time, and at most half of the files the process may open
IDLE_EXCHANGES = 256
ATTEND_S = 0.05  # so long nobody steps before `attend` does

_READ, _WRITE = select.POLLIN, select.POLLOUT
_INTEREST = {pycurl.POLL_NONE: 0, pycurl.POLL_IN: _READ, pycurl.POLL_OUT: _WRITE, pycurl.POLL_INOUT: _READ | _WRITE}


class Transport:
    """Sends as many requests at a time as MAX_FLIGHTS allows; later ones wait, and their time begins when they are sent."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = allowed
        self._submitted: deque[Request] = deque()
        self._found: deque[Name] = deque()
        self._names = Names(self._name_found)
        self._flying: dict[Any, Exchange] = {}  # by curl's handle
        self._unresolved: set[Exchange] = set()
        self._overdue_at = math.inf  # when the first of them is
        self._outcomes: list[Outcome] = []
        self._idle: list[Exchange] = []
        self._wanted: set[int] = set()  # the files that curl waits for
        self._beside = -1
        self._beside_is_ready = False
        self._due = math.inf  # when curl wants to be called without any of them being ready
        self._lock = threading.Lock()  # held by whoever steps
        self._asleep = False
        self._nudged = False  # somebody wants `step` to return
        self._closing = threading.Event()
        self._max_flights = _max_flights()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._poll = _Poll()
        self._poll.register(self._woken.fileno(), _READ)
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, self._max_flights)

    def submit(self, request: Request) -> None:
        """To be sent by the next step."""
        self._submitted.append(request)

    def step(self, wait_s: float) -> list[Outcome]:
        """Send and receive until something is over, somebody wakes us, or `wait_s` have passed. Returns what is over."""
        return self.step_beside(-1, wait_s)[1]

    def step_beside(self, fd: int, wait_s: float) -> tuple[bool, list[Outcome]]:
        """As `step`, but also until there is something to read from a file of the caller's. Returns whether there is."""
        end = time.monotonic() + wait_s
        with self._lock:
            self._beside, self._beside_is_ready = fd, False
            if fd >= 0:
                self._register(fd, _READ)
            while not self._closing.is_set():
                self._advance(end)
                if self._outcomes or self._nudged or self._beside_is_ready or time.monotonic() >= end:
                    break
            self._beside, self._nudged = -1, False
            outcomes, self._outcomes = self._outcomes, []
            return self._beside_is_ready, outcomes

    def wake(self) -> None:
        """Let `step` return, now or when it is next called. From any thread."""
        self._nudged = True
        if self._asleep:
            self._asleep = False
            try:
                self._waker.send(b"\0")
            except OSError:
                pass  # enough is waiting to be read there, or it is closed

    def attend(self) -> None:
        """Keep time limits, and take answers in, while `step` is not called; the body of a thread, until `close`."""
        while not self._closing.wait(ATTEND_S):
            if self._lock.acquire(blocking=False):
                try:
                    if not self._closing.is_set():
                        self._advance(0.0)
                finally:
                    self._lock.release()

    def close(self) -> None:
        """Drop every request."""
        if self._closing.is_set():
            return
        self._closing.set()
        self.wake()
        with self._lock:
            self._names.close()
            for curl in self._flying:
                self._multi.remove_handle(curl)
            self._multi.close()
            for exchange in (*self._flying.values(), *self._unresolved, *self._idle):
                exchange.curl.close()
            self._flying, self._unresolved, self._idle = {}, set(), []
            self._waker.close()
            self._woken.close()

    # By whoever steps ------------------------------------------------------------------------------------------------

    def _advance(self, end: float) -> None:
        """Begin what was submitted, let curl do what it can, wait for more, at most until `end`."""
        try:
            while self._found:
                self._go_on(self._found.popleft())
            now = time.monotonic()
            while self._submitted and len(self._flying) + len(self._unresolved) < self._max_flights:
                request = self._submitted.popleft()
                try:
                    self._begin(request, now)
                except Exception as error:  # each request has an outcome, whatever this machine has run out of
                    log.exception("push transport: a request cannot be sent")
                    self._outcomes.append(Outcome(request.tag, None, f"cannot be sent: {error}"[:300], None, "", 0))
            if now >= self._due:
                self._due = math.inf
                self._act(pycurl.SOCKET_TIMEOUT, 0)
                self._gather()
            if now >= self._overdue_at:
                self._end_overdue(now)
            for fd, ready in self._wait(end, now):
                if fd in self._wanted:
                    # An error or a hang-up shows when it is read, or written to.
                    self._act(fd, (pycurl.CSELECT_IN if ready & ~_WRITE else 0) | (pycurl.CSELECT_OUT if ready & ~_READ else 0))
                elif fd == self._beside:
                    self._beside_is_ready = True
                elif fd == self._woken.fileno():
                    self._woken.recv(4096)
                else:
                    self._forget(fd)
            self._gather()
        except Exception:
            log.exception("push transport: a step failed")

    def _wait(self, end: float, now: float) -> list[tuple[int, int]]:
        self._asleep = True
        # Whoever adds something from here on sends a byte.
        if self._nudged or self._outcomes or self._found:
            end = now
        wait_s = min(end, self._due, self._overdue_at) - now
        ready: list[tuple[int, int]] = self._poll.poll(wait_s * _POLL_UNIT if wait_s > 0 else 0)
        self._asleep = False
        return ready

    def _begin(self, request: Request, now: float) -> None:
        exchange = self._idle.pop() if self._idle else Exchange(self._allowed)
        exchange.take(request, now)
        name = self._names.get(request.url, now)
        if name is None:
            self._send(exchange, "", now)
        elif name.is_usable(now):
            self._send(exchange, name.entry, now)
        else:
            name.waiting.append(exchange)
            self._unresolved.add(exchange)
            self._overdue_at = min(self._overdue_at, exchange.deadline)

    def _name_found(self, name: Name) -> None:
        self._found.append(name)
        self.wake()

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
            self._outcomes.append(exchange.unresolved(f"no answer within {exchange.request.timeout_s:g} s"))
        self._overdue_at = min((one.deadline for one in self._unresolved), default=math.inf)

    def _report(self, exchange: Exchange, outcome: Outcome) -> None:
        if len(self._idle) < IDLE_EXCHANGES:
            self._idle.append(exchange)
        self._outcomes.append(outcome)

    def _watch(self, what: int, fd: int, _multi: Any, _data: Any) -> None:
        """Curl says what it waits for on a socket.

        One that it no longer waits for stays registered: mostly the next request goes over it in a moment.
        """
        if what == pycurl.POLL_REMOVE:
            self._wanted.discard(fd)
        else:
            self._wanted.add(fd)
            self._register(fd, _INTEREST[what])

    def _register(self, fd: int, wanted: int) -> None:
        try:
            self._poll.modify(fd, wanted)
        except FileNotFoundError:
            self._poll.register(fd, wanted)

    def _forget(self, fd: int) -> None:
        """Nobody waits for it, and yet something happens there: an idle connection was closed."""
        try:
            self._poll.unregister(fd)
        except (OSError, KeyError):
            pass  # it was closed here too

    def _set_timer(self, wait_ms: int) -> None:
        if wait_ms > 0:
            self._due = time.monotonic() + wait_ms / 1000
        else:
            self._due = math.inf if wait_ms else 0.0  # -1: not at all


# Registering a file that is registered, or modifying one that is not, says the same with both. Only the unit of time differs.
_Poll, _POLL_UNIT = (select.epoll, 1) if hasattr(select, "epoll") else (select.poll, 1000)


def _max_flights() -> int:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_FLIGHTS if files == resource.RLIM_INFINITY else min(MAX_FLIGHTS, files // 2)
