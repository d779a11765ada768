"""Attempts to get out, to stay on, or to use things up. Each ends in time and leaves the next message and the neighbour alone."""
from __future__ import annotations

import re
import time

import pytest

from consumers.lua.transformer import Transformer
from consumers.lua.types import LuaError
from tests.lua.world import DEADLINE_S, call

NIL = r"a nil value"
CPU = r"took longer than 50 ms CPU"
MEMORY = r"needs more than 64 MiB of memory|not enough memory|took longer than 50 ms CPU|too large"
FROZEN = r"the libraries cannot be changed"

REACHING_OUT = {
    "execute a program": ("return os.execute('id')", NIL),
    "read a secret from the environment": ("return os.getenv('SECRET_KEY')", NIL),
    "end the process": ("os.exit(0)", NIL),
    "remove a file": ("return os.remove('/tmp/x')", NIL),
    "rename a file": ("return os.rename('/tmp/x', '/tmp/y')", NIL),
    "make a temporary file": ("return os.tmpname()", NIL),
    "set the locale": ("return os.setlocale('C')", NIL),
    "open a file": ("return io.open('/etc/passwd'):read('a')", NIL),
    "run a pipe": ("return io.popen('id'):read('a')", NIL),
    "print lines of a file": ("for line in io.lines('/etc/passwd') do end", NIL),
    "load a module": ("return require('os')", NIL),
    "load a C library": ("return package.loadlib('libc.so.6', 'system')", NIL),
    "find loaded modules": ("return package.loaded.os", NIL),
    "load text": ("return load('return 1')()", NIL),
    "load bytecode": ("return load('\\27Lua', 'x', 'b')", NIL),
    "load a string": ("return loadstring('return 1')()", NIL),
    "run a file": ("return dofile('/etc/passwd')", NIL),
    "load a file": ("return loadfile('/etc/passwd')", NIL),
    "dump bytecode": ("return string.dump(transform)", NIL),
    "dump bytecode by method": ("return ('').dump(transform)", NIL),
    "take the registry": ("return debug.getregistry()", NIL),
    "take off the hook": ("debug.sethook()", NIL),
    "read upvalues": ("return debug.getupvalue(pairs, 1)", NIL),
    "evaluate Python": ("return python.eval('1')", NIL),
    "Python's builtins": ("return python.builtins.open('/etc/passwd')", NIL),
    "Python by lupa's names": ("return python.as_attrgetter(record).__class__", NIL),
    "Python attributes of the record": ("return record.__class__.__mro__", NIL),
    "Python attributes of null": ("return null.__class__.__init__", NIL),
    "the metatable of strings": ("getmetatable('').__index = nil", NIL),
    "a metatable with a finaliser": ("setmetatable({}, {__gc = function() end})", NIL),
    "raw writing into a library": ("rawset(string, 'upper', nil)", NIL),
    "a coroutine": ("return coroutine.wrap(function() end)()", NIL),
    "the garbage collector": ("collectgarbage('stop')", NIL),
    "a handler of errors": ("return xpcall(error, function() end)", NIL),
    "globals of the host through _ENV": ("return _ENV._G._G.os.execute('id')", NIL),
    "globals of the host through a function": ("return (tostring).upvalue", r"attempt to index a function value"),
    "a library written into": ("string.upper = nil", FROZEN),
    "a library written into by insert": ("table.insert(math, 1)", FROZEN),
    "a library written into by move": ("table.move({1}, 1, 1, 1, os)", FROZEN),
    "a library made an array": ("return array(string)", r"array\{…\} takes a table"),
    "a library as result": ("return string", r"a library is no JSON value"),
    "null written into": ("null.x = 1", r"attempt to write into null"),
    "an address by format": ("return string.format('%p', {})", r"invalid conversion '%p'"),
    "an address by format with a width": ("return ('%-20p'):format(record)", r"invalid conversion '%p'"),
    "warnings": ("warn('@on')", NIL),
    "printing": ("print('x')", NIL),
}

