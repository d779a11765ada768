"""What tests of backfills share: begin one, step until it has ended, look at what it brought."""
from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

from django.db import connection

from capture.backfilling import step
from consumers.models import Consumer
from consumers.store import backfills
from tests.capture.world import logged
from tests.conftest import wait_until


def fetch(query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters or None)
        return cursor.fetchall() if cursor.description else []


def begin(consumer: Consumer, table: str = "public.t", *, page_rows: int | None = None, **how: Any) -> UUID:
    """A backfill without what the API looks at first. `page_rows`: how many rows its first page has."""
    made = uuid4()
    backfills.begin(made, consumer_id=consumer.pk, source_id=consumer.source_id, table=table, **how)
    if page_rows is not None:
        fetch("UPDATE backfills SET page_rows = %s WHERE id = %s", page_rows, made)
    return made


def status(backfill: UUID) -> tuple[str, str]:
    return fetch("SELECT status, reason FROM backfills WHERE id = %s", backfill)[0]  # type: ignore[return-value]


def counts(backfill: UUID) -> tuple[int, int]:
    """Rows done, and of these left out."""
    return fetch("SELECT rows_done, rows_left_out FROM backfills WHERE id = %s", backfill)[0]  # type: ignore[return-value]


def step_once() -> None:
    """One step now, whatever the pause that was to be made."""
    fetch("UPDATE backfills SET due_at = clock_timestamp()")
    step(slice_s=0.3)


def work_off(backfill: UUID, timeout: float = 30) -> str:
    """Step until it has ended; returns how."""

    def ended() -> str:
        step_once()
        found = status(backfill)[0]
        return "" if found == "running" else found

    try:
        return str(wait_until(ended, timeout, "the backfill to end"))
    except AssertionError:
        raise AssertionError(fetch("SELECT * FROM backfills WHERE id = %s", backfill)) from None


def stage_all(backfill: UUID) -> int:
    """Read pages while no capture lets them be appended. Returns how many rows are staged."""
    staged = -1
    while True:
        step_once()
        now = int(fetch("SELECT coalesce(sum(cardinality(keys)), 0) FROM backfill_chunks WHERE backfill = %s", backfill)[0][0])
        if now == staged:
            return now
        staged = now


def reads(table: str | None = None) -> list[Any]:
    return [row for row in logged() if row.action == "R" and table in (None, row.table)]


def records() -> list[tuple[str, str, str]]:
    """Action, key and record of all that is in the log, as texts."""
    return fetch("SELECT action::text, key, record FROM messages ORDER BY id")  # type: ignore[return-value]


def delivered(consumer: Consumer) -> list[tuple[str, str, str, str | None]]:
    """Action, key, record and old key of what a consumer gets, in order: what the log has for it since its start."""
    return fetch(  # type: ignore[return-value]
        "SELECT m.action::text, m.key, m.record, m.old_key FROM messages m JOIN consumer_position p ON p.consumer = %s"
        " JOIN consumers_consumer c ON c.id = p.consumer WHERE m.source = p.source AND (m.consumer = p.consumer OR m.consumer IS NULL"
        " AND m.id > p.start_id AND (m.epoch <> p.start_epoch OR m.commit_lsn >= p.start_lsn) AND CASE m.action WHEN 'I' THEN 'insert'"
        " WHEN 'U' THEN 'update' WHEN 'D' THEN 'delete' ELSE 'truncate' END = ANY (c.actions)) ORDER BY m.id",
        consumer.pk,
    )


def copy_of(consumer: Consumer, version: str = "n") -> dict[str, Any]:
    """What a consumer has that lets the last message of each key win. Fails when a row goes back to an older version."""
    rows: dict[str, Any] = {}
    newest: dict[str, int] = {}
    for action, key, record, old_key in delivered(consumer):
        if action == "T":
            rows.clear()
            continue
        if old_key is not None:
            rows.pop(old_key, None)
        if action == "D":
            rows.pop(key, None)
            continue
        row = json.loads(record)
        if version in row:
            assert row[version] >= newest.get(key, -1), f"{action} of {key}: version {row[version]} came after {newest[key]}"
            newest[key] = row[version]
        rows[key] = row
    return rows
