"""`manage.py run_web`: the production web server: console, API, /health, /metrics.

granian in WSGI mode, one process: a long poll holds a parked thread there and nothing else.
"""
from __future__ import annotations

import http.client
import logging
import os
import signal
import socket
import threading
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from consumers.parent import die_with_parent

log = logging.getLogger(__name__)

SPARE_THREADS = 100  # for those that do not wait
KILL_AFTER_S = 4  # less than what supervision.py gives it in all
BACKLOG = 2048
BEAT_EVERY_S, ANSWER_WITHIN_S = 2, 15
ALIVE_PATH = "/-/alive"  # is nowhere: a 404 is an answer, and costs no look at the store


class Command(BaseCommand):
    help = "Serve console, API, /health and /metrics."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=port_number, default=8000)

    def handle(self, *_: Any, **options: Any) -> None:
        host, port = options["host"], options["port"]
        demand_free(host, port)
        from granian import Granian
        from granian.constants import Interfaces

        # The worker process ends with this one, even when this one is killed.
        os.register_at_fork(after_in_child=lambda: die_with_parent(signal.SIGKILL))
        server = Granian(
            "sequinapp.wsgi:application",
            address=host,
            port=port,
            interface=Interfaces.WSGI,
            workers=1,
            blocking_threads=settings.SEQUIN_MAX_WAITERS + SPARE_THREADS,
            backlog=BACKLOG,
            backpressure=settings.SEQUIN_MAX_WAITERS + SPARE_THREADS,
            respawn_failed_workers=True,
            respawn_interval=0.2,
            workers_kill_timeout=KILL_AFTER_S,
            websockets=False,
            log_enabled=False,
            working_dir=Path(settings.BASE_DIR),
        )
        os.environ["SEQUIN_WEB_BEATS"] = f"{dialled(host)}:{port}"
        log.info("serving http://%s:%s", f"[{host}]" if ":" in host else host, port)
        server.serve()


def port_number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65_535:
        raise ArgumentTypeError(f"expected a port from 1 to 65535, got {text!r}")
    return int(text)


def demand_free(host: str, port: int) -> None:
    """A port that is taken gets one line, not granian's traceback."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise CommandError(f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port", returncode=2) from None


def beat_while_serving(address: str) -> None:
    """Say every two seconds that this web process reaches the store, as long as it answers requests too."""
    from django.db import DatabaseError, connection

    from consumers.store import lifecycle

    def beat() -> None:
        pause = threading.Event()
        while True:
            try:
                if _answers(address):
                    lifecycle.beat("web")
            except DatabaseError:
                pass
            finally:
                connection.close()
            pause.wait(BEAT_EVERY_S)

    threading.Thread(target=beat, name="web-heartbeat", daemon=True).start()


def _answers(address: str) -> bool:
    """Whether a request gets through to Django and back; what the answer is does not matter."""
    conn = http.client.HTTPConnection(address, timeout=ANSWER_WITHIN_S)
    try:
        conn.request("GET", ALIVE_PATH, headers={"Host": _allowed_host()})
        conn.getresponse().read()
        return True
    except (OSError, http.client.HTTPException):
        return False
    finally:
        conn.close()


def _allowed_host() -> str:
    """A name that Django answers to."""
    names = [name.lstrip(".") for name in settings.ALLOWED_HOSTS if name != "*"]
    return names[0] if names else "localhost"


def dialled(host: str) -> str:
    """Where this machine reaches a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
