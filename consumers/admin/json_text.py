"""Stored JSON for people: a member a line, every value as it is stored, digit for digit. Pure."""
from __future__ import annotations

import json
from typing import NamedTuple

SHOWN_CHARACTERS = 200_000
_DECODER = json.JSONDecoder()


class Difference(NamedTuple):
    """One column before and after. `old` None: not known or not different."""

    name: str
    old: str | None
    new: str | None
    changed: bool


def pretty(text: str) -> str:
    """The text with a line for each member."""
    lines, depth, quoted, escaped = [""], 0, False, False
    for character in text[:SHOWN_CHARACTERS]:
        if quoted:
            lines[-1] += character
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character in "}]":
            depth -= 1
            if not lines[-1].strip() and len(lines) > 1 and lines[-2][-1:] in ("{", "["):
                lines.pop()
                lines[-1] += character
            else:
                lines.append("  " * depth + character)
        elif character not in " \n\t\r" or not lines[-1].strip():
            if character in " \n\t\r":
                continue
            lines[-1] += character + (" " if character == ":" else "")
            quoted = character == '"'
            depth += character in "{["
            if character in "{[,":
                lines.append("  " * depth)
    shown = "\n".join(line for line in lines if line.strip())
    return shown if len(text) <= SHOWN_CHARACTERS else shown + "\n…"


def members(text: str) -> dict[str, str]:
    """The members of a JSON object, values as the text they have.

    >>> members('{"a": 1.50, "b": {"c": [1]}}')
    {'a': '1.50', 'b': '{"c": [1]}'}
    """
    found: dict[str, str] = {}
    at = text.index("{") + 1
    while True:
        at = _skip(text, at)
        if text[at] == "}":
            return found
        name, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at + text[at:].index(":") + 1)
        _, end = _DECODER.raw_decode(text, at)
        found[name] = text[at:end]
        at = _skip(text, end)
        if text[at] == ",":
            at += 1


def differences(record: str, changes: str | None) -> list[Difference]:
    """Every column of the record, with its value before where that differs."""
    old = members(changes) if changes else {}
    new = members(record)
    listed = [Difference(name, old.get(name), value, name in old) for name, value in new.items()]
    return listed + [Difference(name, value, None, True) for name, value in old.items() if name not in new]


def _skip(text: str, at: int) -> int:
    while text[at] in " \n\t\r":
        at += 1
    return at
