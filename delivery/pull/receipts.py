"""Ack ids: the receipt of one message under one claim as text, made and read by the batch. Pure.

It is 24 bytes in base64, URL-safe: the claim's token (16), then the message's id (8). Of one claim's the first 15 bytes, 20
characters, are the same; base64 keeps groups of three bytes apart. So a batch costs no Python for each.
"""
from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterable, Sequence
from uuid import UUID

BYTES, CHARACTERS = 24, 32
SHARED_BYTES, SHARED_CHARACTERS = 15, 20
OWN_BYTES, OWN_CHARACTERS = 9, 12  # the last byte of the token, and the id
FEW = 12  # fewer are quicker one by one
URL_SAFE, FROM_URL_SAFE = bytes.maketrans(b"+/", b"-_"), str.maketrans("-_", "+/")


def encode(token: UUID, ids: Sequence[int]) -> list[bytes]:
    """The ack ids of these messages of one claim."""
    if len(ids) < FEW:
        return [encode_one(token, number) for number in ids]
    packed = struct.pack(f">{len(ids)}q", *ids)
    own = bytearray(OWN_BYTES * len(ids))
    own[0::OWN_BYTES] = token.bytes[SHARED_BYTES:] * len(ids)
    for byte in range(8):
        own[byte + 1 :: OWN_BYTES] = packed[byte::8]
    shared = binascii.b2a_base64(token.bytes[:SHARED_BYTES], newline=False).translate(URL_SAFE)
    text = binascii.b2a_base64(own, newline=False).translate(URL_SAFE)
    return [shared + text[at : at + OWN_CHARACTERS] for at in range(0, len(text), OWN_CHARACTERS)]


def decode(ack_ids: Sequence[str]) -> list[tuple[UUID, int]]:
    """The receipts that `encode` made; anything else is left out."""
    if set(map(len, ack_ids)) == {CHARACTERS}:
        text = "".join(ack_ids)
        if "+" not in text and "/" not in text:
            try:
                raw = binascii.a2b_base64(text.translate(FROM_URL_SAFE), strict_mode=True)
            except ValueError:  # binascii.Error is one; so is a text that is not ASCII
                return decode_each(ack_ids)
            tokens = _Tokens()
            return [(tokens[token], number) for token, number in struct.iter_unpack(">16sq", raw) if number >= 0]
    return decode_each(ack_ids)


class _Tokens(dict[bytes, UUID]):
    """Each made once: mostly there is one."""

    def __missing__(self, raw: bytes) -> UUID:
        token = self[raw] = UUID(bytes=raw)
        return token


def encode_one(token: UUID, message_id: int) -> bytes:
    return base64.urlsafe_b64encode(token.bytes + message_id.to_bytes(8, "big"))


def decode_each(ack_ids: Iterable[str]) -> list[tuple[UUID, int]]:
    """Where some may be anything."""
    tokens = _Tokens()
    found = []
    for ack_id in ack_ids:
        try:
            raw = binascii.a2b_base64(ack_id.translate(FROM_URL_SAFE), strict_mode=True)
        except ValueError:
            continue
        if len(raw) == BYTES and not raw[16] & 0x80 and "+" not in ack_id and "/" not in ack_id:
            found.append((tokens[raw[:16]], int.from_bytes(raw[16:], "big")))
    return found
