"""Numbers, ages and states as people read them. Pure."""
from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from consumers.hosting import readable_bytes

__all__ = ["Tone", "age", "counted", "duration", "moment", "number", "rate", "readable_bytes", "tone_of"]


class Tone(NamedTuple):
    """How a state is shown: its colour (ok, warn, bad, idle, info) and its word."""

    colour: str
    word: str


TONES = {
    "ok": Tone("ok", "Healthy"),
    "active": Tone("ok", "Active"),
    "degraded": Tone("warn", "Needs a look"),
    "failing": Tone("bad", "Failing"),
    "paused": Tone("idle", "Paused"),
    "disabled": Tone("idle", "Disabled"),
    "connecting": Tone("warn", "Connecting"),
    "gap": Tone("bad", "Gap"),
    "waiting": Tone("info", "Waiting"),
    "out": Tone("info", "Out"),
    "parked": Tone("warn", "Parked"),
    "retry": Tone("warn", "To be retried"),
    "blocked": Tone("idle", "Blocked behind another"),
    "error": Tone("bad", "In error"),
    "dead": Tone("bad", "Dead letter"),
    "passed": Tone("idle", "Passed"),
    "filtered": Tone("idle", "Filtered out"),
    "delivered": Tone("ok", "Delivered"),
    "running": Tone("info", "Running"),
    "completed": Tone("ok", "Completed"),
    "cancelled": Tone("idle", "Cancelled"),
    "failed": Tone("bad", "Failed"),
    "firing": Tone("bad", "Firing"),
    "pending": Tone("warn", "Not long enough yet"),
    "over": Tone("ok", "Over"),
    "valid": Tone("ok", "Valid"),
    "expired": Tone("warn", "Expired"),
    "revoked": Tone("bad", "Revoked"),
    "insert": Tone("ok", "insert"),
    "update": Tone("info", "update"),
    "delete": Tone("bad", "delete"),
    "truncate": Tone("warn", "truncate"),
    "read": Tone("idle", "read"),
}


def tone_of(state: str) -> Tone:
    return TONES.get(state, Tone("warn", state.replace("_", " ").capitalize()))


def duration(seconds: float | None) -> str:
    """0.004 → 4 ms, 75 → 1 min 15 s."""
    if seconds is None:
        return "–"
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    whole = int(seconds)
    for size, unit, smaller_size, smaller in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def age(moment: datetime | None, now: datetime) -> str:
    """How long ago, or in how long."""
    if moment is None:
        return "–"
    seconds = (now - moment).total_seconds()
    if abs(seconds) < 1:
        return "now"
    return f"{duration(int(seconds))} ago" if seconds > 0 else f"in {duration(int(-seconds) or 1)}"


def moment(at: datetime | None) -> str:
    return "–" if at is None else f"{at:%Y-%m-%d %H:%M:%S} UTC"


def number(value: float | None) -> str:
    """1234567 → 1,234,567."""
    return "–" if value is None else f"{value:,.0f}"


def counted(count: int, what: str) -> str:
    """1 message, 2,000 messages."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def rate(per_second: float | None) -> str:
    """Messages a second, with as many digits as one can use."""
    if not per_second:
        return "0/s"
    return f"{per_second:.2f}/s" if per_second < 1 else f"{per_second:.1f}/s" if per_second < 10 else f"{per_second:,.0f}/s"
