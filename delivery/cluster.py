"""Watch a django-q2 cluster from outside: keep its slots pumping, and start it anew when it no longer does.

A cluster whose idle worker is killed can stop taking tasks altogether, and none of its processes notices. So the watcher
goes by what counts: pumps that beat. Fewer than slots for some seconds, although tasks are queued: the cluster is replaced.
"""
from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from typing import Any
from uuid import uuid4

from django.conf import settings
from django.db import DatabaseError, connection
from django_q.brokers import get_broker
from django_q.tasks import async_task
from redis.exceptions import RedisError

from consumers.store import lifecycle, turns
from delivery.chores import Chores
from delivery.push.tasks import PUMP_TASK

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
START_GRACE_S = 8.0
PATIENCE_S = 4.0
STOP_WITHIN_S = 7.0


class Watcher:
    """Runs one cluster of `workers` slots and keeps it pumping."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._full_at = 0.0
        self._enqueued_at = 0.0
        self._name = ""

    def stop(self, *_: Any) -> None:
        self._stopping = True

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        chores = Chores()
        chores.start()
        try:
            while not self._stopping:
                try:
                    self._look()
                except (DatabaseError, OSError, RedisError) as error:
                    log.warning("the store or the broker is away: %s", " ".join(str(error).split())[:200])
                    connection.close()
                    self._full_at = time.monotonic()  # an outage is not the cluster's fault: it has time to begin again
                self._pause()
        finally:
            self._end()
            chores.stop()

    def _look(self) -> None:
        now = time.monotonic()
        lifecycle.beat("workers", str(self._workers))
        if self._process is None or self._process.poll() is not None:
            if self._process is not None:
                log.warning("the cluster ended with status %s: started again", self._process.returncode)
                self._kill()
            self._start()
        pumps = turns.alive_pumps(self._name)
        if pumps >= self._workers:
            self._full_at = now
            return
        self._enqueue(now)
        quiet_since = max(self._full_at, self._started_at + START_GRACE_S)
        if now - quiet_since > PATIENCE_S:
            log.warning("%s of %s pumps have beaten lately: the cluster is started anew", pumps, self._workers)
            self._kill()
            self._start()

    def _enqueue(self, now: float) -> None:
        """A task for each slot, on all machines, that neither pumps nor has a task waiting."""
        missing = self._slots() - turns.alive_pumps() - int(get_broker().queue_size())
        # A task that was taken a moment ago does not beat yet.
        if missing > 0 and now - self._enqueued_at > 1.0:
            self._enqueued_at = now
            for _ in range(min(missing, self._workers)):
                async_task(PUMP_TASK)

    def _slots(self) -> int:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT coalesce(sum(detail::integer), 0) FROM heartbeats WHERE process = 'workers'"
                " AND at > now() - interval '5 s'"
            )
            row = cursor.fetchone()
        return int(row[0]) if row else self._workers

    def _start(self) -> None:
        self._name = str(uuid4())
        arguments = [sys.executable, os.path.join(settings.BASE_DIR, "manage.py"), "run_workers", "--cluster"]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "SEQUIN_CLUSTER": self._name}
        )
        self._started_at = time.monotonic()
        log.info("started cluster pid=%s workers=%s", self._process.pid, self._workers)

    def _kill(self) -> None:
        """End the whole session of the cluster; the kernel takes along whoever outlives its parent."""
        process = self._process
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()

    def _end(self) -> None:
        """Let the pumps give back what they hold, then the cluster end; after a while by force."""
        process = self._process
        if process is not None and process.poll() is None:
            try:
                with connection.cursor() as cursor:
                    cursor.execute("SELECT pg_notify('sequin_stop', %s)", [self._name])
            except DatabaseError:
                connection.close()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                log.warning("the cluster did not stop within %s s: killed", STOP_WITHIN_S)
        self._kill()

    def _pause(self) -> None:
        deadline = time.monotonic() + LOOK_EVERY_S
        while not self._stopping and time.monotonic() < deadline:
            time.sleep(0.05)
