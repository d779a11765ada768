"""The live transformers of a process, by consumer and text, the least recently used ended first."""
from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from consumers.lua.transformer import Transformer
from consumers.lua.types import Call, Result

LIVE = 64  # children, some 15 MB each
IDLE_S = 300.0


class Pool:
    """Thread-safe. More than `live` children exist only while more are at work at once."""

    def __init__(self, live: int = LIVE, idle_s: float = IDLE_S) -> None:
        self._live = live
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._transformers: OrderedDict[tuple[Hashable, str], Transformer] = OrderedDict()
        self._used_at: dict[tuple[Hashable, str], float] = {}
        self._busy: dict[tuple[Hashable, str], int] = {}

    def run(self, consumer: Hashable, text: str, messages: Sequence[Call]) -> list[Result]:
        """As `Transformer.run`, in the consumer's own child."""
        key = consumer, text
        transformer = self._take(key)
        try:
            return transformer.run(messages)
        finally:
            self._give_back(key)

    def forget(self, consumer: Hashable) -> None:
        """End the consumer's idle children, as when its text changed or it was deleted."""
        self._end([key for key in list(self._transformers) if key[0] == consumer])

    def close(self) -> None:
        self._end(list(self._transformers))

    def __len__(self) -> int:
        return len(self._transformers)

    def _take(self, key: tuple[Hashable, str]) -> Transformer:
        with self._lock:
            transformer = self._transformers.get(key)
            if transformer is None:
                transformer = self._transformers[key] = Transformer(key[1])
            self._transformers.move_to_end(key)
            self._busy[key] = self._busy.get(key, 0) + 1
        self._trim(time.monotonic())
        return transformer

    def _give_back(self, key: tuple[Hashable, str]) -> None:
        now = time.monotonic()
        with self._lock:
            self._used_at[key] = now
            self._busy[key] -= 1
            if not self._busy[key]:
                del self._busy[key]
        self._trim(now)

    def _trim(self, now: float) -> None:
        with self._lock:
            idle = [key for key in self._transformers if key not in self._busy]
            surplus = max(0, len(self._transformers) - self._live)
            old = [key for key in idle if now - self._used_at.get(key, now) > self._idle_s]
        self._end(dict.fromkeys(idle[:surplus] + old))

    def _end(self, keys: Sequence[tuple[Hashable, str]] | dict[tuple[Hashable, str], None]) -> None:
        ended = []
        with self._lock:
            for key in keys:
                if key not in self._busy and key in self._transformers:
                    ended.append(self._transformers.pop(key))
                    self._used_at.pop(key, None)
        for transformer in ended:
            transformer.close()
