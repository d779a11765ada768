"""Let few requests of one consumer at a time at the store: its calls take turns there anyway, each with a connection in hand.

So a consumer with hundreds of receivers leaves connections to all others, and those of it that wait cost nothing.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from django.db import connection

from consumers.queueing import FewAtOnce

ACKS = "acks"  # most wait for no claim, so none waits here behind one

_gates = FewAtOnce(2)  # one at work, and one that begins the moment it has ended


@contextmanager
def at_store(consumer_id: UUID, what: str = "") -> Iterator[None]:
    """Wait until few enough others are at this consumer. Neither who waits here nor who has been in holds a connection."""
    connection.close()
    with _gates.at((consumer_id, what)):
        try:
            yield
        finally:
            connection.close()
