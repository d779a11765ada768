"""Ack ids by the batch are those that are made and read one by one."""
from __future__ import annotations

import base64
from uuid import UUID, uuid4

import pytest
from hypothesis import given, strategies

from delivery.pull import receipts

TOKENS = strategies.uuids()
IDS = strategies.lists(strategies.integers(0, 2**63 - 1), max_size=40)
TEXTS = strategies.text(alphabet="AZaz09-_+/=é\ud800 \n", min_size=31, max_size=33)
RAW = strategies.binary(min_size=24, max_size=24) | strategies.just(b"\xff" * 16 + b"\x0f" * 8)


def encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode()


@given(TOKENS, IDS)
def test_a_batch_is_encoded_as_each_of_it(token: UUID, ids: list[int]) -> None:
    assert [ack_id.decode() for ack_id in receipts.encode(token, ids)] == [receipts.encode_one(token, number).decode() for number in ids]


@given(strategies.lists(strategies.tuples(strategies.sampled_from([UUID(int=0), UUID(int=2**128 - 1), UUID(int=7)]), strategies.integers(0, 2**63 - 1))))
def test_a_batch_is_decoded_to_what_it_was(held: list[tuple[UUID, int]]) -> None:
    assert receipts.decode([receipts.encode_one(*one).decode() for one in held]) == held


@given(strategies.lists(TEXTS | RAW.map(encoded) | RAW.map(encoded).map(lambda ack_id: ack_id.replace("-", "+").replace("_", "/"))))
def test_what_is_none_is_left_out(ack_ids: list[str]) -> None:
    assert receipts.decode(ack_ids) == receipts.decode_each(ack_ids)


@pytest.mark.parametrize("ack_id", ["", "x", "A" * 31, "A" * 33, "é" * 32, "A" * 31 + "!", "/" * 32])
def test_a_malformed_ack_id_names_nothing(ack_id: str) -> None:
    assert receipts.decode([ack_id]) == []


def test_what_is_none_among_others_is_left_out() -> None:
    receipt = (uuid4(), 2**62)
    texts = [receipts.encode_one(*one).decode() for one in (receipt, (receipt[0], 1))]
    assert receipts.decode(["x", *texts]) == [receipt, (receipt[0], 1)]
