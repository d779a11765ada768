"""Let few requests of one consumer at a time at the store: its calls take turns there anyway, each with a connection in hand.

So a consumer with hundreds of receivers leaves connections to all others, and those of it that wait cost nothing.
"""
from __future__ import annotations

import threading
from uuid import UUID

from django.db import connection

from consumers.queueing import FairSemaphore

AT_ONCE = 2  # one at work, and one that begins the moment it has ended
ACKS = "acks"  # most wait for no claim, so none waits here behind one


class _Gate:
    __slots__ = ("free", "users")

    def __init__(self) -> None:
        self.free = FairSemaphore(AT_ONCE)
        self.users = 0


_gates: dict[tuple[UUID, str], _Gate] = {}
_lock = threading.Lock()


class at_store:
    """Wait until few enough others are at this consumer. Neither who waits here nor who has been in holds a connection."""

    __slots__ = ("_gate", "_key")

    def __init__(self, consumer_id: UUID, what: str = "") -> None:
        self._key = (consumer_id, what)

    def __enter__(self) -> None:
        connection.close()
        with _lock:
            gate = _gates.get(self._key)
            if gate is None:
                gate = _gates[self._key] = _Gate()
            gate.users += 1
        self._gate = gate
        gate.free.acquire()

    def __exit__(self, *_: object) -> None:
        gate = self._gate
        try:
            connection.close()
        finally:
            gate.free.release()
            with _lock:
                gate.users -= 1
                if not gate.users:
                    del _gates[self._key]
