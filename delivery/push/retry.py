"""Decide what an endpoint's answer asks for, and how long an endpoint that fails is left alone. Pure.

When a message is tried again is consumers/backoff.py's.
"""
from __future__ import annotations

from email.utils import parsedate_to_datetime

RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S = 1.0, 3600.0
HONOURED = (429, 503)
GONE = 410
FAILURES_TO_OPEN = 5  # in a row, that say something about the endpoint
REFUSALS_TO_OPEN = 20  # in a row, that may be about the messages
HOLD_FIRST_S, HOLD_LONGEST_S, HOLD_REFUSED_S = 0.5, 30.0, 1.0
OVERLOADED = (429, 502, 503, 504)


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


def is_trouble(status: int | None) -> bool:
    """Whether a failure is the endpoint's: it did not answer, or has too much to do. Otherwise it may be the message's."""
    return status is None or status in OVERLOADED


def opens(troubles: int, failures: int) -> bool:
    """Whether the breaker is open after so many failures in a row, of which so many were the endpoint's."""
    return troubles >= FAILURES_TO_OPEN or failures >= REFUSALS_TO_OPEN


def hold_s(troubles: int, failures: int) -> float:
    """How long an endpoint is left alone before the next probe; 0 while the breaker is closed.

    One that answers at once, if only to refuse, is asked each second: what it refuses may be a stretch of bad messages.
    """
    if not opens(troubles, failures):
        return 0.0
    beyond = max(troubles - FAILURES_TO_OPEN, failures - REFUSALS_TO_OPEN)
    longest = HOLD_LONGEST_S if troubles >= FAILURES_TO_OPEN else HOLD_REFUSED_S
    return min(longest, HOLD_FIRST_S * float(1 << min(beyond, 16)))
