"""Hand messages out under leases and settle them: delivery's face of the store.

Each call is one round trip and one transaction on Django's connection. Every receipt is a (token, message id) pair: a
token names one claim, and is void for a message once that was handed out again.
"""
from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from django.db import connection

from consumers.backoff import HELD, delay_ms
from consumers.filters.scouting import NONE_NEEDED, Scout, scouts
from consumers.filters.statements import DROPS, UNDECIDED
from consumers.store.prepared import Statement, array
from consumers.store.types import ACTIONS, Claim, ClaimedMessage, Failure, Settled, part_failed

SCAN_ROWS = 20_000  # looked at in one transaction, so that nobody waits long behind it
SCAN_MS = 250  # one claim's budget; past it the answer is empty although the end is not reached
MAX_CLAIM_BYTES = 16 * 1024 * 1024  # of rows in one claim; a larger message comes alone

_CLAIM = Statement("claim", "SELECT * FROM sequin_claim($1, $2, $3, $4, $5, $6)")
_ACK = Statement("ack", "SELECT * FROM sequin_ack_lease($1, $2, $3, $4)")
_ACK_MANY = Statement("ack_many", "SELECT * FROM sequin_ack($1, $2::uuid[], $3::bigint[], $4)")
_CLAIM_JUDGED_SQL = (
    "SELECT * FROM sequin_claim_any(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s::bigint[], %s::bigint[], %s::bigint[], %s::text[], %s::bigint[],"
    " %s::bigint[], %s::bigint[])"
)

_relation_names: dict[int, tuple[str, str]] = {}  # relation versions never change


def claim(consumer_id: UUID, limit: int, *, lease_ms: int, holder: UUID | None = None) -> Claim:
    """Hand out up to `limit` messages for `lease_ms`, in log order; fewer when they are large.

    Empty and not at_end: SCAN_MS went by among messages that were not for this consumer; call again.
    A paused, disabled or unknown consumer gets an empty claim at the end.
    """
    deadline = time.monotonic() + SCAN_MS / 1000
    while True:
        scout = scouts.of(consumer_id)
        parameters: list[Any] = [consumer_id, limit, lease_ms, holder, SCAN_ROWS, MAX_CLAIM_BYTES]
        if scout is None:
            verdicts = NONE_NEEDED
            rows = _CLAIM.rows([None if value is None else str(value).encode() for value in parameters])
        else:
            verdicts = scout.verdicts(limit, deadline)
            rows = _fetch(_CLAIM_JUDGED_SQL, [*parameters, *map(_parameter, verdicts[:-1])])
        token, at_end, next_due_ms, reached, needs_verdicts = rows[0][:5]
        if needs_verdicts:
            scouts.renew(consumer_id)  # the consumer was edited
            continue
        if token is not None:
            messages = _messages(rows, frozenset(verdicts.undecided))
            if scout is not None:
                messages = _judged_again(consumer_id, scout, token, messages)
                scout.moved(reached)
            if messages:
                return Claim(token, messages, bool(at_end) and verdicts.at_log_end, None, rows[0][6])
        elif scout is not None and not scout.moved(reached):
            at_end = False  # what was judged lies elsewhere: it was rewound, or others are ahead
        at_end = at_end and verdicts.at_log_end and token is None
        if at_end or time.monotonic() >= deadline:
            return Claim(None, [], bool(at_end), None if next_due_ms is None else max(0, int(next_due_ms)), rows[0][6])


def ack(consumer_id: UUID, receipts: Sequence[tuple[UUID, int]]) -> Settled:
    """Finish these messages. Counts also after the lease's end, until they are handed out again."""
    return _acknowledge(consumer_id, receipts, filtered=False)


def drop(consumer_id: UUID, receipts: Sequence[tuple[UUID, int]]) -> Settled:
    """Finish messages that the consumer's filter or transform does not want; counted as filtered."""
    return _acknowledge(consumer_id, receipts, filtered=True)


def nack(consumer_id: UUID, receipts: Sequence[tuple[UUID, int]], delay_ms: int = 0) -> Settled:
    """Give these messages back, and with them the later ones of their groups from the same claim."""
    count = len(receipts)
    tokens, ids = _columns(receipts, 2)
    return _return(
        consumer_id, tokens, ids, [delay_ms] * count, ["retry"] * count, [None] * count, [None] * count, [None] * count,
        sent=True,
    )  # fmt: skip


def fail(consumer_id: UUID, failures: Sequence[Failure], by: datetime | None = None) -> Settled:
    """Park messages whose push failed; past the consumer's max_deliver as dead letters.

    Later messages of their groups from the same claim come back with them, as if they had never been handed out.
    `by`: where a filter or transform failed, the version of the configuration that has it. Mended since, they are due at once.
    """
    tokens, ids, delays, errors, statuses, reasons, batches = _columns(failures, 7)
    settled = _return(consumer_id, tokens, ids, delays, reasons, errors, statuses, batches, sent=False)
    if by is not None:
        # Whoever has mended it meanwhile did not find these among what had failed.
        _fetch("SELECT sequin_mended(id) FROM consumers_consumer WHERE id = %s AND updated_at <> %s", [consumer_id, by])
    return settled


def give_back(consumer_id: UUID, messages: Sequence[tuple[UUID, ClaimedMessage]]) -> int:
    """Undo the hand-out of messages that were not tried: due at once, and not counted as delivered. Their receipts are void."""
    tokens, ids = _columns([(token, message.id) for token, message in messages], 2)
    batches = [message.max_batch for _, message in messages]
    fresh = [message.id for _, message in messages if message.is_fresh]
    query = "SELECT sequin_undo(%s, %s::uuid[], %s::bigint[], %s::integer[], %s::bigint[])"
    return int(_fetch(query, [consumer_id, tokens, ids, batches, fresh])[0][0])


