"""Run one user's Lua text on messages. Inside the child process only (`worker.py`); the rules are in `sandbox.lua`.

No Python object ever enters Lua: only texts, numbers, booleans and Lua's own tables.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lupa import lua54

from consumers.lua import types
from consumers.lua.types import LuaError, Result
from consumers.lua.values import Flattener, as_bytes

DROPPED, PAYLOAD = 0, 1  # as sandbox.lua answers
ARGUMENTS = 2_000  # of one call; more go in parts
MIB = 1024 * 1024


def _refuse(*_: Any) -> NoReturn:
    raise AttributeError("no access to Python")


class Sandbox:
    """A Lua 5.4 runtime with one user's text."""

    def __init__(self) -> None:
        self._lua = lua54.LuaRuntime(
            register_eval=False,
            register_builtins=False,
            attribute_handlers=(_refuse, _refuse),
            max_memory=types.MEMORY_MIB * MIB,
        )
        limits = self._lua.table_from(
            {
                "cpu_s": types.CPU_S,
                "write_s": types.WRITE_S,
                "memory_mib": types.MEMORY_MIB,
                "output_bytes": types.OUTPUT_BYTES,
                "depth": types.DEPTH,
            }
        )
        trusted = (Path(__file__).with_name("sandbox.lua")).read_text()
        half = self._lua.execute(trusted, limits, name="=(sandbox)")
        self._compile, self._run, self._feed, self._make_shape = half.compile, half.run, half.feed, half.shape
        self._recover = half.recover
        self._flattener = Flattener(self._shape, half.LIST, half.MIXED_LIST, half.BIG)

    def compile(self, text: str) -> LuaError | None:
        """Take `text` as the one to run, and run it once without a message: it must define `transform`."""
        _, message, line = self._compile(text)
        return None if message is None else LuaError(message, line or None)

    def run(self, message: bytes) -> Result:
        """`message` is the JSON array of action, record, changes and metadata."""
        try:
            arguments = self._flattener.arguments(message.decode())
            answer = self._call(arguments)
        except (ValueError, RecursionError) as problem:
            return LuaError(f"the message cannot be given to Lua: {problem}", None)
        except (lua54.LuaError, MemoryError):
            self._recover()
            return LuaError(f"needs more than {types.MEMORY_MIB} MiB of memory", None)
        if answer[0] == DROPPED:
            return None
        if answer[0] == PAYLOAD:
            payload: bytes = answer[1].encode()
            return payload
        return LuaError(answer[1], answer[2] or None)

    def trim(self) -> None:
        """Give back what messages left behind, when it is much."""
        if self._lua.get_memory_used() > 8 * MIB:
            self._lua.gccollect()

    def _call(self, arguments: list[Any]) -> Any:
        if len(arguments) <= ARGUMENTS:
            try:
                return self._run(*arguments)
            except UnicodeEncodeError:
                return self._run(*as_bytes(arguments))
        for start in range(0, len(arguments), ARGUMENTS):
            self._feed(*as_bytes(arguments[start : start + ARGUMENTS]))
        return self._run()

    def _shape(self, keys: Sequence[str]) -> tuple[Any, Any]:
        flat, mixed = self._make_shape(self._lua.table_from(as_bytes(keys)))
        return flat, mixed