USING_UP = {
    "an endless loop": ("while true do end", CPU),
    "an endless goto": ("::top:: goto top", CPU),
    "an endless repeat": ("repeat until false", CPU),
    "a long for": ("for i = 1, math.maxinteger do end", CPU),
    "an endless tail call": ("local function f() return f() end return f()", CPU),
    "an endless loop behind pcall": ("while true do pcall(function() while true do end end) end", CPU),
    "a limit swallowed once": ("pcall(function() while true do end end) return 'got away'", CPU),
    "nested pcalls": ("local function f() return pcall(f) end while true do f() end", CPU + "|overflow"),
    "insert at the front": ("local t = {} for i = 1, 1e6 do table.insert(t, 1, i) end", CPU),
    "remove at the front": ("local t = {} for i = 1, 1e5 do t[i] = i end while true do table.insert(t, 1, table.remove(t, 1)) end", CPU),
    "move far": ("table.move({}, 1, math.maxinteger - 1, 2)", r"too many elements|too large"),
    "move a lot": ("local t = {} while true do table.move(t, 1, 1e8, 2) end", CPU),
    "sort a lot": ("local t = {} for i = 1, 3e5 do t[i] = -i % 7919 end for i = 1, 99 do table.sort(t) end", CPU),
    "a comparison that lies": ("local t = {} for i = 1, 1000 do t[i] = i end table.sort(t, function() return true end)", r"invalid order function"),
    "a comparison that never ends": ("table.sort({2, 1}, function() while true do end end)", CPU),
    "a pattern of many a?": ("return (('a'):rep(60)):find(('a?'):rep(60) .. ('a'):rep(60) .. 'b')", CPU),
    "a pattern of many .-": ("return (('a'):rep(3000)):find(('.-'):rep(20) .. 'b')", CPU),
    "gsub with a slow pattern": ("return (('a'):rep(100000)):gsub('.-.-b', '')", CPU),
    "gmatch with a slow pattern": ("for _ in ('a'):rep(100000):gmatch('.-.-b') do end", CPU),
    "a deep pattern": ("return ('x'):find(('('):rep(300))", r"too (complex|many captures)|unfinished|malformed"),
    "rep of a gigabyte": ("return ('x'):rep(1e9)", r"too large"),
    "rep beyond an int64": ("return ('xx'):rep(math.maxinteger)", r"too large"),
    "rep with a separator": ("return ('x'):rep(1e8, 'yyyyyyyyyy')", r"too large"),
    "rep again and again": ("local s = 'x' while true do s = ('x'):rep(1e6) end", CPU),
    "upper again and again": ("local s = ('x'):rep(4e6) while true do s:upper() end", CPU),
    "doubling by ..": ("local s = 'x' while true do s = s .. s end", MEMORY),
    "copying by ..": ("local s = ('x'):rep(16e6) while true do local t = s .. 'y' end", MEMORY),
    "a table without end": ("local t = {} while true do t[#t + 1] = {} end", MEMORY),
    "strings without end": ("local t = {} for i = 1, 1e9 do t[i] = ('x'):rep(1e5) .. i end", MEMORY),
    "concat of one text": ("local t = {} for i = 1, 1000 do t[i] = ('x'):rep(1e6) end return table.concat(t)", MEMORY),
    "concat of a long range": ("return table.concat({}, 'x', 1, 1e15)", r"invalid value|nil|" + CPU),
    "gsub that blows up": ("return ('x'):rep(1e5):gsub('x', ('y'):rep(1e5))", MEMORY),
    "recursion": ("local function f() return 1 + f() end return f()", r"stack overflow|" + MEMORY),
    "recursion by format": ("local function f() return (('x'):gsub('x', f)) end return f()", r"overflow|" + CPU),
    "recursion by sort": ("local function f() table.sort({1, 2, 3}, f) end f()", r"overflow|" + CPU),
    "unpack too much": ("return select('#', table.unpack({}, 1, 1e8))", r"too many results"),
    "unpack again and again": ("while true do pcall(table.unpack, {}, 1, 9e5) end", CPU + "|overflow"),
    "char of too much": ("return string.char(table.unpack({}, 1, 1e7))", r"too many results"),
    "format with a wide field": ("return string.format('%99999d', 1)", r"invalid conversion"),
    "a text of a closing loop": ("local x <close> = {}", r"non-closable"),
    "an error that is a table": ("error({})", r"error\(…\) with a table value"),
    "an error that is nil": ("error(nil)", r"error\(…\) with nil|nil"),
    "an error that is long": ("error(('x'):rep(1e6))", r"^xxx"),
    "a result too large": ("return ('x'):rep(1024 * 1024)", r"larger than 1048576 bytes"),
    "a result of many parts": ("local s, t = ('x'):rep(1e5), {} for i = 1, 20 do t[i] = s end return t", r"larger than 1048576 bytes"),
    "a result that is wide by sharing": (
        "local t = {1} for i = 1, 60 do t = {t, t} end return t", r"larger than 1048576 bytes|took longer than 200 ms CPU",
    ),
    "a result that is sparse": ("return array{[1000000000000] = 1}", r"larger than 1048576 bytes"),
    "a result that contains itself": ("local t = {} t.t = t return t", r"contains itself"),
    "a result 101 deep": ("local t = {} for i = 1, 100 do t = {t} end return t", r"more than 100 levels"),
}


