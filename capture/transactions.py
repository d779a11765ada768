"""Turn protocol messages into log rows: of which transaction, at which place in it, and whether they are stored already.

The caller (`reader`) brings the messages in the order they came, stores the rows, and says so. What a restart sends again is
recognised by the progress and skipped.
"""
from __future__ import annotations

import json
import struct

from capture import pgoutput
from capture.encoder import EncodedRow
from capture.lsn import format_lsn, widen_xid
from capture.pgoutput import decode_insert
from capture.tables import Table, Tables
from consumers.store.appender import Appender
from consumers.store.types import LogRow, Progress, Proof

OPEN_TABLE = struct.Struct("!I").unpack_from
INSERT, UPDATE, DELETE, COMMIT = b"IUDC"
ANNOTATE = "sequin:transaction_annotations."
ALL_OF_IT = 1 << 62  # changes; more than a transaction can have


class Diverged(Exception):
    """The server did not send again what the log has from it: its history is another one."""

    def __init__(self, proof: Proof) -> None:
        self.proof = proof
        super().__init__(f"the server did not send the transaction at {format_lsn(proof.lsn)} again")


class PartComplete(Exception):
    """All of the transaction that was stored in part has been taken, and nothing that comes after it."""


class Transactions:
    """What has been taken of the stream since a connection began."""

    def __init__(self, tables: Tables, appender: Appender, progress: Progress, proof: Proof | None) -> None:
        """`proof`: the transaction that has to come first, if one has to."""
        self.tables, self._appender, self._progress = tables, appender, progress
        self.proof = proof
        self.last_lsn: int | None = None
        """Of the last transaction that is to be taken, when one is."""
        self.rows: list[LogRow] = []
        """Not stored yet."""
        self.row_bytes = 0
        self.done_lsn = progress.stored_lsn
        """End of the last transaction that is complete."""
        self.near_xid = 0
        """The server's next transaction id a while ago, all 64 bits."""
        self._begin: pgoutput.Begin | None = None
        self._xid = 0
        self._index = 0  # of the next change in the transaction
        self._skip = 0  # changes of it that are stored already
        self._annotations: bytes | None = None  # of the transaction, from here on

    @property
    def is_open(self) -> bool:
        """Whether a transaction has begun whose commit has not come yet."""
        return self._begin is not None

    def moved(self, progress: Progress) -> Progress:
        """The progress once all that was taken is stored."""
        stored_lsn = max(progress.stored_lsn, self.done_lsn)
        part_lsn, part_changes = 0, 0
        if self._begin is not None and self._index > 0 and self._begin.final_lsn >= stored_lsn:
            part_lsn, part_changes = self._begin.final_lsn, max(self._index, self._skip)
        return progress._replace(
            stored_lsn=stored_lsn,
            part_lsn=part_lsn,
            part_changes=part_changes,
            reached_lsn=max(progress.reached_lsn, stored_lsn),
        )

    def stored(self, progress: Progress) -> None:
        """The rows are in the log, which reaches as far as `progress` says."""
        self._progress = progress
        self.rows = []
        self.row_bytes = 0

    def demand_proof(self, wal_end: int) -> None:
        """Everything up to `wal_end` has been sent. Raises Diverged when the proof was not among it."""
        if self.proof is not None and wal_end > self.proof.lsn:
            raise Diverged(self.proof)

    def take(self, data: bytes) -> None:
        """One protocol message. Raises Diverged, PartComplete, MalformedMessage."""
        tag = data[0]
        if tag == INSERT:
            if self._wanted():
                table = self.tables[OPEN_TABLE(data, 1)[0]]
                self._add(b"I", table, table.encoder.insert(decode_insert(data)))
        elif tag == UPDATE:
            if self._wanted():
                update = pgoutput.decode(data)
                assert isinstance(update, pgoutput.Update)
                self._update(self.tables[update.oid], update)
        elif tag == DELETE:
            if self._wanted():
                delete = pgoutput.decode(data)
                assert isinstance(delete, pgoutput.Delete)
                table = self.tables[delete.oid]
                self._add(b"D", table, table.encoder.delete(delete.old_kind, delete.old))
        elif tag == COMMIT:
            commit = pgoutput.decode(data)
            assert isinstance(commit, pgoutput.Commit)
            self.done_lsn = max(self.done_lsn, commit.end_lsn)
            self._begin = None
            if self.last_lsn is not None and self.done_lsn > self.last_lsn:
                raise PartComplete
        else:
            self._take_rare(data)

    def _take_rare(self, data: bytes) -> None:
        match pgoutput.decode(data):
            case pgoutput.Begin() as begin:
                self._open(begin)
            case pgoutput.Relation() as relation:
                self.tables.register(relation, self._progress.epoch, known=self._skip > self._index)
            case pgoutput.Type() as announced:
                self.tables.announce_type(announced)
            case pgoutput.Truncate() as truncate:
                for oid in truncate.oids:
                    if self._wanted():
                        self._add(b"T", self.tables[oid], EncodedRow(b"{}", None, b"[]", None, None, True))
            case pgoutput.LogicalMessage() as message:
                if message.transactional and message.prefix.startswith(ANNOTATE):
                    self._annotate(message)
            # An Origin says nothing that the log keeps.

    def _open(self, begin: pgoutput.Begin) -> None:
        self._begin = begin
        self._xid = widen_xid(begin.xid, self.near_xid)
        self._index = 0
        self._skip = 0
        self._annotations = None
        if self.proof is not None and begin.final_lsn >= self.proof.lsn:
            self._prove(self.proof, begin)
        if begin.final_lsn < self._progress.stored_lsn:
            self._skip = ALL_OF_IT  # sent again after a reconnect
        elif begin.final_lsn == self._progress.part_lsn:
            self._skip = self._progress.part_changes

    def _prove(self, proof: Proof, begin: pgoutput.Begin) -> None:
        """A copy of the server that was written to on its own has other transactions, even at the same LSN."""
        if (begin.final_lsn, begin.xid, begin.committed_us) != (proof.lsn, proof.xid & 0xFFFFFFFF, proof.committed_us):
            raise Diverged(proof)
        self.proof = None

    def _wanted(self) -> bool:
        """Count the change; false when it is stored already."""
        self._index += 1
        return self._index > self._skip

    def _update(self, table: Table, update: pgoutput.Update) -> None:
        row = table.encoder.update(update.old_kind, update.old, update.new)
        if row.unchanged is not None and table.encoder.lacks_key(row):
            self.tables.tell_once(
                table, "key_not_sent",
                "its primary key holds values so large that the server does not send them with updates: such messages have null in"
                f" record_pks. Run on the source: ALTER TABLE {table.name} REPLICA IDENTITY FULL",
            )  # fmt: skip
        self._add(b"U", table, row)

    def _add(self, action: bytes, table: Table, row: EncodedRow) -> None:
        begin = self._begin
        assert begin is not None
        record, changes, key, old_key, unchanged, known = row
        self.rows.append(
            LogRow(
                table.version, table.oid, action, key, old_key, self._xid, begin.final_lsn, self._index - 1,
                begin.committed_us, record, changes, unchanged, known, self._annotations,
            )
        )  # fmt: skip
        self.row_bytes += len(record) + (len(changes) if changes else 0)

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


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
