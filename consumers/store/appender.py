"""Append changes to the log of one source, exactly once: capture's face of the store.

Every append is one transaction whose first statement locks and compares the source's progress; then come the rows by
binary COPY, then the commit. So ids become visible in order within a source, and two readers can never both append.
"""
from __future__ import annotations

import json
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import psycopg

from consumers.store import shapes
from consumers.store.connection import held_connection
from consumers.store.events import add_event
from consumers.store.locks import SEQUENCE_LOCK, SOURCE_LOCK_CLASS
from consumers.store.room import Room
from consumers.store.types import LogRow, Progress, Proof, RelationShape, stored_shape


_COPY_SQL = (
    "COPY messages (source, relation, table_oid, action, xid, commit_lsn, commit_idx, committed_at, epoch,"
    " old_values_known, key, record, old_key, changes, unchanged, annotations, consumer) FROM STDIN (FORMAT binary)"
)
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
_COPY_END = struct.pack("!h", -1)
# Field count, then each fixed field with its length in front, then the length of the key.
_FIXED = struct.Struct("!h i16s ii iq i1s iq iq iq iq ii i? i")
_LENGTH = struct.Struct("!i")
_NULL = _LENGTH.pack(-1)
_FIVE_NULLS = _NULL * 5  # old_key, changes, unchanged, annotations, consumer


class ProgressMoved(Exception):
    """Another reader appended meanwhile: the source's progress is not what this one thought."""

    def __init__(self, source_id: UUID, expected: Progress) -> None:
        self.source_id = source_id
        self.expected = expected
        super().__init__(f"progress of source {source_id} is no longer {expected}: another reader stored in between")


