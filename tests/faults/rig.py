"""The rig of the fault runs: a source server of its own, a proxy in front of it, writers, and a checker with a verdict line."""
from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from django.db import connection

from consumers import changes
from consumers.models import Source
from tests.cluster import Cluster
from tests.conftest import ROOT, process_environment, wait_until
from tests.installation import command_of, process_tree

KEYS = 40


class Proxy:
    """TCP to a server, which can reset, swallow or slow what goes through."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.blackhole = False
        self.bytes_each_100_ms = 0  # 0: as fast as it goes
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> int:
        """Cut every connection with a RST. Returns how many."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            for end in pair:
                _abort(end)
        return len(pairs)

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        pair = (client, server)
        with self._lock:
            self._pairs.add(pair)
        try:
            while True:
                ready, _, _ = select.select([client, server], [], [], 0.1)
                for end in ready:
                    if self.blackhole:
                        ready = []
                        time.sleep(0.05)  # neither read nor answered, as a network that swallows packets
                        break
                    data = end.recv(self.bytes_each_100_ms or 65536)
                    if not data:
                        return
                    (server if end is client else client).sendall(data)
                    if self.bytes_each_100_ms:
                        time.sleep(0.1)  # the slow network itself
        except OSError:
            pass
        finally:
            with self._lock:
                self._pairs.discard(pair)
            client.close()
            server.close()


def _abort(end: socket.socket) -> None:
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class Writer(threading.Thread):
    """Commits small transactions until stopped, through every fault of the server it writes to."""

    def __init__(
        self, connect: Callable[[], psycopg.Connection[Any]], pause_s: float = 0.003, seed: int = 1, first: int = 0
    ) -> None:
        """`first`: a key's first number, where it has none."""
        super().__init__(daemon=True)
        self._connect, self._pause_s, self._seed, self._first = connect, pause_s, seed, first
        self._stopping = threading.Event()
        self.commits = 0

    def run(self) -> None:
        chance = random.Random(self._seed)
        following: dict[int, int] = defaultdict(lambda: self._first)
        while not self._stopping.is_set():
            try:
                with self._connect() as conn:
                    for key, number in conn.execute("SELECT key, max(number) FROM load GROUP BY key").fetchall():
                        following[key] = max(number + 1, self._first)
                    while not self._stopping.wait(self._pause_s):
                        with conn.transaction():
                            for key in sorted(chance.sample(range(KEYS), chance.randint(1, 3))):
                                conn.execute("INSERT INTO load (key, number) VALUES (%s, %s)", [key, following[key]])
                                following[key] += 1
                        self.commits += 1
            except (psycopg.Error, OSError):
                self._stopping.wait(0.05)

    def stop(self) -> None:
        self._stopping.set()
        if self.ident is not None:
            self.join(60)


