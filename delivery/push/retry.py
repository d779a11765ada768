"""Decide what an endpoint's answer asks for, and how long an endpoint that fails is left alone. Pure.

When a message is tried again is consumers/backoff.py's.
"""
from __future__ import annotations

from email.utils import parsedate_to_datetime

RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S = 1.0, 3600.0
HONOURED = (429, 503)
GONE = 410
FAILURES_TO_OPEN = 5
HOLD_FIRST_S, HOLD_LONGEST_S = 0.5, 30.0


def retry_after_s(status: int, header: str | None, now_s: float) -> float | None:
    """What a 429 or 503 asks for, clamped to 1 s – 1 h; None when it asks for nothing that can be read."""
    if status not in HONOURED or not header:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    else:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now_s
        except (ValueError, TypeError, OverflowError):
            return None
    return min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_MIN_S, seconds))


def hold_s(failures: int) -> float:
    """How long an endpoint that failed so often in a row is left alone before the next probe; 0 below the breaker's limit."""
    if failures < FAILURES_TO_OPEN:
        return 0.0
    return min(HOLD_LONGEST_S, HOLD_FIRST_S * float(1 << min(failures - FAILURES_TO_OPEN, 16)))
