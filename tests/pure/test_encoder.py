"""Text values as JSON, and what of a row is key, change, unknown."""
from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.encoder import ArrayOf, RowEncoder, converter_of, text_to_json, unconverted
from consumers.encodings import codec_of, readable
from capture.pgoutput import UNCHANGED


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("number", "154.970", "154.970"), ("number", "NaN", '"NaN"'), ("number", "-Infinity", '"-Infinity"'),
        ("number", "1e+20", "1e+20"), ("bool", "t", "true"), ("bool", "f", "false"), ("json", '{"a":"\\u0000"}', '{"a":"\\u0000"}'),
        ("timestamptz", "2026-11-23 10:00:00.1+00", '"2026-11-23T10:00:00.1+00:00"'), ("timestamptz", "infinity", '"infinity"'),
        ("timestamptz", "0044-03-15 00:00:00+00 BC", '"0044-03-15T00:00:00+00:00 BC"'), ("timestamp", "-infinity", '"-infinity"'),
        ("timestamp", "12026-11-23 10:00:00", '"12026-11-23T10:00:00"'), ("text", 'a"\\\n\x01é', '"a\\"\\\\\\n\\u0001é"'),
        ("int_vector", "1 2", "[1,2]"), ("bytea", r"\x00ff", r'"\\x00ff"'), (ArrayOf("bytea"), r'{"\\x00","\\xff",NULL}', r'["\\x00","\\xff",null]'),
        (ArrayOf("number"), "{1,NULL,3}", "[1,null,3]"), (ArrayOf("number"), "{{1,2},{3,4}}", "[[1,2],[3,4]]"),
        (ArrayOf("number"), "[0:1]={5,6}", "[5,6]"), (ArrayOf("text"), "{}", "[]"),
        (ArrayOf("text"), '{a,"b,c","NULL",NULL,"d\\"e\\\\"}', '["a","b,c","NULL",null,"d\\"e\\\\"]'),
        (ArrayOf("text", ";"), "{(1,1),(0,0);(2,2),(1,1)}", '["(1,1),(0,0)","(2,2),(1,1)"]'),
    ],
)  # fmt: skip
def test_values(kind: object, text: str, expected: str) -> None:
    assert converter_of(kind)(text.encode()).decode() == expected  # type: ignore[arg-type]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_is_one_json_string(text: str) -> None:
    assert json.loads(text_to_json(text.encode())) == text


def encoder(key: tuple[str, ...] = ("id",)) -> RowEncoder:
    names = ["id", "name", "big"]
    return RowEncoder(names, ["number", "text", "text"], key)


def test_an_insert() -> None:
    row = encoder().insert([b"1", None, b"x"])
    assert (row.record, row.changes, row.key, row.old_key) == (b'{"id":1,"name":null,"big":"x"}', None, b'["1"]', None)


def test_an_update_without_old_values_says_so() -> None:
    row = encoder().update("", [], [b"1", b"b", UNCHANGED])
    assert (row.record, row.changes, row.unchanged) == (b'{"id":1,"name":"b"}', b"{}", b'["big"]')
    assert not row.old_values_known and row.old_key is None


def test_an_update_under_full_has_the_old_values_and_the_unchanged_one() -> None:
    row = encoder().update("O", [b"1", b"a", b"long"], [b"1", b"b", UNCHANGED])
    assert (row.record, row.changes, row.unchanged) == (b'{"id":1,"name":"b","big":"long"}', b'{"name":"a"}', None)
    assert row.old_values_known and row.old_key is None


def test_an_update_of_the_key_has_both_keys() -> None:
    row = encoder().update("K", [b"1", None, None], [b"2", b"a", b"x"])
    assert (row.key, row.old_key, row.changes, row.old_values_known) == (b'["2"]', b'["1"]', b'{"id":1}', False)


