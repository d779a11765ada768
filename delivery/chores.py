"""What run_workers does besides pushing: count for the charts, judge alerts. On a thread with a connection of its own.

Any number of processes may run it; the store's locks see that each round is done by one.
"""
from __future__ import annotations

import logging
import threading
import time

from django.db import DatabaseError, connection

from consumers.store import counters

log = logging.getLogger(__name__)

ROUND_S = 5.0
FORGET_EVERY_S = 3600.0
STOP_WITHIN_S = 2.0


class Chores:
    """Started with the watcher, ended with it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chores", daemon=True)
        self._forgot_at = -FORGET_EVERY_S

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(STOP_WITHIN_S)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self.step()
                except (DatabaseError, OSError) as error:
                    log.warning("counting and alerting wait for the store: %s", " ".join(str(error).split())[:200])
                    connection.close()
                except Exception:
                    log.exception("a round of counting and alerting failed")
                self._stop.wait(ROUND_S)
        finally:
            connection.close()

    def step(self) -> None:
        """One round."""
        counters.count()
        if time.monotonic() - self._forgot_at >= FORGET_EVERY_S:
            self._forgot_at = time.monotonic()
            counters.forget_old()
