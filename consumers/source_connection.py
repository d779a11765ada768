"""Connect to a source: one place for the options every such connection pins, and for errors that name no secret."""
from __future__ import annotations

import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import psycopg
from django.conf import settings
from psycopg.conninfo import make_conninfo

from consumers.addresses import is_allowed
from consumers.hosting import hint

CONNECT_TIMEOUT_S = 10
APPLICATION_NAME = "sequin"
# Everything that shapes values as text is fixed, for replication and for reading rows alike.
PINNED_SETTINGS = {
    "TimeZone": "UTC",
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "client_min_messages": "warning",
    "search_path": "pg_catalog",
    "quote_all_identifiers": "off",
}


class SourceParameters(Protocol):
    """What a connection needs of a source; models.Source has it."""

    host: Any
    port: Any
    database: Any
    username: Any
    password: Any
    ssl_root_cert: Any

    @property
    def effective_sslmode(self) -> str: ...


class SourceUnreachable(Exception):
    """The source cannot be reached or refuses us. `reason` is one line without secrets."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        self.host, self.port, self.reason = host, port, reason
        more = hint(reason, str(host), int(port))
        super().__init__(f"cannot connect to {host}:{port}: {reason}" + (f". {more[0].upper()}{more[1:]}" if more else ""))


def conninfo(
    source: SourceParameters, *, replication: bool = False, application_name: str = APPLICATION_NAME, encoded: bool = True
) -> str:
    """The libpq connection string of a source, password included: never log it.

    `encoded`: the database has an encoding, so that the server can convert text to UTF-8.
    """
    options = " ".join(f"-c {name}={value}" for name, value in PINNED_SETTINGS.items())
    parameters: dict[str, Any] = {
        "host": source.host,
        "port": source.port,
        "dbname": source.database,
        "user": source.username,
        "password": source.password or None,
        "sslmode": source.effective_sslmode,
        "sslrootcert": _root_certificate(source.ssl_root_cert),
        "application_name": application_name,
        "client_encoding": "UTF8" if encoded else "SQL_ASCII",
        "connect_timeout": CONNECT_TIMEOUT_S,
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
        "options": options,
    }
    if settings.SEQUIN_RESTRICT_SOURCES:
        parameters["hostaddr"] = _vetted_address(str(source.host), int(source.port))
    if replication:
        parameters["replication"] = "database"
    return make_conninfo("", **{name: value for name, value in parameters.items() if value is not None})


def connect(source: SourceParameters, *, statement_timeout_ms: int = 30_000, lock_timeout_ms: int = 0) -> psycopg.Connection[Any]:
    """Open an ordinary connection in autocommit. Raises SourceUnreachable."""
    try:
        connection = psycopg.connect(conninfo(source), autocommit=True)
        connection.execute(f"SET statement_timeout = {int(statement_timeout_ms)}; SET lock_timeout = {int(lock_timeout_ms)}")
        if connection.info.server_version >= 140_000:  # which brought it; a role may have it set
            connection.execute("SET idle_session_timeout = 0")
    except (psycopg.Error, UnicodeError) as error:
        raise SourceUnreachable(source.host, source.port, reason_of(error, source)) from None
    return connection


@contextmanager
def cut_after(descriptor: int, seconds: float) -> Iterator[None]:
    """End a connection's socket when the block takes longer: a dead network would otherwise hold it for ever.

    The call that waits then fails as after any other cut.
    """
    copy = os.dup(descriptor)

    def cut() -> None:
        with socket.socket(fileno=os.dup(copy)) as found:
            try:
                found.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        os.close(copy)


def reason_of(error: BaseException, source: SourceParameters | None = None) -> str:
    """libpq's message as one line, without the password."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^connection (failed|is bad): ", "", text)
    text = re.sub(r"^connection to server at [^:]*?, port \d+ failed: ", "", text)
    if source is not None and source.password:
        text = text.replace(source.password, "********")
    return text[:500]


def _vetted_address(host: str, port: int) -> str:
    """The address to dial, for an installation whose users may not look around its own network. Raises SourceUnreachable."""
    try:
        found = [] if host.startswith("/") else socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SourceUnreachable(host, port, f"the name cannot be resolved ({error})") from None
    for entry in found:
        if is_allowed(str(entry[4][0]), settings.SEQUIN_ALLOWED_NETWORKS):
            return str(entry[4][0])
    raise SourceUnreachable(host, port, "not a public address, and in no network of SEQUIN_ALLOWED_NETWORKS (SEQUIN_RESTRICT_SOURCES=1)")


@lru_cache(maxsize=64)
def _root_certificate(text: str) -> str | None:
    """libpq wants a file; a pasted certificate is put into one."""
    if not text:
        return None
    if "-----BEGIN" not in text:
        return text
    path = Path(tempfile.gettempdir()) / f"sequin-{sha256(text.encode()).hexdigest()[:24]}.pem"
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    return str(path)
