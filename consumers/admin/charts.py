"""Charts as plain numbers for an SVG that the template draws: no script, crisp at every width. Pure."""
from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from consumers.store.counters import Bin

HEIGHT = 100.0
TIME_LABELS = 5


class Line(NamedTuple):
    """One quantity: its name, its colour's class, and its path."""

    name: str
    colour: str
    path: str
    area: str


class Column(NamedTuple):
    """What the pointer rests on: one step, in words."""

    x: int
    text: str


class Chart(NamedTuple):
    width: int
    lines: list[Line]
    ticks: list[str]  # of the y axis, from the top down to 0
    times: list[str]
    columns: list[Column]
    unit: str
    empty: bool


def traffic(bins: Sequence[Bin], now: datetime, *, step: int, kinds: Sequence[str] = ("captured", "delivered", "failed")) -> Chart:
    """Messages a minute, over bins of `step` minutes. A minute that is not over would look like a fall: it is left out."""
    minutes = [step] * (len(bins) - 1) + [min(step, max(1, int((now - bins[-1].at).total_seconds() // 60)))] if bins else []
    is_empty = not any(getattr(one, kind) for one in bins for kind in kinds)
    if step == 1:
        bins, minutes = bins[:-1], minutes[:-1]
    values = {kind: [getattr(one, kind) / size for one, size in zip(bins, minutes, strict=True)] for kind in kinds}
    top = nice_top(max((max(line) for line in values.values() if line), default=0))
    lines = [Line(kind, kind, *_path(values[kind], top)) for kind in kinds]
    columns = [
        Column(number, f"{one.at:%H:%M}: " + ", ".join(f"{getattr(one, kind):,} {kind}" for kind in kinds))
        for number, one in enumerate(bins)
    ]
    ticks = [_short(top), _short(top / 2), "0"]
    return Chart(len(bins), lines, ticks, _times(bins), columns, "messages a minute", is_empty)


def sparkline(values: Sequence[float]) -> Line:
    """A small line without axes."""
    return Line("", "", *_path(values, nice_top(max(values, default=0))))


def nice_top(most: float) -> float:
    """The end of an axis: 1, 2, 4, 5 or 10 times a power of ten, at least 1."""
    size = 1.0
    while size * 10 < most:
        size *= 10
    return next((size * step for step in (1, 2, 4, 5, 10) if size * step >= most), size * 10)


def _path(values: Sequence[float], top: float) -> tuple[str, str]:
    points = [f"{number + 0.5:g},{HEIGHT - HEIGHT * value / top:.2f}" for number, value in enumerate(values)]
    if not points:
        return "", ""
    line = "M" + " L".join(points)
    return line, f"{line} L{len(points) - 0.5:g},{HEIGHT:g} L0.5,{HEIGHT:g} Z"


def _times(bins: Sequence[Bin]) -> list[str]:
    if not bins:
        return []
    every = max(1, (len(bins) - 1) // (TIME_LABELS - 1))
    return [f"{one.at:%H:%M}" for one in bins[::every]][:TIME_LABELS]


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
