"""Decode the protocol messages of pgoutput, version 1. Pure: bytes in, tuples out.

Source: PostgreSQL manual, "Logical Replication Message Formats". Every message begins with its tag byte. A tuple is a list
with one item a column: the text as bytes, None for NULL, UNCHANGED for a TOASTed value that was not sent.
"""
from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

_LENGTH = struct.Struct("!I")
_COUNT = struct.Struct("!H")
_OID = struct.Struct("!I")
_BEGIN = struct.Struct("!QqI")
_COMMIT = struct.Struct("!BQQq")
_COLUMN_TAIL = struct.Struct("!Ii")

TUPLE_NULL, TUPLE_UNCHANGED, TUPLE_TEXT, TUPLE_BINARY = b"nutb"


class Unchanged:
    """The type of UNCHANGED."""

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Final = Unchanged()
Value = bytes | None | Unchanged


class MalformedMessage(ValueError):
    """The bytes are no protocol message: too short, or with an unknown tag."""

    def __init__(self, tag: str, reason: str) -> None:
        self.tag, self.reason = tag, reason
        super().__init__(f"protocol message {tag!r}: {reason}")


class Begin(NamedTuple):
    final_lsn: int
    """LSN of the commit record."""
    committed_us: int
    """Microseconds since 2000-01-01 UTC."""
    xid: int


class Commit(NamedTuple):
    flags: int
    lsn: int
    end_lsn: int
    """Just past the commit record: what may be confirmed once this transaction is stored."""
    committed_us: int


class Origin(NamedTuple):
    lsn: int
    name: str


class RelationColumn(NamedTuple):
    is_key: bool
    name: str
    type_oid: int
    typmod: int


class Relation(NamedTuple):
    oid: int
    schema: str
    table: str
    replica_identity: str
    """d default, n nothing, f full, i index."""
    columns: tuple[RelationColumn, ...]


class Type(NamedTuple):
    oid: int
    schema: str
    name: str


class Insert(NamedTuple):
    oid: int
    new: list[Value]


class Update(NamedTuple):
    oid: int
    old_kind: str
    """"K": old holds the key columns; "O": the whole old row; "": nothing, and old is empty."""
    old: list[Value]
    new: list[Value]


class Delete(NamedTuple):
    oid: int
    old_kind: str
    old: list[Value]


class Truncate(NamedTuple):
    cascade: bool
    restart_identity: bool
    oids: tuple[int, ...]


