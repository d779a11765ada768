"""Keep the process tree of `up` running: start, watch, restart, stop.

A child that dies is started again with growing pauses; one that no longer beats is killed and started again. Beats are read
from the store on a thread of its own, so that a store that hangs holds up nobody. The kernel ends the children when this
process is killed.
"""
from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psycopg
from django.conf import settings

from consumers.parent import die_with_parent
from consumers.store.connection import store_connection

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 2.0
STEADY_S = 3.0  # one that lived so long had started well: the next pause is short again
STALE_AFTER_S = 30.0
LOOK_EVERY_S = 3.0
LOOK_WITHIN_S = 5
STOP_WITHIN_S = 6.5


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


class Beats:
    """What the store says of the processes of this machine, looked at again and again over a new connection."""

    def __init__(self) -> None:
        self._beating: frozenset[str] = frozenset()
        self._answered_at = time.monotonic()
        self._answering_since = time.monotonic()

    def watch(self) -> None:
        threading.Thread(target=self._watch, name="beats", daemon=True).start()

    def silent_s(self) -> float:
        """For how long the store has given no answer at all; an error is one."""
        return time.monotonic() - self._answered_at

    def stale(self, processes: list[str]) -> list[str]:
        """Those of these processes that have not beaten for STALE_AFTER_S, although they could have all that time."""
        now = time.monotonic()
        if now - self._answered_at > 2 * LOOK_EVERY_S or now - self._answering_since < STALE_AFTER_S:
            return []
        return [process for process in processes if process not in self._beating]

    def _watch(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self._look()
            except psycopg.Error as error:
                if "timeout expired" not in str(error):
                    self._answered_at = time.monotonic()
                self._answering_since = time.monotonic()
            if time.monotonic() - began > LOOK_WITHIN_S:
                self._answering_since = time.monotonic()  # who could not write could not beat either
            time.sleep(LOOK_EVERY_S)

    def _look(self) -> None:
        with store_connection(application_name="sequin supervisor", connect_timeout=LOOK_WITHIN_S) as conn:
            rows = conn.execute(
                "SELECT DISTINCT process FROM heartbeats WHERE host = %s AND at > clock_timestamp() - %s * interval '1 s'",
                [socket.gethostname(), STALE_AFTER_S],
            ).fetchall()
        self._beating = frozenset(row[0] for row in rows)
        self._answered_at = time.monotonic()


class Supervisor:
    """Runs the children until `stop`. `each_round` is called a few times a second, for what else is to be kept alive."""

    def __init__(self, children: list[Child], each_round: Callable[[], None]) -> None:
        self._children = children
        self._each_round = each_round
        self._looked_at = time.monotonic()
        self.beats = Beats()
        self.stopping = False

    def stop(self, *_: object) -> None:
        self.stopping = True

    def start(self) -> None:
        self.beats.watch()
        for child in self._children:
            self._start(child)

    def run(self) -> None:
        while not self.stopping:
            self._each_round()
            now = time.monotonic()
            for child in self._children:
                self._keep(child, now)
            if now - self._looked_at >= LOOK_EVERY_S:
                self._looked_at = now
                self._kill_wedged(now)
            time.sleep(0.1)

    def ask_to_end(self) -> list[subprocess.Popen[bytes]]:
        """Ask every child to end; those that run. While `run` does, they are started again as any that ended."""
        running = [child.process for child in self._children if child.process is not None and child.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        return running

    def stop_all(self) -> None:
        """Ask every child to end, and end by force those that do not within STOP_WITHIN_S."""
        running = self.ask_to_end()
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
        stale = self.beats.stale([child.beats for child in self._children])
        for child in self._children:
            if child.process is not None and child.beats in stale and now - child.started_at > STALE_AFTER_S:
                log.warning("%s has not beaten for %s s: killed and started again", child.name, int(STALE_AFTER_S))
                child.process.kill()
