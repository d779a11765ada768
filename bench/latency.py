"""Measure commit → received at steady rates of changes, for a waiting pull client and a push receiver.

    python bench/latency.py [--rates 200 1000 3000] [--rows 1] [--seconds 8]

Everything runs on this machine, in an installation of its own: writers, receiver, client and service share its cores, each of
them in a process of its own. The push consumer takes up to 100 messages in a batch, as one would at such rates, and sends what
there is. Prints milliseconds by the clock of the machine, and the peak memory of each process.
"""
from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.push import sink  # noqa: E402
from tests.installation import Installation, temporary  # noqa: E402

PULL, PUSH = "latency-pull", "latency-push"
COMMITS_A_WRITER = 500  # a second; faster ones are several
WAIT_S = 30.0

Arrivals = dict[int, float]
processes = multiprocessing.get_context("fork")


def write(source_url: str, first: int, step: int, rows: int, count: int, rate: float, begin: float, sent: Any) -> None:
    """Commit every `step`-th transaction of `rows` rows at its time; when each commit was answered, by row."""
    import psycopg

    at: Arrivals = {}
    with psycopg.connect(source_url, autocommit=True) as conn:
        for number in range(first * rows, count, step * rows):
            last = min(number + rows, count) - 1
            time.sleep(max(0.0, begin + number / rate - time.time()))
            conn.execute("INSERT INTO latency (id, note) SELECT g, 'a note' FROM generate_series(%s::int, %s) g", [number, last])
            at.update(dict.fromkeys(range(number, last + 1), time.time()))
    sent.put(at)


def pull(port: int, token: str, count: int, deadline: float, arrived: Any) -> None:
    conn = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    base = f"/api/http_pull_consumers/{PULL}"
    at: Arrivals = {}
    while len(at) < count and time.time() < deadline:
        conn.request("GET", f"{base}/receive?batch_size=100&wait_for=1s", headers=headers)
        messages = json.loads(conn.getresponse().read())["data"]
        now = time.time()
        at.update(dict.fromkeys((message["data"]["record"]["id"] for message in messages), now))
        if messages:
            conn.request("POST", f"{base}/ack", json.dumps({"ack_ids": [m["ack_id"] for m in messages]}), headers)
            conn.getresponse().read()
    arrived.put(at)


def noting(log: Path) -> Callable[[bytes], None]:
    """What the sink does with each body: a line for each row and when it came."""

    def note(body: bytes) -> None:
        now = time.time()
        with log.open("a") as file:
            file.writelines(f"{int(number)} {now}\n" for number in re.findall(rb'"record":\{"id":(-?\d+)', body))

    return note


def read_arrivals(log: Path) -> Arrivals:
    lines = log.read_text().splitlines() if log.exists() else []
    at: Arrivals = {}
    for line in lines:
        number, moment = line.split()
        at.setdefault(int(number), float(moment))
    return at


def warm_up(installation: Installation, log: Path) -> None:
    """Processes just started take some seconds to connect; measured is the steady state."""
    with installation.source() as conn:
        conn.execute("INSERT INTO latency (id, note) VALUES (-1, 'warm up')")
    deadline = time.time() + WAIT_S
    while -1 not in read_arrivals(log) and time.time() < deadline:
        time.sleep(0.1)
    installation.ack(PULL, installation.receive(PULL, wait="30s"))


def measure(installation: Installation, rate: float, rows: int, seconds: float, log: Path) -> None:
    count = int(rate * seconds)
    with installation.source() as conn:
        conn.execute("TRUNCATE latency")
    log.unlink(missing_ok=True)
    begin = time.time() + 1.0
    deadline = begin + seconds + WAIT_S
    sent_queue, pulled_queue = processes.Queue(), processes.Queue()
    writers = max(1, round(rate / rows / COMMITS_A_WRITER))
    running = [
        processes.Process(target=write, args=(installation.psql_url(), first, writers, rows, count, rate, begin, sent_queue)) for first in range(writers)
    ]
    running.append(processes.Process(target=pull, args=(installation.port, installation.token, count, deadline, pulled_queue)))
    for process in running:
        process.start()
    sent: Arrivals = {}
    for _ in range(writers):
        sent |= sent_queue.get(timeout=seconds + 2 * WAIT_S)
    took = max(sent.values()) - begin
    pulled = pulled_queue.get(timeout=2 * WAIT_S)
    while len(read_arrivals(log)) < count and time.time() < deadline:
        time.sleep(0.1)
    for process in running:
        process.join()
    print(f"{rate:g} changes a second, {rows} a commit, for {seconds:g} s; {count / took:.0f} a second were committed")
    report("pull", sent, pulled)
    report("push", sent, read_arrivals(log))


def report(what: str, sent: Arrivals, arrived: Arrivals) -> None:
    took = sorted((arrived[number] - at) * 1000 for number, at in sent.items() if number in arrived)
    picks = ", ".join(f"{name} {took[min(len(took) - 1, int(len(took) * share))]:.1f}" for name, share in
                      (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)))  # fmt: skip
    print(f"  {what}: {len(took)} of {len(sent)} arrived; ms: {picks}", flush=True)


def peaks(installation: Installation) -> None:
    for pid in installation.pids("manage.py"):
        status = Path(f"/proc/{pid}/status").read_text()
        peak = next(line.split(":")[1].strip() for line in status.splitlines() if line.startswith("VmHWM"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        print(f"  peak {peak:>12}  {command.split('manage.py', 1)[1].strip()[:50]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[200.0, 1000.0, 3000.0])
    parser.add_argument("--rows", type=int, default=1, help="changed by each commit")
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()
    with temporary() as installation:
        log = installation.home.parent / "pushed"
        with sink(noting(log)) as port:
            with installation.source() as conn:
                conn.execute("CREATE TABLE latency (id int PRIMARY KEY, note text)")
            installation.call("POST", "/api/http_endpoints", {"name": "latency", "url": f"http://127.0.0.1:{port}/"})
            shared = {"source": "playground", "tables": ["public.latency"]}
            installation.call("POST", "/api/consumers", {**shared, "name": PULL, "kind": "pull"})
            installation.call("POST", "/api/consumers", {**shared, "name": PUSH, "kind": "push", "endpoint": "latency", "batch_size": 100})
            warm_up(installation, log)
            for rate in options.rates:
                measure(installation, rate, options.rows, options.seconds, log)
            peaks(installation)


if __name__ == "__main__":
    main()
