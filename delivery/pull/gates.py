"""Let few requests of one consumer at a time at the store: its calls take turns there anyway, each with a connection in hand.

So a consumer with hundreds of receivers leaves connections to all others, and those of it that wait cost nothing.
"""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from django.db import connection

AT_ONCE = 2  # one at work, and one that begins the moment it has ended


class _Gate:
    def __init__(self) -> None:
        self.free = threading.BoundedSemaphore(AT_ONCE)
        self.users = 0


_gates: dict[UUID, _Gate] = {}
_lock = threading.Lock()


@contextmanager
def one_of_few(consumer_id: UUID) -> Iterator[None]:
    """Wait until few enough others are at this consumer. Nobody waits here with a database connection."""
    connection.close()
    with _lock:
        gate = _gates.setdefault(consumer_id, _Gate())
        gate.users += 1
    try:
        with gate.free:
            yield
    finally:
        with _lock:
            gate.users -= 1
            if not gate.users:
                del _gates[consumer_id]
