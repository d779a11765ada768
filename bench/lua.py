"""Measure Lua transforms: microseconds a message, through the child process and back, in batches.

    python bench/lua.py [--messages 20000] [--batch 100]

Needs no store. `none` is what the same batches cost without a transform. One line a function: the best of ROUNDS rounds.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from consumers.lua.transformer import Transformer  # noqa: E402
from consumers.lua.types import Call  # noqa: E402

ROUNDS = 7
MESSAGE = Call(
    b'"update"',
    b'{"id":17,"status":"paid","total":154.97,"customer_id":88123,"email":"anna@example.com","note":null,'
    b'"created_at":"2026-11-23T10:00:00.123456+00:00"}',
    b'{"status":"pending"}',
    b'{"table_schema":"public","table_name":"orders","record_pks":["17"],"commit_timestamp":"2026-11-23T10:00:00.456789Z",'
    b'"commit_lsn":26741848,"commit_idx":0,"idempotency_key":"c2hvcC4xOjI2NzQxODQ4OjA=","transaction_annotations":null,'
    b'"consumer":{"id":"7d1f","name":"orders-worker"}}',
)
TEXTS = {
    "empty": "function transform(action, record, changes, metadata) return nil end",
    "five fields": "function transform(action, record, changes, metadata) return { id = record.id, status = record.status, "
    "total = record.total, was = changes.status, tab = metadata.table_name } end",
    "pass-through": "function transform(action, record, changes, metadata) return record end",
}


def best_us(work: Callable[[], object], messages: int) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best / messages * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=100)
    options = parser.parse_args()
    batch = [MESSAGE] * options.batch
    rounds = max(1, options.messages // options.batch)
    print(f"message of {len(MESSAGE.as_json())} bytes, batches of {options.batch}")
    none = best_us(lambda: [[call.as_json() for call in batch] for _ in range(rounds)], rounds * len(batch))
    print(f"{'none':<14}{none:8.1f} µs")
    for name, text in TEXTS.items():
        transformer = Transformer(text)
        began = time.perf_counter()
        transformer.run(batch[:1])
        start_ms = (time.perf_counter() - began) * 1e3
        took = best_us(lambda one=transformer: [one.run(batch) for _ in range(rounds)], rounds * len(batch))  # type: ignore[misc]
        print(f"{name:<14}{took:8.1f} µs   first message after {start_ms:.0f} ms")
        transformer.close()


if __name__ == "__main__":
    main()
