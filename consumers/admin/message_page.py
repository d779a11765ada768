"""One message of one consumer: its payload, what changed, and all that happened to it. Answers "why did it not arrive?"."""
from __future__ import annotations

import json
import shlex
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db import DatabaseError, connection
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, render
from django.urls import reverse
from django.utils import timezone

from consumers import envelope, trying
from consumers.admin import json_text, listing
from consumers.admin.listing import Standing
from consumers.admin.pages import OPERATE, VIEW, needs, page
from consumers.api.message_log import ListedMessage
from consumers.envelope import idempotency_key
from consumers.fields import MASK
from consumers.models import Consumer
from consumers.source_connection import SourceUnreachable
from consumers.store.models import Attempt
from consumers.store.types import ACTIONS
from consumers.trying import Tried

ATTEMPTS_SHOWN = 50
FRESH_S = 20
_MESSAGE_SQL = """
    SELECT m.id, 'passed', NULL, 0, NULL, NULL, NULL, m.action::text, r.schema_name, r.table_name, m.record, m.changes, m.key,
           m.commit_lsn, m.commit_idx, to_char(m.committed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), m.epoch,
           m.unchanged, m.old_values_known, m.annotations, m.source
    FROM (SELECT * FROM messages x WHERE x.source = %(source)s AND x.id = %(id)s
          UNION ALL SELECT * FROM kept_messages x WHERE x.source = %(source)s AND x.id = %(id)s LIMIT 1) m
    JOIN relation_version r ON r.id = m.relation
"""


class Step(NamedTuple):
    """One line of a message's history."""

    colour: str
    title: str
    at: Any
    text: str = ""
    answer: str = ""
    headers: str = ""
    behind: int | None = None
    """The message it waits for."""


@needs(VIEW)
def show(request: HttpRequest, pk: UUID, message_id: int) -> HttpResponse:
    consumer = get_object_or_404(Consumer.objects.select_related("source", "endpoint"), pk=pk)
    message = _message(consumer, message_id)
    happened = _happened(consumer, message)
    payload = envelope.render(message, trying.address_of(consumer)).decode()
    tried = _tried(consumer, message_id)
    return page(
        request, "console/message.html", f"Message {message_id}",
        **happened, **_head(request, consumer, message_id, happened["standing"]), payload=json_text.pretty(payload), tried=tried,
        made=json_text.pretty(tried.payload.decode()) if tried and consumer.transform and tried.payload else "",
        differences=json_text.differences(message.record, message.changes) if message.record.startswith("{") else [],
        committed=message.committed_at.replace("T", " ").replace("Z", " UTC"), lsn=f"{message.commit_lsn >> 32:X}/{message.commit_lsn & 0xFFFFFFFF:X}",
        idempotency_key=idempotency_key(message),
        curl=_curl(consumer, message, tried.payload.decode() if tried and tried.payload else payload) if consumer.endpoint else "",
    )  # fmt: skip


def _head(request: HttpRequest, consumer: Consumer, message_id: int, standing: Standing) -> dict[str, Any]:
    """Where the message stands and what may be done about it."""
    return {
        "may_operate": request.user.has_perm(OPERATE), "is_stuck": standing.state in ("retry", "blocked", "error", "dead"),
        "is_done": standing.state in ("delivered", "passed"), "back": reverse("admin:consumers_consumer_page", args=[consumer.pk]),
        "here": reverse("admin:consumers_consumer_message", args=[consumer.pk, message_id]),
    }  # fmt: skip


def _tried(consumer: Consumer, message_id: int) -> Tried | None:
    """What its filter and transform, as they are now, make of the message. None: it has neither, or they cannot be asked."""
    if not consumer.where and not consumer.transform:
        return None
    sample = trying.stored(consumer, message_id)
    try:
        return trying.run(consumer, [sample])[0] if sample is not None else None
    except (SourceUnreachable, DatabaseError):
        return None


@needs(VIEW)
def history(request: HttpRequest, pk: UUID, message_id: int) -> HttpResponse:
    """What happened, for a page that shows it already: until the message is done, it may go on happening.

    Its state and buttons come along when the page shows others, and only then: a button that is just being pressed stays.
    """
    consumer = get_object_or_404(Consumer.objects.select_related("source", "endpoint"), pk=pk)
    happened = _happened(consumer, _message(consumer, message_id))
    standing: Standing = happened["standing"]
    shown = request.GET.get("shown")
    head = _head(request, consumer, message_id, standing) if shown != standing.state else {}
    return render(request, "console/message_history.html", {**happened, **head, "anew": bool(head)})


