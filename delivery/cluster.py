"""Watch the django-q2 clusters from outside: keep their workers busy, and start one anew when it no longer gets on.

A cluster whose idle worker is killed can stop taking tasks altogether, and none of its processes notices. So the watcher
goes by what counts: pumps that beat, and backfills that are worked on. When there are fewer pumps than slots for some
seconds although tasks are queued, or nobody takes the backfills that are due, the cluster is replaced.
"""
from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any
from uuid import uuid4

import psycopg
from django.conf import settings
from django.db import DatabaseError, connection
from django_q.brokers import get_broker
from django_q.tasks import async_task
from redis.exceptions import RedisError

from consumers.parent import die_with_parent
from consumers.store import backfills, lifecycle, turns
from consumers.store.connection import store_connection, why_away
from delivery.chores import Chores
from delivery.push.tasks import PUMP_TASK

log = logging.getLogger(__name__)

REPLAY_TASK = "capture.tasks.replay"  # by name: delivery does not know capture
REPLAY_CLUSTER = "replay"  # in settings.Q_CLUSTER's ALT_CLUSTERS
TICK_S = 0.05
LOOK_EVERY_S = 0.5
START_GRACE_S, MOST_GRACE_S = 8.0, 120.0
PATIENCE_S, REPLAY_PATIENCE_S = 4.0, 10.0
STOP_WITHIN_S = 5.0


class Cluster:
    """One django-q2 cluster, in a session of its own."""

    def __init__(self, queue: str | None = None) -> None:
        """`queue`: one of ALT_CLUSTERS; None is the one that pushes."""
        self.queue = queue
        self.name = ""
        self._grace_s = START_GRACE_S
        self._started_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self) -> None:
        """Start it, for the first time or because it ended."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            log.warning("the %s cluster ended with status %s: started again", self._called(), self._process.returncode)
        self._restart()

    @property
    def due_at(self) -> float:
        """When its processes should have begun to work."""
        return self._started_at + self._grace_s

    def works(self) -> None:
        """It does: the next one need not be slower to begin."""
        self._grace_s = START_GRACE_S

    def replace(self) -> None:
        """It does not work. On a machine where one takes longer than that to begin, the next has twice as long."""
        self._grace_s = min(2 * self._grace_s, MOST_GRACE_S)
        self._restart()

    def _restart(self) -> None:
        self.kill()
        self.name = str(uuid4())
        arguments = [sys.executable, os.path.join(settings.BASE_DIR, "manage.py"), "run_workers", "--cluster"]
        environment = {**os.environ, "SEQUIN_CLUSTER": self.name}
        if self.queue is not None:
            environment["Q_CLUSTER_NAME"] = self.queue
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, start_new_session=True, env=environment, preexec_fn=die_with_parent
        )
        self._started_at = time.monotonic()
        log.info("started %s cluster pid=%s", self._called(), self._process.pid)

    def kill(self) -> None:
        """End the whole session of the cluster; the kernel takes along whoever outlives its parent."""
        process = self._process
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ask_to_end(self) -> None:
        if self._process is not None and self.is_running:
            self._process.send_signal(signal.SIGTERM)

    def end(self, deadline: float) -> None:
        """Wait until it has ended; then by force."""
        if self._process is not None:
            try:
                self._process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("the %s cluster did not stop in time: killed", self._called())
        self.kill()

    def _called(self) -> str:
        return self.queue or "push"


class Notices:
    """Hears when turns are given up: a slot may be free."""

    def __init__(self) -> None:
        self._listening: psycopg.Connection[Any] | None = None

    def listen(self) -> None:
        """Begin, unless it does already."""
        if self._listening is None:
            self._listening = store_connection(application_name="sequin watcher")
            self._listening.execute("LISTEN sequin_turns")

    def wait(self, longest_s: float) -> bool:
        """Until there is a notice; false when there was none."""
        if self._listening is None:
            time.sleep(longest_s)
            return False
        try:
            # Only then psycopg: its own wait costs more than all the watcher's looks.
            readable, _, _ = select.select([self._listening], [], [], longest_s)
            return bool(readable) and any(True for _ in self._listening.notifies(timeout=0))
        except (psycopg.Error, OSError):
            self.close()
            return False

    def close(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None


class PushKeeper:
    """Keeps the slots of the cluster that pushes pumping."""

    def __init__(self, workers: int) -> None:
        self.cluster = Cluster()
        self._workers = workers
        self._full_at = 0.0
        self._enqueued_at = 0.0

    def look(self, now: float) -> None:
        lifecycle.beat("workers", str(self._workers))
        self.cluster.keep()
        pumps = turns.alive_pumps(self.cluster.name)
        if pumps >= self._workers:
            self._full_at = now
            self.cluster.works()
            return
        self._enqueue(now)
        quiet_since = max(self._full_at, self.cluster.due_at)
        if now - quiet_since > PATIENCE_S:
            log.warning("%s of %s pumps have beaten lately: the cluster is started anew", pumps, self._workers)
            self.cluster.replace()

    def forgive(self) -> None:
        """An outage is not the cluster's fault: it has time to begin again."""
        self._full_at = time.monotonic()

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


class ReplayKeeper:
    """Sees that backfills which are due are worked on."""

    def __init__(self) -> None:
        self.cluster = Cluster(REPLAY_CLUSTER)
        self._due_since = 0.0

    def look(self, now: float) -> float:
        """Returns after how many seconds to look again: soon, while backfills run."""
        self.cluster.keep()
        running, due = backfills.running_and_due()
        if not due:
            self._due_since = 0.0
            if running:
                self.cluster.works()
            return TICK_S if running else LOOK_EVERY_S
        if int(get_broker(REPLAY_CLUSTER).queue_size()) == 0:
            async_task(REPLAY_TASK, cluster=REPLAY_CLUSTER)
        self._due_since = self._due_since or now
        waited = now - max(self._due_since, self.cluster.due_at)
        if waited > REPLAY_PATIENCE_S:
            if lifecycle.beat_age_s("replay", self.cluster.name) <= REPLAY_PATIENCE_S:
                self.cluster.works()
            else:
                log.warning("nobody has worked on %s due backfills for %s s: the cluster is started anew", due, int(waited))
                self.cluster.replace()
            self._due_since = 0.0
        return TICK_S


class Watcher:
    """Runs both clusters: one of `workers` slots that pushes, and the one that replays."""

    def __init__(self, workers: int) -> None:
        self._push = PushKeeper(workers)
        self._replay = ReplayKeeper()
        self._notices = Notices()
        self._stopping = False

    def stop(self, *_: Any) -> None:
        self._stopping = True

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        chores = Chores()
        chores.start()
        push_at = replay_at = 0.0
        try:
            while not self._stopping:
                now = time.monotonic()
                try:
                    if now >= push_at:
                        push_at = now + LOOK_EVERY_S
                        self._push.look(now)
                        self._notices.listen()
                    if now >= replay_at:
                        replay_at = now + self._replay.look(now)
                except (DatabaseError, psycopg.Error, OSError, RedisError) as error:
                    log.warning("the store or the broker is away: %s", why_away(error))
                    connection.close()
                    self._push.forgive()
                    push_at = replay_at = now + LOOK_EVERY_S
                if self._notices.wait(TICK_S):
                    # A moment later: a task that waits in the cluster already begins by itself.
                    push_at = min(push_at, time.monotonic() + TICK_S)
        finally:
            self._notices.close()
            self._end()
            chores.stop()

    def _end(self) -> None:
        """Let the pumps give back what they hold, and steps of backfills end, then the clusters; after a while by force."""
        deadline = time.monotonic() + STOP_WITHIN_S
        clusters = (self._push.cluster, self._replay.cluster)
        for cluster in clusters:
            cluster.ask_to_end()
        # Said again and again: a pump that has just begun does not listen yet.
        while any(cluster.is_running for cluster in clusters) and time.monotonic() < deadline:
            self._tell_pumps()
            time.sleep(TICK_S)
        for cluster in clusters:
            cluster.end(deadline)

    def _tell_pumps(self) -> None:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_notify('sequin_stop', %s)", [self._push.cluster.name])
        except DatabaseError:
            connection.close()