class LogicalMessage(NamedTuple):
    """pg_logical_emit_message."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


Message = Begin | Commit | Origin | Relation | Type | Insert | Update | Delete | Truncate | LogicalMessage


def decode(data: bytes) -> Message:
    """Decode one protocol message. Raises MalformedMessage, never anything else."""
    tag = chr(data[0]) if data else ""
    decoder = _DECODERS.get(tag)
    if decoder is None:
        raise MalformedMessage(tag, "is not of protocol version 1")
    try:
        message, end = decoder(data)
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, MalformedMessage):
            raise
        raise MalformedMessage(tag, f"{len(data)} bytes end too early or are garbled ({error})") from None
    if end != len(data):
        raise MalformedMessage(tag, f"expected {end} bytes, got {len(data)}")
    return message


def decode_insert(data: bytes) -> list[Value]:
    """The new row of an Insert, whose relation is bytes 1 to 4: the most frequent message, without a tuple of its own.

    Raises MalformedMessage, never anything else.
    """
    try:
        _expect(data, 5, "N")
        values, end = decode_tuple(data, 6)
    except (struct.error, IndexError) as error:
        raise MalformedMessage("I", f"{len(data)} bytes end too early ({error})") from None
    if end != len(data):
        raise MalformedMessage("I", f"expected {end} bytes, got {len(data)}")
    return values


def decode_tuple(data: bytes, at: int) -> tuple[list[Value], int]:
    """Decode a TupleData that begins at `at`; returns its values and where it ends."""
    (count,) = _COUNT.unpack_from(data, at)
    at += 2
    values: list[Value] = []
    add = values.append
    unpack = _LENGTH.unpack_from
    for _ in range(count):
        kind = data[at]
        if kind == TUPLE_TEXT:
            start = at + 5
            at = start + unpack(data, at + 1)[0]
            add(data[start:at])
        elif kind == TUPLE_NULL:
            add(None)
            at += 1
        elif kind == TUPLE_UNCHANGED:
            add(UNCHANGED)
            at += 1
        else:
            raise MalformedMessage(chr(data[0]), f"column of the unknown kind {chr(kind)!r}")
    if at > len(data):
        raise MalformedMessage(chr(data[0]), f"a column ends at byte {at} of {len(data)}")
    return values, at


def _text(data: bytes, at: int) -> tuple[str, int]:
    """A name. Bytes that are no UTF-8 are escaped, not refused: the database may have another encoding (`encodings`)."""
    end = data.index(0, at)
    return data[at:end].decode("utf-8", "surrogateescape"), end + 1


def _begin(data: bytes) -> tuple[Begin, int]:
    return Begin(*_BEGIN.unpack_from(data, 1)), 1 + _BEGIN.size


def _commit(data: bytes) -> tuple[Commit, int]:
    return Commit(*_COMMIT.unpack_from(data, 1)), 1 + _COMMIT.size


def _origin(data: bytes) -> tuple[Origin, int]:
    (lsn,) = struct.unpack_from("!Q", data, 1)
    name, end = _text(data, 9)
    return Origin(lsn, name), end


def _relation(data: bytes) -> tuple[Relation, int]:
    (oid,) = _OID.unpack_from(data, 1)
    schema, at = _text(data, 5)
    table, at = _text(data, at)
    identity = chr(data[at])
    (count,) = _COUNT.unpack_from(data, at + 1)
    at += 3
    columns = []
    for _ in range(count):
        flags = data[at]
        name, at = _text(data, at + 1)
        type_oid, typmod = _COLUMN_TAIL.unpack_from(data, at)
        at += _COLUMN_TAIL.size
        columns.append(RelationColumn(bool(flags & 1), name, type_oid, typmod))
    # An empty schema name stands for pg_catalog.
    return Relation(oid, schema or "pg_catalog", table, identity, tuple(columns)), at


def _type(data: bytes) -> tuple[Type, int]:
    (oid,) = _OID.unpack_from(data, 1)
    schema, at = _text(data, 5)
    name, at = _text(data, at)
    return Type(oid, schema or "pg_catalog", name), at


def _insert(data: bytes) -> tuple[Insert, int]:
    _expect(data, 5, "N")
    new, end = decode_tuple(data, 6)
    return Insert(_OID.unpack_from(data, 1)[0], new), end


def _update(data: bytes) -> tuple[Update, int]:
    (oid,) = _OID.unpack_from(data, 1)
    kind, at = chr(data[5]), 6
    old: list[Value] = []
    if kind in ("K", "O"):
        old, at = decode_tuple(data, 6)
        _expect(data, at, "N")
        at += 1
    else:
        _expect(data, 5, "N")
        kind = ""
    new, end = decode_tuple(data, at)
    return Update(oid, kind, old, new), end


def _delete(data: bytes) -> tuple[Delete, int]:
    kind = chr(data[5])
    if kind not in ("K", "O"):
        _expect(data, 5, "K or O")
    old, end = decode_tuple(data, 6)
    return Delete(_OID.unpack_from(data, 1)[0], kind, old), end


def _truncate(data: bytes) -> tuple[Truncate, int]:
    count, options = struct.unpack_from("!IB", data, 1)
    oids = struct.unpack_from(f"!{count}I", data, 6)
    return Truncate(bool(options & 1), bool(options & 2), oids), 6 + 4 * count


def _message(data: bytes) -> tuple[LogicalMessage, int]:
    flags, lsn = struct.unpack_from("!BQ", data, 1)
    prefix, at = _text(data, 10)
    (length,) = _LENGTH.unpack_from(data, at)
    at += 4
    return LogicalMessage(bool(flags & 1), lsn, prefix, data[at : at + length]), at + length


def _expect(data: bytes, at: int, what: str) -> None:
    if chr(data[at]) != what:
        raise MalformedMessage(chr(data[0]), f"expected {what} at byte {at}, got {chr(data[at])!r}")


_DECODERS: dict[str, Callable[[bytes], tuple[Message, int]]] = {
    "B": _begin, "C": _commit, "O": _origin, "R": _relation, "Y": _type, "I": _insert, "U": _update, "D": _delete,
    "T": _truncate, "M": _message,
}  # fmt: skip