def extend(consumer_id: UUID, receipts: Sequence[tuple[UUID, int]], ack_wait_ms: int) -> Settled:
    """Let the leases of these messages end `ack_wait_ms` from now."""
    tokens, ids = _columns(receipts, 2)
    rows = _fetch(
        "SELECT * FROM sequin_extend(%s, %s::uuid[], %s::bigint[], %s)", [consumer_id, tokens, ids, ack_wait_ms]
    )
    return Settled(*rows[0])


def renew(tokens: Iterable[UUID], lease_ms: int) -> set[UUID]:
    """Let these leases end `lease_ms` from now. Returns the tokens that still hold something."""
    rows = _fetch(
        "UPDATE leases SET until = clock_timestamp() + %s * interval '1 ms' WHERE token = ANY (%s::uuid[])"
        " RETURNING token",
        [lease_ms, list(tokens)],
    )
    return {row[0] for row in rows}


def _judged_again(
    consumer_id: UUID, scout: Scout, token: UUID, messages: list[ClaimedMessage]
) -> list[ClaimedMessage]:
    """Ask today's filter about what came from the parked ones: what was never handed out goes by it, the rest is only flagged.

    What fails is parked again, and what follows it in its group comes back with it.
    """
    fresh = {message.id for message in messages if message.is_fresh}
    parked = [message.id for message in messages if message.is_fresh or message.deliver_count > 1]
    if not parked:
        return messages
    judged = scout.judge(parked)
    troubles = {number: one.failed for number, one in judged.items() if one.failed is not None and number in fresh}
    going, failing = part_failed(messages, troubles)
    failures = []
    for message in failing:
        trouble = troubles[message.id]
        delay = trouble.delay_ms if trouble.delay_ms == HELD else delay_ms(message.deliver_count, random.uniform(-1, 1))
        failures.append(Failure(token, message.id, delay, trouble.error, reason="error"))
    kept, dropped = [], []
    for message in going:
        verdict = judged[message.id].verdict if message.id in judged else None
        if verdict == DROPS and message.id in fresh:
            dropped.append((token, message.id))
        else:
            kept.append(message._replace(where_undecided=message.where_undecided or verdict == UNDECIDED))
    if dropped:
        drop(consumer_id, dropped)
    if failures:
        fail(consumer_id, failures, scout.plan.version)
    return kept


def _acknowledge(consumer_id: UUID, receipts: Sequence[tuple[UUID, int]], *, filtered: bool) -> Settled:
    tokens, ids = _columns(receipts, 2)
    consumer, numbers, dropped = str(consumer_id).encode(), array(ids), b"t" if filtered else b"f"
    if tokens and tokens.count(tokens[0]) == len(tokens):
        # One claim's messages, as nearly always: its token is written once.
        rows = _ACK.rows([consumer, str(tokens[0]).encode(), numbers, dropped])
    else:
        rows = _ACK_MANY.rows([consumer, array(tokens), numbers, dropped])
    return Settled(*rows[0])


def _parameter(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _return(
    consumer_id: UUID, tokens: list[Any], ids: list[Any], delays: list[Any], reasons: list[Any], errors: list[Any],
    statuses: list[Any], batches: list[Any], *, sent: bool,
) -> Settled:  # fmt: skip
    rows = _fetch(
        "SELECT * FROM sequin_return(%s, %s::uuid[], %s::bigint[], %s::bigint[], %s::text[], %s::text[], %s::integer[],"
        " %s::integer[], %s)",
        [consumer_id, tokens, ids, delays, reasons, errors, statuses, batches, sent],
    )
    return Settled(*rows[0])


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]


def _fetch(query: str, parameters: list[Any]) -> list[tuple[Any, ...]]:
    """Through Django's connection, but prepared on the server: the hot calls would else be parsed each time."""
    if connection.connection is None:
        connection.ensure_connection()
    raw: psycopg.Connection[Any] = connection.connection
    raw.prepare_threshold = 0
    try:
        return psycopg.Cursor(raw).execute(query, parameters).fetchall()
    except psycopg.Error:
        with connection.wrap_database_errors:
            raise


def _messages(rows: list[tuple[Any, ...]], undecided: frozenset[int]) -> list[ClaimedMessage]:
    missing = {row[13] for row in rows} - _relation_names.keys()
    if missing:
        found = _fetch("SELECT id, schema_name, table_name FROM relation_version WHERE id = ANY (%s)", [list(missing)])
        _relation_names.update({row[0]: (row[1], row[2]) for row in found})
    messages = []
    source = rows[0][7]  # with the token in the first row alone
    for (
        _, _, _, _, _, fresh, _, _, id_, count, group, group2, max_batch, relation, action, record, changes, key, commit_lsn,
        commit_idx, committed_at, epoch, unchanged, old_values_known, notes, backfill, replay,
    ) in rows:  # fmt: skip
        schema, table = _relation_names[relation]
        messages.append(
            ClaimedMessage(
                id_, count, group, group2, max_batch, ACTIONS[action], schema, table, record, changes, key, commit_lsn,
                commit_idx, committed_at, epoch, unchanged, old_values_known, notes, source, backfill, replay, id_ in undecided, bool(fresh),
            )
        )  # fmt: skip
    return messages
