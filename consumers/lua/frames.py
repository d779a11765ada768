"""The frames between a transformer and its child: a kind, a length, a body. Pure; both sides share it.

To the child: COMPILE text, RUN messages. From it: one answer for a text, one for each message in their order.
"""
from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from consumers.lua.types import LuaError, Result

HEADER = struct.Struct("!cI")
LENGTH = struct.Struct("!I")
LINE = struct.Struct("!i")  # -1: none

COMPILE, RUN = b"C", b"R"
PAYLOAD, DROPPED, FAILED = b"P", b"D", b"E"


def frame(kind: bytes, body: bytes = b"") -> bytes:
    return HEADER.pack(kind, len(body)) + body


def answer(result: Result) -> bytes:
    """A message's result as a frame; of a text that compiled, DROPPED."""
    if result is None:
        return frame(DROPPED)
    if isinstance(result, LuaError):
        return frame(FAILED, LINE.pack(-1 if result.line is None else result.line) + result.message.encode("utf-8", "replace"))
    return frame(PAYLOAD, result)


def result(kind: bytes, body: bytes) -> Result:
    """What `answer` made a frame of."""
    if kind == PAYLOAD:
        return body
    if kind == DROPPED:
        return None
    (line,) = LINE.unpack_from(body)
    return LuaError(body[LINE.size :].decode("utf-8", "replace"), None if line < 0 else line)


def joined(messages: Iterable[bytes]) -> bytes:
    """The body of a RUN frame."""
    return b"".join([LENGTH.pack(len(message)) + message for message in messages])


def split(body: bytes) -> Iterator[bytes]:
    """The messages of a RUN frame."""
    at = 0
    while at < len(body):
        (length,) = LENGTH.unpack_from(body, at)
        at += LENGTH.size
        yield body[at : at + length]
        at += length


class Inbox:
    """Bytes as they come, frames as they are complete."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The frames that `data` completes, as kind and body."""
        buffer = self._bytes
        buffer += data
        frames = []
        at = 0
        while len(buffer) - at >= HEADER.size:
            kind, length = HEADER.unpack_from(buffer, at)
            start = at + HEADER.size
            if len(buffer) - start < length:
                break
            frames.append((kind, bytes(buffer[start : start + length])))
            at = start + length
        del buffer[:at]
        return frames
