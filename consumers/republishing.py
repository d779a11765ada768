"""Republish from the log: find what matches an SQL condition, count it and show some, or append copies for one consumer.

What is delivered goes through the consumer's own filter too, as everything does, so that is asked as well.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connection

from consumers.filters import plans
from consumers.filters.scouting import Scout, scouts
from consumers.filters.statements import PASSES, UNDECIDED
from consumers.store.backfill_work import BackfillWork, Job

LOOK_AT = 2_000  # messages at a time
COPY_AT_ONCE = 500
COUNT_WITHIN_S = 5.0


class CannotJudge(Exception):
    """The condition failed on a message; the text says on which, and how."""


class Found(NamedTuple):
    """What a republish would bring. `is_complete` False: counting took too long, and there may be more."""

    matching: int
    is_complete: bool
    sample: list[int]
    """The ids of the first ones."""


class Search:
    """Judges messages by a republish's condition, and by the consumer's own filter."""

    def __init__(self, consumer_id: UUID, where: str, table: str) -> None:
        """`table`: of this one only, unless it is empty."""
        self._asked = Scout(plans.republished(consumer_id, where, table))
        self._own = scouts.of(consumer_id)

    def matching(self, ids: Sequence[int]) -> list[int]:
        """Those of the messages that match. Raises CannotJudge."""
        left = self._passing(self._asked, ids)
        return left if self._own is None else self._passing(self._own, left)

    def _passing(self, scout: Scout, ids: Sequence[int]) -> list[int]:
        if not ids:
            return []
        verdicts = scout.judge(ids)
        passing = []
        for number in ids:
            verdict, failed = verdicts[number]
            if failed is None:
                passes = verdict in (PASSES, UNDECIDED)
            elif scout is self._own:
                passes = True  # it is delivered, and parked with the error as ever
            elif failed.error in scout.plan.unfit.values():
                passes = False  # of a shape of the table that has not what the condition names
            else:
                raise CannotJudge(f"message {number}: {failed.error}")
            if passes:
                passing.append(number)
        return passing


def look(
    consumer_id: UUID, source_id: UUID, where: str, table: str, since: datetime | None, until: datetime | None, sample: int,
    within_s: float = COUNT_WITHIN_S,
) -> Found:  # fmt: skip
    """Count what would be republished, for so long, and take the first ones. Raises CannotJudge."""
    search = Search(consumer_id, where, table)
    deadline = time.monotonic() + within_s
    count = 0
    first: list[int] = []
    after, last = _range(consumer_id, source_id, since)
    while True:
        ids, looked_to = _fetch(
            "SELECT * FROM sequin_candidates(%s, %s, %s, %s, %s, %s, %s)", [source_id, consumer_id, after, last, LOOK_AT, since, until]
        )[0]
        if looked_to is None:
            return Found(count, True, first)
        matching = search.matching(ids)
        first += matching[: sample - len(first)]
        count += len(matching)
        after = looked_to
        if time.monotonic() > deadline:
            return Found(count, False, first)


class Progress(NamedTuple):
    """`outcome`: appended, completed or lost. `place`: what was looked at so far."""

    outcome: str
    copies: int
    place: int


def get_on(work: BackfillWork, job: Job, search: Search, keep_turn: Callable[[], None]) -> Progress:
    """Look at the next messages and copy those that match. Raises CannotJudge."""
    place = int(job.place)
    if (gone := work.log_floor() - place - 1) > 0:
        # It had failed, and nothing was kept for it.
        raise CannotJudge(f"up to {gone} messages behind the place where it was have left the log meanwhile: cancel it, and begin another one")
    ids, looked_to = work.candidates(job, place, LOOK_AT)
    if looked_to is None:
        return Progress(work.append_copies(job, [], place, is_last=True), 0, place)
    matching = search.matching(ids)
    for begin in range(0, len(matching), COPY_AT_ONCE):
        chunk = matching[begin : begin + COPY_AT_ONCE]
        keep_turn()
        if work.append_copies(job, chunk, chunk[-1], is_last=False) == "lost":
            return Progress("lost", begin, place)
        place = chunk[-1]
    return Progress(work.append_copies(job, [], looked_to, is_last=False), len(matching), looked_to)


def _range(consumer_id: UUID, source_id: UUID, since: datetime | None) -> tuple[int, int]:
    """The log as it is now, from `since` on."""
    found = _fetch(
        "SELECT coalesce(CASE WHEN %(since)s::timestamptz IS NOT NULL THEN sequin_find(%(source)s, %(consumer)s,"
        " %(since)s::timestamptz, NULL, NULL) - 1 END, (SELECT id - 1 FROM log_floor)),"
        " coalesce((SELECT max(id) FROM messages WHERE source = %(source)s), 0)",
        {"source": source_id, "consumer": consumer_id, "since": since},
    )[0]
    return int(found[0]), int(found[1])


def _fetch(query: str, parameters: Any) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query, parameters)
        return cursor.fetchall()
