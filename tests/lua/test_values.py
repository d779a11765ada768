"""What goes in comes out: every JSON value through Lua, and what Lua makes that JSON has no word for."""
from __future__ import annotations

import json

import pytest

from consumers.lua.transformer import Transformer, check
from consumers.lua.types import LuaError
from tests.lua.world import call, raw

KEYS = "keys must all be strings (an object) or the integers 1, 2, 3 … (an array)"
PASS_THROUGH = "function transform(action, record) return record end"


@pytest.fixture(scope="module")
def passing():
    one = Transformer(PASS_THROUGH)
    yield one
    one.close()


@pytest.mark.parametrize("text", [
    '{"a":null,"b":[],"c":{},"d":[null],"e":[[],[[]],{}]}',
    '[1,null,3]',
    '{"low":-9223372036854775808,"high":9223372036854775807}',
    '{"above":9223372036854775808,"below":-9223372036854775809}',
    '12345678901234567890123456789012345678',
    '{"numeric":0.12345678901234567890123456789}',
    '{"numeric":98765432109876543210.123456789012345678}',
    '[1e400,-1e400,1e-400,1E+999]',
    '[1e99999999999999999999999]',
    '[0.1,154.97,1.5e-7,5e-324,1.7976931348623157e+308,0.30000000000000004,1e+22]',
    '[1.0,-0.0,0,-1]',
    '{"text":"ünï ✓ 😀 \\u0000 \\u001f \\" \\\\ / \u2028"}',
    '["\\ud800","\\udfff x","a\\udc00b"]',
    '{"1":"a","2":"b"}',
    '{"":1," ":2,"a.b":3,"end":4,"\\u0000":5,"\\"":6}',
    '{"z":1,"a":2,"m":{"y":1,"b":[{"q":1,"c":null}]}}',
    'true', 'false', '"x"', '[]', '{}',
])  # fmt: skip
def test_a_record_passes_through_unchanged(passing: Transformer, text: str) -> None:
    (result,) = passing.run([raw(text)])
    assert isinstance(result, bytes), result
    exact = {"parse_float": str, "parse_int": str} if len(text) > 25 and "." not in text else {}
    assert json.loads(result, **exact) == json.loads(text, **exact)


@pytest.mark.parametrize("digits", [
    "12345678901234567890123456789012345678", "0.12345678901234567890123456789", "1e400", "-9223372036854775809", "1.0",
    "9007199254740993", "123456789012345678.5", "154.97", "100",
])  # fmt: skip
def test_a_number_keeps_its_digits(passing: Transformer, digits: str) -> None:
    assert passing.run([raw(f'{{"n":{digits}}}'), raw(f"[{digits}]")]) == [f'{{"n":{digits}}}'.encode(), f"[{digits}]".encode()]


def test_the_order_of_keys_is_kept_with_new_ones_behind(transformer) -> None:
    one = transformer("function transform(a, record) record.b, record.extra, record.another = nil, 1, 2 return record end")
    assert one.run([raw('{"z":1,"b":2,"a":3}')]) == [b'{"z":1,"a":3,"another":2,"extra":1}']


def test_a_large_record_goes_in_parts(passing: Transformer) -> None:
    large = {"list": list(range(20_000)), "rows": [{"id": i, "name": f"n{i}", "none": None} for i in range(5_000)]}
    wide = {f"column {i}": i for i in range(1_500)}
    results = passing.run([call(large), call(wide), call({"id": 1})])
    assert [json.loads(result) for result in results] == [large, wide, {"id": 1}]


