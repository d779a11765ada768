"""A consumer's messages for the console: the newest first, each with where it stands. Reads only, and never for long.

The log is searched from its end, a bounded number of rows at a time: nothing is counted, however long the log is. The
API's own listing is `consumers/api/message_log.py`.
"""
from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connection, transaction
from django.db.utils import OperationalError

from consumers.admin import judging
from consumers.models import Consumer
from consumers.store import types
from consumers.store.models import RelationVersion
from consumers.store.types import ACTIONS

PAGE = 50
SEARCHED_ROWS = 30_000  # of the log in one request
STATEMENT_TIMEOUT_MS = 3_000
RECORD_CHARACTERS = 400
LOG_STATES = ("all", "waiting", "passed", "filtered")
JUDGED = 500  # passed messages that the filter is asked about, when only those it left out are wanted
STATES = (*LOG_STATES, "out", "parked", "dead")

_COLUMNS = f"""m.id, m.action::text, m.relation, m.key, left(m.record, {RECORD_CHARACTERS}), length(m.record) > {RECORD_CHARACTERS},
    m.committed_at, m.id > p.position"""
_WANTED = """(%(key)s::text IS NULL OR m.key = %(key)s) AND (%(since)s::timestamptz IS NULL OR m.committed_at >= %(since)s)
    AND (%(text)s::text IS NULL OR strpos(lower(m.record), lower(%(text)s)) > 0 OR strpos(lower(m.changes), lower(%(text)s)) > 0)"""
# What a claim would take for this consumer, filters apart. Nothing is joined: so the search ends with the last row it shows.
_LOG_SQL = f"""
    SELECT {_COLUMNS} FROM consumer_position p,
    LATERAL (SELECT x.* FROM messages x WHERE x.source = %(source)s AND x.id < %(before)s AND x.id > %(above)s
             ORDER BY x.id DESC LIMIT {SEARCHED_ROWS}) m
    WHERE p.consumer = %(consumer)s AND {_WANTED} AND (m.consumer = p.consumer OR m.consumer IS NULL AND m.action = ANY (%(actions)s)
      AND m.relation = ANY (%(relations)s) AND (m.epoch <> p.start_epoch OR m.commit_lsn >= p.start_lsn))
    ORDER BY m.id DESC LIMIT %(limit)s
"""
_HELD_SQL = f"""
    SELECT {_COLUMNS} FROM consumer_position p, LATERAL ({{held}}) h, LATERAL (
        SELECT x.* FROM messages x WHERE x.source = %(source)s AND x.id = h.id
        UNION ALL SELECT x.* FROM kept_messages x WHERE x.source = %(source)s AND x.id = h.id LIMIT 1) m
    WHERE p.consumer = %(consumer)s AND m.id < %(before)s AND m.id > %(above)s AND {_WANTED} ORDER BY m.id DESC LIMIT {PAGE + 1}
"""
_HELD = {
    "out": "SELECT unnest(l.ids) AS id FROM leases l WHERE l.consumer = p.consumer",
    "parked": "SELECT unnest(k.ids) AS id FROM parked k WHERE k.consumer = p.consumer AND k.reason <> 'dead' LIMIT 10000",
    "dead": "SELECT k.first_id AS id FROM parked k WHERE k.consumer = p.consumer AND k.reason = 'dead' AND k.first_id < %(before)s"
            " ORDER BY k.first_id DESC LIMIT 10000",
}  # fmt: skip
_STANDING_SQL = """
    SELECT i.id, 'out', i.count, NULL, NULL::int, l.until FROM leases l, unnest(l.ids, l.counts) i(id, count)
    WHERE l.consumer = %(consumer)s AND i.id = ANY (%(ids)s)
    UNION ALL
    SELECT i.id, k.reason, k.deliver_count, k.last_error, k.last_status, k.due_at FROM parked k, unnest(k.ids) i(id)
    WHERE k.consumer = %(consumer)s AND i.id = ANY (%(ids)s)
"""
_LEADER_SQL = """
    SELECT least(
      (SELECT min(o.first_id) FROM parked o WHERE o.consumer = k.consumer AND o.reason <> 'dead' AND o.grp IN (k.grp, k.grp2)),
      (SELECT min(o.first_id) FROM parked o WHERE o.consumer = k.consumer AND o.reason <> 'dead' AND o.grp2 IN (k.grp, k.grp2)),
      (SELECT min(i.id) FROM leases l, unnest(l.ids, l.grps, l.grp2s) i(id, grp, grp2)
       WHERE l.consumer = k.consumer AND (i.grp IN (k.grp, k.grp2) OR i.grp2 IN (k.grp, k.grp2))))
    FROM parked k WHERE k.consumer = %(consumer)s AND %(id)s = ANY (k.ids) LIMIT 1
"""


class Standing(NamedTuple):
    """Where a message stands with a consumer. `state`: waiting, out, retry, blocked, error, dead, delivered, filtered or passed."""

    state: str
    deliver_count: int = 0
    error: str | None = None
    status: int | None = None
    due_at: datetime | None = None


class Row(NamedTuple):
    id: int
    action: str
    table: str
    key: str
    record: str
    is_cut: bool
    committed_at: datetime
    standing: Standing


class Wanted(NamedTuple):
    """What to look for. `before`: only older ones."""

    state: str = "all"
    key: str | None = None
    since: datetime | None = None
    text: str | None = None
    before: int = 2**63 - 1


class Page(NamedTuple):
    """`older`: where to go on; `searched_rows`: the search ended after so many rows although the log goes on."""

    rows: list[Row]
    older: int | None
    searched_rows: int | None = None
    too_slow: bool = False


