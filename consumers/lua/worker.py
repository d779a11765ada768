"""The child process: one user's text, run on the messages that come in on standard input, a socket.

`child.py` starts it with an empty environment. Standard output is a page shared with the parent: the number of the message
under way, so that the parent knows whose fault the end of this process was. CPU time is bounded from inside Lua, with the
line (`sandbox.lua`); what Lua's own C functions eat meanwhile is bounded here, by a timer that ends the process.
"""
from __future__ import annotations

import gc
import mmap
import signal
import socket
import struct
import sys
import time

from consumers.lua import frames, jail
from consumers.lua.sandbox import Sandbox
from consumers.lua.types import CPU_S, WRITE_S

HARD_CPU_S = CPU_S + WRITE_S + 0.05
DECODE_S_PER_BYTE = 1e-7
FLUSH_AFTER_S = 0.001
FLUSH_BYTES = 64 * 1024
PAGE = struct.Struct("=Q")


def main() -> None:
    parent = int(sys.argv[-1])
    connection = socket.socket(fileno=0)
    page = mmap.mmap(1, PAGE.size)
    sandbox = Sandbox()
    gc.freeze()
    gc.disable()
    jail.lock(parent)
    serve(connection, page, sandbox)


def serve(connection: socket.socket, page: mmap.mmap, sandbox: Sandbox) -> None:
    """Until the parent hangs up."""
    inbox = frames.Inbox()
    while True:
        try:
            data = connection.recv(1 << 20)
        except OSError:
            return
        if not data:
            return
        for kind, body in inbox.feed(data):
            allow(len(body))
            if kind == frames.COMPILE:
                connection.sendall(frames.answer(sandbox.compile(body.decode())))
            else:
                run(connection, page, sandbox, body)
            sandbox.trim()
            gc.collect()


def run(connection: socket.socket, page: mmap.mmap, sandbox: Sandbox, body: bytes) -> None:
    """Answer the messages of one frame, in order; several answers go together when they come fast."""
    waiting = bytearray()
    sent_at = time.monotonic()
    for number, message in enumerate(frames.split(body)):
        PAGE.pack_into(page, 0, number)
        allow(len(message))
        waiting += frames.answer(sandbox.run(message))
        if len(waiting) > FLUSH_BYTES or time.monotonic() - sent_at > FLUSH_AFTER_S:
            connection.sendall(waiting)
            waiting.clear()
            sent_at = time.monotonic()
    connection.sendall(waiting)


def allow(size: int) -> None:
    """Let this process use CPU for one message of `size` bytes, and be ended by SIGPROF beyond."""
    signal.setitimer(signal.ITIMER_PROF, HARD_CPU_S + size * DECODE_S_PER_BYTE)


if __name__ == "__main__":
    main()
