"""What run_workers does besides pushing: count for the charts, judge alerts and send them, keep hot tables small. Each on a
thread of its own.

Any number of processes may run it; the store's locks see that each round is done by one.
"""
from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from django.db import DatabaseError, connection

from consumers.store import counters, hot
from consumers.store.connection import why_away
from delivery import alerting

log = logging.getLogger(__name__)

ROUND_S = 5.0
FORGET_EVERY_S = 3600.0
STOP_WITHIN_S = 1.0


class Chores:
    """Started with the watcher, ended with it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._forgot_at = -FORGET_EVERY_S
        self._threads = [
            threading.Thread(target=self._run, args=(task,), name=name, daemon=True)
            for name, task in (("counting", self.count), ("judging", alerting.judge), ("alerting", alerting.send))
        ]
        self._threads.append(threading.Thread(target=hot.keep_small, name="housekeeping", args=(self._stop,), daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        deadline = time.monotonic() + STOP_WITHIN_S
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    def count(self) -> None:
        counters.count()
        if time.monotonic() - self._forgot_at >= FORGET_EVERY_S:
            self._forgot_at = time.monotonic()
            counters.forget_old()

    def _run(self, task: Callable[[], Any]) -> None:
        try:
            while not self._stop.is_set():
                try:
                    task()
                except (DatabaseError, OSError) as error:
                    log.warning("%s waits for the store: %s", threading.current_thread().name, why_away(error))
                    connection.close()
                except Exception:
                    log.exception("a round of %s failed", threading.current_thread().name)
                self._stop.wait(ROUND_S)
        finally:
            connection.close()
