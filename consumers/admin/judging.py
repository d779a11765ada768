"""Which messages that a consumer has passed its filter said no to: by the filter as it is now."""
from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import psycopg

from consumers.filters import plans
from consumers.filters.filtering import filtering
from consumers.filters.statements import DROPS, UNHEARD_OF

SHAPES_AT_ONCE = 3  # rounds of learning shapes that turn up


def dropped(consumer_id: UUID, ids: Sequence[int]) -> set[int]:
    """Those of the messages that the filter leaves out. Empty when there is none, or when it cannot judge them."""
    plan = plans.load(consumer_id) if ids else None
    if plan is None:
        return set()
    try:
        for _ in range(SHAPES_AT_ONCE):
            with filtering() as cursor:
                rows = cursor.execute(plan.some, [plan.source_id, list(ids)]).fetchall()  # type: ignore[call-overload]
            unheard = sorted({relation for _id, verdict, relation in rows if verdict == UNHEARD_OF})
            if not unheard:
                return {id_ for id_, verdict, _relation in rows if verdict == DROPS}
            plan.learn_shapes(unheard)
    except psycopg.Error:
        pass  # it fails on one of them: these are parked, and say so themselves
    return set()
