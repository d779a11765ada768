"""Let few requests of one consumer at a time at the store: its calls take turns there anyway, each with a connection in hand.

So a consumer with hundreds of receivers leaves connections to all others, and those of it that wait cost nothing.
"""
from __future__ import annotations

from uuid import UUID

from django.db import DEFAULT_DB_ALIAS, connections

from consumers.queueing import FewAtOnce

ACKS = "acks"  # most wait for no claim, so none waits here behind one

_gates = FewAtOnce(2)  # one at work, and one that begins the moment it has ended


class AtStore:
    """Wait until few enough others are at this consumer. Neither who waits here nor who has been in holds a connection."""

    __slots__ = ("_connection", "_key")

    def __init__(self, consumer_id: UUID, what: str = "") -> None:
        self._key = (consumer_id, what)

    def __enter__(self) -> None:
        self._connection = connections[DEFAULT_DB_ALIAS]
        self._connection.close()
        _gates.enter(self._key)

    def __exit__(self, *_: object) -> None:
        try:
            self._connection.close()
        finally:
            _gates.leave(self._key)
