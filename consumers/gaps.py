"""Close the gap of a source once backfills have brought what may be missing."""
from __future__ import annotations

from uuid import UUID

from consumers.backfill_rules import tables_to_backfill
from consumers.models import Consumer, Source
from consumers.source_connection import SourceUnreachable
from consumers.store import backfills, lifecycle


def close_if_covered(source_id: UUID) -> bool:
    """Whether it was closed: every consumer that was there has had every table of its own since, whole.

    Rows that were deleted meanwhile are not told of by any backfill.
    """
    since = lifecycle.gap_since(source_id)
    if since is None:
        return False
    source = Source.objects.get(pk=source_id)
    try:
        for consumer in Consumer.objects.filter(source=source, created_at__lt=since).exclude(status="disabled"):
            if not set(tables_to_backfill(source, consumer.tables)) <= backfills.brought_since(consumer.pk, since):
                return False
    except SourceUnreachable:
        return False
    return lifecycle.close_gap(source_id, since, "every table of every consumer was backfilled since")
