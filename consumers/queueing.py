"""Wait in the order of coming: a semaphore that is fair, and one for each key there is. Pure."""
from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class FairSemaphore:
    """Who came first is served first, whatever others come meanwhile: of a thousand threads none is left out for long."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout_s: float = -1) -> bool:
        """False when the time went by."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        if mine.acquire(timeout=timeout_s):
            return True
        with self._lock:
            if mine not in self._waiting:
                return True  # it was handed over at this very moment
            self._waiting.remove(mine)
            return False

    def release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Gate(FairSemaphore):
    users = 0
    """Who is in, and who waits."""


class FewAtOnce:
    """So many at a time for each key, in the order of coming; a key is known as long as somebody is in or waits."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._gates: dict[Hashable, Gate] = {}

    @contextmanager
    def at(self, key: Hashable) -> Iterator[None]:
        self.enter(key)
        try:
            yield
        finally:
            self.leave(key)

    def enter(self, key: Hashable) -> None:
        with self._lock:
            gate = self._gates.get(key)
            if gate is None:
                gate = self._gates[key] = Gate(self._count)
            gate.users += 1
        try:
            gate.acquire()
        except BaseException:
            self._forget(key, gate)
            raise

    def leave(self, key: Hashable) -> None:
        gate = self._gates[key]
        gate.release()
        self._forget(key, gate)

    def _forget(self, key: Hashable, gate: Gate) -> None:
        with self._lock:
            gate.users -= 1
            if not gate.users:
                del self._gates[key]
