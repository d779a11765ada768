"""Look names up on threads of its own, so that no name server can hold up a request to another name.

libcurl resolves on at most 20 threads for everything, two lookups for each name: ten names whose server is silent stop all
others, and closing waits for them. Here each name is looked up once at a time, whoever waits for it. What is found is no
permission: `delivery/push/exchange.py` vets the address when it is dialled.
"""
from __future__ import annotations

import queue
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

FRESH_S = 5.0  # so long an answer is simply used
USABLE_S = 60.0  # so long it is used while it is looked up anew; after that a request waits for the lookup
MAX_THREADS = 64
KEPT_NAMES = 4096

# What is not plainly a name (an address in any notation, a name outside ASCII, nonsense) is left to libcurl.
_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]*")
_NUMBER_AT_THE_END = re.compile(r"(?:.*\.)?(?:0[xX][0-9A-Fa-f]*|[0-9]+)\.?")


@dataclass(slots=True)
class Name:
    """One name and port. `entry` is what libcurl takes ("+host:port:address,…"), "" when nothing is known."""

    host: str
    port: int
    entry: str = ""
    error: str = ""
    found_at: float = -USABLE_S
    looking: bool = False
    waiting: list[Any] = field(default_factory=list)  # the caller's own, who goes on when the lookup is over

    def is_usable(self, now: float) -> bool:
        return bool(self.entry) and now - self.found_at < USABLE_S


class Names:
    """Lookups under way and what they found. `found(name)` is called on a thread of ours after each."""

    def __init__(self, found: Callable[[Name], None]) -> None:
        self._found = found
        self._by_url: dict[str, Name | None] = {}
        self._by_place: dict[str, Name | None] = {}  # scheme, host and port: one lookup for all URLs there
        self._work: queue.SimpleQueue[Name | None] = queue.SimpleQueue()
        self._threads = 0
        self._unfinished = 0
        self._lock = threading.Lock()

    def get(self, url: str, now: float) -> Name | None:
        """The name a URL leads to, being looked up if need be; None when there is none to look up."""
        try:
            name = self._by_url[url]
        except KeyError:
            place = "/".join(url.split("/", 3)[:3])
            if len(self._by_url) >= KEPT_NAMES:
                self._by_url.clear()
                self._by_place.clear()
            if place not in self._by_place:
                self._by_place[place] = _name_in(url)
            name = self._by_url[url] = self._by_place[place]
        if name is not None and not name.looking and now - name.found_at >= FRESH_S:
            name.looking = True
            self._look_up(name)
        return name

    def close(self) -> None:
        """Let the threads end; one that waits for a name server ends when that has answered."""
        for _ in range(self._threads):
            self._work.put(None)

    def _look_up(self, name: Name) -> None:
        with self._lock:
            self._unfinished += 1
            wanted = self._unfinished > self._threads and self._threads < MAX_THREADS
            self._threads += wanted
        self._work.put(name)
        if wanted:
            threading.Thread(target=self._serve, name="push-names", daemon=True).start()

    def _serve(self) -> None:
        while (name := self._work.get()) is not None:
            name.error = _resolve(name)
            with self._lock:
                self._unfinished -= 1
            self._found(name)


def _name_in(url: str) -> Name | None:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or not _NAME.fullmatch(host) or _NUMBER_AT_THE_END.fullmatch(host):
        return None
    return Name(host, port or (443 if parts.scheme == "https" else 80))


def _resolve(name: Name) -> str:
    """Look it up and return what is wrong, "" if nothing. What was known outlives a name server's silence."""
    try:
        found = socket.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if not (isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN):
            name.entry = ""
        return str(getattr(error, "strerror", None) or error)
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    usable = [f"[{address}]" if ":" in address else address for address in addresses if "%" not in address]
    name.entry = f"+{name.host}:{name.port}:{','.join(usable)}" if usable else ""
    return "" if usable else "only addresses with a zone"
