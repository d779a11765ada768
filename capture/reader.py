"""Read one source: protocol messages into log rows, stored first, confirmed after.

`stream` brings the bytes, `pgoutput` and `encoder` say what they mean, the store's `Appender` keeps them. A batch ends when
nothing more has arrived, or at BATCH_ROWS; a transaction larger than that is stored in parts. What a restart sends again
is recognised by the progress and skipped.
"""
from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable
from typing import Any

import psycopg

from capture import history, membership, pgoutput, surroundings
from capture.catalog import Catalog
from capture.encoder import EncodedRow
from capture.encodings import SQL_ASCII, UTF8, codec_of
from capture.lsn import format_lsn, widen_xid
from capture.pgoutput import decode_tuple
from capture.stream import ReplicationStream, SlotActive, StreamEnded, Untranslatable
from capture.surroundings import Slot
from capture.tables import Table, Tables
from consumers.models import Source
from consumers.preflight_tables import unmet
from consumers.source_connection import APPLICATION_NAME, conninfo, connect, cut_after
from consumers.store.appender import Appender
from consumers.store.types import LogRow, Progress, Proof

log = logging.getLogger(__name__)

BATCH_ROWS = 2_000
BATCH_BYTES = 8 * 1024 * 1024
READ_MESSAGES = 4_000
IDLE_WAIT_S = 0.5
REACH_EVERY_S = 1.0
LOOK_EVERY_S = 10.0
LOOK_AT_TABLES_EVERY_S = 60.0
OPEN_TABLE = struct.Struct("!I").unpack_from
INSERT, UPDATE, DELETE, BEGIN, COMMIT, RELATION, TRUNCATE, MESSAGE, TYPE = b"IUDBCRTMY"
ANNOTATE = "sequin:transaction_annotations."


class NoRoom(Exception):
    """The store has no room: what was read is neither stored nor confirmed, and read again later."""


class Promoted(StreamEnded):
    """The standby that is read became a primary: its timeline is another one from here on."""


