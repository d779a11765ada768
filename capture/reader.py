"""Read one source: protocol messages into log rows, stored first, confirmed after.

`stream` brings the bytes, `transactions` makes rows of them, the store's `Appender` keeps them. A batch ends when nothing more has
arrived, or at BATCH_ROWS; a transaction larger than that is stored in parts.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import psycopg

from capture import history, membership, surroundings
from capture.catalog import Catalog
from capture.lsn import format_lsn
from capture.stream import ReplicationStream, SlotActive, StreamEnded, Untranslatable
from capture.surroundings import Slot
from capture.tables import Tables
from capture.transactions import Diverged, PartComplete, Transactions
from consumers.encodings import SQL_ASCII, UTF8, codec_of
from consumers.models import Source
from consumers.preflight_tables import complaints
from consumers.source_connection import APPLICATION_NAME, conninfo, connect, cut_after
from consumers.store.appender import Appender
from consumers.store.types import Progress, Proof

log = logging.getLogger(__name__)

BATCH_ROWS = 2_000
BATCH_BYTES = 8 * 1024 * 1024
READ_MESSAGES = 4_000
IDLE_WAIT_S = 0.5
REACH_EVERY_S = 1.0
LOOK_AT_WISHES_EVERY_S, HURRY_WAIT_S = 0.4, 0.04
LOOK_EVERY_S = 10.0
LOOK_AT_TABLES_EVERY_S = 60.0
LOCK_WITHIN_MS = 1_000  # while a table is locked, by an ALTER TABLE that takes long for one, what wants to look at it comes again later


class NoRoom(Exception):
    """The store has no room: what was read is neither stored nor confirmed, and read again later."""


class Promoted(StreamEnded):
    """The standby that is read became a primary: its timeline is another one from here on."""


class Reader:
    """One connection's life of reading a source. `run` returns when told to stop and raises when something breaks."""

    def __init__(
        self,
        source: Source,
        appender: Appender,
        *,
        stopping: Callable[[], bool],
        report: Callable[[Slot], None] = lambda slot: None,
        alive: Callable[[], None] = lambda: None,
        shortage: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`report` hears of the slot's state now and then; `alive` is called each time round the loop.

        `shortage` says why nothing may be stored now, if so.
        """
        self.source = source
        self._appender = appender
        self._stopping = stopping
        self._report = report
        self._alive = alive
        self._shortage = shortage
        self._reached_at = 0.0
        self._tables_at = 0.0
        self._looked_lsn = 0
        self._wanted_lsn: int | None = None  # a backfill waits until the log reaches it
        self._wanted_at = 0.0
        self._next_xid = 0
        self._in_recovery = False
        self._publication = ""  # that is read
        self._complaints: tuple[str, ...] = ()  # what is wrong with the publication's tables

    @property
    def stored(self) -> tuple[int, int]:
        """How far the log reaches: where a failure that comes again is at the same place."""
        return self._progress.stored_lsn, self._progress.part_changes

    def run(self) -> None:
        """Raises SlotUnusable, NoRoom, SlotActive and StreamEnded, SourceUnreachable, ProgressMoved and psycopg's errors."""
        with connect(self.source, lock_timeout_ms=LOCK_WITHIN_MS) as control:
            self._encoding = surroundings.encoding(control)
            self._catalog = Catalog(control, self._encoding, self.source.publication_name)
            converted = self._encoding != SQL_ASCII
            try:
                self._run(control, converted=converted)
            except Untranslatable as error:
                if self._encoding in (UTF8, SQL_ASCII):
                    raise
                self._tell_untranslatable(error)
                self._run(control, converted=False)
            except Promoted:
                self._run(control, converted=converted, same_server=True)

    def _run(self, control: psycopg.Connection[Any], *, converted: bool, same_server: bool = False) -> None:
        """`converted`: the server makes UTF-8 of everything. If not, texts come in the database's encoding.

        `same_server`: it was promoted while we read it.
        """
        # A reader killed a moment ago may still have its process on the server: it is known by this name.
        name = f"{APPLICATION_NAME} {self.source.pk}"
        tables = Tables(self.source.name, self._appender, self._catalog, None if converted else codec_of(self._encoding))
        slot = self._look(control)
        self._in_recovery = slot.in_recovery
        with ReplicationStream(conninfo(self.source, replication=True, application_name=name, encoded=converted)) as stream:
            if stream.started_at() != surroundings.started_at(control):
                raise StreamEnded("two servers answered at this address, one after the other: its slot may be on neither or both")
            server, self._progress, proof = self._open_history(slot, stream, same_server)
            self._transactions = Transactions(tables, self._appender, self._progress, proof)
            if self._publication != self.source.publication_name:
                self._transactions.last_lsn = self._progress.part_lsn
            start = self._progress.reached_lsn if proof is None else min(self._progress.reached_lsn, proof.lsn)
            try:
                stream.start(self.source.slot_name, self._publication, start, proven=proof is None)
            except SlotActive as error:
                surroundings.end_own_sender(control, error.pid, name)
                raise
            log.info("reading source=%s slot=%s from=%s", self.source.name, self.source.slot_name, format_lsn(start))
            self._look_at_tables(control)
            self._tell(slot)
            try:
                self._read(stream, control)
            except Diverged as error:
                self._begin_history(history.diverged(self._progress, server, error.proof))
                raise StreamEnded(str(error)) from None
            except PartComplete:
                self._store(stream)
                if self._progress.part_lsn:  # it was only its commit that was missing
                    self._appender.reach(self._progress, self._transactions.moved(self._progress))
                raise StreamEnded(f"the transaction that was stored in part is complete: {self.source.publication_name} is read now") from None

    def _read(self, stream: ReplicationStream, control: psycopg.Connection[Any]) -> None:
        looked_at = time.monotonic()
        taken = self._transactions
        for batch in stream.batches(READ_MESSAGES, IDLE_WAIT_S):
            taken.near_xid = self._next_xid
            for data in batch:
                taken.take(data)
                if len(taken.rows) >= BATCH_ROWS or taken.row_bytes >= BATCH_BYTES:
                    self._store(stream)
            self._store(stream)
            self._hurry(stream)
            self._reach(stream)
            self._alive()
            if self._stopping():
                stream.finish()
                return
            if time.monotonic() - looked_at >= LOOK_EVERY_S:
                looked_at = time.monotonic()
                slot = self._look(control)
                if self._in_recovery and not slot.in_recovery:
                    raise Promoted("the standby was promoted")
                self._beat_on_source(control, slot)
                self._look_at_tables(control)
                self._tell(slot)

    # Storing and confirming -------------------------------------------------------------------------------------

    def _store(self, stream: ReplicationStream) -> None:
        """Store what has been read, then let it be confirmed. In this order: the other way round loses changes."""
        taken = self._transactions
        if not taken.rows:
            return
        if reason := self._shortage():
            raise NoRoom(reason)
        after = taken.moved(self._progress)
        newest = taken.rows[-1]
        proof = Proof(newest.commit_lsn, newest.xid, newest.committed_us, self._publication)
        with stream.kept_alive():
            self._appender.append(taken.rows, self._progress, after, proof)
        self._progress = after
        taken.stored(after)
        self._reached_at = time.monotonic()
        if taken.proof is None:
            stream.confirm(after.reached_lsn)
        stream.send_status_by_clock(0.1)
        self._appender.notify()

    def _reach(self, stream: ReplicationStream) -> None:
        """Between transactions, everything the server has sent is stored: say so, and let it drop its WAL."""
        now = time.monotonic()
        taken = self._transactions
        if taken.is_open:
            return
        taken.demand_proof(stream.wal_end)
        hurry = self._wanted_lsn is not None and self._wanted_lsn > self._progress.reached_lsn
        if taken.proof is not None or (now - self._reached_at < REACH_EVERY_S and not hurry):
            return
        reached = max(stream.wal_end, taken.done_lsn)
        if reached <= self._progress.reached_lsn:
            return
        after = taken.moved(self._progress)._replace(reached_lsn=reached)
        self._appender.reach(self._progress, after)
        self._progress = after
        taken.stored(after)
        self._reached_at = now
        stream.confirm(reached)

    def _hurry(self, stream: ReplicationStream) -> None:
        """While backfills run: come round more often, and ask the server how far it is when one waits to hear that."""
        now = time.monotonic()
        if now - self._wanted_at < (LOOK_AT_WISHES_EVERY_S if self._wanted_lsn is None else HURRY_WAIT_S):
            return
        self._wanted_at = now
        self._wanted_lsn = wanted = self._appender.wanted_lsn()
        stream.wait_s = IDLE_WAIT_S if wanted is None else HURRY_WAIT_S
        if wanted is not None and wanted > max(stream.wal_end, self._progress.reached_lsn) and not self._transactions.is_open:
            stream.send_status(ask=True)

    # The slot and its surroundings --------------------------------------------------------------------------------

    def _tell_untranslatable(self, error: Untranslatable) -> None:
        log.warning("reading unconverted source=%s: %s", self.source.name, error)
        self._appender.note(
            "encoding", None,
            f"a value has no equivalent in UTF-8; such bytes arrive as \\x escapes ({str(error)[:300]})",
        )  # fmt: skip

    def _look(self, control: psycopg.Connection[Any]) -> Slot:
        """Read the slot's state. Raises SlotUnusable."""
        with cut_after(control.fileno(), surroundings.LOOK_WITHIN_S):
            slot = surroundings.look_at_slot(control, self.source)
        self._next_xid = slot.next_xid
        return slot

    def _look_at_tables(self, control: psycopg.Connection[Any]) -> None:
        """Now and then: tables that joined or left the publication, and partitions attached with rows in them."""
        now = time.monotonic()
        if self._tables_at and now - self._tables_at < LOOK_AT_TABLES_EVERY_S:
            return
        self._tables_at = now
        before = membership.from_json(self._appender.known_tables())
        try:
            with cut_after(control.fileno(), surroundings.LOOK_WITHIN_S):
                seen = surroundings.look_at_tables(control, self.source.publication_name, self._encoding, before)
                self._complaints = tuple(complaints(control, self.source))
        except psycopg.errors.LockNotAvailable:
            return
        for told in membership.happened(before, seen):
            log.warning("publication changed source=%s table=%s: %s", self.source.name, told.table, told.text)
            if told.gap:
                self._appender.note_gap(told.text)
            else:
                self._appender.note(told.kind, told.table, told.text, backfill=told.backfill)
        self._appender.remember_tables(seen.as_json())

    def _tell(self, slot: Slot) -> None:
        """Report the slot's state, and what else people should know although all is well."""
        self._report(slot._replace(warnings=slot.warnings + self._complaints))

    def _beat_on_source(self, control: psycopg.Connection[Any], slot: Slot) -> None:
        """Where the server writes but nothing lets us get on, a message of ours does: WAL is not kept for nothing."""
        stuck = self._looked_lsn == self._progress.reached_lsn and slot.source_lsn > self._progress.reached_lsn
        self._looked_lsn = self._progress.reached_lsn
        if stuck and not self._transactions.is_open and not slot.in_recovery:
            with cut_after(control.fileno(), surroundings.LOOK_WITHIN_S):
                surroundings.beat(control)

    def _open_history(
        self, slot: Slot, stream: ReplicationStream, same_server: bool
    ) -> tuple[history.Server, Progress, Proof | None]:
        """Go on where the log ends, or begin an epoch; never pass over a gap without noting it.

        The proof is what the server has to send first, before anything is confirmed to it.
        """
        before, newest = self._appender.progress(), self._appender.proof()
        ancestors: list[history.Switch] = []
        if before is not None and before.timeline != stream.timeline:
            ancestors = history.parse_timeline_history(stream.timeline_history())
        server = history.Server(
            stream.system_identifier, stream.timeline, slot.source_lsn, slot.in_recovery, slot.confirmed_lsn, ancestors
        )
        decision = history.decide(before, server, newest_lsn=newest.lsn if newest else 0, same_server=same_server)
        if before is None or decision.progress.epoch != before.epoch:
            self._begin_history(decision)
        self._publication = str(self.source.publication_name)
        if newest is not None and not decision.gap and newest.lsn == decision.progress.part_lsn:
            # What is stored of a transaction is so many of the changes that this publication sends: it is completed under it.
            self._publication = newest.publication
        proof = None if decision.gap else history.proof_of(newest, server, self._publication)
        return server, decision.progress, proof

    def _begin_history(self, decision: history.Decision) -> None:
        if decision.gap:
            log.error("gap source=%s: %s", self.source.name, decision.gap)
        self._appender.begin_history(*decision)