@pytest.mark.parametrize("expression, expected", [
    ("nil", None),
    ("null", "null"),
    ("false", "false"),
    ("'text'", '"text"'),
    ("{}", "{}"),
    ("array{}", "[]"),
    ("array()", "[]"),
    ("{1, 2, 3}", "[1,2,3]"),
    ("{{}, {1}, null}", "[{},[1],null]"),
    ("array{1, nil, 3}", "[1,null,3]"),
    ("array{[4] = 'x'}", '[null,null,null,"x"]'),
    ("{b = 1, a = {c = array{}}}", '{"a":{"c":[]},"b":1}'),
    ("{7 // 2, 7 / 2, 4 / 2, 2^53, 10 * 1.0}", "[3,3.5,2.0,9.00719925474099e+15,10.0]"),
    ("0.1 + 0.2", "0.30000000000000004"),
    ("math.maxinteger", "9223372036854775807"),
    ("'\\0\\1\\n\\t\\\"\\\\é'", '"\\u0000\\u0001\\n\\t\\"\\\\é"'),
    ("{1, 2}, 'a second result'", "[1,2]"),
    ("record.missing", None),
    ("record.null", "null"),
    ("record.null == null", "true"),
    ("record.null ~= nil", "true"),
    ("record.null.anything == nil", "true"),
    ("type(record.null) .. tostring(record.null)", '"nullnull"'),
    ("#record.list + #record.empty", "3"),
    ("{table.unpack(record.list, 2)}", "[null,3]"),
    ("record.big", "123456789012345678901234567890"),
    ("tostring(record.big)", '"123456789012345678901234567890"'),
    ("'n ' .. record.big", '"n 123456789012345678901234567890"'),
    ("type(record.big) .. math.type(record.big)", '"numberfloat"'),
    ("record.big + 1 == 123456789012345678901234567890 + 1.0", "true"),
    ("record.big > 5 and 5 < record.big and record.big == record.big2", "true"),
    ("-record.big", "-1.2345678901234568e+29"),
    ("math.floor(record.exact * 10)", "2"),
    ("('%.2f|%s|%d'):format(record.exact, record.exact, 3)", '"0.20|0.20000000000000000000000001|3"'),
    ("tonumber(record.exact)", "0.2"),
    ("math.max(1, record.big) > 10", "true"),
    ("tostring(1/3) .. ' ' .. tostring(10)", '"0.3333333333333333 10"'),
    ("action .. ' ' .. type(changes) .. ' ' .. metadata.table_name", '"insert null orders"'),
    ("{changes = changes}", '{"changes":null}'),
    ("{pcall(error, 'x')}", '[false,"x"]'),
    ("select('#', pcall(function() end))", "1"),
    ("os.date('!%Y-%m-%d', 0)", '"1970-01-01"'),
    ("os.date('%H:%M', 0)", '"00:00"'),
    ("('Grüße'):upper():sub(1, 2)", '"GR"'),
    ("utf8.len('Grüße')", "5"),
    ("tostring({}) .. tostring(print) .. tostring(pairs)", '"tablenilfunction"'),
])  # fmt: skip
def test_an_expression_gives(passing: Transformer, transformer, expression: str, expected: str | None) -> None:
    one = transformer(f"function transform(action, record, changes, metadata) return {expression} end")
    record = (
        '{"null":null,"list":[1,null,3],"empty":[],"big":123456789012345678901234567890,'
        '"big2":123456789012345678901234567890,"exact":0.20000000000000000000000001}'
    )
    (result,) = one.run([raw(record)._replace(metadata=b'{"table_name":"orders"}')])
    if expression.startswith("{7"):
        assert json.loads(result) == [3, 3.5, 2.0, 2**53, 10.0]
    else:
        assert result == (None if expected is None else expected.encode())