class Appender:
    """The append side of one source's log. Not thread-safe; owns its connection unless given one."""

    def __init__(self, source_id: UUID, conn: psycopg.Connection[Any] | None = None) -> None:
        self.source_id = source_id
        self._conn = conn or held_connection("sequin capture")
        self._notify_conn: psycopg.Connection[Any] | None = None
        self._source_bytes = source_id.bytes
        self._room = Room(self._conn)
        self._last_id = 0
        self._unnotified: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._conn.close()
        if self._notify_conn is not None:
            self._notify_conn.close()

    def lock_source(self) -> bool:
        """Try to become the one reader of the source; held until the connection closes."""
        row = self._conn.execute("SELECT pg_try_advisory_lock(%s, hashtext(%s))", [SOURCE_LOCK_CLASS, str(self.source_id)])
        found = row.fetchone()
        return bool(found and found[0])

    def wait_for_source(self, timeout_s: float, every_s: float = 0.2) -> bool:
        """Stand by until the source's lock is free, at most `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.lock_source():
            if time.monotonic() >= deadline:
                return False
            time.sleep(every_s)
        return True

    def progress(self) -> Progress | None:
        """What is stored of the source, None before its first start."""
        row = self._conn.execute(
            "SELECT epoch, system_identifier, timeline, stored_lsn, part_lsn, part_changes, reached_lsn"
            " FROM capture_progress WHERE source = %s",
            [self.source_id],
        ).fetchone()
        return None if row is None else Progress(*row)

    def proof(self) -> Proof | None:
        """The newest transaction stored in this epoch."""
        row = self._conn.execute("SELECT proof FROM capture_progress WHERE source = %s", [self.source_id]).fetchone()
        return None if row is None or row[0] is None else Proof(**json.loads(row[0]))

    def begin_history(self, begun: Progress, gap: str | None = None) -> None:
        """Let the source's first epoch begin, or the next one: LSNs compare within an epoch only.

        `gap`: what may be missing from the log, until it is acknowledged or has been backfilled.
        """
        with self._conn.transaction():
            self._conn.execute(
                "INSERT INTO capture_progress (source, epoch, system_identifier, timeline, stored_lsn, part_lsn, part_changes,"
                " reached_lsn) VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (source) DO UPDATE SET"
                " epoch = excluded.epoch, system_identifier = excluded.system_identifier, timeline = excluded.timeline,"
                " stored_lsn = excluded.stored_lsn, part_lsn = excluded.part_lsn, part_changes = excluded.part_changes,"
                " reached_lsn = excluded.reached_lsn, updated_at = now()",
                [self.source_id, *begun],
            )
            self._conn.execute(
                "INSERT INTO source_epoch (source, epoch, begun_lsn) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
                [self.source_id, begun.epoch, begun.reached_lsn],
            )
            if gap:
                self._conn.execute("UPDATE capture_progress SET proof = NULL WHERE source = %s", [self.source_id])
                self.note_gap(gap)

    def note_gap(self, reason: str) -> None:
        """Keep in mind that changes may be missing from the log, until it is acknowledged or they have been backfilled."""
        self._conn.execute(
            "UPDATE capture_progress SET gap = concat_ws('; ', gap, %s::text), gap_at = clock_timestamp() WHERE source = %s",
            [reason, self.source_id],
        )
        self.note("gap", None, reason, backfill=True)

    def note(self, kind: str, table: str | None, text: str, *, backfill: bool = False) -> None:
        """Tell people what happened to the source, or to a table of it."""
        add_event(self._conn.execute, self.source_id, kind, table, text, backfill=backfill)

    def known_tables(self) -> dict[str, list[int]] | None:
        """What `remember_tables` was last told."""
        row = self._conn.execute("SELECT tables FROM source_tables WHERE source = %s", [self.source_id]).fetchone()
        return None if row is None else row[0]

    def remember_tables(self, tables: dict[str, list[int]]) -> None:
        """Keep which tables are published and which others there are, to see later what changed."""
        self._conn.execute(
            "INSERT INTO source_tables AS t (source, tables) VALUES (%s, %s) ON CONFLICT (source) DO UPDATE SET"
            " tables = excluded.tables WHERE t.tables <> excluded.tables",
            [self.source_id, json.dumps(tables)],
        )

    def last_shape(self, schema: str, table: str) -> RelationShape | None:
        """The shape under which changes of the table came last."""
        row = self._conn.execute(
            "SELECT oid, schema_name, table_name, columns, primary_key, replica_identity FROM relation_version"
            " WHERE source = %s AND schema_name = %s AND table_name = %s ORDER BY seen_at DESC, id DESC LIMIT 1",
            [self.source_id, schema, table],
        ).fetchone()
        if row is None:
            return None
        return stored_shape(*row)

    def register_relation(self, epoch: int, shape: RelationShape) -> int:
        """The id of this shape of the table, under which a change came."""
        return shapes.register_relation(self._conn, self.source_id, epoch, shape, seen=True)

    def append(self, rows: Sequence[LogRow], before: Progress, after: Progress, proof: Proof | None = None) -> int | None:
        """Store `rows` and move the progress from `before` to `after`, both or neither. Returns the last id drawn.

        `proof`: the newest transaction of `rows`; None leaves the one there is.
        Raises ProgressMoved when the progress was not `before`. After any psycopg error the outcome is what
        `progress()` says on a new connection.
        """
        if rows:
            self._room.ensure()
        conn = self._conn
        with conn.cursor() as cursor:
            cursor.execute("BEGIN")
            try:
                self._move(cursor, before, after, len(rows), proof)
                if rows:
                    with cursor.copy(_COPY_SQL) as copy:
                        copy.write(encode_rows(rows, self._source_bytes, after.epoch))
                    cursor.execute("SELECT currval('messages_id')")
                    found = cursor.fetchone()
                    assert found is not None
                    last_id = int(found[0])
                cursor.execute("COMMIT")
            except BaseException:
                if not conn.closed and conn.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                    conn.rollback()
                raise
        if not rows:
            return None
        self._last_id = last_id
        self._unnotified.update(row.relation for row in rows)
        return last_id

    def wanted_lsn(self) -> int | None:
        """The position that backfills of the source wait for the log to reach; None when none runs."""
        row = self._conn.execute(
            "SELECT max(coalesce(wants_lsn, 0)) FROM backfills WHERE source = %s AND status = 'running'", [self.source_id]
        ).fetchone()
        return None if row is None or row[0] is None else int(row[0])

    def reach(self, before: Progress, after: Progress) -> None:
        """Move the progress alone: the source was idle, or had nothing for us."""
        self.append((), before, after)

    def notify(self) -> None:
        """Tell listeners what was appended since the last notice. Lost notices cost latency only."""
        if not self._unnotified:
            return
        if self._notify_conn is None or self._notify_conn.closed:
            self._notify_conn = held_connection("sequin capture notify")
            self._notify_conn.execute("SET synchronous_commit = off")
        relations = sorted(self._unnotified)[:500]  # a payload holds less than 8,000 bytes
        if len(relations) < len(self._unnotified):
            relations = []  # empty: any
        payload = json.dumps({"source": str(self.source_id), "last_id": self._last_id, "relations": relations})
        self._notify_conn.execute("SELECT pg_notify('sequin_log', %s)", [payload])
        self._unnotified.clear()

    def _move(self, cursor: psycopg.Cursor[Any], before: Progress, after: Progress, rows: int, proof: Proof | None) -> None:
        cursor.execute(
            "UPDATE capture_progress SET epoch = %s, system_identifier = %s, timeline = %s, stored_lsn = %s, part_lsn = %s,"
            " part_changes = %s, reached_lsn = %s, messages = messages + %s, proof = coalesce(%s, proof), updated_at = now()"
            " FROM (SELECT pg_advisory_xact_lock_shared(%s)) AS sequence_stays"
            " WHERE source = %s AND (epoch, system_identifier, timeline, stored_lsn, part_lsn, part_changes, reached_lsn)"
            " = (%s, %s, %s, %s, %s, %s, %s)",
            [*after, rows, None if proof is None else json.dumps(proof._asdict()), SEQUENCE_LOCK, self.source_id, *before],
        )
        if cursor.rowcount != 1:
            raise ProgressMoved(self.source_id, before)


def encode_rows(rows: Sequence[LogRow], source: bytes, epoch: int) -> bytes:
    """The rows in COPY's binary format, header and trailer included.

    Source: PostgreSQL manual, COPY, "Binary Format".
    """
    parts: list[bytes] = [_COPY_HEADER]
    add = parts.append
    fixed, length = _FIXED.pack, _LENGTH.pack
    for (
        relation, table_oid, action, key, old_key, xid, commit_lsn, commit_idx, committed_us, record, changes,
        unchanged, old_values_known, notes, consumer,
    ) in rows:  # fmt: skip
        add(
            fixed(
                17, 16, source, 4, relation, 8, table_oid, 1, action, 8, xid, 8, commit_lsn, 8, commit_idx,
                8, committed_us, 4, epoch, 1, old_values_known, len(key),
            )
        )  # fmt: skip
        add(key)
        add(length(len(record)))
        add(record)
        if old_key is None and unchanged is None and notes is None and consumer is None:
            if changes is None:
                add(_FIVE_NULLS)
            else:
                add(_NULL + length(len(changes)))
                add(changes)
                add(_NULL * 3)
        else:
            for text in (old_key, changes, unchanged, notes, None if consumer is None else consumer.bytes):
                if text is None:
                    add(_NULL)
                else:
                    add(length(len(text)))
                    add(text)
    add(_COPY_END)
    return b"".join(parts)
