"""Read pages of a source's tables under a snapshot, and turn them into what the log keeps, by the encoder of the stream.

A page is one short read-only transaction: first the snapshot is taken, then rows are read, then the WAL position that lies beyond
everything the snapshot sees. Reading locks the table against changes of its shape; whether it was changed just before is looked
at afterwards, and then the page is read again. Nothing is written to the source. Values arrive as texts, as pgoutput sends them.
"""
from __future__ import annotations

import json
import logging
import re
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

import psycopg
from psycopg import pq

from capture import page_sql, surroundings
from capture.catalog import Catalog
from capture.encoder import EncodedRow
from capture.page_sql import NULL, Bounds
from capture.published import Part, Published, look, parts_of
from consumers.encodings import SQL_ASCII, codec_of
from consumers.models import Source
from consumers.source_connection import SourceUnreachable, conninfo, connect, cut_after, reason_of
from consumers.store.backfill_work import Snapshot

log = logging.getLogger(__name__)

PAGE_BYTES = 4 * 1024 * 1024  # of rows; the last one may go beyond
PAGE_S = 2.0  # reading ends then, whatever was asked for
STATEMENT_MS = 60_000
LOCK_MS = 2_000
COMMAND_S = 30.0
ALIVE_EVERY_S = 1.0
LOCKED = "the table is locked"
CANNOT_CONVERT = ("22P05", "22021")  # SQLSTATE untranslatable_character, character_not_in_repertoire
BEGIN = b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL row_security = off; SET LOCAL search_path = %b"
# The files of a table and its partitions. A table that was truncated or rewritten looks empty to older snapshots.
FILES = (
    b"SELECT string_agg(c.oid::text || ':' || %b, ' ' ORDER BY c.oid) FROM pg_class c WHERE c.relkind = 'r'"
    b" AND (c.oid = %d OR c.oid IN (SELECT relid FROM pg_partition_tree(%d)))"
)
FILES_SEEN, FILES_NOW = b"c.relfilenode::text", b"pg_relation_filenode(c.oid)::text"
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)
_ESCAPES = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}

Condition = Callable[[Published], str | None]


class Busy(Exception):
    """The table is locked by somebody who changes it; try again in a moment."""


class TooSlow(Exception):
    """A page took longer than a statement may."""


class Untranslatable(Exception):
    """The server cannot convert a value to UTF-8."""


class Identity(NamedTuple):
    """Which history the server is in. The timeline is None on a standby."""

    system_identifier: str
    timeline: int | None


class Page(NamedTuple):
    """Rows of one snapshot: those that are wanted."""

    snapshot: Snapshot
    high: int
    read_at: str
    rows: list[EncodedRow]
    places: list[Any]
    """The place behind each of them."""
    place: Any
    """Behind all that was looked at."""
    looked_at: int
    is_last: bool
    size: int
    took_s: float


@contextmanager
def _locked_is_busy() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.LockNotAvailable:
        raise Busy(LOCKED) from None


