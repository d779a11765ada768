"""Keep the process tree of `up` running: start, watch, restart, stop.

A child that dies is started again with growing pauses; one that no longer beats is killed and started again. The kernel
ends the children when this process is killed.
"""
from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from django.conf import settings
from django.db import DatabaseError, connection
from django.utils import timezone

from consumers.parent import die_with_parent
from consumers.store.models import Heartbeat

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 2.0
STEADY_S = 3.0  # one that lived so long had started well: the next pause is short again
STALE_AFTER_S = 30.0
LOOK_AT_BEATS_EVERY_S = 3.0
STOP_WITHIN_S = 8.0


@dataclass
class Child:
    """One command that is to run all the time. `beats`: the process name its heartbeat goes by."""

    beats: str
    arguments: list[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    not_before: float = 0.0
    pause: float = field(default=FIRST_PAUSE_S)

    @property
    def name(self) -> str:
        return self.arguments[0]


class Supervisor:
    """Runs the children until `stop`. `each_round` is called a few times a second, for what else is to be kept alive."""

    def __init__(self, children: list[Child], each_round: Callable[[], None]) -> None:
        self._children = children
        self._each_round = each_round
        self._looked_at = time.monotonic()
        self.stopping = False

    def stop(self, *_: object) -> None:
        self.stopping = True

    def start(self) -> None:
        for child in self._children:
            self._start(child)

    def run(self) -> None:
        while not self.stopping:
            self._each_round()
            now = time.monotonic()
            for child in self._children:
                self._keep(child, now)
            if now - self._looked_at >= LOOK_AT_BEATS_EVERY_S:
                self._looked_at = now
                self._kill_wedged(now)
            time.sleep(0.1)

    def stop_all(self) -> None:
        """Ask every child to stop, and end by force those that do not within STOP_WITHIN_S."""
        running = [child.process for child in self._children if child.process is not None and child.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        deadline = time.monotonic() + STOP_WITHIN_S
        for process in running:
            try:
                process.wait(max(0.05, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("pid=%s did not stop in time: killed", process.pid)
                process.kill()
                process.wait()

    def _start(self, child: Child) -> None:
        command = [sys.executable, os.path.join(settings.BASE_DIR, "manage.py"), *child.arguments]
        child.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=lambda: die_with_parent(signal.SIGTERM)
        )
        child.started_at = time.monotonic()

    def _keep(self, child: Child, now: float) -> None:
        process = child.process
        if process is not None:
            if process.poll() is None:
                return
            log.warning("%s ended with status %s: started again", child.name, process.returncode)
            child.process = None
            child.pause = FIRST_PAUSE_S if now - child.started_at > STEADY_S else min(child.pause * 2, LONGEST_PAUSE_S)
            child.not_before = now + child.pause
        if now >= child.not_before:
            self._start(child)

    def _kill_wedged(self, now: float) -> None:
        try:
            recent = timezone.now() - timedelta(seconds=STALE_AFTER_S)
            beating = set(Heartbeat.objects.filter(at__gte=recent).values_list("process", flat=True))
        except DatabaseError:
            connection.close()
            return
        for child in self._children:
            if child.process is not None and child.beats not in beating and now - child.started_at > STALE_AFTER_S:
                log.warning("%s has not beaten for %s s: killed and started again", child.name, int(STALE_AFTER_S))
                child.process.kill()
