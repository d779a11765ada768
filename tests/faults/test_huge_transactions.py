"""F19 and F20: one transaction of a million rows of 1 kB, whole and in order, in little memory, killed in its middle or not."""
from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import wait_until
from tests.faults.rig import Scene, timed, verdict_line
from tests.faults.test_capture_faults import scene, server  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

MOST_MB = 300


@pytest.fixture(params=["whole", "killed", "narrow"])
def kind(request: pytest.FixtureRequest, long_run: bool) -> Iterator[str]:
    if request.param == "narrow" and not long_run:
        pytest.skip("ten million rows: with --long")
    yield request.param


def test_f19_f20_a_huge_transaction(scene: Scene, long_run: bool, kind: str) -> None:
    rows, width = (10_000_000, 100) if kind == "narrow" else (1_000_000 if long_run else 60_000, 1000)
    scene.cluster.execute("CREATE TABLE big (id int PRIMARY KEY, filler text)", database="shop")
    scene.capture.start()
    scene.writer.start()  # others go on writing, and are not held up for longer than it takes
    scene.goes_on()
    insert = f"INSERT INTO big SELECT g, repeat('x', {width}) FROM generate_series(1, {rows}) g"
    server = scene.cluster
    writing = subprocess.Popen(
        [server.binaries / "psql", "-qc", insert, f"host=127.0.0.1 port={server.port} user=postgres password={server.password} dbname=shop"]
    )
    before = scene.stored_count()
    try:
        if kind == "killed":
            for part in (0.1, 0.3, 0.5, 0.7, 0.9):
                wait_until(lambda: scene.stored_count() - before > rows * part, 600, "a part to be stored")  # noqa: B023
                scene.capture.kill_reader()
                with timed() as took:
                    scene.goes_on(60)
                    scene.recovery_s = max(scene.recovery_s, took())
        assert writing.wait(600) == 0
        scene.writer.stop()
        all_rows = rows + len(scene.committed())
        wait_until(lambda: scene.stored_count() >= all_rows, 1200, "all rows")
    finally:
        writing.kill()
    checked = (
        "SELECT count(*), count(DISTINCT commit_idx), bool_and((record::json->>'id')::bigint = commit_idx + 1 AND rising)"
        " FROM (SELECT m.record, m.commit_idx, lag(m.commit_idx, 1, -1::bigint) OVER (ORDER BY m.id) < m.commit_idx AS rising"
        " FROM messages m JOIN relation_version r ON r.id = m.relation WHERE r.table_name = 'big') b"
    )
    found, distinct, kept = scene.fetch(checked)[0]
    peak = scene.capture.look()
    name = "F20 one transaction, killed 5 times in its middle" if kind == "killed" else "F19 one transaction"
    print(verdict_line(f"{name}, rows of {width} B", rows, rows - distinct, found - distinct, kept, scene.recovery_s, peak))  # noqa: T201
    assert (found, distinct, kept) == (rows, rows, True)
    assert peak < MOST_MB
    scene.verdict(f"{name}, small transactions beside it")