def test_a_delete_has_the_key_or_the_row() -> None:
    assert encoder().delete("K", [b"1", None, None]).record == b'{"id":1}'
    assert encoder().delete("O", [b"1", b"a", None]).record == b'{"id":1,"name":"a","big":null}'


def test_what_is_null_in_an_old_key_was_not_sent() -> None:
    """A partition's identity may be another one than the table's, under whose name it arrives."""
    gone = encoder().delete("K", [None, b"a", None])
    assert (gone.record, gone.key) == (b'{"name":"a"}', b"[null]")
    moved = encoder().update("K", [None, b"a", None], [b"1", b"b", b"x"])
    assert (moved.changes, moved.key, moved.old_key) == (b'{"name":"a"}', b'["1"]', None)


def test_a_row_beyond_what_a_message_can_be_goes_without_its_largest_values() -> None:
    left_out: list[list[str]] = []
    small = RowEncoder(["id", "a", "b"], ["number", "text", "text"], ["id"], most_bytes=600, on_large=left_out.append)
    fits = small.insert([b"1", b"x" * 550, b"y"])
    assert fits.unchanged is None and not left_out
    row = small.insert([b"1", b"x" * 700, b"y"])
    assert (row.record, row.unchanged, row.key) == (b'{"id":1,"b":"y"}', b'["a"]', b'["1"]')
    row = small.update("O", [b"1", b"x" * 700, b"y"], [b"1", UNCHANGED, b"z"])
    assert (row.record, row.changes, row.unchanged) == (b'{"id":1,"b":"z"}', b'{"b":"y"}', b'["a"]')
    assert small.delete("O", [b"1", b"x" * 90, b"\1" * 120]).record == b'{"id":1,"a":"' + b"x" * 90 + b'"}'
    assert left_out == [["a"], ["a"], ["b"]]


def test_a_table_without_a_key() -> None:
    assert encoder(key=()).insert([b"1", b"a", b"b"]).key == b"[]"


def test_a_large_key_that_did_not_change_is_taken_from_the_old_row() -> None:
    row = encoder().update("K", [b"1", None, None], [UNCHANGED, b"b", UNCHANGED])
    assert (row.record, row.key, row.old_key, row.changes) == (b'{"id":1,"name":"b"}', b'["1"]', None, b"{}")
    assert row.unchanged == b'["big"]' and not row.old_values_known


@given(st.binary(), st.sampled_from(["utf-8", "cp1252", "euc_jp", "ascii", "iso8859_2"]))
def test_bytes_of_any_encoding_are_one_json_string(value: bytes, codec: str) -> None:
    converters = unconverted(codec)
    assert isinstance(json.loads(converters["text"](value).decode()), str)
    assert isinstance(json.loads(text_to_json(value).decode()), str)
    inside = value.translate(None, bytes(range(0x20)) + b'"\\')
    assert isinstance(json.loads(converters["json"](b'"%b"' % inside).decode()), str)


@pytest.mark.parametrize(
    ("encoding", "codec"),
    [
        ("UTF8", "utf-8"), ("SQL_ASCII", "utf-8"), ("LATIN1", "iso8859_1"), ("LATIN9", "iso8859_15"), ("WIN1252", "cp1252"),
        ("WIN866", "cp866"), ("ISO_8859_5", "iso8859_5"), ("KOI8U", "koi8_u"), ("EUC_TW", "ascii"),
    ],
)  # fmt: skip
def test_codecs(encoding: str, codec: str) -> None:
    assert codec_of(encoding) == codec


def test_every_codec_exists() -> None:
    singles = [f"LATIN{n}" for n in range(1, 11)] + [f"WIN{n}" for n in (866, 874, *range(1250, 1259))]
    for encoding in [*singles, "EUC_JP", "EUC_CN", "EUC_KR", "EUC_JIS_2004", "KOI8R", "KOI8U", *(f"ISO_8859_{n}" for n in range(5, 9))]:
        assert readable(b"plain", codec_of(encoding)) == "plain"