class SourcePages:
    """Connections to one source for one worker's turn. `alive` is called now and then while the source keeps us waiting."""

    def __init__(self, source: Source, alive: Callable[[], None] = lambda: None) -> None:
        """Raises SourceUnreachable."""
        self.source = source
        self._alive = alive
        self._known: dict[Part, Published] = {}
        self._control = connect(source)
        try:
            self._control.execute("SELECT set_config('lock_timeout', %s, false)", [f"{LOCK_MS}ms"])
            self._encoding = surroundings.encoding(self._control)
            self._catalog = Catalog(self._control, self._encoding, source.publication_name)
            self._converted = self._encoding != SQL_ASCII
            self._open()
        except BaseException:
            self._control.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._raw.finish()
        self._control.close()

    def parts(self, table: str) -> list[Part]:
        """The relations under which a table is published. Raises NotReadable, Busy."""
        with _locked_is_busy():
            return parts_of(self._control, self._encoding, self.source.publication_name, table)

    def identity(self) -> Identity:
        row = self._control.execute(
            "SELECT (SELECT system_identifier::text FROM pg_control_system()),"
            " CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END"
        ).fetchone()
        assert row is not None
        return Identity(row[0], None if row[1] is None else int(row[1], 16))

    def look(self, part: Part, sort_column: str) -> Published:
        """Raises NotReadable, Busy, Untranslatable."""
        try:
            with _locked_is_busy():
                return look(
                    self._control, self._catalog, self._encoding, self.source.publication_name, part, sort_column, converted=self._converted
                )
        except (psycopg.errors.UntranslatableCharacter, psycopg.errors.CharacterNotInRepertoire) as error:
            raise Untranslatable(str(error)) from None

    def rows_estimated(self, table: Published, start_value: str | None, condition: Condition) -> int:
        """The planner's idea of how many rows there are."""
        bounds = Bounds(None, None, self._raw_text(start_value))
        plan = b"\n".join(row[0] or b"" for row in self._rows(page_sql.count_sql(table.sql, bounds, self._raw_text(condition(table)))))
        return int(json.loads(plan.decode(errors="replace"))[0]["Plan"]["Plan Rows"])

    def read(
        self, part: Part, sort_column: str, place: Any, limit: int, *, condition: Condition, start_value: str | None = None
    ) -> tuple[Published, Page]:
        """Up to `limit` rows from `place` on (None: the beginning); fewer when they are large.

        `condition`: SQL for the rows that are wanted of the table, which is `t` in it; None for all.
        Raises NotReadable, Busy, TooSlow, Untranslatable, SourceUnreachable.
        """
        began = time.monotonic()
        table = self._known.get(part) or self.look(part, sort_column)
        oid = part.leaf or part.oid
        low = self._replayed()
        self._run(BEGIN % table.search_path)
        try:
            snapshot, read_at, standby = self._snapshot(low)
            (files,), = self._rows(FILES % (FILES_SEEN, oid, oid))
            order = _text(page_sql.order_of(table.sql, files or b""))
            if place is not None and place["order"] != order:
                log.info("table=%s.%s has its rows in another order now: it is read from its beginning", table.shape.schema, table.shape.table)
                place = None
            bounds = self._bounds(table, place, start_value)
            page = self._copy(table, bounds, limit, self._raw_text(condition(table)))
            self._end()  # first: an ALTER TABLE that waits for it would let the look wait, and nobody would see the circle
            self._known[part] = self.look(part, sort_column)
            if self._known[part] != table or self._files(oid) != files:
                raise Busy("the table was changed while it was read")
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
            self._end()
            self._known[part] = self.look(part, sort_column)
            raise Busy("the table was changed while it was read") from None
        finally:
            self._end()
        high = self._high(standby)
        rows, places, behind, looked_at, size, complete = page
        for each in (*places, behind):
            each["order"] = order
        is_last = complete and looked_at < limit
        return table, Page(
            snapshot, high, read_at, rows, places, behind, looked_at, is_last, size, time.monotonic() - began
        )  # fmt: skip

    # One page -------------------------------------------------------------------------------------------------------------

    def _replayed(self) -> int | None:
        """Of a standby, before the snapshot: everything committed below it is seen."""
        row = self._control.execute(
            "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() - '0/0'::pg_lsn END"
        ).fetchone()
        return None if row is None or row[0] is None else int(row[0])

    def _files(self, oid: int) -> bytes | None:
        with _locked_is_busy():
            row = self._control.execute(FILES % (FILES_NOW, oid, oid)).fetchone()
        return None if row is None or row[0] is None else str(row[0]).encode()

    def _end(self) -> None:
        if self._raw.transaction_status != pq.TransactionStatus.IDLE and self._raw.status == pq.ConnStatus.OK:
            self._run(b"ROLLBACK")

    def _snapshot(self, low: int | None) -> tuple[Snapshot, str, bool]:
        (text, read_at, standby), = self._rows(
            b"SELECT txid_current_snapshot()::text, clock_timestamp()::text, pg_is_in_recovery()::int::text"
        )
        assert text is not None and read_at is not None
        xmin, xmax, xip = text.decode().split(":")
        running = tuple(int(xid) for xid in xip.split(",") if xid)
        return Snapshot(int(xmin), int(xmax), running, low if standby == b"1" else None), read_at.decode(), standby == b"1"

    def _high(self, standby: bool) -> int:
        """A position beyond everything that the page's snapshot sees; and let the server flush up to there soon."""
        if standby:
            query = "SELECT x, x FROM (SELECT greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'::pg_lsn AS x) y"
        else:
            query = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn, pg_current_wal_flush_lsn() - '0/0'::pg_lsn"
        row = self._control.execute(query).fetchone()
        assert row is not None
        if row[0] > row[1]:
            # What reading itself wrote (hint bits) nobody flushes for a while, and the slot sends only what is flushed. A
            # transaction that has an id and nothing else wakes the WAL writer when it ends.
            self._control.execute("SELECT txid_current()")
        return int(row[0])

    def _bounds(self, table: Published, place: Any, start_value: str | None) -> Bounds:
        start = self._raw_text(start_value)
        if place is not None:
            return Bounds(_values(place["after"]), _values(place["last"]), start)
        return Bounds(None, self._last(table, start_value), start)

    def _last(self, table: Published, start_value: str | None) -> list[bytes | None] | None:
        """Where the table ends now. Not of a sort column of its own: finding its last row may take as long as reading all."""
        if table.sql.by_place:
            (blocks,), = self._rows(
                b"SELECT pg_relation_size(%b::regclass) / current_setting('block_size')::int"
                % page_sql.quoted(table.sql.table.removeprefix(b"ONLY "))
            )
            return [b"(%b,0)" % (blocks or b"0")]
        if len(table.sql.sort) != len(table.shape.primary_key):
            return None
        found = list(self._copied(page_sql.last_row_sql(table.sql)))
        return list(found[0]) if found else None

    def _copy(self, table: Published, bounds: Bounds, limit: int, condition: bytes | None) -> tuple[Any, ...]:
        found: list[EncodedRow] = []
        places: list[Any] = []
        width = len(table.sql.sort)
        insert = table.encoder.insert
        last = _texts(bounds.last)
        looked_at = size = 0
        behind: Any = None
        complete = True
        deadline = time.monotonic() + PAGE_S
        rows = self._copied(page_sql.page_sql(table.sql, bounds, limit, condition))
        for row in rows:
            looked_at += 1
            behind = row[:width]
            if row[width] == b"t":
                encoded = insert(row[width + 1 :])
                found.append(encoded)
                places.append(behind)
                size += len(encoded.record)
            if size >= PAGE_BYTES or (looked_at & 63 == 0 and time.monotonic() > deadline):
                complete = False
                rows.close()
                break
        behind_all = {"after": _texts(bounds.after if behind is None else behind), "last": last}
        return found, [{"after": _texts(values), "last": last} for values in places], behind_all, looked_at, size, complete

    # The connection that reads -----------------------------------------------------------------------------------------------

    def read_unconverted(self) -> None:
        """Take texts as they are stored from now on: the server cannot convert one of them."""
        self._converted = False
        self._known.clear()
        self._raw.finish()
        self._open()

    def _open(self) -> None:
        self._raw = pq.PGconn.connect(conninfo(self.source, encoded=self._converted).encode())
        if self._raw.status != pq.ConnStatus.OK:
            raise SourceUnreachable(
                str(self.source.host), int(self.source.port), reason_of(Exception(self._raw.error_message.decode(errors="replace")), self.source)
            )
        self._run(
            b"SET statement_timeout = %d; SET lock_timeout = %d; SET idle_in_transaction_session_timeout = %d;"
            b" SET max_parallel_workers_per_gather = 0; SET synchronize_seqscans = off" % (STATEMENT_MS, LOCK_MS, STATEMENT_MS)
        )

    def _raw_text(self, text: str | None) -> bytes | None:
        """A text of ours as the connection that reads takes it."""
        return None if text is None else text.encode("utf-8" if self._converted else codec_of(self._encoding))

    def _run(self, query: bytes) -> pq.abc.PGresult:
        with cut_after(self._raw.socket, COMMAND_S):
            result = self._raw.exec_(query)
        self._check(result)
        return result

    def _rows(self, query: bytes) -> list[tuple[bytes | None, ...]]:
        result = self._run(query)
        return [tuple(result.get_value(row, column) for column in range(result.nfields)) for row in range(result.ntuples)]

    def _copied(self, query: bytes) -> Any:
        """Yield the rows of a COPY as lists of texts, None for NULL. Closed early, the rest is cancelled."""
        self._run(query)
        conn = self._raw
        conn.nonblocking = 1
        poll = select.poll()
        poll.register(conn.socket, select.POLLIN)
        done = False
        try:
            while True:
                count, data = conn.get_copy_data(1)
                if count > 0:
                    line = bytes(data[:-1])
                    values: list[bytes | None] = [None if text == NULL else text for text in line.split(b"\t")]
                    if b"\\" in line:
                        values = [text and _unescape(text) for text in values]
                    yield values
                elif count == 0:
                    if not poll.poll(int(ALIVE_EVERY_S * 1000)):
                        self._alive()
                        continue
                    conn.consume_input()
                else:
                    done = True
                    break
        finally:
            conn.nonblocking = 0
            if not done and conn.status == pq.ConnStatus.OK:
                self._cancel()
        with cut_after(conn.socket, COMMAND_S):
            while (result := conn.get_result()) is not None:
                self._check(result)

    def _cancel(self) -> None:
        conn = self._raw
        conn.get_cancel().cancel()
        with cut_after(conn.socket, COMMAND_S):
            while conn.get_copy_data(0)[0] > 0:
                pass
            while conn.get_result() is not None:
                pass

    def _check(self, result: pq.abc.PGresult) -> None:
        if result.status in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COPY_OUT):
            return
        state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        if state in CANNOT_CONVERT:
            raise Untranslatable(result.get_error_message())
        error = psycopg.errors.error_from_result(result)
        if isinstance(error, psycopg.errors.LockNotAvailable):
            raise Busy(LOCKED) from None
        if isinstance(error, psycopg.errors.QueryCanceled):
            raise TooSlow(str(error)) from None
        raise error


def _unescape(text: bytes) -> bytes:
    return _ESCAPE.sub(lambda found: _ESCAPES.get(found[1], found[1]), text) if b"\\" in text else text


def _text(value: bytes | None) -> str | None:
    """A value for JSON: whatever bytes it is, none is lost."""
    return None if value is None else value.decode("latin-1")


def _texts(values: Any) -> list[str | None] | None:
    return None if values is None else [_text(value) for value in values]


def _values(texts: Any) -> list[bytes | None] | None:
    return None if texts is None else [None if text is None else text.encode("latin-1") for text in texts]
