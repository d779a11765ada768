"""One POST and its answer on a handle of libcurl's, which is kept for the next one. Decides what the outcome is.

`delivery/push/transport.py` drives it, and with it the functions that curl calls.
"""
from __future__ import annotations

import errno
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import pycurl

from consumers.addresses import Network, is_allowed
from delivery.push.request import Outcome, Request

try:
    from certifi import where as authorities
except ImportError:  # then those of the system

    def authorities() -> str:
        return ssl.get_default_verify_paths().cafile or ""


ANSWER_BYTES = 65_536  # of an answer's body; more is not read, and the connection not kept
HEAD_BYTES = 65_536  # of its headers; with more it is no answer, and libcurl itself reads no more than 300 KB
HEAD_LINES = 1000  # so many are held at most
SHOWN_CHARACTERS = 500
CONNECT_S = 10.0
CONNECTION_LIFE_S = 300  # then an endpoint is dialled anew, so that a change of its addresses is followed
LARGE_BODY = 65_536
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
_BLANK = (b"\r\n", b"\n")


class Exchange:
    """Reused: `take` a request, `prepare` the handle, and after the transfer `outcome`."""

    request: Request

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = allowed
        self.deadline = self._began = 0.0
        self._url: str | None = None  # what the handle is set to
        self._entry = ""
        self._left_ms = 0
        self._refused: list[str] = []
        self._dialled = False
        self._socket_error = ""
        # Taken in by the deque itself, without a call of ours for each line.
        self._head: deque[bytes] = deque(maxlen=HEAD_LINES)
        self._body = b""
        self._body_bytes = 0
        self.curl = curl = pycurl.Curl()
        curl.setopt(pycurl.POST, 1)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        curl.setopt(pycurl.FOLLOWLOCATION, 0)
        curl.setopt(pycurl.PROXY, "")
        curl.setopt(pycurl.NOPROXY, "*")
        curl.setopt(pycurl.NETRC, pycurl.NETRC_IGNORED)
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.USERAGENT, "sequin")
        curl.setopt(pycurl.CAINFO, authorities())
        curl.setopt(pycurl.MAXLIFETIME_CONN, CONNECTION_LIFE_S)
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open)
        curl.setopt(pycurl.SOCKOPTFUNCTION, _keep_from_children)
        curl.setopt(pycurl.HEADERFUNCTION, self._head.append)
        curl.setopt(pycurl.WRITEFUNCTION, self._take_body)

    def take(self, request: Request, now: float) -> None:
        """Begin with a request; its time runs from now."""
        self.request = request
        self._began = now
        self.deadline = now + request.timeout_s
        self._refused = []
        self._dialled = False
        self._socket_error = ""
        self._head.clear()
        self._body = b""
        self._body_bytes = 0

    def prepare(self, entry: str, now: float) -> None:
        """Set the handle up. `entry`: the addresses of the name, as libcurl takes them; "": it looks itself."""
        request, curl = self.request, self.curl
        if request.url != self._url:
            self._url = None
            curl.setopt(pycurl.URL, request.url if request.url.isascii() else quote(request.url, safe=_PRINTABLE))
            self._url = request.url
        curl.setopt(pycurl.HTTPHEADER, [*request.headers.lines, *request.own_lines])
        curl.setopt(pycurl.POSTFIELDS, request.body)
        left_ms = max(1, round((self.deadline - now) * 1000))
        if left_ms != self._left_ms:
            self._left_ms = left_ms
            curl.setopt(pycurl.TIMEOUT_MS, left_ms)
            curl.setopt(pycurl.CONNECTTIMEOUT_MS, min(left_ms, int(CONNECT_S * 1000)))
        if entry or self._entry:  # once a transfer has used them they are gone
            self._entry = entry
            curl.setopt(pycurl.RESOLVE, [entry] if entry else [])

    def outcome(self, code: int, text: str) -> Outcome:
        """After the transfer. The status line and headers decide; a body that breaks afterwards changes nothing."""
        curl, head = self.curl, self._head
        status = curl.getinfo(pycurl.RESPONSE_CODE)
        is_whole = not code and head and head[-1] in _BLANK and len(head) < HEAD_LINES and curl.getinfo(pycurl.HEADER_SIZE) <= HEAD_BYTES
        if not is_whole or not 200 <= status < 300:
            final = self._final_head()
            if final is None:
                return self.failed(self._reason(code, text))
            if not 200 <= status < 300:
                error = _status_reason(status, _value_of(b"location:", final))
                return self._outcome(status, error, _value_of(b"retry-after:", final), self._response())
        return self._outcome(status, None, None, self._response())

    def _final_head(self) -> list[bytes] | None:
        """The lines of the answer's head, without those of interim answers and trailers; None when there is no whole one."""
        lines: list[bytes] = []
        size = 0
        if len(self._head) == HEAD_LINES:
            return None  # there were more
        for line in self._head:
            size += len(line)
            if size > HEAD_BYTES:
                return None
            if line not in _BLANK:
                lines.append(line)
            elif lines[:1] and lines[0][9:10] == b"1":
                lines = []  # HTTP/1.1 100
            else:
                return lines
        return None

    def _response(self) -> str:
        return self._body.decode("utf-8", "replace")[:SHOWN_CHARACTERS] if self._body else ""

    def failed(self, error: str) -> Outcome:
        """No answer came."""
        return self._outcome(None, " ".join(error.split())[:300])

    def unresolved(self, why: str) -> Outcome:
        return self.failed(f"the name cannot be resolved: {why}")

    def _outcome(self, status: int | None, error: str | None, retry_after: str | None = None, response: str = "") -> Outcome:
        if len(self.request.body) > LARGE_BODY:
            self.curl.setopt(pycurl.POSTFIELDS, b"")  # an idle handle keeps no megabytes
        took = int((time.monotonic() - self._began) * 1000)
        return Outcome(self.request.tag, status, error, retry_after, response, took)

    def _reason(self, code: int, text: str) -> str:
        """What a person can act on."""
        if code == pycurl.E_COULDNT_CONNECT and self._refused and not self._dialled:
            return refusal(_host(self.request.url), sorted(set(self._refused)))
        if code == pycurl.E_OPERATION_TIMEDOUT:
            if time.monotonic() < self.deadline - 0.1:
                return f"no connection within {CONNECT_S:g} s"
            return f"no answer within {self.request.timeout_s:g} s"
        if code == pycurl.E_COULDNT_RESOLVE_HOST:
            return f"the name cannot be resolved: {text}"
        if code == pycurl.E_GOT_NOTHING:
            return "the connection was closed without an answer"
        if "HTTP/0.9" in text:
            return "the answer is not HTTP"
        if len(self._head) == HEAD_LINES or self.curl.getinfo(pycurl.HEADER_SIZE) > HEAD_BYTES:
            return f"the answer's headers are longer than {HEAD_BYTES} bytes"
        if code == pycurl.E_COULDNT_CONNECT:
            number = self.curl.getinfo(pycurl.OS_ERRNO) if self._dialled else 0
            return os.strerror(number) if number else self._socket_error or text
        return text or f"libcurl's error {code}"

    # Called by curl -----------------------------------------------------------------------------------------------------

    def _open(self, _purpose: int, found: Any) -> Any:
        """Curl is about to dial an address: here it is vetted."""
        family, kind, protocol, address = found
        where = str(address[0])
        if family not in (socket.AF_INET, socket.AF_INET6) or not is_allowed(where, self._allowed):
            self._refused.append(where)
            return pycurl.SOCKET_BAD
        try:
            opened = socket.socket(family, kind, protocol)
        except OSError as error:
            self._socket_error = error.strerror or os.strerror(error.errno or errno.EIO)
            return pycurl.SOCKET_BAD
        self._dialled = True
        return opened

    def _take_body(self, piece: bytes) -> int | None:
        if len(self._body) < SHOWN_CHARACTERS * 4:
            self._body += piece[: SHOWN_CHARACTERS * 4 - len(self._body)]
        self._body_bytes += len(piece)
        return 0 if self._body_bytes > ANSWER_BYTES else None


def refusal(host: str, addresses: Sequence[str]) -> str:
    """Why the endpoint was not dialled: its name leads to no address that a push may reach."""
    found = ", ".join(addresses) or "nowhere"
    return f"{host} is {found}: not a public address, and in no network of SEQUIN_ALLOWED_NETWORKS"


def _keep_from_children(fd: int, _purpose: int) -> int:
    os.set_inheritable(fd, False)
    return int(pycurl.SOCKOPT_OK)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or url
    except ValueError:
        return url[:200]


def _value_of(name: bytes, head: list[bytes]) -> str | None:
    """The last header of this name, in small letters and with its colon."""
    found = None
    for line in head:
        if line[: len(name)].lower() == name:
            found = line[len(name) :].strip().decode("latin-1")
    return found


def _status_reason(status: int, location: str | None) -> str:
    if 300 <= status < 400:
        return f"answered {status}, a redirect{f' to {location[:200]}' if location else ''}: redirects are not followed, put the final URL in"
    return f"answered {status}"
