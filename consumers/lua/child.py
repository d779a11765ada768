"""Start, feed and end one child process (`worker.py`). `transformer.py` decides what to do when it ends.

A child inherits nothing: an empty environment, no descriptors but its socket and the page that tells how far it is.
"""
from __future__ import annotations

import importlib.util
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from consumers.lua import frames
from consumers.lua.types import LuaError, Result
from consumers.lua.worker import PAGE

DEADLINE_S = 2.0  # of one message, by the wall; a backstop for CPU limits that the child keeps itself
START_S = 10.0
PROGRAM = "import sys; sys.path[:0] = sys.argv[1:3]; from consumers.lua.worker import main; main()"
# A time zone that needs no file.
ENVIRONMENT = {"TZ": "UTC0", "LC_ALL": "C", "PYTHONUTF8": "1"}


class ChildEnded(Exception):
    """The child is gone. `under_way` counts from the first message of the frame; `used_up`: its CPU time did it."""

    def __init__(self, under_way: int, *, used_up: bool = False, silent: bool = False) -> None:
        super().__init__(f"the process of a transform ended at message {under_way}")
        self.under_way = under_way
        self.used_up = used_up
        self.silent = silent


class Child:
    """One process. Not thread-safe."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as file:
            file.truncate(PAGE.size)
            self._page = mmap.mmap(file.fileno(), PAGE.size)
            self._process = _start(theirs, file.fileno())
        self._socket = ours
        self._socket.settimeout(DEADLINE_S)
        self._inbox = frames.Inbox()
        self._ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def compile(self, text: str) -> LuaError | None:
        """Give the child its text. Raises ChildEnded."""
        self._progress(0)
        self._send(frames.frame(frames.COMPILE, text.encode("utf-8", "replace")))
        (answer,) = self._answers(1)
        self._ready = True
        return answer if isinstance(answer, LuaError) else None

    def run(self, messages: Sequence[bytes]) -> Iterator[Result]:
        """The results, in order, as they come. Raises ChildEnded."""
        self._progress(0)
        self._send(frames.frame(frames.RUN, frames.joined(messages)))
        return self._answers(len(messages))

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        self.forget()

    def forget(self) -> None:
        """Let go of our ends, as a forked copy of the parent must: the process is not ours."""
        self._socket.close()
        self._page.close()

    def _progress(self, number: int | None = None) -> int:
        if number is not None:
            PAGE.pack_into(self._page, 0, number)
        return int(PAGE.unpack_from(self._page, 0)[0])

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise self._ended(silent=True) from None
        except OSError:
            raise self._ended() from None

    def _answers(self, count: int) -> Iterator[Result]:
        missing = count
        while missing:
            for kind, body in self._inbox.feed(self._receive()):
                missing -= 1
                yield frames.result(kind, body)

    def _receive(self) -> bytes:
        """What has come. Waits as long as the child gets on with the messages."""
        deadline_s = DEADLINE_S if self._ready else START_S
        reached = self._progress()
        while not _readable(self._socket, deadline_s):
            if reached == (reached := self._progress()):
                raise self._ended(silent=True)
        try:
            data = self._socket.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            raise self._ended()
        return data

    def _ended(self, *, silent: bool = False) -> ChildEnded:
        self._process.kill()
        status = self._process.wait()
        return ChildEnded(self._progress(), used_up=status == -signal.SIGPROF, silent=silent)


def _readable(connection: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _start(connection: socket.socket, page: int) -> subprocess.Popen[bytes]:
    found = importlib.util.find_spec("lupa")
    if found is None or found.origin is None:
        raise RuntimeError("lupa is not installed")
    root, packages = Path(__file__).parents[2], Path(found.origin).parents[1]
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(root), str(packages), str(os.getpid())]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdin=connection.fileno(), stdout=page, stderr=subprocess.DEVNULL, env=ENVIRONMENT, cwd="/"
        )

    return _starter.call(start)


class _Starter:
    """Starts children from one thread that never ends: the kernel ends a child with the thread that started it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._executor: ThreadPoolExecutor | None = None

    def call(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._executor is None or self._owner != os.getpid():
                self._executor, self._owner = ThreadPoolExecutor(1, "transforms"), os.getpid()
        return self._executor.submit(start).result()


_starter = _Starter()
os.register_at_fork(after_in_child=_starter.__init__)  # type: ignore[misc]
