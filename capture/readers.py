"""Keep one reader process for each source: started, restarted, stopped as the configuration says. A paused source's only looks.

A process for each, so that a source that hangs or bursts touches no other. The readers end with this process, even when
it is killed.
"""
from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psycopg
from django.conf import settings
from django.db import DatabaseError, connection

from consumers.models import Source
from consumers.parent import die_with_parent
from consumers.store import lifecycle
from consumers.store.backlogs import enforce
from consumers.store.connection import store_connection, why_away
from consumers.store.models import Heartbeat
from consumers.store.partitions import maintain

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
MAINTAIN_EVERY_S = 60.0
STALE_AFTER_S = 60
STOP_WITHIN_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


@dataclass
class Child:
    process: subprocess.Popen[bytes]
    version: Any
    started_at: float = field(default_factory=time.monotonic)


class Readers:
    """The reader processes of the chosen sources, or of all."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._children: dict[str, Child] = {}
        self._pauses: dict[str, tuple[float, float]] = {}  # source id → (not before, next pause)
        self._stopping = False
        self._maintained_at = 0.0

    def stop(self, *_: Any) -> None:
        self._stopping = True

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        try:
            while not self._stopping:
                try:
                    self._look()
                    self._pause(early=True)
                except DatabaseError as error:
                    log.warning("the store is away: %s", why_away(error))
                    connection.close()
                    self._pause(early=False)
        finally:
            self._stop_all()

    def _look(self) -> None:
        lifecycle.beat("capture")
        wanted = self._wanted()
        for key, child in list(self._children.items()):
            source = wanted.get(key)
            if child.process.poll() is not None:
                self._ended(key, child)
            elif source is None or source.updated_at != child.version:
                self._end(key)
        self._kill_stale()
        for key, source in wanted.items():
            if key not in self._children and self._pauses.get(key, (0.0, 0.0))[0] <= time.monotonic():
                self._start(source)
        if time.monotonic() - self._maintained_at >= MAINTAIN_EVERY_S:
            self._maintained_at = time.monotonic()
            self._maintain()

    def _wanted(self) -> dict[str, Source]:
        found = Source.objects.only("id", "name", "updated_at")
        if self._names:
            found = found.filter(name__in=self._names)
        return {str(source.pk): source for source in found}

    def _start(self, source: Source) -> None:
        arguments = [sys.executable, os.path.join(settings.BASE_DIR, "manage.py"), "run_capture", "--reader", str(source.pk)]
        # By SIGKILL: a stopped process would keep anything less for later, and the source with it.
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        self._children[str(source.pk)] = Child(process, source.updated_at)
        log.info("started reader source=%s pid=%s", source.name, process.pid)

    def _ended(self, key: str, child: Child) -> None:
        del self._children[key]
        steady = time.monotonic() - child.started_at > 10
        pause = FIRST_PAUSE_S if steady else self._pauses.get(key, (0.0, FIRST_PAUSE_S))[1]
        self._pauses[key] = (time.monotonic() + pause, min(pause * 2, LONGEST_PAUSE_S))
        if child.process.returncode != 0:
            log.warning("reader pid=%s ended with status %s", child.process.pid, child.process.returncode)

    def _end(self, key: str) -> None:
        child = self._children.pop(key)
        child.process.terminate()
        try:
            child.process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()

    def _kill_stale(self) -> None:
        """A reader that no longer beats hangs: end it, so that it is started again."""
        before = lifecycle.clock() - timedelta(seconds=STALE_AFTER_S)  # beats are dated by the store's clock
        pids = {
            child.process.pid: child for child in self._children.values()
            if time.monotonic() - child.started_at > STALE_AFTER_S
        }  # fmt: skip
        if not pids:
            return
        fresh = set(Heartbeat.objects.filter(process="reader", at__gte=before, pid__in=list(pids)).values_list("pid", flat=True))
        for pid, child in pids.items():
            if pid not in fresh:
                log.warning("reader pid=%s has not come round for %s s: killed", pid, STALE_AFTER_S)
                child.process.kill()

    def _maintain(self) -> None:
        try:
            with store_connection(application_name="sequin maintenance") as conn:
                enforce(conn)
                maintain(conn, settings.SEQUIN_RETENTION)
        except psycopg.Error as error:
            log.warning("log maintenance failed, tried again in %s s: %s", int(MAINTAIN_EVERY_S), error)

    def _pause(self, *, early: bool) -> None:
        """`early`: not longer than all readers live."""
        deadline = time.monotonic() + LOOK_EVERY_S
        while not self._stopping and time.monotonic() < deadline:
            if early and any(child.process.poll() is not None for child in self._children.values()):
                time.sleep(0.05)
                return
            time.sleep(0.1)

    def _stop_all(self) -> None:
        for child in self._children.values():
            if child.process.poll() is None:
                child.process.terminate()
        deadline = time.monotonic() + STOP_WITHIN_S
        for child in self._children.values():
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
