"""The decoder, on bytes that a real server sent (fixtures/pgoutput)."""
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import pgoutput
from capture.pgoutput import UNCHANGED, MalformedMessage, decode, decode_insert

FOLDER = Path(__file__).resolve().parents[2] / "fixtures" / "pgoutput"
FILES = sorted(FOLDER.glob("*.hex"))


def messages(name: str) -> list[bytes]:
    return [bytes.fromhex(line) for line in (FOLDER / f"{name}.hex").read_text().split()]


def changes(name: str) -> list[pgoutput.Message]:
    return [m for m in map(decode, messages(name)) if isinstance(m, (pgoutput.Insert, pgoutput.Update, pgoutput.Delete))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_message_cut_anywhere_is_malformed(path: Path) -> None:
    for data in messages(path.stem):
        decode(data)
        for length in range(len(data)):
            with pytest.raises(MalformedMessage):
                decode(data[:length])
        with pytest.raises(MalformedMessage):
            decode(data + b"\0")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_short_way_for_inserts_is_as_strict(path: Path) -> None:
    for data in messages(path.stem):
        if data[:1] != b"I":
            continue
        whole = decode(data)
        assert isinstance(whole, pgoutput.Insert) and decode_insert(data) == whole.new
        for length in range(5, len(data)):
            with pytest.raises(MalformedMessage):
                decode_insert(data[:length])
        with pytest.raises(MalformedMessage):
            decode_insert(data + b"\0")
        for at in range(5, len(data)):
            for bit in (0x01, 0x80, 0xFF):
                flipped = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
                try:
                    expected: object = decode(flipped)
                except MalformedMessage:
                    with pytest.raises(MalformedMessage):
                        decode_insert(flipped)
                else:
                    assert isinstance(expected, pgoutput.Insert) and decode_insert(flipped) == expected.new


@given(st.binary(max_size=200))
def test_junk_is_malformed_and_nothing_else(data: bytes) -> None:
    try:
        decode(data)
    except MalformedMessage:
        pass


def test_a_transaction_begins_and_commits() -> None:
    first, *_, last = map(decode, messages("update"))
    assert isinstance(first, pgoutput.Begin) and isinstance(last, pgoutput.Commit)
    assert first.final_lsn == last.lsn < last.end_lsn and first.committed_us == last.committed_us


def test_a_relation_names_its_columns_and_key() -> None:
    relation = next(m for m in map(decode, messages("insert")) if isinstance(m, pgoutput.Relation) and m.table == "plain")
    assert (relation.schema, relation.replica_identity) == ("wire", "d")
    assert [(c.name, c.is_key) for c in relation.columns][:2] == [("id", True), ("name", False)]


def test_values_come_as_text_and_null() -> None:
    first, second = changes("insert")
    assert isinstance(first, pgoutput.Insert) and isinstance(second, pgoutput.Insert)
    assert first.new[:4] == [b"1", 'Zoë "q" \\ \n'.encode(), b"154.970", b"t"]
    assert second.new[1] is None and second.new[2] == b"NaN"


def test_what_an_update_tells_of_the_old_row() -> None:
    (plain,) = changes("update")
    (moved,) = changes("update_key")
    full = changes("update_full")[1]
    assert isinstance(plain, pgoutput.Update) and (plain.old_kind, plain.old) == ("", [])
    assert isinstance(moved, pgoutput.Update) and moved.old_kind == "K" and moved.old[0] == b"1"
    assert isinstance(full, pgoutput.Update) and full.old_kind == "O" and full.old == [b"1", b"a", b"b"]


def test_an_unchanged_toast_value_is_marked() -> None:
    update = changes("unchanged_toast")[1]
    assert isinstance(update, pgoutput.Update) and update.new[2] is UNCHANGED


def test_truncate_names_all_tables_and_its_options() -> None:
    truncate = next(m for m in map(decode, messages("truncate")) if isinstance(m, pgoutput.Truncate))
    assert len(truncate.oids) == 2 and truncate.restart_identity and truncate.cascade


def test_a_logical_message() -> None:
    message = next(m for m in map(decode, messages("message")) if isinstance(m, pgoutput.LogicalMessage))
    assert (message.transactional, message.prefix, message.content) == (True, "a prefix", b"content")


def test_types_and_enums_are_announced() -> None:
    assert any(isinstance(m, pgoutput.Type) and m.name == "mood" for m in map(decode, messages("insert")))


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_a_message_with_a_flipped_byte_is_malformed_or_another_message(name: str) -> None:
    """Never a hang, never an error of another type, and never a value read beyond the message."""
    for data in messages(name):
        for at in range(len(data)):
            for bit in (0x01, 0x80, 0xFF):
                flipped = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
                try:
                    found = decode(flipped)
                except MalformedMessage:
                    continue
                values = [value for field in found if isinstance(field, list) for value in field]
                assert sum(len(value) for value in values if isinstance(value, bytes)) < len(flipped)
