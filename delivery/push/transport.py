"""Send requests and report what became of them: `submit(request)`, then an Outcome arrives in the queue given.

Threads over `requests`' adapter, with connections kept alive. Every socket goes to an address vetted at the moment of
dialling; name, Host and certificate stay those of the URL. No redirects, no proxies from the environment, no cookies.
"""
from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NewConnectionError
from urllib3.poolmanager import PoolManager
from urllib3.util import connection as urllib3_connection

from delivery.push.addresses import Network, is_allowed

MAX_THREADS = 256
KEEP_HOSTS, KEEP_CONNECTIONS = 256, 64
ANSWER_BYTES = 65_536  # of an answer's body; more is not read, and the connection not kept
SHOWN_CHARACTERS = 500
OVERDUE_S = 0.5


class AddressRefused(OSError):
    """The endpoint's name leads to no address that a push may reach."""

    def __init__(self, host: str, addresses: Sequence[str]) -> None:
        super().__init__(
            f"{host} is {', '.join(addresses) or 'nowhere'}: not a public address, and in no network of SEQUIN_ALLOWED_NETWORKS"
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One POST. `tag` is the caller's own; it comes back with the outcome."""

    url: str
    headers: dict[str, str]
    body: bytes
    timeout_s: float
    tag: Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request. `status` None: no answer came, `error` says why."""

    tag: Any
    status: int | None
    error: str | None
    retry_after: str | None
    response: str
    duration_ms: int

    @property
    def ok(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


@dataclass(slots=True)
class _Flight:
    request: Request
    began: float
    deadline: float
    socket: Any = None
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Transport:
    """Sends on as many threads as there are requests at a time, up to MAX_THREADS."""

    def __init__(self, outcomes: queue.SimpleQueue[Any], allowed: Sequence[Network]) -> None:
        self._outcomes = outcomes
        self._work: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._adapter = _VettingAdapter(allowed)
        self._flights: dict[int, _Flight] = {}
        self._threads = 0
        self._idle = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="push-deadlines", daemon=True).start()

    def submit(self, request: Request) -> None:
        """Begin to send; never blocks."""
        self._work.put(request)
        with self._lock:
            if self._idle < self._work.qsize() and self._threads < MAX_THREADS:
                self._threads += 1
                threading.Thread(target=self._serve, name="push", daemon=True).start()

    def close(self) -> None:
        """Drop every request and end the threads."""
        self._closing.set()
        for flight in list(self._flights.values()):
            _cut(flight)
        for _ in range(self._threads):
            self._work.put(None)
        self._adapter.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                self._idle += 1
            request = self._work.get()
            with self._lock:
                self._idle -= 1
            if request is None:
                return
            began = time.monotonic()
            flight = _Flight(request, began, began + request.timeout_s)
            self._flights[id(flight)] = flight
            _current.flight = flight
            outcome = self._send(flight)
            _current.flight = None
            self._flights.pop(id(flight), None)
            self._report(flight, outcome)

    def _send(self, flight: _Flight) -> Outcome:
        request = flight.request
        prepared = requests.PreparedRequest()
        prepared.method = "POST"
        prepared.url = request.url
        prepared.headers = requests.structures.CaseInsensitiveDict(request.headers)
        prepared.headers["Content-Length"] = str(len(request.body))
        prepared.body = request.body
        try:
            answer = self._adapter.send(prepared, stream=True, timeout=request.timeout_s, verify=True, proxies={})
        except requests.exceptions.Timeout:
            return self._outcome(flight, None, f"no answer within {request.timeout_s:g} s")
        except (requests.exceptions.RequestException, HTTPError, OSError, ValueError) as error:
            if time.monotonic() >= flight.deadline:
                return self._outcome(flight, None, f"no answer within {request.timeout_s:g} s")
            return self._outcome(flight, None, _reason(error))
        # The status line and headers decide; a body that breaks afterwards changes nothing.
        text = _read_some(answer)
        status = answer.status_code
        error_text = None if 200 <= status < 300 else _status_reason(status, answer.headers.get("location"))
        return self._outcome(flight, status, error_text, answer.headers.get("retry-after"), text)

    @staticmethod
    def _outcome(flight: _Flight, status: int | None, error: str | None, retry_after: str | None = None, response: str = "") -> Outcome:
        took = int((time.monotonic() - flight.began) * 1000)
        return Outcome(flight.request.tag, status, error, retry_after, response, took)

    def _report(self, flight: _Flight, outcome: Outcome) -> None:
        with flight.lock:
            if flight.over:
                return
            flight.over = True
        self._outcomes.put(outcome)

    def _watch(self) -> None:
        """End requests that take longer than they may although bytes keep dripping in."""
        while not self._closing.wait(0.2):
            now = time.monotonic()
            for flight in list(self._flights.values()):
                if now >= flight.deadline + OVERDUE_S and not flight.over:
                    self._report(flight, self._outcome(flight, None, f"no complete answer within {flight.request.timeout_s:g} s"))
                    _cut(flight)


_current = threading.local()


def _cut(flight: _Flight) -> None:
    found = flight.socket
    if found is not None:
        try:
            found.shutdown(socket.SHUT_RDWR)
        except (OSError, AttributeError):
            pass


def _read_some(answer: requests.Response) -> str:
    try:
        body = answer.raw.read(ANSWER_BYTES, decode_content=False)
        if answer.raw.read(1, decode_content=False):
            answer.raw.close()
        else:
            answer.raw.release_conn()
    except (HTTPError, OSError, ValueError):
        answer.raw.close()
        return ""
    return body[: SHOWN_CHARACTERS * 4].decode("utf-8", "replace")[:SHOWN_CHARACTERS]


def _status_reason(status: int, location: str | None) -> str:
    if 300 <= status < 400:
        return f"answered {status}, a redirect{f' to {location[:200]}' if location else ''}: redirects are not followed, put the final URL in"
    return f"answered {status}"


def _reason(error: BaseException) -> str:
    """The innermost cause as one line: what a person can act on."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "reason", None) or error.__cause__ or error.__context__
        if isinstance(error, AddressRefused) or not isinstance(inner, BaseException):
            break
        error = inner
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved: {error.strerror or error}"
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return (text or type(error).__name__)[:300]


class _Vetted:
    """Mixed into urllib3's connections: resolve, vet, and dial exactly what was vetted."""

    allowed: Sequence[Network] = ()

    def _new_conn(self: Any) -> socket.socket:
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, urllib3_connection.allowed_gai_family(), socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise NewConnectionError(self, str(error)) from error
        permitted = [entry for entry in found if is_allowed(str(entry[4][0]), self.allowed)]
        if not permitted:
            refused = AddressRefused(self._dns_host, sorted({str(entry[4][0]) for entry in found}))
            raise NewConnectionError(self, str(refused)) from refused
        failure: OSError | None = None
        for family, kind, protocol, _, address in permitted:
            dialled = None
            try:
                dialled = socket.socket(family, kind, protocol)
                dialled.settimeout(self.timeout)
                dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _note_socket(dialled)
                dialled.connect(address)
                return dialled
            except OSError as error:
                failure = error
                if dialled is not None:
                    dialled.close()
        assert failure is not None
        raise NewConnectionError(self, str(failure)) from failure

    def request(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.sock is not None:
            _note_socket(self.sock)
        return super().request(*arguments, **options)  # type: ignore[misc]


def _note_socket(found: Any) -> None:
    flight = getattr(_current, "flight", None)
    if flight is not None:
        flight.socket = found


class _VettingAdapter(HTTPAdapter):
    """requests' adapter on pools whose connections vet what they dial."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        plain = type("VettedHTTPConnection", (_Vetted, HTTPConnection), {"allowed": allowed})
        secure = type("VettedHTTPSConnection", (_Vetted, HTTPSConnection), {"allowed": allowed})
        self._pools = {
            "http": type("VettedHTTPPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("VettedHTTPSPool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
        }
        super().__init__(pool_connections=KEEP_HOSTS, pool_maxsize=KEEP_CONNECTIONS, max_retries=0)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        self.poolmanager = PoolManager(num_pools=connections, maxsize=maxsize, block=block, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools
