"""Keep one source read: lock it, connect, read, and connect again after whatever breaks. The life of a reader process.

Of a paused source nothing is read, but what that costs is watched: its slot goes on keeping WAL on the source's disk.
"""
from __future__ import annotations

import logging
import re
import signal
import time
from typing import Any

import psycopg
from django.conf import settings
from django.db import DatabaseError, connection

from capture import surroundings
from capture.disk import shortage
from capture.reader import NoRoom, Reader
from capture.stream import DecodingFailed, SlotActive, StreamEnded
from capture.surroundings import Slot, SlotUnusable
from consumers.hosting import hint
from consumers.models import Source
from consumers.source_connection import SourceUnreachable, connect, cut_after, reason_of
from consumers.store import lifecycle
from consumers.store.appender import Appender, ProgressMoved

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.0
UNUSABLE_PAUSE_S = {"slot_lost": 30.0}  # nothing changes by itself; recover starts the reader anew at once
STEADY_S = 10.0  # a connection that lived so long was a good one: the next pause is short again
STANDBY_LOOK_S = 1.0
BEAT_EVERY_S = 2.0
DISK_EVERY_S = 1.0
TICK_S = 0.1
WATCH_EVERY_S = 10
SAME_FAILURES = 5  # of the server's decoding, at the same place: then it is not tried as often any more
PASSING = (SourceUnreachable, StreamEnded, ProgressMoved, psycopg.Error, DatabaseError, OSError)


class Reading:
    """Reads one source until told to stop."""

    reader_class: type[Reader] = Reader

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stopping = False  # no threading.Event: the handler that sets it would wait for a lock that the wait it interrupts may hold
        self._beat_at = 0.0
        self._disk_at = -DISK_EVERY_S
        self._disk: str | None = None
        self._reader: Reader | None = None
        self._failure: tuple[str, object] | None = None  # of the server's decoding: what it said, and where the log ended
        self._failures = 0

    def stop(self, *_: Any) -> None:
        self.stopping = True

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        pause = FIRST_PAUSE_S
        while not self.stopping:
            began = time.monotonic()
            try:
                if self.source.status == "paused":
                    self._watch()
                else:
                    self._read_once()
            except Exception as caught:
                error = self._judged(caught)
                self._trouble(error)
                if time.monotonic() - began > STEADY_S:
                    pause = FIRST_PAUSE_S
                self._wait(UNUSABLE_PAUSE_S.get(getattr(error, "state", ""), pause))
                pause = min(pause * 2, LONGEST_PAUSE_S)
            self._alive()

    def _read_once(self) -> None:
        with Appender(self.source.pk) as appender:
            standing_by = False
            while not appender.wait_for_source(STANDBY_LOOK_S):
                if not standing_by:
                    log.info("standing by source=%s: another process reads it", self.source.name)
                    standing_by = True
                self._alive()
                if self.stopping:
                    return
            self._reader = self.reader_class(
                self.source, appender, stopping=lambda: self.stopping, report=self._report, alive=self._alive, shortage=self._look_at_disk
            )
            self._reader.run()

    def _watch(self) -> None:
        """Look at the slot of a paused source, again and again; one that never was read has none to look at."""
        if not lifecycle.has_begun(self.source.pk):
            self._wait(STANDBY_LOOK_S)
            return
        with connect(self.source) as control:
            limit = surroundings.idle_limit(control)
            while not self.stopping:
                with cut_after(control.fileno(), surroundings.LOOK_WITHIN_S):
                    slot = surroundings.look_at_slot(control, self.source)
                self._report(slot._replace(warnings=slot.warnings + limit), state="paused")
                for _ in range(WATCH_EVERY_S):
                    self._alive()
                    self._wait(1.0)
                    if self.stopping:
                        return

    def _wait(self, seconds: float) -> None:
        """For so long, or until told to stop."""
        end = time.monotonic() + seconds
        while not self.stopping and (left := end - time.monotonic()) > 0:
            time.sleep(min(TICK_S, left))

    def _look_at_disk(self) -> str | None:
        """At most once a second: a stat each batch would be felt."""
        now = time.monotonic()
        if now - self._disk_at >= DISK_EVERY_S:
            self._disk_at = now
            self._disk = shortage(settings.SEQUIN_STORE_DIRECTORY, settings.SEQUIN_MIN_FREE_DISK)
        return self._disk

    def _alive(self) -> None:
        """Beat, now and then. The watcher restarts a reader that no longer comes by here."""
        now = time.monotonic()
        if now - self._beat_at < BEAT_EVERY_S:
            return
        self._beat_at = now
        try:
            lifecycle.beat("reader", self.source.name)
        except DatabaseError:
            connection.close()

    def _report(self, slot: Slot, state: str = "active") -> None:
        lifecycle.set_source_status(
            self.source.pk, state, slot.warnings, retained_bytes=slot.retained_bytes, source_lsn=slot.source_lsn,
            confirmed_lsn=slot.confirmed_lsn,
        )  # fmt: skip

    def _judged(self, error: Exception) -> Exception:
        """A failure of the server's decoding that is there each time at the same place is the slot's end."""
        if not isinstance(error, DecodingFailed):
            return error
        failure = (str(error), self._reader and self._reader.stored)
        self._failures = self._failures + 1 if failure == self._failure else 1
        self._failure = failure
        way_back = "The console's and the API's recover makes the slot anew; what lies before it is a gap to be backfilled"
        if found := re.search(r'publication "(.*?)" does not exist', str(error)):
            return SlotUnusable(
                "slot_lost",
                f"the publication {found[1]} was dropped, or made anew, and the server cannot decode what was written before that."
                f" {way_back}",
            )
        if self._failures >= SAME_FAILURES:
            return SlotUnusable("slot_lost", f"the server fails at the same place each time: {error}. {way_back}")
        return error

    def _trouble(self, error: Exception) -> None:
        reason = str(error) if isinstance(error, (SourceUnreachable, SlotUnusable, NoRoom)) else reason_of(error, self.source)
        more = hint(reason, self.source.host, self.source.port)
        if more and not isinstance(error, SourceUnreachable):
            reason = f"{reason}. {more[0].upper()}{more[1:]}"
        state = _state_of(error)
        log.warning("not reading source=%s: %s", self.source.name, reason, exc_info=error if state == "broken" else None)
        try:
            lifecycle.set_source_status(self.source.pk, state, [reason])
        except DatabaseError:
            connection.close()


def _state_of(error: Exception) -> str:
    """The name that health, console and metrics give the trouble."""
    if isinstance(error, SlotUnusable):
        return error.state
    if isinstance(error, SlotActive):
        return "slot_busy"
    if isinstance(error, (NoRoom, psycopg.errors.DiskFull)):
        return "store_full"
    if isinstance(error, SourceUnreachable):
        return "unreachable"
    # Anything else is a mistake of ours: it is said and tried again, and stops no other source.
    return "connecting" if isinstance(error, PASSING) else "broken"