class Diverged(StreamEnded):
    """The server does not send again what the log has from it: its history is another one."""


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
        self._rows: list[LogRow] = []
        self._row_bytes = 0
        self._begin: pgoutput.Begin | None = None
        self._xid = 0
        self._near_xid = 0
        self._index = 0  # of the next change in the transaction
        self._skip = 0  # changes of it that are stored already
        self._done_lsn = 0  # end of the last transaction that is complete
        self._reached_at = 0.0
        self._annotations: bytes | None = None  # of the transaction, from here on
        self._tables_at = 0.0
        self._looked_lsn = 0
        self._proof: Proof | None = None  # still to be seen before anything is confirmed
        self._in_recovery = False
        self._unmet: tuple[str, ...] = ()  # what consumers ask for and do not get

    @property
    def stored(self) -> tuple[int, int]:
        """How far the log reaches: where a failure that comes again is at the same place."""
        return self._progress.stored_lsn, self._progress.part_changes

    def run(self) -> None:
        """Raises SlotUnusable, NoRoom, SlotActive and StreamEnded, SourceUnreachable, ProgressMoved and psycopg's errors."""
        with connect(self.source) as control:
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
        self._tables = Tables(self.source.name, self._appender, self._catalog, None if converted else codec_of(self._encoding))
        self._begin, self._index = None, 0
        slot = self._look(control)
        self._in_recovery = slot.in_recovery
        with ReplicationStream(conninfo(self.source, replication=True, application_name=name, encoded=converted)) as stream:
            server, self._progress = self._open_history(slot, stream, same_server)
            self._done_lsn = self._progress.stored_lsn
            start = self._progress.reached_lsn if self._proof is None else min(self._progress.reached_lsn, self._proof.lsn)
            try:
                stream.start(self.source.slot_name, self.source.publication_name, start, proven=self._proof is None)
            except SlotActive as error:
                surroundings.end_own_sender(control, error.pid, name)
                raise
            log.info("reading source=%s slot=%s from=%s", self.source.name, self.source.slot_name, format_lsn(start))
            self._look_at_tables(control)
            self._tell(slot)
            try:
                self._read(stream, control)
            except Diverged:
                assert self._proof is not None
                self._begin_history(history.diverged(self._progress, server, self._proof))
                raise

    def _read(self, stream: ReplicationStream, control: psycopg.Connection[Any]) -> None:
        looked_at = time.monotonic()
        for batch in stream.batches(READ_MESSAGES, IDLE_WAIT_S):
            for data in batch:
                self._take(data)
                if len(self._rows) >= BATCH_ROWS or self._row_bytes >= BATCH_BYTES:
                    self._store(stream)
            self._store(stream)
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
        if not self._rows:
            return
        if reason := self._shortage():
            raise NoRoom(reason)
        after = self._moved(self._progress)
        newest = self._rows[-1]
        proof = Proof(newest.commit_lsn, newest.xid, newest.committed_us, self.source.publication_name)
        with stream.kept_alive():
            self._appender.append(self._rows, self._progress, after, proof)
        self._progress = after
        self._rows = []
        self._row_bytes = 0
        self._reached_at = time.monotonic()
        if self._proof is None:
            stream.confirm(after.reached_lsn)
        stream.send_status_by_clock(0.1)
        self._appender.notify()

    def _moved(self, progress: Progress) -> Progress:
        stored_lsn = max(progress.stored_lsn, self._done_lsn)
        part_lsn, part_changes = 0, 0
        if self._begin is not None and self._index > 0 and self._begin.final_lsn >= stored_lsn:
            part_lsn, part_changes = self._begin.final_lsn, max(self._index, self._skip)
        return progress._replace(
            stored_lsn=stored_lsn,
            part_lsn=part_lsn,
            part_changes=part_changes,
            reached_lsn=max(progress.reached_lsn, stored_lsn),
        )

    def _reach(self, stream: ReplicationStream) -> None:
        """Between transactions, everything the server has sent is stored: say so, and let it drop its WAL."""
        now = time.monotonic()
        if self._proof is not None:
            if self._begin is None and stream.wal_end > self._proof.lsn:
                raise Diverged(f"the server did not send the transaction at {format_lsn(self._proof.lsn)} again")
            return
        if self._begin is not None or now - self._reached_at < REACH_EVERY_S:
            return
        reached = max(stream.wal_end, self._done_lsn)
        if reached <= self._progress.reached_lsn:
            return
        after = self._moved(self._progress)._replace(reached_lsn=reached)
        self._appender.reach(self._progress, after)
        self._progress = after
        self._reached_at = now
        stream.confirm(reached)

    # Protocol messages ------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        tag = data[0]
        if tag == INSERT:
            if self._wanted():
                table = self._tables[OPEN_TABLE(data, 1)[0]]
                self._add(b"I", table, table.encoder.insert(decode_tuple(data, 6)[0]))
        elif tag == UPDATE:
            if self._wanted():
                update = pgoutput.decode(data)
                assert isinstance(update, pgoutput.Update)
                self._update(self._tables[update.oid], update)
        elif tag == DELETE:
            if self._wanted():
                delete = pgoutput.decode(data)
                assert isinstance(delete, pgoutput.Delete)
                table = self._tables[delete.oid]
                self._add(b"D", table, table.encoder.delete(delete.old_kind, delete.old))
        elif tag == BEGIN:
            begin = pgoutput.decode(data)
            assert isinstance(begin, pgoutput.Begin)
            self._open(begin)
        elif tag == COMMIT:
            commit = pgoutput.decode(data)
            assert isinstance(commit, pgoutput.Commit)
            self._done_lsn = max(self._done_lsn, commit.end_lsn)
            self._begin = None
        elif tag == RELATION:
            relation = pgoutput.decode(data)
            assert isinstance(relation, pgoutput.Relation)
            self._tables.register(relation, self._progress.epoch, known=self._skip > self._index)
        elif tag == TRUNCATE:
            self._truncate(data)
        elif tag == MESSAGE:
            message = pgoutput.decode(data)
            assert isinstance(message, pgoutput.LogicalMessage)
            if message.transactional and message.prefix.startswith(ANNOTATE):
                self._annotate(message)
        elif tag == TYPE:
            announced = pgoutput.decode(data)
            assert isinstance(announced, pgoutput.Type)
            self._tables.announce_type(announced)
        # O says nothing that the log keeps.

    def _annotate(self, message: pgoutput.LogicalMessage) -> None:
        """`set` gives what follows in the transaction its annotations, `clear` takes them away."""
        if message.prefix == ANNOTATE + "clear":
            self._annotations = None
        elif message.prefix == ANNOTATE + "set":
            try:
                # As text: of bytes, loads would also take UTF-16 and halves of surrogate pairs, which the store does not.
                if not isinstance(json.loads(message.content.decode(), parse_constant=_refuse_constant), dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                if self._skip <= self._index:
                    text = f"transaction annotations were not set: expected a JSON object ({str(error)[:100]})"
                    self._appender.note("annotations", None, text)
                return
            self._annotations = message.content.strip()

    def _open(self, begin: pgoutput.Begin) -> None:
        self._begin = begin
        self._xid = widen_xid(begin.xid, self._near_xid)
        self._index = 0
        self._skip = 0
        self._annotations = None
        if self._proof is not None and begin.final_lsn >= self._proof.lsn:
            self._prove(self._proof, begin)
        if begin.final_lsn < self._progress.stored_lsn:
            self._skip = 1 << 62  # stored completely; sent again after a reconnect
        elif begin.final_lsn == self._progress.part_lsn:
            self._skip = self._progress.part_changes

    def _prove(self, proof: Proof, begin: pgoutput.Begin) -> None:
        """The first transaction that comes has to be the newest one of the log: else this WAL is not the one we read."""
        if (begin.final_lsn, begin.xid, begin.committed_us) != (proof.lsn, proof.xid & 0xFFFFFFFF, proof.committed_us):
            raise Diverged(f"the server sent another transaction than the one at {format_lsn(proof.lsn)} again")
        self._proof = None

    def _wanted(self) -> bool:
        """Count the change; false when it is stored already."""
        self._index += 1
        return self._index > self._skip

    def _update(self, table: Table, update: pgoutput.Update) -> None:
        row = table.encoder.update(update.old_kind, update.old, update.new)
        if row.unchanged is not None and table.encoder.lacks_key(row):
            self._tables.tell_once(
                table, "key_not_sent",
                "its primary key holds values so large that the server does not send them with updates: such messages have null in"
                f" record_pks. Run on the source: ALTER TABLE {table.name} REPLICA IDENTITY FULL",
            )  # fmt: skip
        self._add(b"U", table, row)

    def _add(self, action: bytes, table: Table, row: EncodedRow) -> None:
        begin = self._begin
        assert begin is not None
        record, changes, key, old_key, unchanged, known = row
        self._rows.append(
            LogRow(
                table.version, table.oid, action, key, old_key, self._xid, begin.final_lsn, self._index - 1,
                begin.committed_us, record, changes, unchanged, known, self._annotations,
            )
        )  # fmt: skip
        self._row_bytes += len(record) + (len(changes) if changes else 0)

    def _truncate(self, data: bytes) -> None:
        truncate = pgoutput.decode(data)
        assert isinstance(truncate, pgoutput.Truncate)
        for oid in truncate.oids:
            if self._wanted():
                self._add(b"T", self._tables[oid], EncodedRow(b"{}", None, b"[]", None, None, True))

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
        self._near_xid = slot.next_xid
        return slot

    def _look_at_tables(self, control: psycopg.Connection[Any]) -> None:
        """Now and then: tables that joined or left the publication, and partitions attached with rows in them."""
        now = time.monotonic()
        if self._tables_at and now - self._tables_at < LOOK_AT_TABLES_EVERY_S:
            return
        self._tables_at = now
        before = membership.from_json(self._appender.known_tables())
        with cut_after(control.fileno(), surroundings.LOOK_WITHIN_S):
            seen = surroundings.look_at_tables(control, self.source.publication_name, self._encoding, before)
            self._unmet = tuple(unmet(control, self.source))
        for told in membership.happened(before, seen):
            log.warning("publication changed source=%s table=%s: %s", self.source.name, told.table, told.text)
            if told.gap:
                self._appender.note_gap(told.text)
            else:
                self._appender.note(told.kind, told.table, told.text, backfill=told.backfill)
        self._appender.remember_tables(seen.as_json())

    def _tell(self, slot: Slot) -> None:
        """Report the slot's state, and what else people should know although all is well."""
        self._report(slot._replace(warnings=slot.warnings + self._unmet))

    def _beat_on_source(self, control: psycopg.Connection[Any], slot: Slot) -> None:
        """Where the server writes but nothing lets us get on, a message of ours does: WAL is not kept for nothing."""
        stuck = self._looked_lsn == self._progress.reached_lsn and slot.source_lsn > self._progress.reached_lsn
        self._looked_lsn = self._progress.reached_lsn
        if stuck and self._begin is None and not slot.in_recovery:
            with cut_after(control.fileno(), surroundings.LOOK_WITHIN_S):
                surroundings.beat(control)

    def _open_history(self, slot: Slot, stream: ReplicationStream, same_server: bool) -> tuple[history.Server, Progress]:
        """Go on where the log ends, or begin an epoch; never pass over a gap without noting it."""
        before, proof = self._appender.progress(), self._appender.proof()
        ancestors: list[history.Switch] = []
        if before is not None and before.timeline != stream.timeline:
            ancestors = history.parse_timeline_history(stream.timeline_history())
        server = history.Server(
            stream.system_identifier, stream.timeline, slot.source_lsn, slot.in_recovery, slot.confirmed_lsn, ancestors
        )
        newest = 0 if proof is None else proof.lsn
        decision = history.decide(before, server, newest_lsn=newest, same_server=same_server)
        self._proof = None
        if before is None or decision.progress.epoch != before.epoch:
            self._begin_history(decision)
        if decision.gap is None:
            self._proof = history.proof_of(proof, server, self.source.publication_name)
        return server, decision.progress

    def _begin_history(self, decision: history.Decision) -> None:
        if decision.gap:
            log.error("gap source=%s: %s", self.source.name, decision.gap)
        self._appender.begin_history(*decision)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
