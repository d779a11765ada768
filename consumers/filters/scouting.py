"""Judge the log ahead of a consumer's position, outside of the claim's lock, so that a claim only takes what is known.

Verdicts on a stretch of the log stay true whatever others do meanwhile: the log only grows, and an expression is immutable.
They are kept per consumer and process, so that a thousand claims of one message share one look at a thousand.
"""
from __future__ import annotations

import bisect
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from django.db import connection

from consumers.backoff import HELD, delay_ms
from consumers.filters import plans
from consumers.filters.filtering import TIMEOUT_MS, filtering
from consumers.filters.plans import Plan
from consumers.filters.statements import DROPS, LOOK_AHEAD, UNFIT, UNHEARD_OF

FIRST_ROWS, MOST_ROWS = 1_000, 5_000  # judged by one statement
SPARE = 32  # verdicts handed to a claim beyond what it asks for: some are blocked behind their groups
SCOUTS_KEPT = 1_000
# Errors that an expression makes: data, cardinality, syntax and access of what it names, limits, memory.
OF_THE_EXPRESSION = ("22", "21", "42", "54", "0A", "2F", "53200")
NOT_OF_THE_EXPRESSION = ("42P01", "42501")  # the log is not there, or not ours to read


class Failed(NamedTuple):
    """What a filter did with a message instead of judging it."""

    error: str
    delay_ms: int


class Verdicts(NamedTuple):
    """On the stretch (from_id, through] of the log: the last arguments of sequin_claim, and whether the log ends there."""

    version: datetime | None
    from_id: int | None
    through: int | None
    ids: Sequence[int]
    grps: Sequence[int]
    grp2s: Sequence[int | None]
    errors: Sequence[str | None]
    delays_ms: Sequence[int | None]
    passed: Sequence[int]
    undecided: Sequence[int]
    at_log_end: bool


NONE_NEEDED = Verdicts(None, None, None, (), (), (), (), (), (), (), True)


class Judged(NamedTuple):
    """One message that a claim took out of the parked ones."""

    verdict: int
    failed: Failed | None = None


