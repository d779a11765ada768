"""Move a consumer's position back in the log: find the point, end what is out, say what the log no longer has.

The work is done by the functions of `replays.sql`. Uses Django's connection.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from django.db import connection

from consumers.store import lifecycle
from consumers.store.locks import SEQUENCE_LOCK
from consumers.store.types import key_text

LSN = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}")  # as people write it
LOOKED_AT = 20_000  # messages; how many come after a longer way is estimated from so many


class Oldest(NamedTuple):
    """The first message of a source that is in the log."""

    id: int
    committed_at: datetime
    lsn: str


class OutOfReach(Exception):
    """The log does not reach back to the point asked for. `oldest`: what can be had, None when the log is empty."""

    def __init__(self, reason: str, oldest: Oldest | None) -> None:
        self.oldest = oldest
        super().__init__(reason)


class Rewound(NamedTuple):
    replay_id: UUID | None
    """None when nothing moved, because the point lies ahead of the position."""
    position: int
    messages_estimate: int
    first_commit_timestamp: datetime | None


def before_row(consumer_id: UUID, source_id: UUID, table: str, key: Sequence[str], *, last: bool = False) -> int:
    """The position in front of the oldest message of a row, or of the newest. Raises OutOfReach."""
    text = key_text(key)
    found = _value(
        "SELECT sequin_find_row(%s, %s, ARRAY(SELECT id FROM relation_version WHERE source = %s AND schema_name || '.' ||"
        " table_name = %s), %s, %s)",
        [source_id, consumer_id, source_id, table, text, last],
    )
    if found is None:
        raise OutOfReach(f"the log has no message of the row {text} of {table}", oldest(source_id))
    return int(found) - 1


def before_time(consumer_id: UUID, source_id: UUID, moment: datetime) -> int:
    """The position in front of the first message committed at `moment` or later. Raises OutOfReach."""
    # Searched first: what goes with its partition meanwhile is known to be lost before it cannot be found any more.
    position = _before(source_id, _value("SELECT sequin_find(%s, %s, %s, NULL, NULL)", [source_id, consumer_id, moment]))
    lost = _value("SELECT max(committed_at) FROM log_lost WHERE source = %s", [source_id])
    begun = _value(
        "SELECT least(s.created_at, (SELECT min(begun_at) FROM source_epoch WHERE source = s.id)) FROM consumers_source s WHERE s.id = %s",
        [source_id],
    )
    first = oldest(source_id)
    before_all = begun is not None and begun > moment and (first is None or first.committed_at > moment)
    if before_all or (lost is not None and lost >= moment):
        raise OutOfReach(f"the log does not reach back to {moment.isoformat()}", first)
    return position


def before_lsn(consumer_id: UUID, source_id: UUID, lsn: str) -> int:
    """The position in front of the first change committed at `lsn` (of the source's present history) or later. Raises OutOfReach."""
    epoch = _value(
        "SELECT max(epoch) FROM source_epoch WHERE source = %s AND begun_lsn <= %s::pg_lsn - '0/0'", [source_id, lsn]
    )
    found = _value("SELECT sequin_find(%s, %s, NULL, %s, (%s::pg_lsn - '0/0')::bigint)", [source_id, consumer_id, epoch, lsn])
    position = _before(source_id, found)
    lost = epoch is not None and _value(
        "SELECT count(*) FROM log_lost WHERE source = %s AND (epoch > %s OR epoch = %s AND commit_lsn >= %s::pg_lsn - '0/0')",
        [source_id, epoch, epoch, lsn],
    )
    if epoch is None or lost:
        raise OutOfReach(f"the log does not reach back to {lsn}", oldest(source_id))
    return position


def beginning() -> int:
    """The position in front of everything that is in the log."""
    return max(0, int(_value("SELECT id FROM log_floor", [])) - 1)


def oldest(source_id: UUID) -> Oldest | None:
    rows = _fetch(
        "SELECT id, committed_at, ('0/0'::pg_lsn + commit_lsn)::text FROM messages WHERE source = %s AND id >= (SELECT id FROM"
        " log_floor) ORDER BY id LIMIT 1",
        [source_id],
    )
    return Oldest(*rows[0]) if rows else None


def rewind(consumer_id: UUID, source_id: UUID, position: int) -> Rewound:
    """Let everything beyond `position` come again. Raises OutOfReach when that has left the log meanwhile."""
    replay_id = uuid4()
    moved, now, floor = _fetch("SELECT * FROM sequin_rewind(%s, %s, %s)", [consumer_id, position, replay_id])[0]
    if floor is not None:
        raise OutOfReach("the log does not reach back so far", oldest(source_id))
    messages, first = _fetch("SELECT * FROM sequin_estimate(%s, %s)", [consumer_id, LOOKED_AT])[0]
    return Rewound(replay_id if moved else None, int(now), int(messages), first)


def copy(consumer_id: UUID, source_id: UUID, ids: Sequence[int], replay_id: UUID) -> int:
    """Let these messages of the log be delivered once more, as they were, behind everything else. Returns how many it still has."""
    return int(_value("SELECT sequin_copy(%s, %s, %s, %s::bigint[], %s)", [consumer_id, source_id, SEQUENCE_LOCK, sorted(ids), replay_id]))


def tables_of(consumer_id: UUID) -> list[str]:
    """The tables of a consumer of which something was captured."""
    return [
        row[0]
        for row in _fetch(
            "SELECT DISTINCT r.schema_name || '.' || r.table_name FROM consumers_consumer c JOIN relation_version r ON r.source ="
            " c.source_id WHERE c.id = %s AND (c.tables = '{}' OR r.schema_name || '.' || r.table_name = ANY (c.tables)"
            " OR r.schema_name || '.*' = ANY (c.tables)) ORDER BY 1",
            [consumer_id],
        )
    ]


def _before(source_id: UUID, found: int | None) -> int:
    """The position in front of this message; without one, the end of the log."""
    return lifecycle.last_id(source_id) if found is None else int(found) - 1


def _value(query: str, parameters: Any) -> Any:
    rows = _fetch(query, parameters)
    return rows[0][0] if rows else None


def _fetch(query: str, parameters: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)
        return cursor.fetchall()