class Capture:
    """A `run_capture`, as a user runs it, in a process group of its own."""

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.peak_mb = 0
        """The most memory one of its reader processes has had, as far as it was looked at: on a kill, and by `look`."""

    def start(self) -> Capture:
        environment = {**process_environment(), **self._environment}
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "manage.py"), "run_capture"], env=environment, start_new_session=True, stderr=self._output
        )
        return self

    def said(self) -> str:
        """What it logged."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def reader(self, timeout: float = 30) -> int:
        """The process that reads."""
        assert self._process is not None
        return int(wait_until(lambda: self._readers(), timeout, "a reader process")[0])

    def kill_reader(self) -> None:
        pid = self.reader()
        self.look()
        os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """All of it at once."""
        process, self._process = self._process, None
        if process is not None:
            self._look(process.pid)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)

    def look(self) -> int:
        if self._process is not None:
            self._look(self._process.pid)
        return self.peak_mb

    def _readers(self) -> list[int]:
        assert self._process is not None
        return [pid for pid in process_tree(self._process.pid) if "--reader" in command_of(pid)]

    def _look(self, root: int) -> None:
        self.peak_mb = max([self.peak_mb, *(peak_mb(pid) for pid in process_tree(root) if "--reader" in command_of(pid))])


class OwnStore:
    """A store on a server of its own, which a test may end as well."""

    def __init__(self, **settings: str) -> None:
        self.cluster = Cluster("store", **settings).start()
        self.cluster.execute("CREATE DATABASE sequin")
        self.environment = {"DATABASE_URL": f"postgres://postgres:{self.cluster.password}@127.0.0.1:{self.cluster.port}/sequin"}
        self.manage("migrate", "--verbosity", "0")

    def manage(self, *arguments: str) -> None:
        subprocess.run([sys.executable, str(ROOT / "manage.py"), *arguments], env={**process_environment(), **self.environment}, check=True, capture_output=True)

    def load(self, source: dict[str, Any]) -> None:
        fixture = self.cluster.directory / "source.json"
        fixture.write_text(json.dumps([{"model": "consumers.source", "fields": source}]))
        self.manage("loaddata", str(fixture))

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        return self.cluster.execute(query, database="sequin")

    def empty(self) -> None:
        self.fetch("TRUNCATE messages, relation_version, capture_progress, source_status, source_events, source_tables, consumers_source CASCADE")


LOAD = "CREATE TABLE load (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key int NOT NULL, number int NOT NULL)"


class Scene:
    """A source server with a database under load, read through a proxy into the tests' store, or one of its own."""

    def __init__(self, cluster: Cluster, store: OwnStore | None = None) -> None:
        self.cluster, self.store = cluster, store
        self.proxy = Proxy(cluster.port)
        cluster.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")
        cluster.execute("CREATE DATABASE shop")
        cluster.execute(LOAD, database="shop")
        cluster.execute("CREATE PUBLICATION sequin_pub FOR ALL TABLES", database="shop")
        fields = {"name": "shop", "host": "127.0.0.1", "port": self.proxy.port, "database": "shop", "username": "postgres",
                  "password": cluster.password}  # fmt: skip
        self.source = Source(**fields)
        if store is None:
            changes.save(self.source)
        else:
            store.load(fields)
        self.writer = Writer(lambda: cluster.connect("shop"))
        self.capture = Capture(**(store.environment if store else {}))
        self.recovery_s = 0.0

    def committed(self) -> set[tuple[int, int]]:
        return {(key, number) for key, number in self.cluster.execute("SELECT key, number FROM load", database="shop")}

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        return self.store.fetch(query) if self.store else fetch(query)

    def stored(self) -> list[tuple[int, int]]:
        return stored(self.fetch)

    def stored_count(self) -> int:
        return stored_count(self.fetch)

    def goes_on(self, timeout: float = 30) -> None:
        before = self.stored_count()
        wait_until(lambda: self.stored_count() > before + 5, timeout, "capture to go on")

    def recovers(self, timeout: float = 30) -> None:
        """Goes on, and the time that took counts for the verdict."""
        with timed() as took:
            self.goes_on(timeout)
            self.recovery_s = max(self.recovery_s, took())

    def state(self) -> tuple[str, str]:
        """The source's state as health sees it, with its reasons; a gap is the state gap."""
        rows = self.fetch(
            "SELECT CASE WHEN p.gap IS NOT NULL THEN 'gap' ELSE s.state END, coalesce(p.gap, array_to_string(s.reasons, '; '))"
            " FROM source_status s LEFT JOIN capture_progress p ON p.source = s.source"
        )
        return rows[0] if rows else ("", "")

    def becomes(self, state: str, timeout: float = 60) -> float:
        """Wait for a state; how long that took."""
        with timed() as took:
            wait_until(lambda: self.state()[0] == state, timeout, f"the state {state}")
            return float(took())

    def await_all(self, timeout: float = 60) -> set[tuple[int, int]]:
        """Stop writing, and wait until the log has all that the source has."""
        self.writer.stop()
        wanted = self.committed()
        wait_until(lambda: wanted <= set(self.stored()), timeout, f"all {len(wanted)} in the log")
        return wanted

    def verdict(
        self, name: str, *, gap: Collection[tuple[int, int]] = (), also: Collection[tuple[int, int]] = (), reader: Any = None, timeout: float = 60
    ) -> None:
        """Wait for all that was committed, but for what a named gap has swallowed, and print the verdict line.

        `also`: was committed on a server that is no more.
        """
        self.writer.stop()
        wanted = (self.committed() | set(also)) - set(gap)
        wait_until(lambda: wanted <= set(self.stored()), timeout, f"all {len(wanted)} in the log")
        verdict(name, wanted, self.stored(), recovery_s=self.recovery_s, peak=(reader or self.capture).look())

    def close(self) -> None:
        self.writer.stop()
        self.capture.kill()
        self.proxy.close()


Fetch = Callable[[str], list[tuple[Any, ...]]]


def fetch(query: str) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def stored(fetch: Fetch = fetch) -> list[tuple[int, int]]:
    """What the log has of the load, in log order."""
    return [
        (int(key), int(number)) for key, number in fetch(
            "SELECT m.record::json->>'key', m.record::json->>'number' FROM messages m JOIN relation_version r"
            " ON r.id = m.relation WHERE r.table_name = 'load' AND m.action = 'I' ORDER BY m.id"
        )
    ]  # fmt: skip


def stored_count(fetch: Fetch = fetch) -> int:
    return int(fetch("SELECT coalesce(sum(messages), 0) FROM capture_progress")[0][0])


def verdict(name: str, committed: set[tuple[int, int]], logged: list[tuple[int, int]], *, recovery_s: float, peak: int) -> None:
    """Compare the log with what was committed and print the line; fails when something is lost, doubled or out of order."""
    lost, foreign = committed - set(logged), set(logged) - committed
    doubled = len(logged) - len(set(logged))
    per_key: dict[int, list[int]] = defaultdict(list)
    for key, number in logged:
        per_key[key].append(number)
    kept = all(numbers == sorted(numbers) for numbers in per_key.values())
    line = verdict_line(name, len(committed), len(lost), doubled, kept, recovery_s, peak, len(foreign))
    print(line)  # noqa: T201
    assert not lost and not foreign and not doubled and kept, line


def verdict_line(name: str, committed: int, lost: int, doubled: int, kept: bool, recovery_s: float, peak: int, foreign: int = 0) -> str:
    order = "kept" if kept else "BROKEN"
    more = f", never committed {foreign}" if foreign else ""
    return f"{name}: {committed} committed, lost {lost}, doubled {doubled}{more}, order {order}, recovery {recovery_s:.1f} s, peak {peak} MB"


def peak_mb(pid: int) -> int:
    """The most memory a process has had; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)


@contextmanager
def timed() -> Any:
    """A function that gives the seconds since the block began."""
    began = time.monotonic()
    yield lambda: time.monotonic() - began
