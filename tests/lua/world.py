"""A message and a transformer for tests."""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from consumers.lua.types import Call

DEADLINE_S = 40.0  # of a test's condition, on a busy machine


def call(record: Any = None, *, action: str = "insert", changes: Any = None, metadata: Any = None) -> Call:
    return Call(
        json.dumps(action).encode(),
        json.dumps({"id": 1} if record is None else record).encode(),
        None if changes is None else json.dumps(changes).encode(),
        json.dumps({} if metadata is None else metadata).encode(),
    )


def raw(record: str) -> Call:
    return Call(b'"insert"', record.encode("utf-8", "surrogatepass"), None, b"{}")


def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, at most DEADLINE_S."""
    ends = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < ends, "did not come about in time"
        time.sleep(0.005)
