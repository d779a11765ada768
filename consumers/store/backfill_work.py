"""Work on backfills: take a turn, stage what was read of the source, append it to the log. Capture's face of the store.

One connection, and no transaction longer than one statement: a worker that is stopped in the middle of anything holds no
lock. A turn ends with a time limit, and whatever its holder writes afterwards is refused.
"""
from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import TracebackType
from typing import Any, NamedTuple, Self
from uuid import UUID

from psycopg.adapt import Dumper
from psycopg.pq import Format

from consumers.store import shapes
from consumers.store.backfills import DUE_SQL
from consumers.store.connection import store_connection
from consumers.store.locks import SEQUENCE_LOCK
from consumers.store.room import Room
from consumers.store.types import RelationShape

TURN_S = 6.0  # a worker that dies is replaced after this long
CHUNK_ROWS = 500
CHUNK_BYTES = 2 * 1024 * 1024
LOOK_FIRST = 2_000  # ids: so much of the log may be searched under the append lock
SEARCHES = 10  # without it, until the log has not grown by so much meanwhile
STALE_AFTER_S = 600  # a chunk that waited so long is read again: the search for newer changes would be a long one
FAR_BEHIND = 20_000  # ids: what the snapshot sees is found anew instead of searching so far
BACKLOG_MESSAGES = 50_000  # of a consumer: beyond it nothing more is read for it
TEXT_OID, TEXT_ARRAY_OID = 25, 1009
STATEMENT_MS, LOOK_MS, LOCK_MS = 5_000, 120_000, 1_000


class Job(NamedTuple):
    """A backfill whose turn this worker has."""

    id: UUID
    consumer_id: UUID
    source_id: UUID
    kind: str
    table: str
    where: str
    sort_column: str
    start_value: str | None
    since: datetime | None
    until: datetime | None
    parts: list[dict[str, Any]] | None
    part: int
    place: Any
    page_rows: int
    barrier_xid: int
    seen_id: int | None
    rows_done: int
    to_id: int | None


class Snapshot(NamedTuple):
    """What a page was read under. `low`: set on standbys, whose snapshots do not list what is running."""

    xmin: int
    xmax: int
    xip: tuple[int, ...]
    low: int | None

    def sees(self, xid: int) -> bool:
        return xid < self.xmin or (self.low is None and xid < self.xmax and xid not in self.xip)


class Chunk(NamedTuple):
    """Rows on their way into the log. Keys and records are UTF-8 bytes of JSON."""

    page: int
    epoch: int
    snapshot: Snapshot
    high: int
    relation: int
    table_oid: int
    read_at: str
    part: int
    place: Any
    is_last: bool
    keys: Sequence[bytes]
    records: Sequence[bytes]
    unchanged: Sequence[bytes | None] | None
    """JSON arrays of the columns that were left out because the row is too large; None when no row is."""
    seen_id: int | None = None


class Place(NamedTuple):
    """Where reading goes on: behind what is staged, or behind what is appended."""

    part: int
    place: Any
    page: int
    """Number of the last page staged."""
    pages_staged: int
    is_complete: bool


class Appended(NamedTuple):
    """What `sequin_append_chunk` answers: appended, completed, waiting, empty, again or lost."""

    outcome: str
    rows: int
    reason: str | None


class Texts:
    """A text[] parameter made of bytes, in the binary format: nothing is escaped on the way."""

    def __init__(self, items: Sequence[bytes | None]) -> None:
        self.items = items


class _TextsDumper(Dumper):
    format = Format.BINARY
    oid = TEXT_ARRAY_OID

    def dump(self, obj: Texts) -> bytes:
        if not obj.items:
            return struct.pack("!iiI", 0, 0, TEXT_OID)
        parts = [struct.pack("!iiIii", 1, 1, TEXT_OID, len(obj.items), 1)]
        pack = struct.Struct("!i").pack
        for item in obj.items:
            if item is None:
                parts.append(pack(-1))
            else:
                parts.append(pack(len(item)))
                parts.append(item)
        return b"".join(parts)


