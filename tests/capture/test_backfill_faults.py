"""Workers of backfills that are stopped or killed anywhere: capture goes on, another worker too, and no row comes twice."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.capture.backfill_world import begin, copy_of, counts, fetch, status, work_off
from tests.capture.stopping_worker import STEPS
from tests.capture.test_backfill_order import MAKE, Scene, scene  # noqa: F401
from tests.capture.world import reading
from tests.conftest import ROOT, process_environment, wait_until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("quick_reader")]

STALL_S = 15.0


@pytest.fixture
def source_server(servers: dict[str, Any]) -> Any:
    return servers["18"]


def state_of(pid: int) -> str:
    """R, S, T (stopped) …; empty when there is no such process any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


class Workers:
    """Starts workers that stop in a step."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.capture.stopping_worker"], env=process_environment(), cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._pids: list[int] = []

    def start(self, step: str, nth: int) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{step} {nth}\n")
        self._process.stdin.flush()
        self._pids.append(int(self._process.stdout.readline()))
        return self._pids[-1]

    def close(self) -> None:
        for pid in self._pids:
            if state_of(pid):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


@pytest.fixture
def workers(transactional_db: None) -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


def test_a_worker_stopped_anywhere_stalls_nobody(scene: Callable[..., Scene], workers: Workers, long_run: bool) -> None:  # noqa: F811
    """Whatever it held is free within seconds, and what it does when it goes on later counts for nothing."""
    on = scene()
    stopped = []
    longest = 0.0
    with reading(on.source):
        for number, step in enumerate(STEPS):
            for nth in (1, 2, 5) if long_run else (1 + number % 2,):
                on.database.execute("UPDATE t SET n = n + 1000 WHERE id %% 7 = %s", [number % 7])
                backfill = begin(on.consumer, page_rows=10)
                worker = workers.start(step, nth)
                wait_until(lambda: state_of(worker) in ("", "T"), 30)
                if state_of(worker) == "T":
                    stopped.append(step)
                    began = time.monotonic()
                    mark = fetch("SELECT max(id) FROM messages")[0][0]
                    on.database.execute("UPDATE t SET n = n + 1000 WHERE id = 3")
                    wait_until(
                        lambda: fetch("SELECT 1 FROM messages WHERE id > %s AND action = 'U'", mark), STALL_S,
                        f"capture to go on while a worker is stopped in {step}",
                    )  # fmt: skip
                    longest = max(longest, time.monotonic() - began)
                    fetch("UPDATE backfills SET held_until = clock_timestamp()")  # its turn is over
                    assert work_off(backfill) == "completed", (step, status(backfill))
                    os.kill(worker, signal.SIGCONT)
                wait_until(lambda: not state_of(worker), 30, "the worker to end")
                if status(backfill)[0] == "running":
                    assert work_off(backfill) == "completed", (step, status(backfill))
                assert counts(backfill)[0] == 40, f"each row once: {step}"
                [(twice,)] = fetch("SELECT count(*) FROM (SELECT FROM messages WHERE backfill = %s GROUP BY key HAVING count(*) > 1) x", backfill)
                assert twice == 0, step
    on.catch_up()
    print(f"stopped in {len(stopped)} of {len(STEPS)} steps, capture went on after {longest:.2f} s at most")  # noqa: T201
    assert len(set(stopped)) >= len(STEPS) - 4
    assert copy_of(on.consumer) == on.rows() and fetch("SELECT count(*) FROM backfill_chunks") == [(0,)]
