"""Turn the text values of a row into JSON bytes, as Postgres' own to_json would write them. Pure.

One RowEncoder per relation version: each column's converter is chosen once, and no Python object is made of a value on the
way. The connection that reads has its settings pinned: UTC, ISO dates, hex bytea, full float digits.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import NamedTuple

from capture.encodings import readable, readable_json
from capture.pgoutput import UNCHANGED, Unchanged, Value

Converter = Callable[[bytes], bytes]
NULL = b"null"
MAX_ROW_BYTES = 512 * 1024 * 1024  # of JSON: the store takes less than 1 GB in one row, and several copies are in memory
MOST_GROWTH = 6  # one byte, a control character, becomes six


class ArrayOf(NamedTuple):
    """An array's element and what stands between elements."""

    element: Kind
    delimiter: str = ","


Kind = str | ArrayOf
"""number, bool, json, text, bytea, timestamp, timestamptz, int_vector, text_vector, or an ArrayOf one of these."""


class EncodedRow(NamedTuple):
    record: bytes
    changes: bytes | None
    key: bytes
    old_key: bytes | None
    unchanged: bytes | None
    old_values_known: bool


def text_to_json(value: bytes) -> bytes:
    try:
        return encode_basestring(value.decode()).encode()
    except UnicodeDecodeError:  # an output function that minds no encoding
        return encode_basestring(readable(value, "utf-8")).encode()


def bytea_to_json(value: bytes) -> bytes:
    return b'"\\%b"' % value  # \x and hex digits: the backslash alone is to be escaped


def number_to_json(value: bytes) -> bytes:
    # NaN and Infinity have no place among JSON's numbers.
    return value if value[-1] <= 57 else b'"%b"' % value


def bool_to_json(value: bytes) -> bytes:
    return b"true" if value == b"t" else b"false"


def json_to_json(value: bytes) -> bytes:
    return value


def timestamp_to_json(value: bytes) -> bytes:
    return b'"%b"' % value.replace(b" ", b"T", 1) if value[-1] != 121 else b'"%b"' % value  # infinity ends in y


def timestamptz_to_json(value: bytes) -> bytes:
    if value[-1] == 121:
        return b'"%b"' % value
    return b'"%b"' % value.replace(b" ", b"T", 1).replace(b"+00", b"+00:00", 1)


def _vector(converter: Converter) -> Converter:
    def convert(value: bytes) -> bytes:
        return b"[" + b",".join(map(converter, value.split())) + b"]"

    return convert


CONVERTERS: dict[str, Converter] = {
    "number": number_to_json,
    "bool": bool_to_json,
    "json": json_to_json,
    "text": text_to_json,
    "bytea": bytea_to_json,
    "timestamp": timestamp_to_json,
    "timestamptz": timestamptz_to_json,
    "int_vector": _vector(number_to_json),
    "text_vector": _vector(text_to_json),
}


def unconverted(codec: str) -> dict[str, Converter]:
    """The functions for texts that the server did not convert to UTF-8; `codec` reads them."""

    def text(value: bytes) -> bytes:
        return encode_basestring(readable(value, codec)).encode()

    def from_json(value: bytes) -> bytes:
        return readable_json(value, codec).encode()

    return {**CONVERTERS, "text": text, "json": from_json, "text_vector": _vector(text)}


def converter_of(kind: Kind, converters: Mapping[str, Converter] = CONVERTERS) -> Converter:
    """The function for values of this kind."""
    if isinstance(kind, str):
        return converters[kind]
    element = converter_of(kind.element, converters)
    delimiter = ord(kind.delimiter)

    def convert(value: bytes) -> bytes:
        return array_to_json(value, element, delimiter)

    return convert


def array_to_json(value: bytes, element: Converter, delimiter: int = 44) -> bytes:
    """Postgres' text form of an array as a JSON array, nested as it is; lower bounds are left out, as to_json does.

    Source: PostgreSQL manual, "Array Input and Output Syntax".
    """
    at = value.index(b"=") + 1 if value[:1] == b"[" else 0
    out: list[bytes] = []
    add = out.append
    end = len(value)
    while at < end:
        byte = value[at]
        if byte == 123:  # {
            add(b"[")
            at += 1
        elif byte == 125:  # }
            add(b"]")
            at += 1
        elif byte == delimiter:
            add(b",")
            at += 1
        elif byte == 34:  # "
            stop = at + 1
            while value[stop] != 34:
                stop += 2 if value[stop] == 92 else 1
            add(element(_unescape(value[at + 1 : stop])))
            at = stop + 1
        else:
            stop = at
            while value[stop] != delimiter and value[stop] != 125:
                stop += 2 if value[stop] == 92 else 1
            text = value[at:stop]
            add(NULL if text == b"NULL" else element(_unescape(text)))
            at = stop
    return b"".join(out)


