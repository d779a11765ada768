"""A backfill with real processes: capture, workers; killed and stopped while it runs."""
from __future__ import annotations

from typing import Any

import pytest

from consumers.models import Backfill, Consumer
from consumers import changes
from tests.capture.backfill_world import fetch
from tests.conftest import SourceDatabase, wait_until

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_consumer_that_begins_with_everything(
    source_database: SourceDatabase, make_source: Any, run: Any
) -> None:
    rows = 20_000
    source_database.execute(f"CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, repeat('x', 100) FROM generate_series(1, {rows}) g")
    source = make_source()
    run("run_capture")
    run("run_workers")
    consumer = Consumer(name="all", source=source, kind="pull", tables=["public.t"], start_from="beginning")
    changes.save(consumer)
    backfill = Backfill.objects.get()

    def completed() -> bool:
        backfill.refresh_from_db()
        assert backfill.status in ("running", "completed"), backfill.reason
        return backfill.status == "completed"

    wait_until(completed, 60, "the backfill")
    assert fetch("SELECT count(*), count(DISTINCT key) FROM messages WHERE action = 'R'") == [(rows, rows)]
