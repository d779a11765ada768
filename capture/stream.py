"""Drive the replication protocol of one slot: bytes from the socket, status to the server. `reader` knows what they mean.

psycopg has no replication API; its libpq wrapper has all it takes. Status goes out by the clock, also under full load.
Source: PostgreSQL manual, "Streaming Replication Protocol".
"""
from __future__ import annotations

import select
import struct
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from psycopg import pq

from capture.lsn import format_lsn

POSTGRES_EPOCH_S = 946_684_800  # 2000-01-01 UTC
STATUS_EVERY_S = 1.0
_STATUS = struct.Struct("!cQQQqB")
_KEEPALIVE = struct.Struct("!QqB")
HEADER_BYTES = 25  # of an XLogData message; the payload follows
XLOG_DATA, KEEPALIVE = b"wk"


class StreamEnded(Exception):
    """The server or the network ended the stream; the text is one line."""


class ReplicationStream:
    """One START_REPLICATION. Yields batches of protocol messages; `confirm` what is stored."""

    def __init__(self, conninfo: str) -> None:
        """Connect and learn which history the server has. Raises StreamEnded."""
        self._conn = pq.PGconn.connect(conninfo.encode())
        if self._conn.status != pq.ConnStatus.OK:
            raise StreamEnded(_line(self._conn.error_message))
        self.wal_end = 0
        """Up to here the server has sent everything (only meaningful between transactions)."""
        self._confirmed = 0
        self._status_at = 0.0
        self.system_identifier, self.timeline = self._identify()

    def start(self, slot: str, publication: str, start_lsn: int) -> None:
        """Begin to stream what was committed after `start_lsn`. Raises StreamEnded."""
        self.wal_end = self._confirmed = start_lsn
        quoted = publication.replace('"', '""').replace("'", "''")
        self._query(
            f'START_REPLICATION SLOT "{slot}" LOGICAL {format_lsn(start_lsn)}'
            f" (proto_version '1', publication_names '\"{quoted}\"')",
            pq.ExecStatus.COPY_BOTH,
        )
        self._conn.nonblocking = 1
        self._poll = select.poll()
        self._poll.register(self._conn.socket, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def batches(self, limit: int, wait_s: float) -> Iterator[list[bytes]]:
        """Yield what has arrived, up to `limit` messages at a time; an empty list after `wait_s` without any.

        Keepalives alone do not keep it from yielding: the caller has clocks of its own to look at.

        Raises StreamEnded.
        """
        conn = self._conn
        get = conn.get_copy_data
        while True:
            batch: list[bytes] = []
            deadline = time.monotonic() + wait_s  # also when keepalives come all the time
            while len(batch) < limit:
                count, data = get(1)
                if count > 0:
                    if data[0] == XLOG_DATA:
                        batch.append(bytes(data[HEADER_BYTES:]))
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
                    result = conn.get_result()
                    raise StreamEnded(_line(result.error_message if result is not None else b"the server ended the stream"))
            self.send_status_by_clock()
            yield batch

    def confirm(self, lsn: int) -> None:
        """Everything up to `lsn` is stored, or had nothing for us. Sent with the next status."""
        self._confirmed = max(self._confirmed, lsn)

    def send_status_by_clock(self, every_s: float = STATUS_EVERY_S) -> None:
        if time.monotonic() - self._status_at >= every_s:
            self.send_status()

    def send_status(self) -> None:
        """Tell the server what is confirmed."""
        now_us = int((time.time() - POSTGRES_EPOCH_S) * 1e6)
        lsn = self._confirmed
        self._conn.put_copy_data(_STATUS.pack(b"r", max(self.wal_end, lsn), lsn, lsn, now_us, 0))
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
        """Send the last status and end the copy, so that the slot is free at once."""
        self.send_status()
        self._conn.put_copy_end()
        deadline = time.monotonic() + 3
        while self._conn.flush() == 1 and time.monotonic() < deadline:
            self._poll.poll(100)
        while time.monotonic() < deadline:
            count, _ = self._conn.get_copy_data(1)
            if count < 0:
                return
            if count == 0:
                if not self._poll.poll(200):
                    continue
                self._consume()

    def close(self) -> None:
        self._conn.finish()

    def _keepalive(self, data: bytes) -> None:
        self.wal_end, _, reply = _KEEPALIVE.unpack_from(data, 1)
        if reply:
            self.send_status()

    def _consume(self) -> None:
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
        result = self._conn.exec_(text.encode())
        if result.status != expected:
            raise StreamEnded(_line(result.error_message))
        return result


def _line(message: bytes) -> str:
    return " ".join(message.decode(errors="replace").split()) or "the connection ended"