class Scout:
    """The verdicts of one consumer in this process. Thread-safe."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._lock = threading.Lock()
        self._most = LOOK_AHEAD if plan.looks_ahead else MOST_ROWS
        self._rows = LOOK_AHEAD if plan.looks_ahead else FIRST_ROWS
        self._ceiling = self._most  # lower after a statement that took too long
        self._begin(plan.position)

    def _begin(self, position: int) -> None:
        self._position = self._from = self._through = position
        self._ids: list[int] = []
        self._groups: list[tuple[int, int | None]] = []
        self._passed: list[int] = []
        self._undecided: set[int] = set()
        self._failed: dict[int, Failed] = {}
        self._at_end = False

    def verdicts(self, limit: int, deadline: float) -> Verdicts:
        """What is known beyond the position: enough for `limit` messages, unless the log or the time ends."""
        with self._lock:
            self._at_end = False
            while len(self._ids) - len(self._failed) < limit and not self._at_end:
                self._scout()
                if time.monotonic() >= deadline:
                    break
            count = min(len(self._ids), limit + SPARE)
            through = self._through if count == len(self._ids) else self._ids[count] - 1
            ids = self._ids[:count]
            failed = [self._failed.get(number) for number in ids] if self._failed else []
            return Verdicts(
                self.plan.version, self._from, through, ids, [group for group, _ in self._groups[:count]],
                [group for _, group in self._groups[:count]],
                [None if one is None else one.error for one in failed], [None if one is None else one.delay_ms for one in failed],
                self._passed[: bisect.bisect_right(self._passed, through)], [number for number in ids if number in self._undecided],
                self._at_end and count == len(self._ids),
            )  # fmt: skip

    def moved(self, position: int) -> bool:
        """A claim found the consumer there: forget what lies behind. False: it is somewhere else, all begins anew."""
        with self._lock:
            if position < self._from or position > self._through:
                self._begin(position)
                return False
            if position <= self._position:
                return True
            self._position = self._from = position
            count = bisect.bisect_right(self._ids, position)
            for number in self._ids[:count]:
                self._failed.pop(number, None)
                self._undecided.discard(number)
            del self._ids[:count], self._groups[:count]
            del self._passed[: bisect.bisect_right(self._passed, position)]
            return True

    def is_undecided(self, message_id: int) -> bool:
        return message_id in self._undecided

    def judge(self, ids: Sequence[int]) -> dict[int, Judged]:
        """Judge these messages, wherever they are kept. One that is not there is dropped."""
        with self._lock:
            return self._judge(list(ids))

    # ------------------------------------------------------------------------------------------------------------------

    def _scout(self) -> None:
        """Judge the next rows of the log; fewer when it takes too long, one alone when something goes wrong."""
        plan, rows = self.plan, self._rows
        while True:
            try:
                found = self._run(plan.stretch, [plan.source_id, self._through, rows])[0]
            except _Trouble as trouble:
                if rows == 1:
                    self._note_failure(trouble)
                    return
                rows = max(1, rows // (4 if trouble.took_too_long else 2))
                self._rows = rows
                if trouble.took_too_long:
                    self._ceiling = rows * 2
                    return  # the claim has waited long enough
                continue
            last, count, ids, grps, grp2s, undecided, passed, unfit, unfit_grps, unfit_grp2s, relations, unheard_of = found
            if unheard_of:
                plan.learn_shapes(sorted(set(unheard_of)))
                continue
            break
        self._rows = min(rows * 2, self._ceiling)
        self._ceiling = min(self._most, self._ceiling + self._ceiling // 16 + 1)
        self._at_end = count < rows
        if not count:
            return
        taken = list(zip(ids or (), zip(grps or (), grp2s or (), strict=True), strict=True))
        if unfit:
            for number, relation in zip(unfit, relations, strict=True):
                self._failed[number] = Failed(plan.unfit[relation], HELD)
            taken += zip(unfit, zip(unfit_grps, unfit_grp2s, strict=True), strict=True)
            taken.sort()
        self._ids += [number for number, _ in taken]
        self._groups += [groups for _, groups in taken]
        self._undecided.update(undecided or ())
        self._passed += passed or ()
        self._through = last

    def _note_failure(self, trouble: _Trouble) -> None:
        found = self._run(self.plan.one, [self.plan.source_id, self._through])
        if not found:
            self._at_end = True
            return
        number, group, group2 = found[0]
        self._ids.append(number)
        self._groups.append((group, group2))
        self._failed[number] = trouble.failed()
        self._through = number

    def _judge(self, ids: list[int]) -> dict[int, Judged]:
        plan = self.plan
        try:
            rows = self._run(plan.some, [plan.source_id, ids])
        except _Trouble as trouble:
            if len(ids) == 1:
                return {ids[0]: Judged(UNFIT, trouble.failed())}
            middle = len(ids) // 2
            return self._judge(ids[:middle]) | self._judge(ids[middle:])
        unheard_of = sorted({relation for _, verdict, relation in rows if verdict == UNHEARD_OF})
        if unheard_of:
            plan.learn_shapes(unheard_of)
            return self._judge(ids)
        judged = dict.fromkeys(ids, Judged(DROPS))
        for number, verdict, relation in rows:
            failed = Failed(plan.unfit[relation], HELD) if verdict == UNFIT else None
            judged[number] = Judged(DROPS if verdict is None else verdict, failed)
        return judged

    def _run(self, statement: str, parameters: list[Any]) -> list[Any]:
        """Raises _Trouble for what the expression did, Django's errors for anything else."""
        try:
            with filtering() as cursor:
                return cursor.execute(statement, parameters).fetchall()
        except psycopg.Error as error:
            state = error.sqlstate or ""
            if state == "57014":
                raise _Trouble(f"where took longer than {TIMEOUT_MS} ms", took_too_long=True) from None
            if state.startswith(OF_THE_EXPRESSION) and state not in NOT_OF_THE_EXPRESSION:
                raise _Trouble(f"where: {error.diag.message_primary or error}") from None
            with connection.wrap_database_errors:
                raise


class _Trouble(Exception):
    """A filter failed on one of some messages."""

    def __init__(self, error: str, *, took_too_long: bool = False) -> None:
        self.error, self.took_too_long = error, took_too_long
        super().__init__(error)

    def failed(self) -> Failed:
        return Failed(self.error, delay_ms(1, random.uniform(-1, 1)))


class _Scouts:
    """The scouts of this process, by consumer; None for a consumer that needs none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[UUID, Scout | None] = OrderedDict()

    def of(self, consumer_id: UUID) -> Scout | None:
        with self._lock:
            if consumer_id in self._known:
                self._known.move_to_end(consumer_id)
                return self._known[consumer_id]
        return self.renew(consumer_id)

    def renew(self, consumer_id: UUID) -> Scout | None:
        """The consumer was made, or edited."""
        plan = plans.load(consumer_id)
        scout = None if plan is None else Scout(plan)
        with self._lock:
            self._known[consumer_id] = scout
            while len(self._known) > SCOUTS_KEPT:
                self._known.popitem(last=False)
        return scout


scouts = _Scouts()
