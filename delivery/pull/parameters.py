"""Read what a pull client asks for: batch sizes, waits, ack ids. Pure, but for the error it raises."""
from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from consumers.api.errors import BadParameter

MAX_BATCH = 1000
MAX_WAIT_MS = 300_000
MAX_RECEIPTS = 10_000
MAX_MOMENT_MS = 43_200_000
MIN_ACK_WAIT_MS = 500
UNITS_MS = {"": 1, "ms": 1, "s": 1000, "m": 60_000}


def batch_size(given: Mapping[str, Any]) -> int:
    """`batch_size` or `max_batch_size`, 1 to 1000, default 1. Both: only when equal."""
    sizes = [_whole(name, given[name], 1, MAX_BATCH) for name in ("batch_size", "max_batch_size") if given.get(name) is not None]
    if len(set(sizes)) > 1:
        raise BadParameter(f"batch_size {sizes[0]} and max_batch_size {sizes[1]} differ: give one of them")
    return sizes[0] if sizes else 1


def wait_ms(given: Mapping[str, Any]) -> int:
    """`wait_for` in milliseconds, or as "60s", "5m"; 0 to 300000, default 0."""
    value = given.get("wait_for")
    if value is None:
        return 0
    match = re.fullmatch(r"(\d{1,9})\s*(ms|s|m|)", value.strip(), re.ASCII) if isinstance(value, str) else None
    if isinstance(value, int) and not isinstance(value, bool):
        milliseconds = value
    elif match is not None:
        milliseconds = int(match[1]) * UNITS_MS[match[2]]
    else:
        raise BadParameter(f'wait_for: expected milliseconds or a text such as "60s" or "5m", got {reprlib.repr(value)}')
    if not 0 <= milliseconds <= MAX_WAIT_MS:
        raise BadParameter(f"wait_for: expected 0 to {MAX_WAIT_MS} ms, got {milliseconds}")
    return milliseconds


def ack_ids(given: Mapping[str, Any]) -> list[str]:
    """`ack_ids` or `ack_tokens`: 1 to 10000 texts. Both: only when equal."""
    lists = [_texts(name, given[name]) for name in ("ack_ids", "ack_tokens") if given.get(name) is not None]
    if not lists:
        raise BadParameter("ack_ids is missing: expected a list of the ack_id texts that receive gave")
    if len(lists) == 2 and lists[0] != lists[1]:
        raise BadParameter("ack_ids and ack_tokens differ: give one of them")
    return lists[0]


def delay_ms(given: Mapping[str, Any]) -> int:
    """`delay_ms`, 0 to 12 hours, default 0."""
    value = given.get("delay_ms")
    return 0 if value is None else _whole("delay_ms", value, 0, MAX_MOMENT_MS)


def ack_wait_ms(given: Mapping[str, Any], default: int) -> int:
    """`ack_wait_ms`, 500 ms to 12 hours, default the consumer's."""
    value = given.get("ack_wait_ms")
    return default if value is None else _whole("ack_wait_ms", value, MIN_ACK_WAIT_MS, MAX_MOMENT_MS)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,12}", value.strip(), re.ASCII):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadParameter(f"{name}: expected a whole number from {low} to {high}, got {reprlib.repr(value)}")
    if not low <= value <= high:
        raise BadParameter(f"{name}: expected {low} to {high}, got {value}")
    return value


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list):
        raise BadParameter(f"{name}: expected a list of texts, got {reprlib.repr(value)}")
    if not all(isinstance(item, str) for item in value):
        odd = next(item for item in value if not isinstance(item, str))
        raise BadParameter(f"{name}: expected a list of texts, got one with {reprlib.repr(odd)} in it")
    if not 1 <= len(value) <= MAX_RECEIPTS:
        raise BadParameter(f"{name}: expected 1 to {MAX_RECEIPTS} texts, got {len(value)}")
    return value