@pytest.mark.parametrize("expression, message", [
    ("0/0", "result: NaN is no JSON number"),
    ("{a = {1, -0/0 * 0}}", "result.a[2]: NaN is no JSON number"),
    ("{a = 1/0}", "result.a: Infinity is no JSON number"),
    ("-math.huge", "result: Infinity is no JSON number"),
    ("function() end", "result: a function is no JSON value"),
    ("{handler = pairs}", "result.handler: a function is no JSON value"),
    ("{1, 2, x = 3}", "result: " + KEYS),
    ("{a = 1, [2] = 3}", "result: " + KEYS),
    ("{a = {[1] = 1, [3] = 3}}", "result.a: a list with holes; array{…} makes them null"),
    ("{[1.5] = 1}", "result: " + KEYS),
    ("{[true] = 1}", "result: " + KEYS),
    ("array{x = 1}", "result: " + KEYS),
    ("array{[0] = 1}", "result: " + KEYS),
    ("{[0] = 1}", "result: " + KEYS),
    ("'\\xff'", "the result is not valid UTF-8"),
    ("{('ü'):sub(1, 1)}", "the result is not valid UTF-8"),
    ("'a' .. null", "attempt to concatenate a null value (global 'null')"),
    ("record.name .. 'x'", "attempt to concatenate a nil value (field 'name')"),
    ("null + 1", "attempt to perform arithmetic on a null value (global 'null')"),
])  # fmt: skip
def test_an_expression_is_refused(transformer, expression: str, message: str) -> None:
    one = transformer(f"function transform(action, record)\n return {expression} end")
    (error,) = one.run([call()])
    assert isinstance(error, LuaError)
    assert error.message == message


def test_an_error_that_is_not_utf8_is_told_all_the_same(transformer) -> None:
    assert transformer("function transform() error('a\\xff\\xe2b') end").run([call()]) == [LuaError("a??b", 1)]
    assert check("error('\\xff')") == LuaError("?", 1)
    assert check("x = '\udc80'") is not None


def test_digits_cannot_be_forged(transformer) -> None:
    for body in ("record[1] = '1,2'", "record.x = 1", "table.insert(record, '1')", "table.remove(record)"):
        (error,) = transformer(f"function transform(a, record) {body} return record end").run([raw("1" * 30)])
        assert isinstance(error, LuaError)
    (result,) = transformer("function transform(a, record) return {next(record)} end").run([raw("1" * 30)])
    assert result == b"{}"


def test_an_error_has_its_line(transformer) -> None:
    one = transformer("local function total(r)\n  return r.price *\n    r.amount\nend\n\nfunction transform(a, r)\n  error('no ' .. total(r))\nend")
    assert one.run([call({"price": 2, "amount": 3}), call({"price": 2})]) == [
        LuaError("no 6", 7),
        LuaError("attempt to perform arithmetic on a nil value (field 'amount')", 2),
    ]


@pytest.mark.parametrize("text, line, message", [
    ("function transform()\n  return 1 +\nend", 3, "unexpected symbol near 'end'"),
    ("function transform()\n  if true then\n", 3, "'end' expected"),
    ("\n\nx = = 1", 3, "unexpected symbol near '='"),
    ("function transform() goto nowhere end", 1, "no visible label 'nowhere'"),
    ("\n\nlocal x = nil .. 'a'\nfunction transform() end", 3, "attempt to concatenate a nil value"),
    ("function Transform() end", 1, "the text defines no function named transform"),
    ("transform = 5", 1, "the text defines no function named transform"),
    ("", 1, "the text defines no function named transform"),
    ("\nwhile true do end", 2, "took longer than 50 ms CPU"),
    ("\x1bLua", 1, "attempt to load a binary chunk|unexpected symbol"),
    ("local x = " + "(" * 1000, 1, "C stack overflow|overflow"),
    ("x = ('a'):rep(60):find(('a?'):rep(60) .. ('a'):rep(60) .. 'b')", None, "took longer than 50 ms CPU"),
    ("-" * 300_000, None, "the text is longer than 262144 bytes"),
])  # fmt: skip
def test_a_bad_text_is_refused_with_its_line(transformer, text: str, line: int | None, message: str) -> None:
    error = check(text)
    assert error is not None
    assert any(part in error.message for part in message.split("|")), error
    assert error.line == line
    assert transformer(text).run([call(), call()]) == [error, error]


def test_a_good_text_is_not_refused() -> None:
    assert check("-- ünï\nlocal rate = 1.19\nfunction transform(action, record) return record end") is None


def test_a_message_that_is_no_json_fails_alone(passing: Transformer) -> None:
    results = passing.run([raw("{"), raw("1,2"), raw("NaN"), raw("[" * 5000 + "]" * 5000), raw("1")])
    assert [type(result) for result in results] == [LuaError, LuaError, LuaError, LuaError, bytes]
