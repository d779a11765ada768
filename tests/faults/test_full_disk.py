"""F9: the embedded store on a small file system that fills up. Capture stops cleanly, says so, and goes on by itself."""
from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.faults.rig import LOAD, Writer, peak_mb, stored, verdict
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
    writer = Writer(installation.source, pause_s=0.02)

    def source_state() -> tuple[int, dict[str, object]]:
        status, body = installation.call("GET", "/health")
        return status, body["sources"][0]

    def logged() -> list[tuple[int, int]]:
        with installation.store() as conn:
            return stored(lambda query: conn.execute(query).fetchall())  # type: ignore[arg-type]

    def confirmed() -> int:
        with installation.source() as conn:
            row = conn.execute("SELECT confirmed_flush_lsn - '0/0'::pg_lsn FROM pg_replication_slots").fetchone()
        assert row is not None
        return int(row[0])

    def stored_to() -> int:
        with installation.store() as conn:
            row = conn.execute("SELECT reached_lsn FROM capture_progress").fetchone()
        assert row is not None
        return int(row[0])

    try:
        with installation.source() as conn:
            conn.execute(LOAD)
        consumer = {"name": "load", "kind": "pull", "source": "playground", "tables": ["public.load"]}
        assert installation.call("POST", "/api/consumers", consumer)[0] == 201
        writer.start()
        wait_until(lambda: len(logged()) > 20, 20, "capture to work")
        filler = small_disk / "filler"
        free = int(subprocess.run(["stat", "-f", "-c", "%a %S", small_disk], capture_output=True, text=True, check=True).stdout.split()[0]) * 4096
        with open(filler, "wb") as file:
            file.write(b"x" * (free - (LEAST_MB - 60) * 1_000_000))
        began = time.monotonic()
        wait_until(lambda: source_state()[0] == 503 and "nearly full" in str(source_state()[1]["reasons"]), 60, "the full disk to be said")
        said = time.monotonic() - began
        before, count, commits = stored_to(), len(logged()), writer.commits
        wait_until(lambda: writer.commits > commits + 20, 20, "the source to be written")
        assert stored_to() == before and len(logged()) == count, "nothing is stored"
        assert confirmed() <= before, "nothing else is confirmed"
        filler.unlink()
        began = time.monotonic()
        wait_until(lambda: len(logged()) > count, 30, "capture to go on by itself")
        recovery_s = time.monotonic() - began
        wait_until(lambda: source_state()[0] == 200, 30, "health to be well again")
        writer.stop()
        with installation.source() as conn:
            committed = {(key, number) for key, number in conn.execute("SELECT key, number FROM load").fetchall()}
        wait_until(lambda: committed <= set(logged()), 30, "all of it")
        peak = max(peak_mb(pid) for pid in installation.pids("run_capture --reader"))
        verdict(f"F9 the store's disk nearly full, said after {said:.0f} s", committed, logged(), recovery_s=recovery_s, peak=peak)
    finally:
        writer.stop()
        installation.stop()
        wait_until(lambda: not leftovers(installation.home), 15, "every process to be gone")