def _unescape(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    out = bytearray()
    at = 0
    while at < len(text):
        if text[at] == 92:
            at += 1
        out.append(text[at])
        at += 1
    return bytes(out)


def _sent(old: Sequence[Value]) -> set[int]:
    """The columns of an old key that the server sent. None of an identity's columns is null, so a null one was not."""
    return {i for i, value in enumerate(old) if value is not None}


class RowEncoder:
    """Encodes the rows of one relation version."""

    def __init__(
        self, names: Sequence[str], kinds: Sequence[Kind], primary_key: Sequence[str],
        *, codec: str | None = None, most_bytes: int = MAX_ROW_BYTES, on_large: Callable[[list[str]], None] = lambda names: None,
    ) -> None:  # fmt: skip
        """`codec`: reads texts that the server does not convert to UTF-8. A row of more than `most_bytes` is encoded without its
        largest values, as if these had not been sent; `on_large` hears which columns that were.
        """
        self._most_bytes, self._on_large = most_bytes, on_large
        self._column_names = list(names)
        converters = CONVERTERS if codec is None else unconverted(codec)
        self._text = converters["text"]
        self._names = [encode_basestring(name).encode() + b":" for name in names]
        self._plain_names = [encode_basestring(name).encode() for name in names]
        self._converters = [converter_of(kind, converters) for kind in kinds]
        self._pairs = list(zip(self._names, self._converters, strict=True))
        # A column that the publication leaves out has no place in the tuple, and a null one in the key.
        self._key = [names.index(name) if name in names else -1 for name in primary_key]

    def insert(self, new: Sequence[Value]) -> EncodedRow:
        record, unchanged = self._record(new)
        if len(record) > self._most_bytes:
            return self.insert(*self._without_largest(new))
        return EncodedRow(record, None, self.key(new), None, unchanged, True)

    def update(self, old_kind: str, old: Sequence[Value], new: Sequence[Value]) -> EncodedRow:
        if old_kind == "O":
            new = [before if now is UNCHANGED else now for before, now in zip(old, new, strict=True)]
        elif old_kind and UNCHANGED in new:  # the server sends a large key with the old row, because it is not in the new one
            known = _sent(old)
            new = [old[i] if now is UNCHANGED and i in known else now for i, now in enumerate(new)]
        record, unchanged = self._record(new)
        key = self.key(new)
        if not old_kind and len(record) <= self._most_bytes:
            return EncodedRow(record, b"{}", key, None, unchanged, False)
        if not old_kind:
            return self.update("", old, *self._without_largest(new))
        old_key = self._old_key(old_kind, old, new)
        columns = range(len(old)) if old_kind == "O" else sorted(_sent(old))
        changes = [
            self._names[i] + self._value(i, old[i])
            for i in columns
            if old[i] != new[i] and new[i] is not UNCHANGED and old[i] is not UNCHANGED
        ]
        if len(record) + sum(map(len, changes)) > self._most_bytes:
            return self.update(old_kind, *self._without_largest(old, new))
        return EncodedRow(
            record, b"{" + b",".join(changes) + b"}", key, None if old_key == key else old_key, unchanged, old_kind == "O"
        )

    def delete(self, old_kind: str, old: Sequence[Value]) -> EncodedRow:
        if old_kind == "O":
            record, unchanged = self._record(old)
            if len(record) > self._most_bytes:
                return self.delete(old_kind, *self._without_largest(old))
        else:
            # No column of an identity is null. What is was not sent: a partition's identity may differ from its table's.
            record = b"{" + b",".join(self._names[i] + self._value(i, value) for i, value in enumerate(old) if value is not None) + b"}"
            unchanged = None
        return EncodedRow(record, None, self.key(old), None, unchanged, True)

    def key(self, row: Sequence[Value]) -> bytes:
        """The primary key's values as a JSON array of texts."""
        return b"[" + b",".join([self._key_text(row[i] if i >= 0 else None) for i in self._key]) + b"]"

    def _old_key(self, old_kind: str, old: Sequence[Value], new: Sequence[Value]) -> bytes:
        """The key before. What the identity's columns do not tell has not changed, or cannot be known."""
        if old_kind == "O":
            return self.key(old)
        known = _sent(old)
        return self.key([old[i] if i in known else new[i] for i in range(len(new))])

    def _key_text(self, value: Value) -> bytes:
        return NULL if value is None or isinstance(value, Unchanged) else self._text(value)

    def lacks_key(self, row: EncodedRow) -> bool:
        """Whether a column of the primary key was not sent, because it is large and did not change: the row is not known."""
        return row.unchanged is not None and any(i >= 0 and self._plain_names[i] in row.unchanged for i in self._key)

    def _value(self, index: int, value: Value) -> bytes:
        return NULL if value is None or isinstance(value, Unchanged) else self._converters[index](value)

    def _record(self, row: Sequence[Value]) -> tuple[bytes, bytes | None]:
        if UNCHANGED in row:
            return self._record_with_gaps(row)
        return (
            b"{"
            + b",".join(
                [name + (NULL if value is None else convert(value)) for (name, convert), value in zip(self._pairs, row)]  # type: ignore[arg-type]  # noqa: B905
            )
            + b"}"
        ), None

    def _record_with_gaps(self, row: Sequence[Value]) -> tuple[bytes, bytes]:
        sent = [i for i, value in enumerate(row) if value is not UNCHANGED]
        missing = [self._plain_names[i] for i, value in enumerate(row) if value is UNCHANGED]
        record = b"{" + b",".join(self._names[i] + self._value(i, row[i]) for i in sent) + b"}"
        return record, b"[" + b",".join(missing) + b"]"

    def _without_largest(self, *rows: Sequence[Value]) -> list[list[Value]]:
        """The rows without the values of as many columns, the largest first, as make the rest fit whatever it holds."""
        sizes = [sum(len(value) for value in column if isinstance(value, bytes)) for column in zip(*rows, strict=True)]
        left_out: set[int] = set()
        total = sum(sizes)
        for size, i in sorted(((size, i) for i, size in enumerate(sizes)), reverse=True):
            if total * MOST_GROWTH <= self._most_bytes:
                break
            left_out.add(i)
            total -= size
        self._on_large([self._column_names[i] for i in sorted(left_out)])
        return [[UNCHANGED if i in left_out else value for i, value in enumerate(row)] for row in rows]
