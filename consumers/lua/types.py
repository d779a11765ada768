"""What goes into a transform and what comes out, and its limits. Pure; parent and child share it."""
from __future__ import annotations

from typing import NamedTuple

CPU_S = 0.05  # of the user's text
WRITE_S = 0.2  # CPU, of its result as JSON
MEMORY_MIB = 64
OUTPUT_BYTES = 1024 * 1024
DEPTH = 100
TEXT_BYTES = 256 * 1024
TOO_LONG = f"took longer than {CPU_S * 1000:.0f} ms CPU"


class Call(NamedTuple):
    """One message for the user's function: JSON texts. `changes` None is null."""

    action: bytes
    """A JSON text too: b'"insert"'."""
    record: bytes
    changes: bytes | None
    metadata: bytes

    def as_json(self) -> bytes:
        return b"[%b,%b,%b,%b]" % (self.action, self.record, b"null" if self.changes is None else self.changes, self.metadata)


class LuaError(NamedTuple):
    """Why a text was refused or a message failed. `line` is one of the user's text, from 1, None when none can be told."""

    message: str
    line: int | None

    def __str__(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


Result = bytes | None | LuaError
"""The payload's JSON text; None: the function dropped the message."""
