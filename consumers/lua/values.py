"""Turn a message's JSON text into arguments for `sandbox.lua`, which builds the Lua tables from them.

Flat, because one call with thirty scalars costs a tenth of thirty assignments: scalars as they are, None for null, and a
marker before each object or list. The markers are Lua tables made by `sandbox.lua`: one for each set of keys.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from json import JSONDecoder
from typing import Any

SCALARS = frozenset((str, int, float, bool, type(None)))
KEYS_KEPT = 500_000  # characters, over all sets of keys; then they are learnt again
INT64 = range(-(2**63), 2**63)


class Digits(str):
    """A number that neither an int64 nor a double holds, as it is written."""


def integer(text: str) -> int | Digits:
    if len(text) < 19:
        return int(text)
    if len(text) < 21 and int(text) in INT64:
        return int(text)
    return Digits(text)


def number(text: str) -> float | Digits:
    value = float(text)
    # 15 digits and a point always come back from a double as they were.
    if len(text) <= 16 and "e" not in text and "E" not in text:
        return value
    try:
        return value if Decimal(repr(value)) == Decimal(text) else Digits(text)
    except InvalidOperation:
        return Digits(text)


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


class Flattener:
    """Knows the markers of one runtime."""

    def __init__(self, shape: Callable[[Sequence[str]], tuple[Any, Any]], flat_list: Any, mixed_list: Any, big: Any) -> None:
        """`shape` makes the two markers of a set of keys: for an object of scalars, and for one with more inside."""
        self._shape = shape
        self._list = flat_list
        self._mixed_list = mixed_list
        self._big = big
        self._shapes: dict[tuple[str, ...], tuple[Any, Any]] = {}
        self._keys = 0
        self._decode = JSONDecoder(parse_float=number, parse_int=integer, parse_constant=_constant, strict=False).decode

    def arguments(self, text: str) -> list[Any]:
        """The arguments for the JSON array `text` of four values. Raises ValueError when it is none, RecursionError."""
        values = self._decode(text)
        if type(values) is not list or len(values) != 4:
            raise ValueError("not a message of action, record, changes and metadata")
        out: list[Any] = []
        for value in values:
            self._flatten(value, out)
        return out

    def _flatten(self, value: Any, out: list[Any]) -> None:
        kind = type(value)
        if kind is dict:
            keys = tuple(value)
            flat, mixed = self._shapes.get(keys) or self._learn(keys)
            members = value.values()
            if SCALARS.issuperset(map(type, members)):
                out.append(flat)
                out.extend(members)
                return
            out.append(mixed)
        elif kind is list:
            if SCALARS.issuperset(map(type, value)):
                out.append(self._list)
                out.append(len(value))
                out.extend(value)
                return
            out.append(self._mixed_list)
            out.append(len(value))
            members = value
        else:
            if kind is Digits:
                out.append(self._big)
                value = str(value)
            out.append(value)
            return
        for member in members:
            if type(member) in SCALARS:
                out.append(member)
            else:
                self._flatten(member, out)

    def _learn(self, keys: tuple[str, ...]) -> tuple[Any, Any]:
        size = sum(map(len, keys)) + 10 * len(keys) + 10
        self._keys += size
        if self._keys > KEYS_KEPT:
            self._shapes.clear()
            self._keys = size
        markers = self._shapes[keys] = self._shape(keys)
        return markers


def as_bytes(arguments: Sequence[Any]) -> list[Any]:
    """The same with texts as bytes: lone surrogates, which JSON can spell and UTF-8 cannot, included."""
    return [value.encode("utf-8", "surrogatepass") if type(value) is str else value for value in arguments]
