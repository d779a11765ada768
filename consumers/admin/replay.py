"""Deliver again, from the console: rewind, backfill, republish; what would come is shown before it begins, and how far it is."""
from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse

from consumers import changes, replaying
from consumers.admin import json_text
from consumers.admin.listing import key_values
from consumers.admin.pages import OPERATE, VIEW, ask, is_confirmed, needs, posted
from consumers.models import Backfill, Consumer
from consumers.routing import clean_where
from consumers.store import rewinds
from consumers.store.rewinds import OutOfReach

SHOWN = 20
COUNTED = 10_000
SAMPLE = 5


def context(consumer: Consumer) -> dict[str, Any]:
    """For the tab of a consumer's page."""
    return {
        "tables": rewinds.tables_of(consumer.pk) or [table for table in consumer.tables if not table.endswith(".*")],
        "backfills": _backfills(consumer),
        "oldest": rewinds.oldest(consumer.source_id),
    }


@needs(VIEW)
def progress(request: HttpRequest, pk: UUID) -> HttpResponse:
    """The backfills alone, for a page that shows them already."""
    consumer = _find(pk)
    return render(
        request, "console/backfills.html",
        {"consumer": consumer, "may_operate": request.user.has_perm(OPERATE), "backfills": _backfills(consumer)},
    )  # fmt: skip


