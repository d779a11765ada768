"""Charts and numbers as people read them."""
from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from consumers import words
from consumers.admin import charts, json_text
from consumers.store.counters import Bin

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def bins(*captured: int, step: int = 1) -> list[Bin]:
    return [Bin(NOON + timedelta(minutes=step * n), count, 0, 0, 0, 0, 0.0) for n, count in enumerate(captured)]


@pytest.mark.parametrize("most, top", [(0, 1), (0.4, 1), (1, 1), (3, 4), (7, 10), (11, 20), (450, 500), (1001, 2000), (41_000, 50_000)])
def test_an_axis_ends_at_a_round_number(most: float, top: float) -> None:
    assert charts.nice_top(most) == top


def test_a_minute_that_is_not_over_is_left_out_and_longer_steps_are_averaged() -> None:
    hour = charts.traffic(bins(10, 10, 3), NOON + timedelta(minutes=2, seconds=20), step=1, kinds=("captured",))
    assert hour.width == 2 and hour.ticks == ["10", "5", "0"]
    day = charts.traffic(bins(100, 30, step=10), NOON + timedelta(minutes=13), step=10, kinds=("captured",))
    assert day.ticks[0] == "10" and day.lines[0].path == "M0.5,0.00 L1.5,0.00"
    assert charts.traffic(bins(0, 0, 0), NOON, step=1).empty
    assert not charts.traffic(bins(0, 0, 1), NOON, step=1).empty, "the first message of all has come a moment ago"


@pytest.mark.parametrize(
    "seconds, text",
    [(None, "–"), (0, "0 s"), (0.004, "4 ms"), (59, "59 s"), (75, "1 min 15 s"), (3600, "1 h"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize("value, text", [(None, "0/s"), (0.256, "0.26/s"), (5.64, "5.6/s"), (1234.5, "1,234/s")])
def test_rates(value: float | None, text: str) -> None:
    assert words.rate(value) == text


def test_stored_json_keeps_its_digits() -> None:
    text = '{"a":1.50,"b":{"c":[1,"x, y: {\\""]},"big":12345678901234567890123,"e":[],"f":{}}'
    assert json_text.members(text)["a"] == "1.50" and json_text.members(text)["big"] == "12345678901234567890123"
    shown = json_text.pretty(text)
    assert '"a": 1.50,' in shown and '"e": [],' in shown and shown.endswith('"f": {}\n}')
    changed = json_text.differences('{"a": 1.50, "b": 2}', '{"a": 1.5}')
    assert [(one.name, one.old, one.new, one.changed) for one in changed] == [("a", "1.5", "1.50", True), ("b", None, "2", False)]
