"""Let few requests of one consumer at a time at the store: its calls take turns there anyway, each with a connection in hand.

So a consumer with hundreds of receivers leaves connections to all others, and those of it that wait cost nothing.
"""
from __future__ import annotations

import threading
from queue import SimpleQueue
from uuid import UUID

from django.db import connection

AT_ONCE = 2  # one at work, and one that begins the moment it has ended


class Places:
    """What a semaphore is, but waiting, taking and giving back run no Python."""

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[None] = SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def __enter__(self) -> None:
        self._free.get()

    def __exit__(self, *_: object) -> None:
        self._free.put(None)


class _Gate:
    __slots__ = ("places", "users")

    def __init__(self) -> None:
        self.places = Places(AT_ONCE)
        self.users = 0


_gates: dict[UUID, _Gate] = {}
_lock = threading.Lock()


class at_store:
    """Wait until few enough others are at this consumer. Neither who waits here nor who has been in holds a connection."""

    __slots__ = ("_consumer_id", "_gate")

    def __init__(self, consumer_id: UUID) -> None:
        self._consumer_id = consumer_id

    def __enter__(self) -> None:
        connection.close()
        with _lock:
            gate = _gates.get(self._consumer_id)
            if gate is None:
                gate = _gates[self._consumer_id] = _Gate()
            gate.users += 1
        self._gate = gate
        gate.places.__enter__()

    def __exit__(self, *_: object) -> None:
        gate = self._gate
        try:
            connection.close()
        finally:
            gate.places.__exit__()
            with _lock:
                gate.users -= 1
                if not gate.users:
                    del _gates[self._consumer_id]
