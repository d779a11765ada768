"""Drive the replication protocol of one slot: bytes from the socket, status to the server. `reader` knows what they mean.

psycopg has no replication API; its libpq wrapper has all it takes. Status goes out by the clock, also under full load.
Source: PostgreSQL manual, "Streaming Replication Protocol".
"""
from __future__ import annotations

import re
import select
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from psycopg import pq

from capture.lsn import format_lsn
from consumers.source_connection import cut_after

POSTGRES_EPOCH_S = 946_684_800  # 2000-01-01 UTC
READ_BYTES = 16 * 1024 * 1024  # of messages taken at once, when they are large; the last one may go beyond
STATUS_EVERY_S = 1.0
BUSY_STATUS_EVERY_S = 2.0
ASK_AFTER_S, DEAD_AFTER_S = 10.0, 20.0
ANSWER_WITHIN_S = 15.0  # to a command before the stream begins
CANNOT_CONVERT = (b"22P05", b"22021")  # SQLSTATE untranslatable_character, character_not_in_repertoire
PASSING = (b"", b"08", b"53", b"57")  # classes of SQLSTATE: the connection, resources, an operator (shutdown, terminate)
_STATUS = struct.Struct("!cQQQqB")
_KEEPALIVE = struct.Struct("!QqB")
HEADER_BYTES = 25  # of an XLogData message; the payload follows
XLOG_DATA, KEEPALIVE = b"wk"


class StreamEnded(Exception):
    """The server or the network ended the stream; the text is one line."""


class SlotActive(StreamEnded):
    """Another process of the server sends this slot's changes. `pid` is that process."""

    def __init__(self, text: str, pid: int) -> None:
        self.pid = pid
        super().__init__(text)


class Untranslatable(StreamEnded):
    """The server cannot convert a value to UTF-8: a byte that means nothing in the database's own encoding, say."""


class DecodingFailed(StreamEnded):
    """The server's decoding of the WAL failed, for a reason that may be there again next time."""


