"""Measure what hanging endpoints cost the others: 10 push consumers, 3 of whose endpoints never answer, 2 workers.

Every row goes to all ten. Prints commit → received of the seven that answer, once with the three hanging and once with
all ten answering, each in an installation of its own. `python bench/hanging.py [ROWS A SECOND] [SECONDS]`.
"""
from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["SEQUIN_WORKERS"] = "2"

from bench._installations import temporary  # noqa: E402

CONSUMERS, HANGING = 10, 3


def serve(arrived: dict[int, float], hangs: bool) -> str:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if hangs:
                time.sleep(60)
                return
            arrived.setdefault(json.loads(body)["record"]["id"], time.time())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # a full one costs a second: the kernel's first retransmission

        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


def measure(hanging: int, rate: float, seconds: float) -> None:
    with temporary() as installation:
        arrivals: list[dict[int, float]] = [{} for _ in range(CONSUMERS)]
        with installation.source() as conn:
            conn.execute("CREATE TABLE shared (id int PRIMARY KEY)")
        for number, arrived in enumerate(arrivals):
            url = serve(arrived, number < hanging)
            installation.call("POST", "/api/http_endpoints", {"name": f"e{number}", "url": url})
            body = {"name": f"c{number}", "source": "playground", "kind": "push", "tables": ["public.shared"], "endpoint": f"e{number}"}
            status, answer = installation.call("POST", "/api/consumers", body)
            assert status == 201, answer
        sent: dict[int, float] = {}
        with installation.source() as conn:
            conn.execute("INSERT INTO shared VALUES (-1)")  # processes just started take a second to connect
            deadline = time.monotonic() + 30
            while any(-1 not in arrived for arrived in arrivals[hanging:]) and time.monotonic() < deadline:
                time.sleep(0.05)
            began = time.time()
            for number in range(int(rate * seconds)):
                time.sleep(max(0.0, began + number / rate - time.time()))
                conn.execute("INSERT INTO shared VALUES (%s)", [number])
                sent[number] = time.time()
        healthy = arrivals[hanging:] if hanging else arrivals[HANGING:]
        deadline = time.monotonic() + 30
        while any(len(arrived) <= len(sent) for arrived in healthy) and time.monotonic() < deadline:
            time.sleep(0.05)
        took = sorted((arrived[n] - at) * 1000 for arrived in healthy for n, at in sent.items() if n in arrived)
        picks = ", ".join(f"{name} {took[min(len(took) - 1, int(len(took) * share))]:.0f}" for name, share in
                          (("median", 0.5), ("p99", 0.99), ("max", 1.0)))  # fmt: skip
        print(f"{hanging} of {CONSUMERS} hanging: {len(took)} of {len(sent) * len(healthy)} arrived at the others; ms: {picks}", flush=True)


def main() -> None:
    rate = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    for hanging in (0, HANGING):
        measure(hanging, rate, seconds)


if __name__ == "__main__":
    main()
