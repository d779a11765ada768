"""See now and then, while ids are drawn, that the log has partitions for those to come."""
from __future__ import annotations

from typing import Any

import psycopg

from consumers.store.partitions import ensure_ahead

LOOK_EVERY = 100_000  # ids; far below partitions.AHEAD_IDS. Other sources draw ids too


class Room:
    """Of one connection that appends."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self._conn = conn
        self._looked_at = -LOOK_EVERY

    def ensure(self) -> None:
        row = self._conn.execute("SELECT last_value FROM messages_id").fetchone()
        assert row is not None
        if row[0] - self._looked_at >= LOOK_EVERY:
            ensure_ahead(self._conn)
            self._looked_at = row[0]
