"""SIGKILL of any process under load, again and again: nothing lost, nothing twice in the log, order kept per key.

A writer commits rows that carry a key and a number counting up per key. A pull client and a push receiver note what
arrives. In the end the log is compared with what was committed. `make faults` runs the long version.
"""
from __future__ import annotations

import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest

from tests.conftest import wait_until
from tests.faults.rig import peak_mb, stored, verdict
from tests.installation import Installation, kill, leftovers, temporary

KEYS = 40
VICTIMS = ["run_capture --reader", "run_capture", "run_workers --cluster", "run_workers", "run_web", "postgres"]
RECOVERY_S = 20  # the deadline of one recovery in the suite, on a loaded machine; the bench measures it
PULL, PUSH = "load-pull", "load-push"


class Arrivals:
    """What arrived, by key, in the order of first arrival; repeats are allowed, going back is not."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers: dict[int, list[int]] = defaultdict(list)
        self.seen: set[tuple[int, int]] = set()
        self.repeats = 0

    def add(self, record: dict[str, Any]) -> None:
        with self.lock:
            pair = (record["key"], record["number"])
            if pair in self.seen:
                self.repeats += 1
                return
            self.seen.add(pair)
            self.numbers[pair[0]].append(pair[1])

    def overtaken(self) -> list[int]:
        return [key for key, numbers in self.numbers.items() if numbers != sorted(numbers)]


class Receiver:
    """An endpoint of ours on loopback."""

    def __init__(self, arrivals: Arrivals) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                body = self.rfile.read(length)
                if len(body) < length:
                    return  # its sender was killed in the middle
                arrivals.add(json.loads(body)["record"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/hook"


class Writer(threading.Thread):
    """Commits transactions of one to three rows until told to stop; `committed` is what the source confirmed.

    The source is the playground's database, in the server that `everything` kills too: a commit whose answer was lost is
    looked up afterwards.
    """

    def __init__(self, installation: Installation) -> None:
        super().__init__(daemon=True)
        self.installation = installation
        self.stopping = threading.Event()
        self.next: dict[int, int] = defaultdict(int)

    def run(self) -> None:
        chance = random.Random(1)
        while not self.stopping.is_set():
            try:
                with self.installation.source() as conn:
                    for key, number in conn.execute("SELECT key, max(number) FROM load GROUP BY key").fetchall():
                        self.next[key] = number + 1
                    while not self.stopping.wait(0.004):
                        with conn.transaction():
                            for key in sorted(chance.sample(range(KEYS), chance.randint(1, 3))):
                                conn.execute("INSERT INTO load (key, number) VALUES (%s, %s)", [key, self.next[key]])
                                self.next[key] += 1
            except (psycopg.Error, OSError):
                self.stopping.wait(0.1)


class Puller(threading.Thread):
    """Receives and acknowledges until told to stop, whatever happens to the server."""

    def __init__(self, installation: Installation, arrivals: Arrivals) -> None:
        super().__init__(daemon=True)
        self.installation, self.arrivals = installation, arrivals
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                messages = self.installation.receive(PULL, wait="1s")
                for message in messages:
                    self.arrivals.add(message["data"]["record"])
                if messages:
                    self.installation.ack(PULL, messages)
            except (OSError, HTTPException, AssertionError, ValueError):  # an answer cut off in the middle is HTTPException
                self.stopping.wait(0.1)


@pytest.fixture
def installation() -> Iterator[Installation]:
    with temporary() as made:
        yield made
    wait_until(lambda: not leftovers(made.home), 15, "every process to be gone")


def set_up(installation: Installation, url: str) -> None:
    with installation.source() as conn:
        conn.execute(
            "CREATE TABLE load (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key int NOT NULL, number int NOT NULL);"
            "ALTER TABLE load REPLICA IDENTITY FULL"
        )
    shared = {"source": "playground", "tables": ["public.load"], "group_columns": ["key"], "ack_wait_ms": 2000}
    assert installation.call("POST", "/api/http_endpoints", {"name": "load", "url": url, "timeout_ms": 2000})[0] == 201
    for body in ({"name": PULL, "kind": "pull"}, {"name": PUSH, "kind": "push", "endpoint": "load"}):
        status, answer = installation.call("POST", "/api/consumers", {**shared, **body})
        assert status == 201, answer


def strike(installation: Installation, victim: str) -> None:
    if victim == "everything":
        installation.kill()
        wait_until(lambda: not leftovers(installation.home), 15, "every process to be gone")
        installation.start()
        return
    if victim == "postgres":  # the store crashes, and here the source with it
        victim = "bin/postgres -D"
    pids = installation.pids(victim)
    if pids:
        kill(random.choice(pids))


def test_f1_f2_f3_sigkill_under_load_loses_nothing_doubles_nothing_keeps_order(installation: Installation, long_run: bool) -> None:
    victims = VICTIMS * (8 if long_run else 1)
    name = f"F1 F2 F3 {len(victims)} kills of readers, workers, web servers and databases under load"
    kill_under_load(installation, victims, name)


def test_f4_everything_killed_at_once(installation: Installation, long_run: bool) -> None:
    times = 50 if long_run else 1
    kill_under_load(installation, ["everything"] * times, f"F4 everything killed at once, {times} times, store and source with it")


def kill_under_load(installation: Installation, victims: list[str], name: str) -> None:
    pulled, pushed = Arrivals(), Arrivals()
    receiver = Receiver(pushed)
    set_up(installation, receiver.url)
    writer, puller = Writer(installation), Puller(installation, pulled)
    writer.start()
    puller.start()
    recovery_s, peak = 0.0, 0
    for victim in victims:
        mark = len(pulled.seen), len(pushed.seen)
        peak = max([peak, *(peak_mb(pid) for pid in installation.pids("run_capture --reader"))])
        strike(installation, victim)
        began = time.monotonic()
        wait_until(lambda: len(pulled.seen) > mark[0] + 20, RECOVERY_S, f"pull to go on after {victim}")  # noqa: B023
        wait_until(lambda: len(pushed.seen) > mark[1] + 20, RECOVERY_S, f"push to go on after {victim}")  # noqa: B023
        recovery_s = max(recovery_s, time.monotonic() - began)
    writer.stopping.set()
    writer.join(60)
    committed = {(key, number) for key, number in answer(installation.source, "SELECT key, number FROM load")}
    assert len(committed) > 20
    for arrivals, what in ((pulled, "pull"), (pushed, "push")):
        wait_until(lambda: committed <= arrivals.seen, 40, f"all of {len(committed)} by {what}")  # noqa: B023
        assert arrivals.seen == committed, "nothing arrives that was not committed"
        assert not arrivals.overtaken(), f"{what}: a key's messages arrived out of order"
    puller.stopping.set()
    verdict(name, committed, stored(lambda query: answer(installation.store, query)), recovery_s=recovery_s, peak=peak)  # type: ignore[arg-type]


def answer(connect: Callable[[], psycopg.Connection[Any]], query: str) -> list[tuple[Any, ...]]:
    """What the server says once it is back: what was on its way goes on arriving for a moment when its first process is killed."""

    def ask() -> tuple[list[tuple[Any, ...]]] | None:
        try:
            with connect() as conn:
                return (conn.execute(query).fetchall(),)  # type: ignore[arg-type]
        except psycopg.OperationalError:
            return None

    return wait_until(ask, RECOVERY_S, "the server to answer")[0]  # type: ignore[no-any-return]
