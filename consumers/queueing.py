"""Wait in the order of coming: a semaphore that is fair, and a lock for each thing that is being loaded. Pure."""
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


class OneByOne:
    """A lock for each key, there as long as somebody has it or waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[Hashable, list[threading.Lock]] = {}  # as often as there are users

    @contextmanager
    def alone(self, key: Hashable) -> Iterator[None]:
        with self._lock:
            users = self._locks.setdefault(key, [])
            mine = users[0] if users else threading.Lock()
            users.append(mine)
        try:
            with mine:
                yield
        finally:
            with self._lock:
                users.pop()
                if not users:
                    del self._locks[key]
