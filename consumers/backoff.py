"""Decide when what failed is tried again: a push, or a filter or transform on its message. Pure: jitter is an argument.

    delay(n) = min(600 s, 1 s × 2^(n−1)) × (1 + jitter × 0.15)
"""
from __future__ import annotations

FIRST_S, LONGEST_S, SPREAD = 1.0, 600.0, 0.15
HELD = -1  # the store's sign for: not before something is changed


def delay_ms(deliver_count: int, jitter: float) -> int:
    """Milliseconds to wait after attempt number `deliver_count` (from 1) failed; `jitter` from −1 to 1."""
    doublings = min(max(deliver_count, 1) - 1, 32)
    return int(min(LONGEST_S, FIRST_S * 2**doublings) * (1 + jitter * SPREAD) * 1000)
