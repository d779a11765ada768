"""The transport on real sockets of this machine: what counts as an answer, what may be dialled, what holds up nobody."""
from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pycurl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from delivery.push import exchange, names, transport
from delivery.push.transport import Headers, Outcome, Request, Transport
from tests.conftest import wait_until
from tests.push.endpoint import Endpoint, status

LOOPBACK = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER: on, 0 s


class Sender:
    """A transport and what it has reported so far."""

    def __init__(self, allowed: Any = LOOPBACK) -> None:
        self.outcomes: list[Outcome] = []
        self.transport = Transport(allowed)

    def submit(self, url: str, *, body: bytes = b"{}", timeout_s: float = 60.0, tag: Any = None, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.transport.submit(Request(url, Headers({"Content-Type": "application/json", **named}), body, timeout_s, tag or url))

    def step(self, wait_s: float = 0.0) -> None:
        self.outcomes += self.transport.step(wait_s)

    def get(self, timeout: float = 20) -> Outcome:
        end = time.monotonic() + timeout
        while not self.outcomes:
            assert time.monotonic() < end, "no outcome"
            self.step(end - time.monotonic())
        return self.outcomes.pop(0)

    def until(self, happened: Callable[[], bool], timeout: float, what: str) -> None:
        """Step until something has happened at the other end."""

        def stepped() -> bool:
            self.step()
            return happened()

        wait_until(stepped, timeout, what)

    def post(self, url: str, **how: Any) -> Outcome:
        self.submit(url, **how)
        return self.get()


@pytest.fixture
def sender() -> Iterator[Callable[..., Sender]]:
    made: list[Sender] = []

    def make(*arguments: Any) -> Sender:
        made.append(Sender(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.transport.close()


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Endpoint]]:
    made: list[Endpoint] = []

    def make(*arguments: Any) -> Endpoint:
        made.append(Endpoint(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Wire:
    """A listener that treats each request on a connection as the test says; keeps the connections it got."""

    def __init__(self, answer: Callable[[socket.socket], Any], tls: ssl.SSLContext | None = None) -> None:
        self.answer, self.tls = answer, tls
        self.got: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self.listener.accept()
            except OSError:
                return
            self.got.append(conn)
            if self.answer is not hold:
                threading.Thread(target=self._serve, args=(conn,), daemon=True).start()

    def _serve(self, conn: socket.socket) -> None:
        try:
            served = self.tls.wrap_socket(conn, server_side=True) if self.tls else conn
            while read_request(served):
                if self.answer(served) == "close":
                    served.close()
                    return
        except OSError:
            conn.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for conn in self.got:
            conn.close()


def hold(conn: socket.socket) -> None:
    """Never answers, and no thread is spent on it."""


def sends(data: bytes, *, reset: bool = False, close: bool = False) -> Callable[[socket.socket], Any]:
    def answer(conn: socket.socket) -> Any:
        conn.sendall(data)
        if reset:
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return "close" if reset or close else None

    return answer


def read_request(conn: socket.socket) -> bytes:
    held = b""
    while b"\r\n\r\n" not in held:
        more = conn.recv(65_536)
        if not more:
            return b""
        held += more
    head, _, body = held.partition(b"\r\n\r\n")
    length = int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split(b":")[1])
    while len(body) < length:
        body += conn.recv(65_536)
    return head


@pytest.fixture
def wire() -> Iterator[Callable[..., Wire]]:
    made: list[Wire] = []

    def make(*arguments: Any, **options: Any) -> Wire:
        made.append(Wire(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names below example and their addresses; a callable is called. Other names are the machine's."""
    known: dict[str, Any] = {}
    really = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        if "example" not in host:
            return really(host, port, *arguments, **options)
        found = known.get(host, [])
        addresses = found() if callable(found) else found
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(names.socket, "getaddrinfo", getaddrinfo)
    return known


# What counts as an answer ----------------------------------------------------------------------------------------------


def test_an_answer_is_reported_with_its_beginning(sender: Any, wire: Any) -> None:
    where = wire(sends(b"HTTP/1.1 201 Created\r\nContent-Length: 600\r\n\r\n" + "ü".encode() * 300))
    outcome = sender().post(where.url, tag=("mine", 7))
    assert (outcome.tag, outcome.status, outcome.ok, outcome.error) == (("mine", 7), 201, True, None)
    assert outcome.response == "ü" * 300 and outcome.duration_ms >= 0


def test_no_more_than_500_characters_are_kept_and_bad_utf8_is_replaced(sender: Any, wire: Any) -> None:
    where = wire(sends(b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + b"\xff" + b"x" * 2999))
    assert sender().post(where.url).response == "\ufffd" + "x" * 499


def test_the_request_is_what_was_asked_for(sender: Any, endpoint: Any) -> None:
    where = endpoint()
    sender().post(where.url + "/hook?a=b%20c", body=b"\0\xff" * 700_000, x_team="shöp", x_empty="", authorization="Bearer s")
    (got,) = where.got
    assert got.path == "/hook?a=b%20c" and got.body == b"\0\xff" * 700_000
    assert got.headers["x-team"] == "shöp" and got.headers["x-empty"] == "" and got.headers["authorization"] == "Bearer s"
    assert got.headers["host"] == where.url.removeprefix("http://") and got.headers["content-type"] == "application/json"
    assert not {"expect", "cookie", "transfer-encoding", "accept-encoding"} & got.headers.keys()


@pytest.mark.parametrize("code", [400, 404, 410, 500, 502])
def test_another_status_is_a_failure_that_says_it(sender: Any, endpoint: Any, code: int) -> None:
    outcome = sender().post(endpoint(status(code)).url)
    assert (outcome.status, outcome.ok, outcome.error) == (code, False, f"answered {code}")


def test_retry_after_is_reported_as_it_came(sender: Any, endpoint: Any) -> None:
    asked = "Wed, 25 Nov 2026 07:28:00 GMT"
    assert sender().post(endpoint(status(503, Retry_After=asked)).url).retry_after == asked


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(sender: Any, endpoint: Any, code: int) -> None:
    elsewhere = endpoint()
    outcome = sender().post(endpoint(status(code, Location=elsewhere.url)).url)
    assert outcome.status == code and elsewhere.url in outcome.error and "redirects are not followed" in outcome.error
    assert elsewhere.got == []


def test_cookies_are_not_kept(sender: Any, endpoint: Any) -> None:
    where, one = endpoint(status(200, Set_Cookie="a=b")), sender()
    one.post(where.url)
    one.post(where.url)
    assert len(where.got) == 2 and "cookie" not in where.got[1].headers


@pytest.mark.parametrize(
    "rest",
    [
        sends(b"half", reset=True),
        sends(b"half", close=True),
        sends(b"half"),  # and then nothing, until the timeout
        sends(b"", reset=True),
    ],
)
def test_what_happens_after_the_headers_changes_nothing(sender: Any, wire: Any, rest: Any) -> None:
    def answer(conn: socket.socket) -> Any:
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        return rest(conn)

    outcome = sender().post(wire(answer).url, timeout_s=5.0)
    assert (outcome.status, outcome.error) == (200, None)


def test_a_broken_chunk_changes_nothing(sender: Any, wire: Any) -> None:
    where = wire(sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", close=True))
    assert sender().post(where.url).status == 200


@pytest.mark.parametrize(
    "head, said",
    [
        (b"", "closed without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", ""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n", ""),
        (b"HTTP/1.1 100 Continue\r\n\r\n", ""),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "not HTTP"),
    ],
)
@pytest.mark.parametrize("reset", [True, False])
def test_without_a_whole_head_there_is_no_answer(sender: Any, wire: Any, head: bytes, said: str, reset: bool) -> None:
    outcome = sender().post(wire(sends(head, reset=reset, close=True)).url)
    assert outcome.status is None and outcome.error and "\n" not in outcome.error
    assert reset or said in outcome.error


def test_interim_answers_are_passed_over(sender: Any, wire: Any) -> None:
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\nRetry-After: 9\r\n\r\n"
    assert sender().post(wire(sends(early + PLAIN)).url).status == 200
    assert sender().post(wire(sends(early + b"HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\n\r\n")).url).status == 409


@pytest.mark.parametrize("manner", ["hang", "drip"])
def test_an_endpoint_that_never_answers_is_ended_at_the_timeout(sender: Any, endpoint: Any, manner: str) -> None:
    where = endpoint()
    where.answer = getattr(where, manner)
    outcome = sender().post(where.url, timeout_s=0.5)
    assert (outcome.status, outcome.error) == (None, "no answer within 0.5 s")
    assert 450 <= outcome.duration_ms < 20_000


def test_a_huge_answer_is_cut(sender: Any, wire: Any) -> None:
    cut = threading.Event()

    def answer(conn: socket.socket) -> Any:
        conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                conn.sendall(b"x" * 65_536)
        except OSError:
            cut.set()
        return "close"

    outcome = sender().post(wire(answer).url, timeout_s=60)
    assert outcome.status == 200 and outcome.response == "x" * 500
    assert cut.wait(60)


def test_an_endless_head_is_no_answer(sender: Any, wire: Any) -> None:
    def answer(conn: socket.socket) -> Any:
        conn.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            conn.sendall(b"X-More: " + b"x" * 1000 + b"\r\n")

    outcome = sender().post(wire(answer).url, timeout_s=60)
    assert outcome.status is None and "headers are longer than 65536 bytes" in outcome.error


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n" + (b"X-More: " + b"x" * 1000 + b"\r\n") * 70 + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * exchange.HEAD_LINES + b"Content-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * exchange.HEAD_LINES + PLAIN,
    ],
)
def test_a_whole_head_that_is_too_long_is_no_answer(sender: Any, wire: Any, head: bytes) -> None:
    outcome = sender().post(wire(sends(head)).url)
    assert outcome.status is None and "headers are longer than 65536 bytes" in outcome.error


def test_trailers_change_nothing(sender: Any, wire: Any) -> None:
    rest = b"Transfer-Encoding: chunked\r\nRetry-After: 7\r\n\r\n2\r\nok\r\n0\r\nRetry-After: 9\r\nLocation: /x\r\n\r\n"
    good = sender().post(wire(sends(b"HTTP/1.1 200 OK\r\n" + rest)).url)
    assert (good.status, good.response) == (200, "ok")
    bad = sender().post(wire(sends(b"HTTP/1.1 503 Busy\r\n" + rest)).url)
    assert (bad.status, bad.retry_after, bad.error) == (503, "7", "answered 503")


def test_a_refused_connection_says_so(sender: Any, free_port: int) -> None:
    assert sender().post(f"http://127.0.0.1:{free_port}/").error == "Connection refused"


@pytest.mark.parametrize("value", ["s3cret\r\nx: y", "s3cret€", "s3cret\0"])
def test_a_header_that_cannot_be_sent_is_an_outcome_without_its_value(sender: Any, endpoint: Any, value: str) -> None:
    where, one = endpoint(), sender()
    outcome = one.post(where.url, authorization=value)
    assert outcome.status is None and outcome.error.startswith("a header is not") and "s3cret" not in outcome.error
    assert where.got == [] and one.post(where.url).ok


def test_what_this_machine_cannot_send_has_an_outcome_too(sender: Any, endpoint: Any, monkeypatch: Any) -> None:
    where, told, sends = endpoint(), [], sender()

    def runs_out(*_: Any) -> Any:
        told.append(1)
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(names.Names, "get", runs_out)
        sends.submit(where.url, tag=1)
        assert sends.get()[:3] == (1, None, "cannot be sent: can't start new thread")
    sends.submit(where.url, tag=2)
    assert sends.get().ok and told == [1]


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "file:///etc/passwd", "gopher://127.0.0.1/", "http://", "http://a b/", ""])
def test_only_http_and_https_are_spoken(sender: Any, url: str) -> None:
    outcome = sender().post(url)
    assert outcome.status is None and outcome.error


# Connections ---------------------------------------------------------------------------------------------------------------


def test_connections_are_kept(sender: Any, wire: Any) -> None:
    where, one = wire(sends(PLAIN)), sender()
    assert all(one.post(where.url).ok for _ in range(20))
    assert len(where.got) == 1


def test_children_inherit_no_connection(sender: Any, wire: Any) -> None:
    before = inheritable()
    where, one = wire(sends(PLAIN)), sender()
    assert one.post(where.url).ok
    assert inheritable() == before


def inheritable() -> set[int]:
    found = set()
    for name in os.listdir("/dev/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.add(int(name))
        except OSError:
            pass  # the one that listed them
    return found


def test_more_requests_than_files_wait_for_their_turn(sender: Any, wire: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(transport, "MAX_FLIGHTS", 3)
    slow, one = wire(hold), sender()
    for _ in range(9):
        one.submit(slow.url, timeout_s=0.3)
    late = [one.get() for _ in range(9)]
    assert {outcome.error for outcome in late} == {"no answer within 0.3 s"}
    assert all(outcome.duration_ms < 20_000 for outcome in late)
    one.until(lambda: len(slow.got) == 9, 10, "all to have been there")


def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(sender: Any, wire: Any) -> None:
    where, one = wire(sends(PLAIN, close=True)), sender()
    assert all(one.post(where.url).ok for _ in range(5))
    assert len(where.got) == 5


def test_500_hanging_requests_hold_up_nobody(sender: Any, wire: Any) -> None:
    hanging, quick, one = wire(hold), wire(sends(PLAIN)), sender()
    for _ in range(500):
        one.submit(hanging.url, timeout_s=60)
    one.until(lambda: len(hanging.got) == 500, 20, "500 connections")
    began = time.monotonic()
    assert all(one.post(quick.url).ok for _ in range(50))
    assert time.monotonic() - began < 30
    assert one.outcomes == []


def test_time_limits_are_kept_and_answers_taken_in_while_nobody_steps(sender: Any, wire: Any) -> None:
    slow, quick, one = wire(hold), wire(sends(PLAIN, close=True)), sender()
    one.submit(slow.url, timeout_s=3.0, tag="slow")
    one.submit(quick.url, tag="quick")
    threading.Thread(target=one.transport.attend, daemon=True).start()
    wait_until(lambda: slow.got and quick.got, 10, "both to be dialled")
    slow.got[0].settimeout(60)
    assert read_request(slow.got[0]) and slow.got[0].recv(1) == b"", "ended at its time"
    one.step()
    assert [(outcome.tag, outcome.status) for outcome in one.outcomes] == [("quick", 200), ("slow", None)]


def test_a_step_ends_when_somebody_wakes_it_or_another_file_can_be_read(sender: Any, wire: Any) -> None:
    where, one = wire(hold), sender()
    one.submit(where.url, timeout_s=60)
    began = time.monotonic()
    one.transport.wake()
    assert one.transport.step(60) == [], "woken before"
    threading.Timer(0.1, one.transport.wake).start()
    assert one.transport.step(60) == [], "woken meanwhile"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert one.transport.step_beside(ours.fileno(), 0.0) == (False, [])
        theirs.send(b"x")
        assert one.transport.step_beside(ours.fileno(), 60) == (True, [])
    assert time.monotonic() - began < 20


def test_proxies_of_the_environment_are_not_used(sender: Any, endpoint: Any, wire: Any, monkeypatch: Any) -> None:
    proxy, where = wire(sends(PLAIN)), endpoint()
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    assert sender().post(where.url).status == 204
    assert len(where.got) == 1 and proxy.got == []


def test_closing_drops_what_is_in_flight(wire: Any) -> None:
    where, one = wire(hold), Sender()
    for _ in range(50):
        one.submit(where.url, timeout_s=60)
    one.until(lambda: len(where.got) == 50, 10, "50 connections")
    began = time.monotonic()
    one.transport.close()
    assert time.monotonic() - began < 20
    for conn in where.got:
        conn.settimeout(5)
        assert read_request(conn) and conn.recv(1) == b""
    one.submit(where.url)
    assert one.outcomes == []


# Names ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_name_says_so(sender: Any) -> None:
    outcome = sender().post("http://nowhere.invalid/")
    assert outcome.status is None and outcome.error.startswith("the name cannot be resolved: ")


def test_a_name_keeps_its_host_and_is_looked_up_once(sender: Any, endpoint: Any, name_server: Any) -> None:
    asked: list[int] = []
    name_server["hooks.example"] = lambda: asked.append(1) or ["127.0.0.1"]
    where, one = endpoint(), sender()
    port = where.url.rpartition(":")[2]
    assert all(one.post(f"http://hooks.example:{port}/").ok for _ in range(5))
    assert where.got[0].headers["host"] == f"hooks.example:{port}" and len(asked) == 1


def test_silent_name_servers_hold_up_nobody(sender: Any, endpoint: Any, name_server: Any) -> None:
    answers = threading.Event()
    where, one = endpoint(), sender()
    for number in range(30):
        name_server[f"silent{number}.example"] = lambda: answers.wait(30) and []
        one.submit(f"http://silent{number}.example/", timeout_s=4.0)
    name_server["hooks.example"] = ["127.0.0.1"]
    try:
        outcome = one.post(where.url.replace("127.0.0.1", "hooks.example"))
        assert outcome.ok
        late = [one.get() for _ in range(30)]
        assert {o.error for o in late} == {"the name cannot be resolved: no answer within 4 s"}
        began = time.monotonic()
        one.transport.close()
        assert time.monotonic() - began < 20
    finally:
        answers.set()


def test_a_known_name_outlives_its_name_servers_failure(sender: Any, endpoint: Any, name_server: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(names, "FRESH_S", 0.0)
    monkeypatch.setattr(names, "USABLE_S", 0.0)
    failing: list[int] = []

    def found() -> list[str]:
        if failing:
            raise socket.gaierror(failing[0], "it failed")
        return ["127.0.0.1"]

    name_server["hooks.example"] = found
    where, one = endpoint(), sender()
    url = where.url.replace("127.0.0.1", "hooks.example")
    assert one.post(url).ok
    failing.append(socket.EAI_AGAIN)
    assert one.post(url).ok
    failing[0] = socket.EAI_NONAME
    assert one.post(url).error == "the name cannot be resolved: it failed"


# What may be dialled -------------------------------------------------------------------------------------------------------

LITERAL = [
    "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0x7f000001", "2130706433", "017700000001", "0177.0.0.1", "127.255.255.254",
    "0", "0.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.1.1",
    "169.254.169.254", "0xa9fea9fe", "2852039166", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1", "localhost", "localhost.",
    "sub.localhost", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:10.0.0.1]", "[::127.0.0.1]",
    "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::a00:1]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::1]",
    "[2001:0:0:0:0:0:80ff:fffe]", "[fc00::1]", "[fd00::1]", "[fd00:ec2::254]", "[fe80::1]", "[fec0::1]", "[ff02::1]",
    "[2001:db8::1]", "[100::1]", "[3fff::1]", "%31%32%37.0.0.1", "127%2e0%2e0%2e1", "127.0.0.1.", "１２７.0.0.1",
]  # fmt: skip
NAMED = {
    "private.example": ["10.1.2.3"],
    "loop.example": ["127.0.0.1", "::1"],
    "metadata.example": ["169.254.169.254"],
    "mapped.example": ["::ffff:192.168.0.1"],
    "many.example": ["10.0.0.1", "192.168.0.1", "fd00::1"],
    "dotted.example.": ["127.0.0.1"],
}


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that would have been dialled: none of them is, except those of this machine."""
    seen: list[str] = []
    really = exchange.Exchange._open

    def watched(self: Any, purpose: int, found: Any) -> Any:
        opened = really(self, purpose, found)
        if opened == pycurl.SOCKET_BAD:
            return opened
        seen.append(found[3][0])
        if ipaddress.ip_address(found[3][0]).is_loopback:
            return opened
        opened.close()
        return pycurl.SOCKET_BAD

    monkeypatch.setattr(exchange.Exchange, "_open", watched)
    return seen


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_address_that_is_not_public_is_dialled(sender: Any, name_server: Any, dialled: Any, endpoint: Any, scheme: str) -> None:
    where, one = endpoint(), sender([])
    port = where.url.rpartition(":")[2]
    name_server.update(NAMED)
    hosts = [*LITERAL, *NAMED]
    assert len(hosts) >= 40
    for host in hosts:
        one.submit(f"{scheme}://{host}:{port}/", tag=host)
    outcomes = {outcome.tag: outcome for outcome in (one.get() for _ in hosts)}
    assert outcomes.keys() == set(hosts)
    wrong = {
        host: outcome.error
        for host, outcome in outcomes.items()
        if outcome.status is not None or "in no network of SEQUIN_ALLOWED_NETWORKS" not in outcome.error
    }
    # To some resolvers these are names, and there is none of them.
    assert wrong.keys() <= {"127.0.0.1.", "localhost.", "sub.localhost", "１２７.0.0.1"}, wrong
    assert all(error.startswith("the name cannot be resolved") for error in wrong.values()), wrong
    assert dialled == [] and where.got == []
    assert "10.0.0.1" in outcomes["many.example"].error and "fd00::1" in outcomes["many.example"].error


def test_a_name_that_is_rebound_is_refused(sender: Any, name_server: Any, dialled: Any, wire: Any, monkeypatch: Any) -> None:
    """What was allowed before says nothing about what is dialled now."""
    monkeypatch.setattr(names, "FRESH_S", 0.0)
    monkeypatch.setattr(names, "USABLE_S", 0.0)
    where, one = wire(sends(PLAIN, close=True)), sender([ipaddress.ip_network("127.0.0.1/32")])
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    name_server["hooks.example"] = lambda: answers.pop(0)
    url = f"http://hooks.example:{where.port}/"
    assert one.post(url).ok
    assert one.post(url).error.startswith("hooks.example is 127.0.0.2: not a public address")
    assert dialled == ["127.0.0.1"]


def test_of_several_addresses_an_allowed_one_is_dialled(sender: Any, name_server: Any, dialled: Any, endpoint: Any) -> None:
    where = endpoint()
    name_server["hooks.example"] = ["10.0.0.1", "127.0.0.1"]
    assert sender([ipaddress.ip_network("127.0.0.0/8")]).post(where.url.replace("127.0.0.1", "hooks.example")).ok
    assert dialled == ["127.0.0.1"]


def test_public_addresses_are_dialled(sender: Any, dialled: Any) -> None:
    one = sender([])
    for host in ("93.184.216.34", "[2606:4700::1111]"):
        assert one.post(f"http://{host}/").status is None
    assert dialled == ["93.184.216.34", "2606:4700::1111"]


# TLS -----------------------------------------------------------------------------------------------------------------------


def certificate(name: str, folder: Path) -> Path:
    """A self-signed certificate and its key, as one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


class Secure:
    """A TLS endpoint for hooks.example, and the server names it was asked for."""

    def __init__(self, wire: Any, folder: Path) -> None:
        self.path = certificate("hooks.example", folder)
        self.asked: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path)
        context.sni_callback = lambda _socket, name, _context: self.asked.append(name)
        self.wire = wire(sends(PLAIN), tls=context)


@pytest.fixture
def secure(wire: Any, tmp_path: Path, name_server: Any) -> Secure:
    name_server["hooks.example"] = name_server["other.example"] = ["127.0.0.1"]
    return Secure(wire, tmp_path)


def test_a_certificate_nobody_vouches_for_is_refused(sender: Any, secure: Secure) -> None:
    outcome = sender().post(f"https://hooks.example:{secure.wire.port}/")
    assert outcome.status is None and "self-signed certificate" in outcome.error


def test_a_certificate_is_checked_against_the_name_of_the_url(sender: Any, secure: Secure, monkeypatch: Any) -> None:
    monkeypatch.setattr(exchange, "authorities", lambda: str(secure.path))
    one = sender()
    assert all(one.post(f"https://hooks.example:{secure.wire.port}/").ok for _ in range(3))
    assert secure.asked == ["hooks.example"] and len(secure.wire.got) == 1
    for other in ("other.example", "127.0.0.1"):
        outcome = one.post(f"https://{other}:{secure.wire.port}/")
        assert outcome.status is None and "SSL" in outcome.error and other in outcome.error


def test_plain_http_behind_https_is_an_error_of_tls(sender: Any, endpoint: Any) -> None:
    outcome = sender().post(endpoint().url.replace("http:", "https:"), timeout_s=2)
    assert outcome.status is None and "TLS" in outcome.error
