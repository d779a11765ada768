"""What tests of capture share: reading in this process until a condition holds, and looking into the log."""
from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from django.db import connection

from capture.reader import Reader
from capture.reading import Reading
from capture.stream import SlotActive
from consumers.models import Source
from consumers.store.appender import Appender
from tests.conftest import SLOWER, wait_until


# A database's encoding, a text as it is stored there, and as it arrives.
ENCODINGS = [
    ("LATIN1", b"caf\xe9", "café"),
    ("SQL_ASCII", "café ✓ ".encode() + b"\xff", r"café ✓ \xff"),
    ("WIN1252", b"caf\xe9\x80 \x81", r"café€ \x81"),  # 0x81 means nothing there: the server refuses to convert it
    ("EUC_JP", b"\xc6\xfc \x8f\xa2\xa1", r"日 \x8f◆"),  # one character of three bytes, which has no equivalent
]


class Logged(NamedTuple):
    table: str
    action: str
    record: Any
    changes: Any
    key: list[str]
    annotations: Any
    epoch: int


def logged(source: Source | None = None) -> list[Logged]:
    """The log, with JSON decoded."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT r.schema_name || '.' || r.table_name, m.action, m.record, m.changes, m.key, m.annotations, m.epoch"
            " FROM messages m JOIN relation_version r ON r.id = m.relation WHERE %(source)s::uuid IS NULL OR m.source = %(source)s"
            " ORDER BY m.id",
            {"source": None if source is None else source.pk},
        )
        return [
            Logged(table, action, json.loads(record), changes and json.loads(changes), json.loads(key), notes and json.loads(notes), epoch)
            for table, action, record, changes, key, notes, epoch in cursor.fetchall()
        ]


def events(source: Source) -> list[tuple[str, str | None, str, bool]]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT kind, table_name, text, backfill FROM source_events WHERE source = %s ORDER BY id", [source.pk])
        return cursor.fetchall()


def gap(source: Source) -> str | None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT gap FROM capture_progress WHERE source = %s", [source.pk])
        row = cursor.fetchone()
        return None if row is None else row[0]


def run_reader(source: Source, appender: Appender, stopping: Callable[[], bool]) -> None:
    """As production does: the server may take a moment to be rid of the sender of before."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return Reader(source, appender, stopping=stopping).run()
        except SlotActive:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def read_until(source: Source, condition: Callable[[], Any], timeout: float = 30) -> None:
    """Read in this thread until the condition holds. Raises what the reader raises."""
    deadline = time.monotonic() + SLOWER * timeout

    def done() -> bool:
        assert time.monotonic() < deadline, f"waited {timeout} s in vain; events: {events(source)}"
        return bool(condition())

    with Appender(source.pk) as appender:
        assert appender.wait_for_source(10)
        run_reader(source, appender, done)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """A reader in a thread while the block runs. What it raises fails the test."""
    stop, failed = threading.Event(), []

    def run() -> None:
        try:
            with Appender(source.pk) as appender:
                assert appender.wait_for_source(10)
                run_reader(source, appender, stop.is_set)
        except BaseException as error:
            failed.append(error)
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
        if failed:  # also when the block has waited in vain because of it
            raise failed[0]
    assert not thread.is_alive()


def await_messages(count: int, source: Source | None = None, timeout: float = 20) -> list[Logged]:
    wait_until(lambda: len(logged(source)) >= count, timeout, f"{count} messages in the log")
    return logged(source)


class ForkedReader:
    """A reader in a process of its own, which can be killed: `ForkedReader(source, **{"capture.reader.BATCH_ROWS": 10})`.

    It is forked, so that a test need not wait for an interpreter to start. No thread of ours may hold a database connection then.
    """

    def __init__(self, source: Source, **constants: Any) -> None:
        self._source_id, self._constants = source.pk, constants
        self.pid = 0
        self.peak_mb = 0
        """The most memory one of its processes has had, as far as it was looked at: on a kill, and by `look`."""

    def start(self) -> ForkedReader:
        connection.close()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for name, value in self._constants.items():
                    module, attribute = name.rsplit(".", 1)
                    setattr(importlib.import_module(module), attribute, value)
                Reading(Source.objects.get(pk=self._source_id)).run()
            finally:
                os._exit(0)
        return self

    def kill(self) -> None:
        if self.pid:
            self.look()
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def is_alive(self) -> bool:
        return bool(self.pid) and os.waitpid(self.pid, os.WNOHANG) == (0, 0)

    def look(self) -> int:
        """The most memory it has had until now."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                self.peak_mb = max(self.peak_mb, int(line.split()[1]) // 1024)
        return self.peak_mb
