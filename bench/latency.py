"""Measure commit → received at a steady rate of single-row commits, for a waiting pull client and a push receiver.

Everything runs on this machine, in an installation of its own: writer, receiver, client and service share its cores.
`python bench/latency.py [RATE] [SECONDS]`. Prints milliseconds, and the peak memory of each process.
"""
from __future__ import annotations

import http.client
import json
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.installation import Installation  # noqa: E402

PULL, PUSH = "latency-pull", "latency-push"


def serve(arrived: dict[int, float]) -> str:
    """An endpoint on loopback that notes when each row arrived."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            arrived[body["record"]["id"]] = time.time()
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # a full one costs a second: the kernel's first retransmission

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


def pull(installation: Installation, arrived: dict[int, float], stopping: threading.Event) -> None:
    conn = http.client.HTTPConnection("127.0.0.1", installation.port)
    headers = {"Authorization": f"Bearer {installation.token}", "Content-Type": "application/json"}
    base = f"/api/http_pull_consumers/{PULL}"
    while not stopping.is_set():
        conn.request("GET", f"{base}/receive?batch_size=100&wait_for=1s", headers=headers)
        messages = json.loads(conn.getresponse().read())["data"]
        now = time.time()
        for message in messages:
            arrived[message["data"]["record"]["id"]] = now
        if messages:
            conn.request("POST", f"{base}/ack", json.dumps({"ack_ids": [m["ack_id"] for m in messages]}), headers)
            conn.getresponse().read()


def write(installation: Installation, rate: float, count: int) -> dict[int, float]:
    """Commit single rows at a steady rate; when each commit was answered."""
    sent: dict[int, float] = {}
    with installation.source() as conn:
        began = time.time()
        for number in range(count):
            time.sleep(max(0.0, began + number / rate - time.time()))
            conn.execute("INSERT INTO latency (id, note) VALUES (%s, 'a note')", [number])
            sent[number] = time.time()
    return sent


def warm_up(installation: Installation, *arrivals: dict[int, float]) -> None:
    """Processes just started take a second to connect; measured is the steady state."""
    with installation.source() as conn:
        conn.execute("INSERT INTO latency (id, note) VALUES (-1, 'warm up')")
    deadline = time.monotonic() + 30
    while any(-1 not in arrived for arrived in arrivals) and time.monotonic() < deadline:
        time.sleep(0.05)


def report(what: str, sent: dict[int, float], arrived: dict[int, float]) -> None:
    took = sorted((arrived[number] - at) * 1000 for number, at in sent.items() if number in arrived)
    picks = ", ".join(f"{name} {took[min(len(took) - 1, int(len(took) * share))]:.1f}" for name, share in
                      (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)))  # fmt: skip
    print(f"{what}: {len(took)} of {len(sent)} arrived; ms: {picks}")


def peaks(installation: Installation) -> None:
    for pid in installation.pids("manage.py"):
        status = Path(f"/proc/{pid}/status").read_text()
        peak = next(line.split(":")[1].strip() for line in status.splitlines() if line.startswith("VmHWM"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        print(f"  peak {peak:>12}  {command.split('manage.py', 1)[1].strip()[:50]}")


def main() -> None:
    rate = float(sys.argv[1]) if len(sys.argv) > 1 else 200.0
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    base = Path(tempfile.mkdtemp(prefix="sequin-bench-"))
    base.chmod(0o711)
    installation = Installation(base / "home")
    installation.start()
    pulled: dict[int, float] = {}
    pushed: dict[int, float] = {}
    try:
        with installation.source() as conn:
            conn.execute("CREATE TABLE latency (id int PRIMARY KEY, note text)")
        installation.call("POST", "/api/http_endpoints", {"name": "latency", "url": serve(pushed)})
        shared = {"source": "playground", "tables": ["public.latency"]}
        installation.call("POST", "/api/consumers", {**shared, "name": PULL, "kind": "pull"})
        installation.call("POST", "/api/consumers", {**shared, "name": PUSH, "kind": "push", "endpoint": "latency"})
        stopping = threading.Event()
        puller = threading.Thread(target=pull, args=(installation, pulled, stopping))
        puller.start()
        warm_up(installation, pulled, pushed)
        sent = write(installation, rate, int(rate * seconds))
        deadline = time.monotonic() + 30
        while (len(pulled) <= len(sent) or len(pushed) <= len(sent)) and time.monotonic() < deadline:
            time.sleep(0.05)
        stopping.set()
        puller.join()
        print(f"{rate:g} single-row commits a second for {seconds:g} s")
        report("pull", sent, pulled)
        report("push", sent, pushed)
        peaks(installation)
    finally:
        installation.stop()


if __name__ == "__main__":
    main()