class ReplicationStream:
    """One START_REPLICATION. Yields batches of protocol messages; `confirm` what is stored."""

    def __init__(self, conninfo: str) -> None:
        """Connect and learn which history the server has. Raises StreamEnded."""
        self._conn = pq.PGconn.connect(conninfo.encode())
        if self._conn.status != pq.ConnStatus.OK:
            raise StreamEnded(_line(self._conn.error_message))
        self.wal_end = 0
        """Up to here the server has sent everything (only meaningful between transactions)."""
        self.wait_s = 0.0
        self._confirmed = 0
        self._status_at = self._heard_at = self._asked_at = 0.0
        self._helper = _StatusHelper(self)
        if self._conn.server_version >= 140_000:  # which brought it; a role may have it set
            self._query("SET idle_session_timeout = 0", pq.ExecStatus.COMMAND_OK)
        self.system_identifier, self.timeline = self._identify()

    def started_at(self) -> str:
        """When the server that answers was started, as its text. Raises StreamEnded."""
        value = self._query("SELECT pg_postmaster_start_time()", pq.ExecStatus.TUPLES_OK).get_value(0, 0)
        return (value or b"").decode(errors="replace")

    def timeline_history(self) -> str:
        """The history file of the server's timeline; empty for the first one. Raises StreamEnded."""
        if self.timeline <= 1:
            return ""
        content = self._query(f"TIMELINE_HISTORY {self.timeline}", pq.ExecStatus.TUPLES_OK).get_value(0, 1)
        return (content or b"").decode(errors="replace")

    def start(self, slot: str, publication: str, start_lsn: int, *, proven: bool = True) -> None:
        """Begin to stream what was committed after `start_lsn`. Raises StreamEnded, SlotActive.

        `proven`: up to there the server's history is known to be the log's; if not, nothing is confirmed before `confirm`.
        """
        self.wal_end = start_lsn
        self._confirmed = start_lsn if proven else 0
        quoted = publication.replace('"', '""').replace("'", "''")
        # pgoutput hands on logical messages from Postgres 14 on; transaction annotations are such.
        messages = ", messages 'true'" if self._conn.server_version >= 140_000 else ""
        self._query(
            f'START_REPLICATION SLOT "{slot}" LOGICAL {format_lsn(start_lsn)}'
            f" (proto_version '1', publication_names '\"{quoted}\"'{messages})",
            pq.ExecStatus.COPY_BOTH,
        )
        self._conn.nonblocking = 1
        self._heard_at = time.monotonic()
        self._poll = select.poll()
        self._poll.register(self._conn.socket, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def batches(self, limit: int, wait_s: float) -> Iterator[list[bytes]]:
        """Yield what has arrived, up to `limit` messages or READ_BYTES at a time; an empty list after `wait_s` without any, which
        may be set to another value meanwhile.

        Keepalives alone do not keep it from yielding: the caller has clocks of its own to look at. A server that says
        nothing is asked for a sign of life, and given up when none comes: a dead connection looks like an idle one.

        Raises StreamEnded, Untranslatable.
        """
        conn = self._conn
        get = conn.get_copy_data
        self.wait_s = wait_s
        while True:
            batch: list[bytes] = []
            size = 0
            deadline = time.monotonic() + self.wait_s  # also when keepalives come all the time
            while len(batch) < limit and size < READ_BYTES:
                count, data = get(1)
                if count > 0:
                    self._asked_at = 0.0
                    if data[0] == XLOG_DATA:
                        batch.append(bytes(data[HEADER_BYTES:]))
                        size += len(data)
                    elif data[0] == KEEPALIVE:
                        self._keepalive(bytes(data))
                elif count == 0:
                    if batch:
                        # Take along what has arrived meanwhile, but never wait for more.
                        if not self._poll.poll(0):
                            break
                    else:
                        left = deadline - time.monotonic()
                        if left <= 0 or not self._poll.poll(int(left * 1000) + 1):
                            break
                    self._consume()
                else:
                    raise self._ended()
            self.send_status_by_clock()
            if not batch:
                self._demand_life()
            yield batch

    def confirm(self, lsn: int) -> None:
        """Everything up to `lsn` is stored, or had nothing for us. Sent with the next status."""
        self._confirmed = max(self._confirmed, lsn)

    def send_status_by_clock(self, every_s: float = STATUS_EVERY_S) -> None:
        if time.monotonic() - self._status_at >= every_s:
            self.send_status()

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """While the caller does something that may take long: status goes out all the same, with nothing new confirmed.

        The stream must not be used otherwise in the meantime.
        """
        self._helper.begin()
        try:
            yield
        finally:
            self._helper.end()

    def send_status(self, *, ask: bool = False) -> None:
        """Tell the server what is confirmed. `ask`: and have it answer."""
        now_us = int((time.time() - POSTGRES_EPOCH_S) * 1e6)
        lsn = self._confirmed
        self._conn.put_copy_data(_STATUS.pack(b"r", max(self.wal_end, lsn), lsn, lsn, now_us, int(ask)))
        deadline = time.monotonic() + 10
        while self._conn.flush() == 1:
            # The server may be writing too: read, or both wait for each other.
            both = select.poll()
            both.register(self._conn.socket, select.POLLIN | select.POLLOUT)
            for _, event in both.poll(1000):
                if event & select.POLLIN:
                    self._consume()
            if time.monotonic() > deadline:
                raise StreamEnded("the server does not take our status")
        self._status_at = time.monotonic()

    def finish(self) -> None:
        """Send the last status and end the copy, so that the slot is free when this returns."""
        self.send_status()
        self._conn.put_copy_end()
        deadline = time.monotonic() + 3
        while self._conn.flush() == 1 and time.monotonic() < deadline:
            self._poll.poll(100)
        while time.monotonic() < deadline:
            count, _ = self._conn.get_copy_data(1)
            if count < 0:
                self._drain(max(0.1, deadline - time.monotonic()))
                return
            if count == 0:
                if not self._poll.poll(200):
                    continue
                self._consume()

    def close(self) -> None:
        self._helper.close()
        self._conn.finish()

    def _ended(self) -> StreamEnded:
        result = self._conn.get_result()
        if result is None:
            return StreamEnded("the server ended the stream")
        line = _line(result.error_message)
        state = result.error_field(pq.DiagnosticField.SQLSTATE) or b""
        if state not in CANNOT_CONVERT:
            return StreamEnded(line) if state[:2] in PASSING else DecodingFailed(line)
        self._drain(ANSWER_WITHIN_S)
        return Untranslatable(line)

    def _drain(self, within_s: float) -> None:
        """To the command's very end: the server ends the copy first, and frees the slot then."""
        with cut_after(self._conn.socket, within_s):
            while self._conn.get_result() is not None:
                pass

    def _demand_life(self) -> None:
        now = time.monotonic()
        if self._asked_at:
            if now - self._asked_at >= DEAD_AFTER_S - ASK_AFTER_S:
                raise StreamEnded(f"nothing came from the server for {int(DEAD_AFTER_S)} s although it was asked: the connection is dead")
        elif now - self._heard_at >= ASK_AFTER_S:
            self._asked_at = now
            self.send_status(ask=True)

    def _keepalive(self, data: bytes) -> None:
        self.wal_end, _, reply = _KEEPALIVE.unpack_from(data, 1)
        if reply:
            self.send_status()

    def _consume(self) -> None:
        self._heard_at = time.monotonic()
        try:
            self._conn.consume_input()
        except Exception as error:  # psycopg raises its own OperationalError here
            raise StreamEnded(_line(str(error).encode())) from None

    def _identify(self) -> tuple[str, int]:
        result = self._query("IDENTIFY_SYSTEM", pq.ExecStatus.TUPLES_OK)
        system, timeline = result.get_value(0, 0), result.get_value(0, 1)
        assert system is not None and timeline is not None
        return system.decode(), int(timeline)

    def _query(self, text: str, expected: pq.ExecStatus) -> pq.abc.PGresult:
        with cut_after(self._conn.socket, ANSWER_WITHIN_S):
            result = self._conn.exec_(text.encode())
        if result.status != expected:
            line = _line(result.error_message)
            active = re.search(r"is active for PID (\d+)", line)
            raise SlotActive(line, int(active[1])) if active else StreamEnded(line)
        return result


class _StatusHelper:
    """Sends status from a thread of its own while the stream's user is busy elsewhere."""

    def __init__(self, stream: ReplicationStream) -> None:
        self._stream = stream
        self._change = threading.Condition()
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        with self._change:
            self._busy = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="replication-status", daemon=True)
                self._thread.start()

    def end(self) -> None:
        with self._change:  # also waits for a status that is just going out
            self._busy = False

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join(15)

    def _run(self) -> None:
        with self._change:
            while not self._closed:
                self._change.wait(BUSY_STATUS_EVERY_S / 2)
                if self._busy and not self._closed:
                    try:
                        self._stream.send_status_by_clock(BUSY_STATUS_EVERY_S)
                    except StreamEnded:
                        self._busy = False  # the user finds out when it reads again


def _line(message: bytes) -> str:
    return " ".join(message.decode(errors="replace").split()) or "the connection ended"
