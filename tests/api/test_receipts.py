"""Ack ids by the batch are those that are made and read one by one."""
from __future__ import annotations

import base64
from uuid import UUID

from hypothesis import given, strategies

from consumers.store import claims
from delivery.pull import receipts

TOKENS = strategies.uuids()
IDS = strategies.lists(strategies.integers(0, 2**63 - 1), max_size=40)
TEXTS = strategies.text(alphabet="AZaz09-_+/=é\ud800 \n", min_size=31, max_size=33)
RAW = strategies.binary(min_size=24, max_size=24) | strategies.just(b"\xff" * 16 + b"\x0f" * 8)


def encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode()


@given(TOKENS, IDS)
def test_a_batch_is_encoded_as_each_of_it(token: UUID, ids: list[int]) -> None:
    assert [ack_id.decode() for ack_id in receipts.encode(token, ids)] == [claims.encode_receipt(token, number) for number in ids]


@given(strategies.lists(strategies.tuples(strategies.sampled_from([UUID(int=0), UUID(int=2**128 - 1), UUID(int=7)]), strategies.integers(0, 2**63 - 1))))
def test_a_batch_is_decoded_to_what_it_was(held: list[tuple[UUID, int]]) -> None:
    assert receipts.decode([claims.encode_receipt(*one) for one in held]) == held


@given(strategies.lists(TEXTS | RAW.map(encoded) | RAW.map(encoded).map(lambda ack_id: ack_id.replace("-", "+").replace("_", "/"))))
def test_what_is_none_is_left_out(ack_ids: list[str]) -> None:
    assert receipts.decode(ack_ids) == claims.decode_receipts(ack_ids)