class BackfillWork:
    """One worker's connection to the store."""

    def __init__(self, holder: UUID) -> None:
        self.holder = holder
        self._conn = store_connection(application_name="sequin backfill")
        self._conn.execute(
            "SELECT set_config('statement_timeout', %s, false), set_config('lock_timeout', %s, false),"
            " set_config('idle_in_transaction_session_timeout', %s, false)",
            [f"{STATEMENT_MS}ms", f"{LOCK_MS}ms", f"{STATEMENT_MS}ms"],
        )
        self._conn.adapters.register_dumper(Texts, _TextsDumper)
        self._conn.prepare_threshold = 0
        self._room = Room(self._conn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._conn.close()

    # Turns ----------------------------------------------------------------------------------------------------------

    def take_turn(self) -> Job | None:
        """The due backfill that nobody has worked on for longest, None when there is none."""
        row = self._conn.execute(
            "UPDATE backfills x SET holder = %s, held_until = clock_timestamp() + %s * interval '1 s', worked_at = clock_timestamp(),"
            f" waits_for = NULL WHERE x.id = (SELECT b.id {DUE_SQL} ORDER BY b.worked_at NULLS FIRST, b.created_at LIMIT 1"
            " FOR UPDATE OF b SKIP LOCKED) RETURNING x.id, x.consumer, x.source, x.kind, x.table_name, x.\"where\", x.sort_column,"
            " x.start_value, x.since, x.until, x.parts, x.part, x.place, x.page_rows, x.barrier_xid, x.seen_id, x.rows_done, x.to_id",
            [self.holder, TURN_S],
        ).fetchone()
        return None if row is None else Job(*row)

    def keep_turn(self, job: Job) -> bool:
        """Go on holding it; false when it was paused or cancelled, or somebody else works on it."""
        return bool(
            self._conn.execute(
                "UPDATE backfills SET held_until = clock_timestamp() + %s * interval '1 s' WHERE id = %s AND holder = %s AND"
                " status = 'running'",
                [TURN_S, job.id, self.holder],
            ).rowcount
        )

    def yield_turn(
        self, job: Job, *, page_rows: int, blocked: bool, rate: float | None = None, again_in_s: float = 0.0, reason: str | None = None
    ) -> None:
        """Give the turn up. It is due again after `again_in_s`; when `blocked`, once what is staged may be appended."""
        self._conn.execute(
            "UPDATE backfills b SET holder = NULL, held_until = NULL, due_at = clock_timestamp() + %(pause)s * interval '1 s',"
            " page_rows = %(rows)s, reason = coalesce(%(reason)s, b.reason),"
            " rate = coalesce(%(rate)s * 0.3 + coalesce(b.rate, %(rate)s) * 0.7, b.rate),"
            " rate_at = CASE WHEN %(rate)s::float8 IS NULL THEN b.rate_at ELSE clock_timestamp() END,"
            " waits_for = CASE WHEN %(blocked)s THEN c.first_high END, waits_epoch = c.epoch, wants_lsn = c.last_high"
            " FROM (SELECT (array_agg(high ORDER BY number))[1] AS first_high, (array_agg(epoch ORDER BY number))[1] AS epoch,"
            " max(high) AS last_high FROM backfill_chunks WHERE backfill = %(id)s) c"
            " WHERE b.id = %(id)s AND b.holder = %(holder)s",
            {"pause": again_in_s, "rows": page_rows, "reason": reason, "rate": rate, "id": job.id, "holder": self.holder, "blocked": blocked},
        )

    def progress(self, job: Job) -> tuple[int, int | None]:
        """Rows done, and about how many there are."""
        row = self._conn.execute("SELECT rows_done, rows_estimated FROM backfills WHERE id = %s", [job.id]).fetchone()
        return row or (job.rows_done, None)

    def fail(self, job: Job, reason: str) -> None:
        """End it: nothing that comes by itself would let it get on."""
        self._conn.execute(
            "UPDATE backfills SET status = 'failed', reason = %s, ended_at = clock_timestamp(), holder = NULL, held_until = NULL"
            " WHERE id = %s AND holder = %s AND status = 'running'",
            [reason[:2000], job.id, self.holder],
        )
        self.drop_staged(job)

    # What a page is read with ---------------------------------------------------------------------------------------------

    def place(self, job: Job) -> Place:
        """Where reading goes on."""
        row = self._conn.execute(
            "SELECT part, place, page, is_last, (SELECT count(DISTINCT page) FROM backfill_chunks WHERE backfill = %(id)s)"
            " FROM backfill_chunks WHERE backfill = %(id)s ORDER BY number DESC LIMIT 1",
            {"id": job.id},
        ).fetchone()
        if row is not None:
            part, place, page, is_last, staged = row
            return Place(part, place, page, staged, is_last)
        part, place = self._conn.execute("SELECT part, place FROM backfills WHERE id = %s", [job.id]).fetchone() or (0, None)
        return Place(part, place, 0, 0, False)

    def set_parts(self, job: Job, parts: list[dict[str, Any]], rows_estimated: int | None) -> None:
        """What it is to read, found out when it begins."""
        self._conn.execute(
            "UPDATE backfills SET parts = %s, rows_estimated = %s WHERE id = %s AND holder = %s",
            [json.dumps(parts), rows_estimated, job.id, self.holder],
        )

    def history(self, job: Job) -> tuple[int, str, int]:
        """The epoch, system identifier and timeline that the source's log is in."""
        row = self._conn.execute(
            "SELECT epoch, system_identifier, timeline FROM capture_progress WHERE source = %s", [job.source_id]
        ).fetchone()
        assert row is not None, "a backfill is due only when its source has been read"
        return int(row[0]), str(row[1]), int(row[2])

    def last_id(self, job: Job) -> int:
        """The last message of the source: read before a page, to know afterwards what the page's snapshot sees."""
        row = self._conn.execute("SELECT coalesce(max(id), 0) FROM messages WHERE source = %s", [job.source_id]).fetchone()
        return int(row[0]) if row else 0

    def seen(self, job: Job, last_id: int, snapshot: Snapshot) -> int:
        """The last message, not beyond `last_id`, up to which this snapshot sees everything."""
        with self._patience():
            row = self._conn.execute(
                "SELECT sequin_seen(%s, %s, %s, %s, %s::bigint[], %s)",
                [job.source_id, last_id, snapshot.xmin, snapshot.xmax, list(snapshot.xip), snapshot.low is not None],
            ).fetchone()
        assert row is not None
        return int(row[0])

    def seen_if_far(self, job: Job, last_id: int, snapshot: Snapshot) -> int | None:
        """The same, when much has been logged since it was last known; else None."""
        row = self._conn.execute("SELECT seen_id FROM backfills WHERE id = %s", [job.id]).fetchone()
        if row is None or last_id - (row[0] or 0) <= FAR_BEHIND:
            return None
        return self.seen(job, last_id, snapshot)

    def begin_from(self, job: Job, seen_id: int) -> bool:
        """Remember what the first snapshot sees."""
        return bool(
            self._conn.execute(
                "UPDATE backfills SET seen_id = %s WHERE id = %s AND holder = %s AND seen_id IS NULL", [seen_id, job.id, self.holder]
            ).rowcount
        )

    def waiting_for(self, job: Job) -> str | None:
        """Why nothing more may be read for the consumer now, if so: it has enough to do."""
        row = self._conn.execute(
            "SELECT (SELECT count(*) FROM (SELECT FROM messages m WHERE m.source = p.source AND m.id > p.position LIMIT %(limit)s) x)"
            " + p.parked_count, sequin_backlog_bytes(p.position) > c.max_backlog_bytes / 2"
            " FROM consumer_position p JOIN consumers_consumer c ON c.id = p.consumer WHERE p.consumer = %(consumer)s",
            {"limit": BACKLOG_MESSAGES, "consumer": job.consumer_id},
        ).fetchone()
        if row is None:
            return None
        waiting, is_full = row
        if is_full:
            return "waits for the consumer: its backlog has reached half of max_backlog_bytes"
        return f"waits for the consumer: {waiting} messages of the log lie before it" if waiting >= BACKLOG_MESSAGES else None

    def register_relation(self, epoch: int, source_id: UUID, shape: RelationShape) -> int:
        """The id of this shape of the table. It does not count as seen: capture tells of changes to what it saw itself."""
        return shapes.register_relation(self._conn, source_id, epoch, shape, seen=False)

    # Staging and appending ---------------------------------------------------------------------------------------------------

    def stage(self, job: Job, chunk: Chunk) -> bool:
        """Keep rows until the log has reached their high watermark. False when the turn is lost."""
        snapshot = chunk.snapshot
        return bool(
            self._conn.execute(
                "INSERT INTO backfill_chunks (backfill, number, page, epoch, from_xid, to_xid, running, low, high, relation, table_oid,"
                " read_at, part, place, is_last, keys, records, unchanged, seen_id)"
                " SELECT b.id, coalesce((SELECT max(number) FROM backfill_chunks WHERE backfill = b.id), 0) + 1, %s, %s, %s, %s,"
                " %s::bigint[], %s::bigint, %s, %s, %s, %s::timestamptz, %s, %s::jsonb, %s, %s, %s, %s::text[], %s::bigint FROM backfills b WHERE b.id = %s AND b.holder = %s AND"
                " b.status = 'running' FOR SHARE",
                [
                    chunk.page, chunk.epoch, snapshot.xmin, snapshot.xmax, list(snapshot.xip), snapshot.low, chunk.high,
                    chunk.relation, chunk.table_oid, chunk.read_at, chunk.part, json.dumps(chunk.place), chunk.is_last,
                    Texts(chunk.keys), Texts(chunk.records), None if chunk.unchanged is None else Texts(chunk.unchanged),
                    chunk.seen_id, job.id, self.holder,
                ],
            ).rowcount
        )  # fmt: skip

    def append(self, job: Job) -> Appended:
        """Move the next chunk into the log, when it may go there. Raises psycopg's LockNotAvailable when capture is busy."""
        self._room.ensure()
        outcome, rows, reason = self._append(job, LOOK_FIRST)
        for attempt in range(SEARCHES):
            if outcome != "search":
                break
            if self._is_stale(job):
                self.drop_staged(job)
                return Appended("again", 0, "the log was behind for too long")
            with self._patience():
                self._conn.execute("SELECT sequin_look(%s, %s)", [job.id, self.holder])
            outcome, rows, reason = self._append(job, LOOK_FIRST if attempt + 1 < SEARCHES else 1 << 62)
        return Appended(outcome, int(rows or 0), reason)

    def log_floor(self) -> int:
        """The first id that the log still reaches."""
        row = self._conn.execute("SELECT id FROM log_floor").fetchone()
        assert row is not None
        return int(row[0])

    def candidates(self, job: Job, after: int, count: int) -> tuple[list[int], int | None]:
        """Messages that a republish may take, of the next `count` of the log behind `after`; and the last one looked at."""
        row = self._conn.execute(
            "SELECT * FROM sequin_candidates(%s, %s, %s, %s, %s, %s, %s)",
            [job.source_id, job.consumer_id, after, job.to_id, count, job.since, job.until],
        ).fetchone()
        assert row is not None
        return list(row[0]), row[1]

    def append_copies(self, job: Job, ids: Sequence[int], place: int, *, is_last: bool) -> str:
        """Republish these messages: appended, completed or lost. Raises psycopg's LockNotAvailable when capture is busy."""
        self._room.ensure()
        row = self._conn.execute(
            "SELECT sequin_append_copies(%s, %s, %s, %s::bigint[], %s, %s)",
            [job.id, self.holder, SEQUENCE_LOCK, list(ids), place, is_last],
        ).fetchone()
        return str(row[0]) if row else "lost"

    def drop_staged(self, job: Job) -> None:
        """Forget what was read and not appended."""
        self._conn.execute(
            "DELETE FROM backfill_chunks c USING backfills b WHERE c.backfill = %s AND b.id = c.backfill"
            " AND (b.holder = %s OR b.status <> 'running')",
            [job.id, self.holder],
        )

    def _is_stale(self, job: Job) -> bool:
        return bool(
            self._conn.execute(
                "SELECT 1 FROM backfill_chunks WHERE backfill = %s AND staged_at < clock_timestamp() - %s * interval '1 s'",
                [job.id, STALE_AFTER_S],
            ).fetchone()
        )

    def _append(self, job: Job, much: int) -> tuple[str, int | None, str | None]:
        row = self._conn.execute(
            "SELECT * FROM sequin_append_chunk(%s, %s, %s, %s)", [job.id, self.holder, SEQUENCE_LOCK, much]
        ).fetchone()
        return row or ("lost", 0, None)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """A longer limit for a statement that holds no lock."""
        self._conn.execute(f"SET statement_timeout = {LOOK_MS}")
        try:
            yield
        finally:
            if not self._conn.closed:
                self._conn.execute(f"SET statement_timeout = {STATEMENT_MS}")
