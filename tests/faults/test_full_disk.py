"""F9: the embedded store on a small file system that fills up. Capture stops cleanly, says so, and goes on by itself."""
from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.installation import Installation, leftovers

SIZE_MB, LEAST_MB = 700, 250


@pytest.fixture
def small_disk() -> Iterator[Path]:
    mounted = Path(tempfile.mkdtemp(prefix="sequin-disk-"))
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m,mode=755", "tmpfs", mounted], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        mounted.rmdir()
        pytest.skip(f"a small file system needs the right to mount: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", mounted], check=False)
    mounted.rmdir()


def test_f9_the_disk_of_the_store_is_nearly_full(small_disk: Path, tmp_path: Path) -> None:
    installation = Installation(small_disk / "home", SEQUIN_MIN_FREE_DISK=f"{LEAST_MB}MB")
    installation.output = tmp_path / "out"
    installation.start()
    try:
        def source_state() -> tuple[int, dict[str, object]]:
            status, body = installation.call("GET", "/health")
            return status, body["sources"][0]

        def confirmed() -> str:
            with installation.source() as conn:
                row = conn.execute("SELECT confirmed_flush_lsn::text FROM pg_replication_slots").fetchone()
            assert row is not None
            return str(row[0])

        def insert(status: str) -> None:
            with installation.source() as conn:
                conn.execute("INSERT INTO orders (customer_id, status, total) SELECT id, %s, 1 FROM customers LIMIT 1", [status])

        def stored(status: str) -> bool:
            with installation.store() as conn:
                row = conn.execute("SELECT count(*) FROM messages WHERE record LIKE %s", [f"%{status}%"]).fetchone()
            return row is not None and row[0] > 0

        insert("with room")
        wait_until(lambda: stored("with room"), 20, "capture to work")
        filler = small_disk / "filler"
        free = int(subprocess.run(["stat", "-f", "-c", "%a %S", small_disk], capture_output=True, text=True, check=True).stdout.split()[0]) * 4096
        with open(filler, "wb") as file:
            file.write(b"x" * (free - (LEAST_MB - 60) * 1_000_000))
        insert("without room")
        wait_until(lambda: source_state()[0] == 503 and "nearly full" in str(source_state()[1]["reasons"]), 60, "the full disk to be said")
        before = confirmed()
        insert("still without")
        assert confirmed() == before and not stored("without room"), "nothing is stored, nothing confirmed"
        filler.unlink()
        wait_until(lambda: stored("still without"), 30, "capture to go on by itself")
        wait_until(lambda: source_state()[0] == 200, 30, "health to be well again")
        print("F9 store's disk nearly full: stopped, said so, confirmed nothing, went on by itself")  # noqa: T201
    finally:
        installation.stop()
        wait_until(lambda: not leftovers(installation.home), 15, "every process to be gone")
