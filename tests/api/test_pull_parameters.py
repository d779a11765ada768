"""What a pull client may ask for: sizes, waits, ack ids. Pure."""
from __future__ import annotations

import pytest

from consumers.api.errors import BadParameter
from delivery.pull import parameters


@pytest.mark.parametrize("given, expected", [
    ({}, 1),
    ({"batch_size": 1}, 1),
    ({"batch_size": "1000"}, 1000),  # from a query string
    ({"max_batch_size": 7}, 7),
    ({"batch_size": 7, "max_batch_size": "7"}, 7),
    ({"batch_size": None, "max_batch_size": 3}, 3),
])  # fmt: skip
def test_a_batch_size_is_read_under_both_names(given: dict[str, object], expected: int) -> None:
    assert parameters.batch_size(given) == expected


@pytest.mark.parametrize("given", [
    {"batch_size": 0}, {"batch_size": 1001}, {"batch_size": 10**9}, {"batch_size": -1}, {"batch_size": "ten"},
    {"batch_size": True}, {"batch_size": 1.5}, {"batch_size": []}, {"batch_size": ""}, {"max_batch_size": "٣"},
    {"batch_size": 1, "max_batch_size": 2},
])  # fmt: skip
def test_other_batch_sizes_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(BadParameter, match="batch_size"):
        parameters.batch_size(given)


@pytest.mark.parametrize("value, expected_ms", [
    (None, 0), (0, 0), (1500, 1500), ("1500", 1500), ("60s", 60_000), ("5m", 300_000), ("250ms", 250), (" 2s ", 2000),
    (300_000, 300_000),
])  # fmt: skip
def test_a_wait_is_milliseconds_or_a_text_with_its_unit(value: object, expected_ms: int) -> None:
    assert parameters.wait_ms({"wait_for": value}) == expected_ms


@pytest.mark.parametrize("value", [-1, 300_001, "6m", "1h", "", "soon", "1.5s", True, [], {}, "٣s", "9" * 40])
def test_other_waits_are_refused(value: object) -> None:
    with pytest.raises(BadParameter, match="wait_for"):
        parameters.wait_ms({"wait_for": value})


@pytest.mark.parametrize("given", [
    {"ack_ids": ["a"]}, {"ack_tokens": ["a"]}, {"ack_ids": None, "ack_tokens": ["a"]}, {"ack_ids": ["a"], "ack_tokens": None},
    {"ack_ids": ["a"], "ack_tokens": ["a"]},
])  # fmt: skip
def test_ack_ids_are_read_under_both_names(given: dict[str, object]) -> None:
    assert parameters.ack_ids(given) == ["a"]


@pytest.mark.parametrize("value", [None, [], "a", [1], ["a", None], {"a": 1}, ["a"] * 10_001])
def test_other_ack_ids_are_refused(value: object) -> None:
    with pytest.raises(BadParameter, match="ack_ids"):
        parameters.ack_ids({"ack_ids": value})


@pytest.mark.parametrize("tokens", [["b"], [], "a", [1]])
def test_other_ack_ids_under_the_other_name_are_refused_and_not_passed_over(tokens: object) -> None:
    with pytest.raises(BadParameter, match="ack_tokens"):
        parameters.ack_ids({"ack_ids": ["a"], "ack_tokens": tokens})


@pytest.mark.parametrize("given, says", [
    ({"ack_ids": "a"}, "got 'a'"), ({"ack_ids": ["a", None]}, "None in it"), ({"ack_ids": {"a": 1}}, "got {'a': 1}"),
])  # fmt: skip
def test_what_came_instead_of_ack_ids_is_told(given: dict[str, object], says: str) -> None:
    with pytest.raises(BadParameter) as refused:
        parameters.ack_ids(given)
    assert says in str(refused.value)


def test_what_came_is_told_in_short() -> None:
    for read, name in ((parameters.batch_size, "batch_size"), (parameters.wait_ms, "wait_for")):
        with pytest.raises(BadParameter) as refused:
            read({name: "x" * 100_000})
        assert len(str(refused.value)) < 200


@pytest.mark.parametrize("value", [-1, 43_200_001, "x", True])
def test_a_delay_beyond_twelve_hours_is_refused(value: object) -> None:
    with pytest.raises(BadParameter, match="delay_ms"):
        parameters.delay_ms({"delay_ms": value})


@pytest.mark.parametrize("value", [0, 499, 43_200_001, "x"])
def test_an_ack_wait_outside_its_bounds_is_refused(value: object) -> None:
    with pytest.raises(BadParameter, match="ack_wait_ms"):
        parameters.ack_wait_ms({"ack_wait_ms": value}, 30_000)
