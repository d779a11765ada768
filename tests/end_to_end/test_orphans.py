"""A process that has only just begun goes with its parent, too: it may be stopped, and its parent killed, before it runs a line of ours."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, process_environment, wait_until
from tests.installation import kill

PARENT = """
import os, signal, sys, types
import django
django.setup()
from capture.readers import Readers
from delivery.cluster import Cluster

def reader():
    readers = Readers([])
    readers._start(types.SimpleNamespace(pk="00000000-0000-0000-0000-000000000000", name="s", updated_at=None))
    [child] = readers._children.values()
    return child.process

def cluster():
    made = Cluster()
    made.keep()
    return made._process

process = {which}()
os.kill(process.pid, signal.SIGSTOP)
print(process.pid, flush=True)
sys.stdin.read()
"""


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("which", ["reader", "cluster"])
def test_a_stopped_child_goes_with_its_killed_parent(which: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("{which}", which)], cwd=ROOT, env=process_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert not is_gone(child)
            parent.kill()
            wait_until(lambda: is_gone(child), 10, "the child to go")
        finally:
            kill(child)
