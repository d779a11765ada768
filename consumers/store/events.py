"""Write the events of sources: what happened to one that people should know. The newest are kept."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

EVENTS_KEPT = 1_000  # for each source
EVENT_CHARACTERS = 2_000


def add_event(
    execute: Callable[..., Any], source_id: UUID, kind: str, table: str | None, text: str, *, backfill: bool = False
) -> None:
    """Through `execute`, a connection's. `backfill`: a backfill of the table brings what was not sent."""
    execute(
        "INSERT INTO source_events (source, kind, table_name, text, backfill) VALUES (%s, %s, %s, %s, %s)",
        [source_id, kind, table, text[:EVENT_CHARACTERS], backfill],
    )
    execute(
        "DELETE FROM source_events WHERE source = %(source)s AND id <= (SELECT id FROM source_events WHERE source = %(source)s"
        " ORDER BY id DESC OFFSET %(keep)s LIMIT 1)",
        {"source": source_id, "keep": EVENTS_KEPT},
    )
