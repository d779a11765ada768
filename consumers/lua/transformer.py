"""Run a consumer's Lua text on batches of messages, whatever the text does. Called by the push pump and the pull view.

The text runs in a child process (`child.py`) that may be killed at any time. A message whose function used up its CPU time
in one C function, or that was under way in two children that ended, gets an error; every other is run in the next child.
A text has no effects, so running a message twice changes nothing.
"""
from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

from consumers.lua.child import DEADLINE_S, Child, ChildEnded
from consumers.lua.types import TEXT_BYTES, TOO_LONG, Call, LuaError, Result

FRAME_MESSAGES = 500
FRAME_BYTES = 4 * 1024 * 1024
TRIES = 2  # children that may end under one message for reasons of their own


class Transformer:
    """One text. Thread-safe: one batch after another. The child starts with the first batch."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._child: Child | None = None
        self._owner = os.getpid()
        self._refused: LuaError | None = _too_long(text)
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        return self._child.pid if self._child else None

    def run(self, messages: Sequence[Call]) -> list[Result]:
        """A result for each message, in order: its payload, None when dropped, or what went wrong."""
        with self._lock:
            texts = [message.as_json() for message in messages]
            results: list[Result] = []
            for start, end in _frames(texts):
                results += self._run(texts[start:end])
            return results

    def check(self) -> LuaError | None:
        """What is wrong with the text, as far as can be told without a message."""
        with self._lock:
            for _ in range(TRIES):
                try:
                    self._ready()
                    return self._refused
                except ChildEnded as end:
                    problem = self._after(end)
            return problem

    def close(self) -> None:
        """End the child. A later batch starts another."""
        with self._lock:
            child, self._child = self._child, None
            if child is not None:
                child.close() if self._owner == os.getpid() else child.forget()

    def _run(self, texts: list[bytes]) -> list[Result]:
        results: list[Result] = []
        ended_at, ends = -1, 0
        while len(results) < len(texts):
            first = len(results)
            try:
                child = self._ready()
                if child is None:
                    return [self._refused] * len(texts)
                for result in child.run(texts[first:]):
                    results.append(result)
            except ChildEnded as end:
                problem = self._after(end)
                # Answers on their way were lost with the child: those messages run again.
                culprit = first + end.under_way
                ends = ends + 1 if culprit == ended_at else 1
                ended_at = culprit
                if end.used_up or ends >= TRIES:
                    results = self._again(texts, results, culprit)
                    results.append(problem)
        return results

    def _again(self, texts: list[bytes], results: list[Result], culprit: int) -> list[Result]:
        """The results of everything before `culprit`."""
        if len(results) < culprit:
            results += self._run(texts[len(results) : culprit])
        return results[:culprit]

    def _ready(self) -> Child | None:
        """The child with its text compiled; None when the text is refused."""
        if self._child is not None and self._owner != os.getpid():
            self._child.forget()
            self._child = None
        if self._child is None and self._refused is None:
            self._child, self._owner = Child(), os.getpid()
            try:
                self._refused = self._child.compile(self.text)
            except ChildEnded as end:
                if not end.used_up:
                    raise
                self._refused = LuaError(TOO_LONG, None)
            if self._refused is not None:
                self._child.close()
                self._child = None
        return self._child

    def _after(self, end: ChildEnded) -> LuaError:
        """Clear away the child that ended, and say what to tell of the message under way."""
        if self._child is not None:
            self._child.close()
            self._child = None
        if end.used_up:
            return LuaError(TOO_LONG, None)
        if end.silent:
            return LuaError(f"{TOO_LONG}: no answer within {DEADLINE_S:.0f} s", None)
        return LuaError("the process that ran it was ended from outside, or by a lack of memory", None)


def check(text: str) -> LuaError | None:
    """What is wrong with `text`: too long, a syntax error, no `transform`, an error or too much time at its top level."""
    transformer = Transformer(text)
    try:
        return transformer.check()
    finally:
        transformer.close()


def _too_long(text: str) -> LuaError | None:
    size = len(text.encode("utf-8", "replace"))
    return LuaError(f"the text is longer than {TEXT_BYTES} bytes: {size}", None) if size > TEXT_BYTES else None


def _frames(texts: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Where to cut a batch: at most so many messages and bytes at once, and at least one message."""
    start = size = 0
    for number, text in enumerate(texts):
        if number > start and (number - start >= FRAME_MESSAGES or size + len(text) > FRAME_BYTES):
            yield start, number
            start, size = number, 0
        size += len(text)
    if start < len(texts):
        yield start, len(texts)
