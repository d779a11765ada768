"""What the pull tests and bench/pull.py start from: a source, consumers, a log that can be appended to, a web server.

No capture runs: `Log.append` writes through the store's Appender, as capture does, and notifies.
"""
from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID, uuid4

import pytest
from django.db import connection

from consumers.models import Consumer, Source
from consumers.store import lifecycle
from consumers.store.appender import Appender
from consumers.store.types import ColumnShape, LogRow, Progress, RelationShape
from consumers.tokens import create_token
from tests.conftest import wait_until
from tests.ports import new_port

ROOT = Path(__file__).resolve().parents[2]
SHAPE_COLUMNS = (ColumnShape("id", 23, -1, "integer"), ColumnShape("status", 25, -1, "text"))
START_WITHIN_S = 60.0


class Log:
    """The log of one source, with one relation a table."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.appender = Appender(source.pk)
        self.progress = Progress(1, "1", 1, 100, 0, 0, 100)
        self.appender.begin_history(self.progress)
        self.relations: dict[str, int] = {}

    def append(self, keys: Iterator[int] | range | list[int], table: str = "orders", *, notify: bool = True) -> None:
        """One transaction that inserts rows with these keys."""
        relation = self._relation(table)
        lsn = self.progress.stored_lsn + 100
        rows = [
            LogRow(
                relation, 1000 + relation, b"I", b'["%d"]' % key, None, 1, lsn, index, int((time.time() - 946_684_800) * 1e6),
                b'{"id":%d,"status":"paid"}' % key, None, None, True,
            )
            for index, key in enumerate(keys)
        ]  # fmt: skip
        after = self.progress._replace(stored_lsn=lsn, reached_lsn=lsn)
        self.appender.append(rows, self.progress, after)
        self.progress = after
        if notify:
            self.appender.notify()

    def close(self) -> None:
        self.appender.close()

    def _relation(self, table: str) -> int:
        if table not in self.relations:
            shape = RelationShape(1000 + len(self.relations), "public", table, SHAPE_COLUMNS, ("id",), "d")
            self.relations[table] = self.appender.register_relation(self.progress.epoch, shape)
        return self.relations[table]


def make_source(name: str = "shop") -> Source:
    source = Source(name=name, host="127.0.0.1", database="shop", username="shop", slot_name=f"slot_{name}")
    source.full_clean()
    source.save()
    return source


def make_consumer(source: Source, name: str = "orders", **fields: Any) -> Consumer:
    """A pull consumer at the end of the log, without asking the source (which is not there)."""
    consumer = Consumer(source=source, name=name, kind=fields.pop("kind", "pull"), **fields)
    consumer.full_clean()
    consumer.save()
    lifecycle.create_position(consumer.pk, source.pk, 0)
    return consumer


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: dict[str, str]

    @property
    def keys(self) -> list[int]:
        return [item["data"]["record"]["id"] for item in self.body["data"]]

    @property
    def ack_ids(self) -> list[str]:
        return [item["ack_id"] for item in self.body["data"]]


@dataclass(frozen=True)
class Client:
    """Pull calls on one server with one token. Each call has a connection of its own, so threads may share it."""

    port: int
    token: str | None

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float = 150.0, **headers: str) -> Answer:
        conn = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            if self.token is not None:
                headers.setdefault("Authorization", f"Bearer {self.token}")
            raw = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
            conn.request(method, path, raw, headers)
            response = conn.getresponse()
            data = response.read()
            is_json = bool(data) and (response.getheader("Content-Type") or "").startswith("application/json")
            return Answer(response.status, json.loads(data) if is_json else data.decode(), dict(response.getheaders()))
        finally:
            conn.close()

    def receive(self, consumer: str | UUID, **parameters: Any) -> Answer:
        return self.call("POST", f"/api/http_pull_consumers/{quote(str(consumer), safe='')}/receive", parameters)

    def settle(self, what: str, consumer: str | UUID, ack_ids: Any, **more: Any) -> Answer:
        return self.call("POST", f"/api/http_pull_consumers/{consumer}/{what}", {"ack_ids": ack_ids, **more})


def until(condition: Any, *, within_s: float = 10.0) -> Any:
    """The first true value of `condition()`; AssertionError after `within_s`."""
    return wait_until(condition, within_s)


@contextmanager
def web_server(**environment: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The real web server in a process of its own, on the database of this test."""
    port = new_port()
    process = subprocess.Popen(
        [sys.executable, "manage.py", "run_web", "--host", "127.0.0.1", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "SEQUIN_LOG_LEVEL": "error", **store_environment(), **environment},
    )
    try:
        until(lambda: _answers(process, port), within_s=START_WITHIN_S)
        yield process, port
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def store_environment() -> dict[str, str]:
    """Environment with which a subprocess uses the database this process uses."""
    from django.conf import settings

    database = connection.settings_dict
    user, password = quote(database["USER"], safe=""), quote(database["PASSWORD"] or "", safe="")
    host, port = quote(database["HOST"] or "127.0.0.1", safe=""), database["PORT"] or 5432
    return {
        "DATABASE_URL": f"postgres://{user}:{password}@{host}:{port}/{database['NAME']}",
        "SECRET_KEY": settings.SECRET_KEY,
        "ENCRYPTION_KEYS": ",".join(settings.ENCRYPTION_KEYS),
    }


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    assert process.poll() is None, f"the web server ended with status {process.returncode}"
    try:
        return Client(port, None).call("GET", "/api/http_pull_consumers/x/receive").status == 401
    except OSError:
        return False


class World:
    """One test's source, log and consumers. Names are its own: the server outlives the test and remembers names briefly."""

    def __init__(self, port: int) -> None:
        self.mark = uuid4().hex[:8]
        self.port = port
        self.source = make_source(f"shop_{self.mark}")
        self.log = Log(self.source)
        self.client = self.with_token()

    def consumer(self, name: str = "orders", **fields: Any) -> Consumer:
        return make_consumer(self.source, f"{name}-{self.mark}", **fields)

    def with_token(self, scope: str = "pull", consumers: list[Consumer] | None = None) -> Client:
        _, plain = create_token(f"token-{uuid4().hex[:12]}", scope, consumers)
        return Client(self.port, plain)


@pytest.fixture(scope="module")
def server(django_db_setup: None) -> Iterator[int]:
    """The port of a web server that serves the tests of one module."""
    with web_server() as (_, port):
        yield port


@pytest.fixture
def world(server: int, transactional_db: None) -> Iterator[World]:
    made = World(server)
    yield made
    made.log.close()
