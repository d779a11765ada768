"""Read a consumer's messages by state, one page at a time. The store's functions alone write; this only reads."""
from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connection, transaction
from django.db.utils import OperationalError

from consumers.store.lifecycle import WAITING_SQL
from consumers.store.types import ACTIONS

STATES = ("waiting", "out", "parked", "dead", "passed")
STATEMENT_TIMEOUT_MS = 10_000

STORED_SQL = """
    SELECT m.* FROM (SELECT * FROM messages x WHERE x.source = p.source AND x.id = u.id
                     UNION ALL SELECT * FROM kept_messages x WHERE x.source = p.source AND x.id = u.id) m LIMIT 1
"""
HELD_SQL = """
    SELECT m.*, u.state, u.reason, u.deliver_count, u.last_error, u.last_status, u.due_at
    FROM consumer_position p,
    LATERAL ({held}) u, LATERAL ({stored}) m WHERE p.consumer = %(consumer)s
"""
OUT_SQL = """
    SELECT i.id, 'out' AS state, NULL AS reason, i.count AS deliver_count, NULL AS last_error, NULL::int AS last_status,
           l.until AS due_at
    FROM leases l, unnest(l.ids, l.counts) i(id, count) WHERE l.consumer = p.consumer
"""
PARKED_SQL = """
    SELECT i.id, {state} AS state, k.reason, k.deliver_count, k.last_error, k.last_status, k.due_at
    FROM parked k, unnest(k.ids) i(id) WHERE k.consumer = p.consumer AND {which}
"""
NOTHING = "NULL AS reason, 0 AS deliver_count, NULL AS last_error, NULL::int AS last_status, NULL::timestamptz AS due_at"
# Taken and neither out nor parked: acked or filtered. Only the tables and actions it takes are shown.
PASSED_SQL = f"""
    SELECT m.*, 'passed' AS state, {NOTHING} FROM consumer_position p
    JOIN consumers_consumer c ON c.id = p.consumer
    JOIN messages m ON m.source = p.source AND m.id <= p.position
    JOIN relation_version r ON r.id = m.relation
    WHERE p.consumer = %(consumer)s AND (m.consumer = p.consumer OR m.consumer IS NULL
      AND CASE m.action WHEN 'I' THEN 'insert' WHEN 'U' THEN 'update' WHEN 'D' THEN 'delete' WHEN 'T' THEN 'truncate' END
          = ANY (c.actions)
      AND (c.tables = '{{}}' OR r.schema_name || '.' || r.table_name = ANY (c.tables) OR r.schema_name || '.*' = ANY (c.tables))
      AND (m.epoch <> p.start_epoch OR m.commit_lsn >= p.start_lsn))
      AND NOT EXISTS (SELECT FROM leases l WHERE l.consumer = p.consumer AND m.id = ANY (l.ids))
      AND NOT EXISTS (SELECT FROM parked k WHERE k.consumer = p.consumer AND m.id = ANY (k.ids))
"""
PAGE_SQL = """
    SELECT s.id, s.state, s.reason, s.deliver_count, s.last_error, s.last_status, s.due_at, s.action::text, r.schema_name,
           r.table_name, s.record, s.changes, s.key, s.commit_lsn, s.commit_idx,
           to_char(s.committed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), s.epoch, s.unchanged,
           s.old_values_known, s.annotations, s.source, s.backfill,
           coalesce(s.replay, CASE WHEN s.id > q.replay_from AND s.id <= q.replay_to AND s.state <> 'passed' THEN q.replay END)
    FROM ({state}) s JOIN relation_version r ON r.id = s.relation JOIN consumer_position q ON q.consumer = %(consumer)s
    WHERE (%(after)s::bigint IS NULL OR s.id {beyond} %(after)s)
      AND (%(key)s::text IS NULL OR s.key = %(key)s) AND (%(since)s::timestamptz IS NULL OR s.committed_at >= %(since)s)
    ORDER BY s.id {direction} LIMIT %(limit)s
"""


class TooSlow(Exception):
    """The search looked at more of the log than it may."""


class ListedMessage(NamedTuple):
    """One message and where it stands; from `action` on what `consumers.envelope.render` reads."""

    id: int
    state: str
    reason: str | None
    deliver_count: int
    last_error: str | None
    last_status: int | None
    due_at: datetime | None
    action: str
    schema: str
    table: str
    record: str
    changes: str | None
    key: str
    commit_lsn: int
    commit_idx: int
    committed_at: str
    epoch: int
    unchanged: str | None
    old_values_known: bool
    annotations: str | None
    source_id: UUID
    backfill_id: UUID | None = None
    replay_id: UUID | None = None
    where_undecided: bool = False


def list_messages(
    consumer_id: UUID, state: str | None, *, after: int | None = None, key: str | None = None, since: datetime | None = None, limit: int
) -> list[ListedMessage]:
    """Up to `limit` messages in `state`, None: in any. Passed ones alone come newest first, all else in the order of the log.

    Raises TooSlow.
    """
    newest_first = state == "passed"
    beyond, direction = ("<", "DESC") if newest_first else (">", "ASC")
    parameters: dict[str, Any] = {"consumer": consumer_id, "after": after, "key": key, "since": since, "limit": limit}
    rows: list[tuple[Any, ...]] = []
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            # One view of them all: a message that moves on meanwhile is in one state and not in two or none.
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("SELECT set_config('statement_timeout', %s, true)", [str(STATEMENT_TIMEOUT_MS)])
            for one in STATES if state is None else (state,):
                cursor.execute(PAGE_SQL.format(state=_state_sql(one), beyond=beyond, direction=direction), parameters)
                rows += cursor.fetchall()
    except OperationalError as error:
        if getattr(error.__cause__, "sqlstate", None) == "57014":
            raise TooSlow from None
        raise
    if state is None:
        rows = sorted(rows, key=lambda row: int(row[0]))[:limit]
    return [ListedMessage(*(*row[:7], ACTIONS[row[7]], *row[8:])) for row in rows]


def _state_sql(state: str) -> str:
    if state == "waiting":
        return f"SELECT w.*, 'waiting' AS state, {NOTHING} FROM ({WAITING_SQL}) w"
    if state == "passed":
        return PASSED_SQL
    held = {
        "out": OUT_SQL,
        "parked": PARKED_SQL.format(state="'parked'", which="k.reason <> 'dead'"),
        "dead": PARKED_SQL.format(state="'dead'", which="k.reason = 'dead'"),
    }[state]
    return HELD_SQL.format(held=held, stored=STORED_SQL)