def newest(consumer: Consumer, wanted: Wanted) -> Page:
    """The newest messages of a consumer that fit."""
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('statement_timeout', %s, true)", [str(STATEMENT_TIMEOUT_MS)])
            return _newest(cursor, consumer, wanted)
    except OperationalError as error:
        if getattr(error.__cause__, "sqlstate", None) == "57014":
            return Page([], None, too_slow=True)
        raise


def standing_of(consumer_id: UUID, message_id: int) -> Standing:
    with connection.cursor() as cursor:
        cursor.execute("SELECT position >= %s FROM consumer_position WHERE consumer = %s", [message_id, consumer_id])
        row = cursor.fetchone()
        taken = bool(row and row[0])
        return _standings(cursor, consumer_id, [(message_id, not taken)])[message_id]


def blocked_by(consumer_id: UUID, message_id: int) -> int | None:
    """The message that leads the group of a parked one: out, failing or in error. None when nothing does any more."""
    with connection.cursor() as cursor:
        cursor.execute(_LEADER_SQL, {"consumer": consumer_id, "id": message_id})
        row = cursor.fetchone()
    return None if row is None or row[0] is None or row[0] >= message_id else int(row[0])


def _newest(cursor: Any, consumer: Consumer, wanted: Wanted) -> Page:
    cursor.execute("SELECT position FROM consumer_position WHERE consumer = %s", [consumer.pk])
    row = cursor.fetchone()
    if row is None:
        return Page([], None)
    before, above = wanted.before, 0
    if wanted.state == "waiting":
        above = row[0]
    elif wanted.state in ("passed", "filtered"):
        before = min(before, row[0] + 1)
    size = JUDGED if wanted.state == "filtered" else PAGE
    tables = {shape.pk: str(shape) for shape in RelationVersion.objects.filter(source=consumer.source_id).defer("columns")}
    parameters = {
        "consumer": consumer.pk, "source": consumer.source_id, "relations": [pk for pk, name in tables.items() if consumer.takes(name)],
        "actions": [letter for letter, action in ACTIONS.items() if action in consumer.actions], "key": None if wanted.key is None else key_text(wanted.key), "since": wanted.since,
        "text": wanted.text or None, "before": before, "above": above, "limit": size + 1,
    }  # fmt: skip
    from_log = wanted.state in LOG_STATES
    cursor.execute(_LOG_SQL if from_log else _HELD_SQL.format(held=_HELD[wanted.state]), parameters)
    found = cursor.fetchall()
    standings = _standings(cursor, consumer.pk, [(row[0], row[7]) for row in found])
    rows = [Row(f[0], ACTIONS[f[1]], tables.get(f[2], ""), _key(f[3]), f[4], f[5], f[6], standings[f[0]]) for f in found[:size]]
    if wanted.state == "passed":
        rows = [row for row in rows if row.standing.state in ("delivered", "passed")]
    elif wanted.state == "filtered":
        rows = [row for row in rows if row.standing.state == "filtered"]
        if len(rows) > PAGE:
            return Page(rows[:PAGE], rows[PAGE - 1].id)
    if len(found) > size:
        return Page(rows, found[size - 1][0], searched_rows=size if size > PAGE else None)
    if from_log:
        cursor.execute(
            "SELECT count(*), min(id) FROM (SELECT m.id FROM messages m WHERE m.source = %s AND m.id < %s AND m.id > %s"
            f" ORDER BY m.id DESC LIMIT {SEARCHED_ROWS}) searched", [consumer.source_id, before, above],
        )  # fmt: skip
        searched, lowest = cursor.fetchone()
        if searched == SEARCHED_ROWS:
            return Page(rows, lowest, searched_rows=SEARCHED_ROWS)
    return Page(rows, None)


def _standings(cursor: Any, consumer_id: UUID, found: list[tuple[int, bool]]) -> dict[int, Standing]:
    """`found`: ids, and whether the consumer has yet to take it."""
    ids = [id_ for id_, _ in found]
    cursor.execute(_STANDING_SQL, {"consumer": consumer_id, "ids": ids})
    known = {row[0]: Standing(*row[1:]) for row in cursor.fetchall()}
    cursor.execute(
        "SELECT message_id, max(deliver_count) FROM attempts WHERE consumer = %s AND message_id = ANY (%s) AND ok GROUP BY 1",
        [consumer_id, ids],
    )
    delivered = dict(cursor.fetchall())
    unsure = [id_ for id_, waiting in found if not waiting and id_ not in known and id_ not in delivered]
    filtered = judging.dropped(consumer_id, unsure)
    for id_, waiting in found:
        if id_ not in known:
            if waiting:
                known[id_] = Standing("waiting")
            else:
                known[id_] = (
                    Standing("delivered", delivered[id_]) if id_ in delivered
                    else Standing("filtered" if id_ in filtered else "passed")
                )  # fmt: skip
    return known


def _key(text: str) -> str:
    """As a person writes it: one column's value is itself."""
    values = json.loads(text)
    return str(values[0]) if len(values) == 1 else text


def key_text(key: str) -> str:
    """The key as capture writes it."""
    return types.key_text(key_values(key))


def key_values(key: str) -> list[str]:
    """What a person wrote: one column's value, or a JSON list of several."""
    if key.startswith("["):
        try:
            values = json.loads(key)
        except ValueError:
            return [key]
        if isinstance(values, list):
            return [str(value) for value in values]
    return [key]
