"""Ports for servers of the tests: outside the range that the kernel takes for connections, each worker's from a range of its own."""
from __future__ import annotations

import itertools
import os
import socket

FIRST, PER_WORKER = 11_000, 2_500

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_tried = itertools.count(os.getpid() % PER_WORKER)


def new_port() -> int:
    """Nobody listens there, and no other call of this process or of the other workers gets it soon."""
    for number in itertools.islice(_tried, PER_WORKER):
        port = FIRST + _worker % 8 * PER_WORKER + number % PER_WORKER
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