def attempt(body: str) -> str:
    return f"function transform(action, record, changes, metadata)\nif record.id == 2 then return 'next' end\ndo {body} end\nend"


@pytest.mark.parametrize("body, expected", (REACHING_OUT | USING_UP).values(), ids=(REACHING_OUT | USING_UP).keys())
def test_an_attempt_fails_alone(transformer, neighbour: Transformer, monkeypatch: pytest.MonkeyPatch, body: str, expected: str) -> None:
    # By the clock, so a child that gets no CPU would be given up before it has used up anything.
    monkeypatch.setattr("consumers.lua.child.DEADLINE_S", DEADLINE_S)
    before = neighbour.run([call({"id": 7})])
    neighbours_child = neighbour.pid
    one = transformer(attempt(body))
    began = time.monotonic()
    first, second = one.run([call({"id": 1}), call({"id": 2})])
    assert time.monotonic() - began < DEADLINE_S
    assert isinstance(first, LuaError), first
    assert re.search(expected, first.message), first
    assert first.line in (3, None) or "result" in first.message or "levels" in first.message
    assert second == b'"next"'
    assert neighbour.run([call({"id": 7})]) == before == [b'{"seen":7}']
    assert neighbour.pid == neighbours_child


def test_there_are_sixty_attempts_and_more() -> None:
    assert len(REACHING_OUT) + len(USING_UP) >= 60


def test_ordinary_limits_tell_the_line(transformer) -> None:
    for body in ("while true do end", "local t = {} for i = 1, 1e6 do table.insert(t, 1, i) end"):
        (error,) = transformer(attempt(body)).run([call()])
        assert isinstance(error, LuaError)
        assert error.line == 3


def test_nothing_is_kept_between_messages(transformer) -> None:
    one = transformer("""
      local count = 0
      function transform(action, record)
        count = count + 1
        total = (total or 0) + 1
        _G.other = (_G.other or 0) + 1
        return { count, total, other }
      end""")
    assert one.run([call(), call(), call()]) == [b"[1,1,1]"] * 3


def test_an_overwritten_name_is_back_with_the_next_message(transformer) -> None:
    one = transformer("""
      function transform(action, record)
        local before = type(tostring)
        tostring, string, null, _G = nil, nil, nil, nil
        return before
      end""")
    assert one.run([call(), call()]) == [b'"function"'] * 2
