"""Measure what hanging endpoints cost the others: 10 push consumers, 3 of whose endpoints never answer, 2 workers.

    python bench/hanging.py [--consumers 10] [--hanging 3] [--rate 20] [--seconds 10]

Every row goes to all of them. Prints commit → received of those that answer, once with the others hanging and once with all
answering, each in an installation of its own. `--consumers 500 --hanging 20 --rate 1` is what pumps were designed for.
"""
from __future__ import annotations

import argparse
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

from tests.installation import temporary  # noqa: E402


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


def measure(consumers: int, hanging: int, counted: int, rate: float, seconds: float) -> None:
    """`counted`: how many of the last consumers are looked at, the same ones with and without the hanging."""
    with temporary() as installation:
        arrivals: list[dict[int, float]] = [{} for _ in range(consumers)]
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
        healthy = arrivals[-counted:]
        deadline = time.monotonic() + 30
        while any(len(arrived) <= len(sent) for arrived in healthy) and time.monotonic() < deadline:
            time.sleep(0.05)
        took = sorted((arrived[n] - at) * 1000 for arrived in healthy for n, at in sent.items() if n in arrived)
        picks = ", ".join(f"{name} {took[min(len(took) - 1, int(len(took) * share))]:.0f}" for name, share in
                          (("median", 0.5), ("p99", 0.99), ("max", 1.0)))  # fmt: skip
        print(f"{hanging} of {consumers} hanging: {len(took)} of {len(sent) * len(healthy)} arrived at the others; ms: {picks}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consumers", type=int, default=10)
    parser.add_argument("--hanging", type=int, default=3)
    parser.add_argument("--rate", type=float, default=20.0, help="rows a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    for hanging in (0, options.hanging):
        measure(options.consumers, hanging, options.consumers - options.hanging, options.rate, options.seconds)


if __name__ == "__main__":
    main()
