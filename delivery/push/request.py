"""What the transport takes and what it gives back. Pure."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

Line = str | bytes
"""One header as libcurl takes it: `name: value`; `name;` is one without a value, `name:` one that is not sent."""


class Headers:
    """Headers that many requests have in common, made into lines once."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    @cached_property
    def lines(self) -> list[Line]:
        """Raises ValueError when they cannot be sent. Its text shows no value: it can be a secret."""
        lines = ["Expect:"]
        for name, value in self._values.items():
            value = value.strip()
            lines.append(f"{name}: {value}" if value else f"{name};")
        together = "".join(lines)
        if "\n" in together or "\r" in together or "\0" in together:
            raise ValueError("a header is not one line")
        if together.isascii():
            return list(lines)
        try:
            return [line.encode("latin-1") for line in lines]
        except UnicodeEncodeError:
            raise ValueError("a header is not Latin-1 text") from None


class Request(NamedTuple):
    """One POST. `tag` is the caller's own; it comes back with the outcome."""

    url: str
    headers: Headers
    body: bytes
    timeout_s: float
    tag: Any
    own_lines: Sequence[Line] = ()
    """Headers of this request alone, ready to be sent."""


class Outcome(NamedTuple):
    """What became of a request. `status` None: no answer came, `error` says why."""

    tag: Any
    status: int | None
    error: str | None
    retry_after: str | None
    """Of an answer that is a failure."""
    response: str
    duration_ms: int

    @property
    def ok(self) -> bool:
        return self.status is not None and 200 <= self.status < 300
