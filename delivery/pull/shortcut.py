"""Answer the calls of the pull API in front of Django: its handler and DRF's views cost more than handing out a message.

What is plainly such a call, to a name this server answers to, is answered here, with the bytes and headers the views would
send and DRF's errors as everywhere (`consumers.api.errors`). All else goes on to Django: other methods, other paths.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from django.core.exceptions import DisallowedHost
from django.core.handlers.wsgi import get_path_info
from django.db import connection
from django.http import HttpRequest

from consumers.api.errors import answer, mistake
from delivery.pull import calls

log = logging.getLogger("django.request")  # as Django tells of its own

PREFIXES = ("http_pull_consumers", "sequin_streams")
CALLS: dict[tuple[str, str], Callable[..., bytes]] = {
    ("GET", "receive"): calls.receive, ("POST", "receive"): calls.receive, ("POST", "ack"): calls.ack, ("POST", "nack"): calls.nack,
    ("POST", "extend"): calls.extend,
}  # fmt: skip
KNOWN_HOSTS = 1000

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Called:
    """What a call reads of a request, of which Django makes much more."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self.META = environ

    @cached_property
    def body(self) -> bytes:
        length = int(self.META.get("CONTENT_LENGTH") or 0)
        return bytes(self.META["wsgi.input"].read(length)) if length > 0 else b""


class PullShortcut:
    """A WSGI application in front of Django's."""

    def __init__(self, django: Application) -> None:
        self._django = django
        self._hosts: set[str] = set()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        parts = (path if path.isascii() else get_path_info(environ)).split("/")
        if len(parts) != 5 or parts[0] or parts[1] != "api" or parts[2] not in PREFIXES or not parts[3]:
            return self._django(environ, start_response)
        call = CALLS.get((environ["REQUEST_METHOD"], parts[4]))
        if call is None or not self._is_allowed(environ):
            return self._django(environ, start_response)
        request = Called(environ)
        try:
            body = call(request, calls.admit(request), parts[3])
            status, headers = "200 OK", [("Content-Type", "application/json")]
        except Exception as error:
            response = answer(error)
            if response is None:
                log.error("Internal Server Error: %s", path, exc_info=True)
                response = mistake()
            status, headers, body = f"{response.status_code} {response.reason_phrase}", list(response.items()), response.content
        finally:
            connection.close()
        start_response(status, [*headers, ("Content-Length", str(len(body))), ("X-Content-Type-Options", "nosniff")])
        return [body]

    def _is_allowed(self, environ: dict[str, Any]) -> bool:
        """Whether ALLOWED_HOSTS has the name that was asked for. Judged once for each, as far as there are few."""
        host = environ.get("HTTP_HOST")
        if host in self._hosts:
            return True
        request = HttpRequest()
        request.META = environ
        try:
            request.get_host()
        except DisallowedHost:
            return False  # Django says so, and logs it
        if host is not None and len(self._hosts) < KNOWN_HOSTS:
            self._hosts.add(host)
        return True