def _happened(consumer: Consumer, message: ListedMessage) -> dict[str, Any]:
    standing = listing.standing_of(consumer.pk, message.id)
    attempts = list(Attempt.objects.filter(consumer=consumer.pk, message_id=message.id)[:ATTEMPTS_SHOWN])[::-1]
    is_fresh = bool(attempts) and (timezone.now() - attempts[-1].at).total_seconds() < FRESH_S
    if standing.state == "passed" and any(attempt.ok for attempt in attempts):
        standing = standing._replace(state="delivered")  # it was written down just now
    # A success is written down a moment after it is acknowledged: with failures alone the last attempt may be yet to come.
    is_settled = standing.state in ("delivered", "filtered") or (standing.state == "passed" and not attempts)
    return {
        "consumer": consumer, "message": message, "key": ", ".join(json.loads(message.key)) or "–", "standing": standing,
        "history": _history(consumer, message, standing, attempts),
        "is_open": is_fresh or not is_settled,
    }  # fmt: skip


def _message(consumer: Consumer, message_id: int) -> ListedMessage:
    with connection.cursor() as cursor:
        cursor.execute(_MESSAGE_SQL, {"source": consumer.source_id, "id": message_id})
        row = cursor.fetchone()
    if row is None:
        raise Http404(f"Message {message_id} is not in the log: it was never there, or is past the retention.")
    return ListedMessage(*(*row[:7], ACTIONS[row[7]], *row[8:]))


def _history(consumer: Consumer, message: ListedMessage, standing: Standing, attempts: list[Attempt]) -> list[Step]:
    """From the commit on the source to where it stands now, oldest first."""
    committed = datetime.fromisoformat(message.committed_at)
    steps = [Step("info", "Committed on the source and kept in the log", committed)]
    for attempt in attempts:
        title = f"Attempt {attempt.deliver_count}: " + (
            f"answered {attempt.status}" if attempt.ok else attempt.error or f"answered {attempt.status}"
        )
        text = f"POST {attempt.url}, {attempt.duration_ms:,} ms" if attempt.url else f"{attempt.duration_ms:,} ms"
        steps.append(Step("ok" if attempt.ok else "bad", title, attempt.at, text, attempt.response or "", _header_lines(attempt.headers)))
    now = _now(consumer, standing, bool(attempts))
    steps.append(now._replace(behind=listing.blocked_by(consumer.pk, message.id)) if standing.state == "blocked" else now)
    return steps


def _header_lines(headers: str | None) -> str:
    return "\n".join(f"{name}: {value}" for name, value in json.loads(headers).items()) if headers else ""


def _now(consumer: Consumer, standing: Standing, tried: bool) -> Step:
    times = f"{standing.deliver_count} time{'' if standing.deliver_count == 1 else 's'}"
    why = standing.error or ""
    match standing.state:
        case "waiting":
            paused = " The consumer is paused." if consumer.status == "paused" else ""
            return Step("info", "Waiting: the consumer has yet to take it", None, f"It comes in the order of the log.{paused}")
        case "out":
            return Step("info", "Out: handed out, not acknowledged yet", standing.due_at, f"Handed out {times}; its lease ends then.")
        case "retry":
            return Step("warn", "Failed, and is tried again", standing.due_at, f"Tried {times}. {why}")
        case "blocked":
            return Step("idle", "Blocked behind an earlier message of the same row", None, "It goes on when that one is delivered.")
        case "error":
            return Step("bad", "In error: filter or transform failed", standing.due_at, why)
        case "dead":
            return Step("bad", "Dead letter: not tried any more", None, f"Tried {times}. {why}")
        case "filtered":
            return Step("idle", "Not delivered: the filter, as it is now, says no", None, f"where {consumer.where[:300]}")
        case "delivered":
            return Step("ok", "Delivered and acknowledged", None)
        case _:
            text = "Acknowledged, discarded or filtered; of older successes no attempt is kept." if not tried else ""
            return Step("idle", "Taken and done", None, text)


def _curl(consumer: Consumer, message: ListedMessage, payload: str) -> str:
    """The push as a command. Secrets stay here: headers that hold one are masked, and the signature."""
    endpoint = consumer.endpoint
    assert endpoint is not None
    headers = {
        "Content-Type": "application/json", "webhook-id": idempotency_key(message), "webhook-signature": MASK,
        **endpoint.headers, **dict.fromkeys(endpoint.secret_headers, MASK),
    }  # fmt: skip
    body = payload if consumer.batch_size == 1 else f'{{"data":[{payload}]}}'
    lines = [f"curl -X POST {shlex.quote(endpoint.url + consumer.path)}"]
    lines += [f"  -H {shlex.quote(f'{name}: {value}')}" for name, value in headers.items()]
    lines.append(f"  --data-raw {shlex.quote(body)}")
    return " \\\n".join(lines)