@posted
@needs(OPERATE)
def rewind(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Move the consumer back. Asks first, with how many come again and a sample of them."""
    consumer, back = _find(pk), _tab(pk)
    if consumer.status == "disabled":
        messages.error(request, f"{consumer.name} is disabled and collects nothing: enable it first.")
        return redirect(back)
    try:
        position, told, noted = _point(consumer, request)
        count, sample = _beyond(consumer, position)
        if not is_confirmed(request):
            about = f"{count:,}" if count < COUNTED else f"at least {COUNTED:,}"
            return ask(
                request, title="Rewind", back=back, button=f"Rewind and deliver {about} again", details=sample,
                question=f"Deliver again everything from {told} on to {consumer.name}: {about} messages of its source? What is out becomes"
                " stale, what is parked from there on comes again in its order.",
            )  # fmt: skip
        done = replaying.rewind(consumer, position, noted)
    except ValidationError as error:
        messages.error(request, " ".join(error.messages))
        return redirect(back)
    except OutOfReach as error:
        oldest = f" It begins at {error.oldest.committed_at:%Y-%m-%d %H:%M:%S} UTC, LSN {error.oldest.lsn}." if error.oldest else ""
        messages.error(request, f"{str(error)[:1].upper()}{str(error)[1:]}.{oldest} A backfill brings the rows as they are now.")
        return redirect(back)
    if done.replay_id is None:
        messages.warning(request, f"{consumer.name} has not come that far yet: nothing moved.")
    else:
        messages.success(request, f"{consumer.name} goes back: about {done.messages_estimate:,} messages come again.")
    return redirect(back)


@posted
@needs(OPERATE)
def begin_backfill(request: HttpRequest, pk: UUID) -> HttpResponse:
    consumer, back = _find(pk), _tab(pk)
    given = request.POST
    backfill = Backfill(
        consumer=consumer, table=given.get("table", ""), where=given.get("where", "").strip(), sort_column=given.get("sort_column", "").strip(),
        start_value=given.get("start_value", "").strip() or None,
    )  # fmt: skip
    try:
        changes.save(backfill)
    except ValidationError as error:
        messages.error(request, " ".join(f"{field}: {' '.join(texts)}" for field, texts in changes.errors_of(error).items()))
        return redirect(back)
    messages.success(request, f"The rows of {backfill.table} are on their way.")
    return redirect(back)


@posted
@needs(OPERATE)
def look(request: HttpRequest, pk: UUID) -> HttpResponse:
    """What a republish would bring: how many, and the first of them. Nothing begins."""
    consumer = _find(pk)
    try:
        asked = _asked(consumer, request)
        if asked.from_log:
            found = replaying.look_in_log(consumer, asked.where, asked.since, asked.until, asked.table)
        else:
            found = replaying.look_in_tables(consumer, asked.where, asked.table)
    except ValidationError as error:
        problems = [("" if field == "non_field_errors" else field, texts) for field, texts in changes.errors_of(error).items()]
        return render(request, "console/problems.html", {"problems": problems})
    sample = [json_text.pretty(one.decode()) for one in found.sample]
    return render(request, "console/republish_look.html", {"found": found, "sample": sample})


@posted
@needs(OPERATE)
def republish(request: HttpRequest, pk: UUID) -> HttpResponse:
    consumer = _find(pk)
    try:
        if consumer.status == "disabled":
            raise ValidationError(f"{consumer.name} is disabled and drops what comes: enable it first.")
        asked = _asked(consumer, request)
        if asked.from_log:
            replaying.republish_from_log(consumer, asked.where, asked.since, asked.until, asked.table)
        else:
            replaying.republish_from_table(consumer, asked.where, asked.table)
    except ValidationError as error:
        messages.error(request, " ".join(" ".join(texts) for texts in changes.errors_of(error).values()))
    else:
        messages.success(request, "What matches is on its way.")
    return redirect(_tab(pk))


@posted
@needs(OPERATE)
def act(request: HttpRequest, pk: UUID, backfill: UUID, action: str) -> HttpResponse:
    """pause, resume, cancel."""
    found = get_object_or_404(Backfill.objects.select_related("consumer"), pk=backfill, consumer=pk)
    if action in replaying.ACTS and replaying.act(found, action):
        messages.success(request, f"The {found.kind} is {Backfill.objects.get(pk=backfill).status}.")
    else:
        messages.warning(request, f"The {found.kind} is {found.status}.")
    return redirect(_tab(pk))


class Asked(NamedTuple):
    """What is to be republished."""

    from_log: bool
    where: str
    table: str | None
    since: datetime | None
    until: datetime | None


def _asked(consumer: Consumer, request: HttpRequest) -> Asked:
    """Raises ValidationError."""
    given = request.POST
    where = given.get("where", "").strip()
    if where:
        try:
            clean_where(where)
        except ValidationError as error:
            raise ValidationError({"where": error.messages}) from None
    from_log = given.get("from") != "table"
    since, until = (_moment(given[name]) if from_log and given.get(name) else None for name in ("since", "until"))
    return Asked(from_log, where, given.get("table") or None, since, until)


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValidationError("Say a time, in UTC.") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _find(pk: UUID) -> Consumer:
    return get_object_or_404(Consumer.objects.select_related("source"), pk=pk)


def _tab(pk: UUID) -> str:
    return reverse("admin:consumers_consumer_page", args=[pk]) + "?tab=replay"


def _backfills(consumer: Consumer) -> list[Backfill]:
    return list(Backfill.objects.filter(consumer=consumer.pk)[:SHOWN])


def _point(consumer: Consumer, request: HttpRequest) -> tuple[int, str, Any]:
    """The position asked for, the point in words, and as it is audited. Raises ValidationError, OutOfReach."""
    given = request.POST
    kind = given.get("point", "")
    if kind == "beginning":
        return rewinds.beginning(), "the beginning of the log", "beginning"
    if kind == "time":
        moment = _moment(given.get("time", ""))
        return rewinds.before_time(consumer.pk, consumer.source_id, moment), f"{moment:%Y-%m-%d %H:%M:%S} UTC", {"time": moment}
    if kind == "lsn":
        lsn = given.get("lsn", "").strip()
        if not rewinds.LSN.fullmatch(lsn):
            raise ValidationError('Expected an LSN such as "0/1A2B".')
        return rewinds.before_lsn(consumer.pk, consumer.source_id, lsn), f"LSN {lsn}", {"lsn": lsn}
    if kind != "row":
        raise ValidationError("Choose a point.")
    table, key = given.get("table", ""), given.get("key", "").strip()
    if not key or "\0" in key + table:
        raise ValidationError("Say which row: its table and key.")
    last = given.get("occurrence") == "last"
    position = rewinds.before_row(consumer.pk, consumer.source_id, table, key_values(key), last=last)
    told = f"the {'newest' if last else 'oldest'} message of the row {key} of {table}"
    return position, told, {"table": table, "pk": key, "occurrence": "last" if last else "first"}


def _beyond(consumer: Consumer, position: int) -> tuple[int, list[tuple[str, str]]]:
    """How many of the log come again, counted up to COUNTED, and the first of them."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM (SELECT FROM messages m JOIN consumer_position p ON p.consumer = %s WHERE m.source = p.source"
            " AND m.id > %s AND m.id <= p.position LIMIT %s) counted", [consumer.pk, position, COUNTED],
        )  # fmt: skip
        count = int(cursor.fetchone()[0])
        cursor.execute(
            "SELECT r.schema_name || '.' || r.table_name || ' ' || m.key, left(m.record, 100) FROM messages m JOIN relation_version r"
            " ON r.id = m.relation WHERE m.source = %s AND m.id > %s ORDER BY m.id LIMIT %s", [consumer.source_id, position, SAMPLE],
        )  # fmt: skip
        return count, [(row[0], row[1]) for row in cursor.fetchall()]
