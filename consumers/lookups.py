"""Keep for a short while what was looked up in the store: once for all who ask at the same time, and nothing from before a change."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from consumers.queueing import FewAtOnce

Found = TypeVar("Found")

KEPT_S = 5.0  # a notice of a change empties it sooner
MOST_KEPT = 10_000


class Lookups(Generic[Found]):
    """By key. What is None is not kept."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, Found]] = {}
        self._forgotten = 0
        self._lock = threading.Lock()
        self._loading = FewAtOnce(1)

    def known(self, key: str) -> Found | None:
        """What is kept of it."""
        kept = self._kept.get(key)
        return None if kept is None or kept[0] <= time.monotonic() else kept[1]

    def find(self, key: str, load: Callable[[str], Found]) -> Found:
        """What is kept, or else what `load` gives, which may raise."""
        found = self.known(key)
        if found is not None:
            return found
        with self._loading.at(key):
            return self.known(key) or self._load(key, load)

    def forget(self) -> None:
        """Look everything up again."""
        with self._lock:
            self._kept.clear()
            self._forgotten += 1

    def _load(self, key: str, load: Callable[[str], Found]) -> Found:
        forgotten = self._forgotten
        found = load(key)
        with self._lock:
            if found is None:
                self._kept.pop(key, None)
            elif forgotten == self._forgotten:  # else it may be from before the change
                if len(self._kept) >= MOST_KEPT:
                    self._kept.clear()
                self._kept[key] = (time.monotonic() + KEPT_S, found)
        return found
