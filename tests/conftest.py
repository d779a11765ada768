"""Fixtures on real components: source databases, processes of ours, HTTP. Waiting is on a condition, with a deadline."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import pytest_django
from django.conf import settings
from django.db import connection
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from psycopg import sql

from tests import emptying
from tests.ports import new_port

ROOT = Path(__file__).resolve().parent.parent
ROLE_PASSWORD = "source-password"
SLOWER = 4  # times, than the quiet machine that deadlines are written for
LONGEST_WAIT_S = 240  # well before the whole run is ended because of a test that hangs (Makefile), which says less

# A machine that is busy elsewhere for a fifth of a second is no counterexample; and what is drawn is the same each time.
hypothesis_settings.register_profile("suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long version of the fault runs")


@pytest.fixture(scope="session")
def long_run(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--long"))


def wait_until(condition: Callable[[], Any], timeout: float = 10, what: str = "the condition") -> Any:
    """Poll until `condition` is true and return its value; fail after `timeout` seconds, or as much longer as a busy machine may take."""
    patience = max(timeout, min(SLOWER * timeout, LONGEST_WAIT_S))
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience} s in vain for {what}; last: {value!r}")
        time.sleep(0.02)


@pytest.fixture
def wait_for() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
def free_port() -> int:
    return new_port()


@pytest.fixture
def log(transactional_db: None) -> Iterator[Any]:
    """A source's log that is written directly."""
    from tests.store.world import Log

    made = Log()
    yield made
    made.appender.close()


class StoreServer:
    """The test store's own server, as a place for source databases."""

    def __init__(self) -> None:
        store = settings.DATABASES["default"]
        self.host, self.port = str(store["HOST"]), int(store["PORT"])
        self.user, self.password = str(store["USER"]), str(store["PASSWORD"])


class SourceDatabase:
    """A database of its own on a server, as a user's would be: an owner who may replicate, no superuser."""

    def __init__(self, name: str, server: Any) -> None:
        self.server, self.name = server, name
        self.host, self.port = server.host, server.port
        self.user, self.password = name, ROLE_PASSWORD

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(
            host=self.host, port=self.port, user=self.user, password=self.password, dbname=self.name,
            **{"autocommit": True, **options},
        )  # fmt: skip

    def execute(self, query: str, parameters: Any = None) -> list[tuple[Any, ...]]:
        with self.connect() as conn:
            cursor = conn.execute(query, parameters)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def admin(self, database: str = "postgres") -> psycopg.Connection[Any]:
        server = self.server
        return psycopg.connect(
            host=server.host, port=server.port, user=server.user, password=server.password, dbname=database, autocommit=True
        )

    @property
    def version(self) -> int:
        """The server's major version."""
        with self.admin() as conn:
            return conn.info.server_version // 10_000


@contextmanager
def database_on(server: Any) -> Iterator[SourceDatabase]:
    """A new database on a server, dropped afterwards with its slots."""
    database = SourceDatabase(f"source_{uuid4().hex[:12]}", server)
    name = sql.Identifier(database.name)
    with database.admin() as conn:
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD {}").format(name, sql.Literal(ROLE_PASSWORD)))
        conn.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, name))
    yield database
    with database.admin() as conn:
        _drop_slots(conn, database.name)
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
        conn.execute(sql.SQL("DROP ROLE {}").format(name))


@pytest.fixture
def source_server() -> Any:
    """Where source databases are made. Tests of capture run on every server there is."""
    return StoreServer()


@pytest.fixture
def source_database(source_server: Any) -> Iterator[SourceDatabase]:
    with database_on(source_server) as database:
        yield database


def _drop_slots(conn: psycopg.Connection[Any], database: str) -> None:
    def dropped() -> bool:
        conn.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = %s AND active", [database]
        )
        try:
            conn.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [database])
            return True
        except (psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
            return False

    wait_until(dropped, 30, "the slots to be dropped")


@pytest.fixture
def make_source(source_database: SourceDatabase, transactional_db: None) -> Callable[..., Any]:
    """Make a source on `source_database`, slot and publication included."""
    from consumers import changes
    from consumers.models import Source

    def make(name: str = "shop", **fields: Any) -> Source:
        source = Source(
            name=name,
            **{
                "host": source_database.host, "port": source_database.port, "database": source_database.name,
                "username": source_database.user, "password": source_database.password,
                "slot_name": f"{source_database.name}_{name.lower()}"[:60].replace("-", "_").replace(".", "_"),
                **fields,
            },
        )  # fmt: skip
        changes.save(source)
        return source

    return make


@pytest.fixture
def make_consumer(transactional_db: None) -> Callable[..., Any]:
    from consumers import changes
    from consumers.models import Consumer

    def make(source: Any, name: str = "orders-worker", kind: str = "pull", **fields: Any) -> Consumer:
        consumer = Consumer(name=name, source=source, kind=kind, **fields)
        changes.save(consumer)
        return consumer

    return make


@pytest.fixture
def token(transactional_db: None) -> Callable[..., str]:
    from consumers.tokens import create_token

    def make(scope: str = "admin", consumers: Any = None) -> str:
        return create_token(f"token-{uuid4().hex[:8]}", scope, consumers)[1]

    return make


@pytest.fixture
def run(transactional_db: None) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start `manage.py …` against the test database, in a process group of its own; ended afterwards."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "manage.py"), *arguments], env=process_environment(**environment), start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
    for process in started:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(60)


def process_environment(**more: str) -> dict[str, str]:
    """The environment of a process of ours on the test database."""
    store = connection.settings_dict
    url = f"postgres://{store['USER']}:{store['PASSWORD']}@{store['HOST']}:{store['PORT']}/{store['NAME']}"
    return {**os.environ, "DATABASE_URL": url, "DJANGO_SETTINGS_MODULE": "sequinapp.settings", **more}


@pytest.fixture
def web(run: Callable[..., Any], free_port: int) -> str:
    """The base URL of a real `run_web`."""
    run("run_web", "--port", str(free_port))
    url = f"http://127.0.0.1:{free_port}"

    def answers() -> bool:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    wait_until(answers, 30, "run_web to answer")
    return url


@pytest.fixture(scope="session", autouse=True)
def _stop_listening(django_db_setup: None) -> Iterator[None]:
    """The pull API's listener of this process ends before the database does."""
    yield
    from consumers.filters import filtering
    from delivery.pull.waiting import room

    filtering.close()
    room.close()
    for thread in threading.enumerate():
        if thread.name in ("pull-listener", "housekeeping"):
            thread.join(5)


@pytest.fixture(autouse=True)
def _forget_caches() -> None:
    """Caches of the process outlive a test's database."""
    from consumers import tokens
    from consumers.store import claims, interest
    from delivery.pull import directory

    tokens.forget()
    directory.forget()
    claims._relation_names.clear()
    interest._names.clear()


@pytest.fixture(autouse=True, scope="session")
def _empty_quickly(django_db_setup: None, django_db_blocker: pytest_django.DjangoDbBlocker) -> None:
    if connection.settings_dict["NAME"].startswith("test_"):  # else no test of this run asks for a database, and there is none
        with django_db_blocker.unblock():
            emptying.hook_in()
