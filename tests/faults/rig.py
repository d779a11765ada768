"""The rig of the fault runs: a source server of its own, a proxy in front of it, writers, and a checker with a verdict line."""
from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from django.db import connection

from consumers import changes
from consumers.models import Source
from tests.cluster import Cluster
from tests.conftest import wait_until

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

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]], pause_s: float = 0.003, seed: int = 1) -> None:
        super().__init__(daemon=True)
        self._connect, self._pause_s, self._seed = connect, pause_s, seed
        self._stopping = threading.Event()
        self.commits = 0

    def run(self) -> None:
        chance = random.Random(self._seed)
        following: dict[int, int] = defaultdict(int)
        while not self._stopping.is_set():
            try:
                with self._connect() as conn:
                    for key, number in conn.execute("SELECT key, max(number) FROM load GROUP BY key").fetchall():
                        following[key] = number + 1
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
            self.join(20)


LOAD = "CREATE TABLE load (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key int NOT NULL, number int NOT NULL)"


class Scene:
    """A source server with a database under load, read through a proxy."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.proxy = Proxy(cluster.port)
        cluster.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")
        cluster.execute("CREATE DATABASE shop")
        cluster.execute(LOAD, database="shop")
        cluster.execute("CREATE PUBLICATION sequin_pub FOR ALL TABLES", database="shop")
        self.source = Source(
            name="shop", host="127.0.0.1", port=self.proxy.port, database="shop", username="postgres", password=cluster.password
        )
        changes.save(self.source)
        self.writer = Writer(lambda: cluster.connect("shop"))

    def committed(self) -> set[tuple[int, int]]:
        return {(key, number) for key, number in self.cluster.execute("SELECT key, number FROM load", database="shop")}

    def goes_on(self, timeout: float = 30) -> None:
        before = stored_count()
        wait_until(lambda: stored_count() > before + 5, timeout, "capture to go on")

    def close(self) -> None:
        self.writer.stop()
        self.proxy.close()


def stored() -> list[tuple[int, int]]:
    """What the log has of the load, in log order."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT (m.record::json->>'key')::int, (m.record::json->>'number')::int FROM messages m JOIN relation_version r"
            " ON r.id = m.relation WHERE r.table_name = 'load' AND m.action = 'I' ORDER BY m.id"
        )
        return cursor.fetchall()


def stored_count() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT coalesce(sum(messages), 0) FROM capture_progress")
        return int(cursor.fetchone()[0])


def state_of(source: Source) -> tuple[str, str]:
    """The source's state as health sees it, with its reasons; a gap is the state gap."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT CASE WHEN p.gap IS NOT NULL THEN 'gap' ELSE s.state END, coalesce(p.gap, array_to_string(s.reasons, '; '))"
            " FROM source_status s LEFT JOIN capture_progress p ON p.source = s.source WHERE s.source = %s",
            [source.pk],
        )
        row = cursor.fetchone()
    return row or ("", "")


def verdict(name: str, committed: set[tuple[int, int]], *, recovery_s: float | None = None, peak_mb: int | None = None) -> None:
    """Compare the log with what was committed and print the verdict line; fails when something is lost, doubled or out of order."""
    logged = stored()
    lost, foreign = committed - set(logged), set(logged) - committed
    doubled = len(logged) - len(set(logged))
    per_key: dict[int, list[int]] = defaultdict(list)
    for key, number in logged:
        per_key[key].append(number)
    kept = all(numbers == sorted(numbers) for numbers in per_key.values())
    line = f"{name}: {len(committed)} committed, lost {len(lost)}, doubled {doubled}, foreign {len(foreign)}, order {'kept' if kept else 'BROKEN'}"
    line += f", recovery {recovery_s:.1f} s" if recovery_s is not None else ""
    line += f", peak {peak_mb} MB" if peak_mb is not None else ""
    print(line)  # noqa: T201
    assert not lost and not foreign and not doubled and kept, line


def await_all(committed: Callable[[], set[tuple[int, int]]], timeout: float = 60) -> set[tuple[int, int]]:
    """Wait until the log has all that the source has."""
    wanted = committed()
    wait_until(lambda: wanted <= set(stored()), timeout, f"all {len(wanted)} in the log")
    return wanted


def peak_mb(pid: int) -> int:
    """The most memory a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    return 0


@contextmanager
def timed() -> Any:
    """A function that gives the seconds since the block began."""
    began = time.monotonic()
    yield lambda: time.monotonic() - began
