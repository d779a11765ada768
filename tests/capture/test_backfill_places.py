"""Where a backfill reads on: a place in one order of a table's rows is none in another, and no row is passed over."""
from __future__ import annotations

from typing import Any

import pytest

from capture import backfilling
from tests.capture.backfill_world import begin, counts, fetch, reads, stage_all, status, work_off
from tests.capture.conftest import EMBEDDED
from tests.capture.world import read_until, reading
from tests.conftest import SourceDatabase

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("quick_reader")]


@pytest.fixture
def source_server(servers: dict[str, Any]) -> Any:
    return servers[EMBEDDED]


@pytest.mark.parametrize("sort_column", ["", "day"])
def test_partitions_without_a_key_published_as_their_root(
    source_database: SourceDatabase, make_source: Any, make_consumer: Any, sort_column: str
) -> None:
    """Each has rows in the same places as the others."""
    source_database.execute(
        "CREATE TABLE t (day date, v int) PARTITION BY RANGE (v);"
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (100); CREATE TABLE t2 (v int, day date);"
        "ALTER TABLE t ATTACH PARTITION t2 FOR VALUES FROM (100) TO (200);"
        "INSERT INTO t SELECT CASE WHEN g % 10 > 0 THEN date '2026-01-01' END, g FROM generate_series(0, 199) g"
    )
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t WITH (publish_via_partition_root)")
    source = make_source()
    backfill = begin(make_consumer(source), page_rows=10, sort_column=sort_column)
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    assert sorted(row.record["v"] for row in reads("public.t")) == list(range(200)) and counts(backfill) == (200, 0)


REORDERED = {
    "moved, without a key": ("a int, id int, f text", "DELETE FROM t WHERE a % 2 = 0", "VACUUM FULL t"),
    "another key": ("a int, id int PRIMARY KEY, f text", "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (a, id)"),
    "less of a key": ("a int, id int, f text, PRIMARY KEY (a, id)", "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (id)"),
    "no key any more": ("a int, id int PRIMARY KEY, f text", "ALTER TABLE t DROP CONSTRAINT t_pkey"),
    "another type": ("a int, id int PRIMARY KEY, f text", "ALTER TABLE t ALTER id TYPE text"),
}  # fmt: skip


@pytest.mark.parametrize("how", sorted(REORDERED))
def test_rows_that_come_in_another_order_between_two_pages_are_all_read(
    source_database: SourceDatabase, make_source: Any, make_consumer: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(backfilling, "MOST_ROWS", 10)
    columns, *statements = REORDERED[how]
    source_database.execute(f"CREATE TABLE t ({columns})")
    source_database.execute("INSERT INTO t SELECT g - 1000, g, 'row ' || g FROM generate_series(1, 300) g")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t; ALTER TABLE t REPLICA IDENTITY FULL")
    source = make_source()
    read_until(source, lambda: fetch("SELECT 1 FROM capture_progress"))
    backfill = begin(make_consumer(source), page_rows=10)
    assert 0 < stage_all(backfill) < 100
    for statement in statements:
        source_database.execute(statement)
    with reading(source):
        assert work_off(backfill) == "completed", status(backfill)
    wanted = {row[0] for row in source_database.execute("SELECT f FROM t")}
    missing = wanted - {row.record["f"] for row in reads()}
    assert not missing and wanted, f"{len(missing)} rows were never read"
