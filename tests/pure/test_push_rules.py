"""Retry times, signatures, addresses, and what a lane sends next."""
from __future__ import annotations

import ipaddress
import time
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from standardwebhooks import Webhook

from consumers.models import new_signing_secret
from consumers.store.types import ClaimedMessage
from consumers.backoff import delay_ms
from consumers.envelope import Addressing
from delivery.push import retry, signing
from consumers.addresses import is_allowed
from delivery.push.lane import PROBE_CHOICE, EndpointState, InHand, Lane, Target

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.mark.parametrize(("count", "expected"), [(1, 1000), (2, 2000), (3, 4000), (10, 512_000), (11, 600_000), (10_000, 600_000)])
def test_delays_double_up_to_ten_minutes(count: int, expected: int) -> None:
    assert delay_ms(count, 0) == expected
    assert delay_ms(count, -1) == int(expected * 0.85) and delay_ms(count, 1) == int(expected * 1.15)


@pytest.mark.parametrize(
    ("status", "header", "expected"),
    [
        (429, "5", 5), (503, "0", 1), (429, "999999", 3600), (500, "5", None), (429, None, None), (429, "soon", None),
        (503, "Thu, 01 Jan 1970 00:01:00 GMT", 60), (503, "-5", None), (429, "\u0665", None),
    ],
)  # fmt: skip
def test_retry_after(status: int, header: str | None, expected: float | None) -> None:
    assert retry.retry_after_s(status, header, now_s=0.0) == expected


def test_the_breaker_opens_after_failures_in_a_row() -> None:
    assert [retry.hold_s(n, n) for n in (1, 4, 5, 6, 100)] == [0, 0, 0.5, 1, 30]


def test_refusals_that_may_be_about_the_messages_open_it_later_and_probes_come_each_second() -> None:
    assert [retry.hold_s(0, n) for n in (5, 19, 20, 21, 100)] == [0, 0, 0.5, 1, 1]
    assert [status for status in (None, 400, 404, 422, 429, 500, 503, 504) if retry.is_trouble(status)] == [None, 429, 503, 504]


def test_refusals_leave_the_number_of_requests_at_a_time() -> None:
    one = lane(concurrency=8)
    one.failed(0.0, 422, sent_at=0.0)
    assert one.window == 8
    one.failed(0.0, 503, sent_at=0.0)
    assert one.window == 4


def test_standard_webhooks_verifies_both_secrets_of_a_rotation() -> None:
    old, new = new_signing_secret(), new_signing_secret()
    body, now = b'{"record":{"id":1}}', int(time.time())
    headers = {"webhook-id": "an id", "webhook-timestamp": str(now)}
    headers["webhook-signature"] = signing.signature(f"{new} {old}", "an id", now, body)
    for secret in (old, new):
        assert Webhook(secret).verify(body, headers) == {"record": {"id": 1}}


REFUSED = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "192.88.99.1", "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "::8.8.8.8", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00::1",
    "fec0::1", "ff02::1", "100::1", "2001:db8::1", "2001::1", "2002:7f00:1::", "2002:a00:1::", "2002:808:808::", "64:ff9b::7f00:1",
    "64:ff9b::a00:1", "64:ff9b::808:808", "64:ff9b:1::1", "3fff::1", "5f00::1", "not an address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_allowed(address, ())


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(address, ())


def test_an_allowed_network_is_allowed_in_its_mapped_form_too() -> None:
    assert is_allowed("127.0.0.1", LOOPBACK) and is_allowed("::ffff:127.0.0.1", LOOPBACK)
    assert not is_allowed("10.0.0.1", LOOPBACK) and not is_allowed("::1", LOOPBACK)


def lane(batch_size: int = 1, concurrency: int = 10, endpoint: EndpointState | None = None) -> Lane:
    target = Target(
        uuid4(), datetime(2026, 1, 1), "c", uuid4(), (), batch_size, concurrency, uuid4(), "http://localhost/", {}, frozenset(), new_signing_secret(), 1.0,
        "", Addressing("", False),
    )  # fmt: skip
    made = Lane(target, endpoint or EndpointState())
    made.window = concurrency
    return made


TOKEN = uuid4()


def held(
    number: int, group: int, *, group2: int | None = None, max_batch: int | None = None, token: UUID = TOKEN, tried: int = 1
) -> InHand:
    fields: dict[str, Any] = dict.fromkeys(ClaimedMessage._fields)
    known = {"id": number, "group": group, "group2": group2, "max_batch": max_batch, "deliver_count": tried}
    return InHand(token, ClaimedMessage(**{**fields, **known}))


def ids(batch: list[InHand]) -> list[int]:
    return [item.message.id for item in batch]


def send(one: Lane, number: int, now: float = 0.0) -> list[int]:
    batch = one.next_batch(now)
    if batch:
        one.depart(number, batch, now)
    return ids(batch)


def test_one_group_is_sent_one_after_another() -> None:
    one = lane()
    one.pending = [held(1, 7), held(2, 7), held(3, 8)]
    assert [send(one, 1), send(one, 2), send(one, 3)] == [[1], [3], []]
    one.arrive(1)
    assert send(one, 4) == [2]


def test_a_message_of_two_groups_waits_for_both() -> None:
    one = lane()
    one.pending = [held(1, 7), held(2, 8, group2=7), held(3, 8)]
    assert [send(one, 1), send(one, 2)] == [[1], []]
    one.arrive(1)
    assert [send(one, 3), send(one, 4)] == [[2], []]


def test_a_batch_keeps_a_group_together_and_in_order() -> None:
    one = lane(batch_size=10)
    one.pending = [held(1, 7), held(2, 8), held(3, 7)]
    assert send(one, 1) == [1, 2, 3]


def test_a_failed_batch_is_sent_in_smaller_ones() -> None:
    one = lane(batch_size=10)
    one.pending = [held(1, 7, max_batch=2), held(2, 8, max_batch=2), held(3, 9, max_batch=2), held(4, 10)]
    assert [send(one, 1), send(one, 2)] == [[1, 2], [3, 4]]


def test_a_failure_takes_back_what_follows_in_its_group() -> None:
    one = lane()
    one.pending = [held(2, 7), held(3, 8, group2=7), held(4, 8), held(5, 9)]
    one.drop_behind([held(1, 7)])
    assert ids(one.pending) == [5]


def test_a_lost_lease_frees_its_groups() -> None:
    one = lane()
    one.pending = [held(1, 7)]
    send(one, 1)
    one.forget_tokens({TOKEN})
    assert one.arrive(1) == [] and one.busy == {}


def test_an_open_breaker_lets_one_probe_through_for_all_consumers_of_the_endpoint() -> None:
    endpoint = EndpointState()
    one, other = lane(endpoint=endpoint), lane(endpoint=endpoint)
    for _ in range(retry.FAILURES_TO_OPEN):
        one.failed(0.0, None, sent_at=0.0)
    one.pending, other.pending = [held(1, 1), held(2, 2)], [held(3, 3)]
    assert send(one, 1, now=0.1) == send(other, 1, now=0.1) == [], "the pause before the first probe"
    assert other.room() == 0 and lane(endpoint=endpoint).room() == PROBE_CHOICE
    assert send(one, 1, now=1.0) == [1]
    assert send(one, 2, now=1.0) == send(other, 2, now=1.0) == [], "one probe at a time"
    one.arrive(1)
    one.failed(1.0, None, sent_at=1.0)
    assert send(other, 3, now=1.5) == [] and send(other, 3, now=2.5) == [3], "pauses grow"


def test_what_was_in_flight_when_the_breaker_opened_makes_no_pause_longer() -> None:
    one = lane()
    for _ in range(retry.FAILURES_TO_OPEN + 10):
        one.failed(3.0, None, sent_at=2.0)
    one.pending = [held(1, 1)]
    assert send(one, 1, now=3.6) == [1]
    one.arrive(1)
    one.failed(3.7, None, sent_at=3.6)
    one.pending = [held(1, 1)]
    assert send(one, 1, now=4.6) == [] and send(one, 1, now=4.8) == [1], "a probe does"


def test_a_probe_is_one_message_the_least_tried_of_those_that_lead_their_groups() -> None:
    one = lane(batch_size=10)
    for _ in range(retry.FAILURES_TO_OPEN):
        one.failed(0.0, None, sent_at=0.0)
    one.pending = [held(1, 1, tried=9), held(2, 1), held(3, 3, tried=2), held(4, 3), held(5, 5, group2=1)]
    assert send(one, 1, now=9.0) == [3]
    one.arrive(1)
    one.succeeded()
    assert send(one, 2, now=9.0) == [1, 2, 4, 5]


FIRST, SECOND, THIRD = uuid4(), uuid4(), uuid4()


def answered(*acks: tuple[UUID, int], claimed: tuple[UUID, ...] = (FIRST, SECOND)) -> Lane:
    """A lane with claims of the messages 1 to 3 (of the first), 4 to 6, …, of which these are answered."""
    one = lane()
    for number, token in enumerate(claimed):
        one.claimed(token, [held(3 * number + at, at).message for at in (1, 2, 3)])
    one.acks = list(acks)
    return one


def test_a_lease_that_is_answered_as_a_whole_is_acknowledged_as_it_was_claimed() -> None:
    one = answered((FIRST, 3), (SECOND, 4), (FIRST, 1), (FIRST, 2))
    assert one.take_acks(may_wait=True) == [[(FIRST, 1), (FIRST, 2), (FIRST, 3)]] and one.acks == [(SECOND, 4)]
    one.acks += [(SECOND, 6), (SECOND, 5)]
    assert one.take_acks(may_wait=True) == [[(SECOND, 4), (SECOND, 5), (SECOND, 6)]] and not one.acks and not one.leases


def test_a_lease_answered_in_part_waits_for_the_rest_while_it_may() -> None:
    one = answered((FIRST, 1), (SECOND, 4))
    assert one.take_acks(may_wait=True) == [] and one.acks == [(FIRST, 1), (SECOND, 4)]
    assert one.take_acks(may_wait=False) == [[(FIRST, 1), (SECOND, 4)]] and one.acks == []
    one.acks = [(FIRST, 2), (FIRST, 3)]
    assert one.take_acks(may_wait=True) == [[(FIRST, 2), (FIRST, 3)]], "it is no longer whole in the store"


def test_only_the_last_two_leases_wait_for_a_straggler() -> None:
    one = answered((FIRST, 1), (SECOND, 4), claimed=(FIRST, SECOND, THIRD))
    assert one.take_acks(may_wait=True) == [[(FIRST, 1)]] and one.acks == [(SECOND, 4)]


def test_nothing_waits_where_groups_return_often() -> None:
    one = answered((FIRST, 1))
    one.claimed(THIRD, [held(9, 9).message._replace(is_fresh=True)])
    assert one.take_acks(may_wait=True) == [[(FIRST, 1)]]


def test_a_lane_that_is_paused_or_leaves_claims_and_sends_nothing() -> None:
    for how in ("paused", "leaving"):
        one = lane()
        one.pending = [held(1, 1)]
        setattr(one, how, True)
        assert send(one, 1) == [] and one.room() == 0


def test_answers_are_awaited_from_endpoints_that_answer() -> None:
    one = lane()
    one.pending = [held(1, 1)]
    assert not one.waits_for_answers(10.0, 0.5), "nothing is in flight"
    send(one, 1, now=10.0)
    assert one.waits_for_answers(10.0, 0.5), "nobody knows how soon it answers"
    one.endpoint.is_slow = False
    assert not one.waits_for_answers(10.4, 0.5) and one.waits_for_answers(10.6, 0.5)
    for _ in range(retry.FAILURES_TO_OPEN):
        one.failed(10.0, None, sent_at=10.0)
    assert not one.waits_for_answers(10.6, 0.5)


def test_after_an_outage_the_rate_ramps_up_one_by_one() -> None:
    one = lane(concurrency=10)
    for _ in range(retry.FAILURES_TO_OPEN):
        one.failed(0.0, None, sent_at=0.0)
    one.pending = [held(number, number) for number in range(200)]
    sizes = []
    number = 0
    for _ in range(10):
        flying = []
        while send(one, number, now=100.0):
            flying.append(number)
            number += 1
        sizes.append(len(flying))
        for flight in flying:
            one.arrive(flight)
            one.succeeded()
    assert sizes == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_without_an_outage_it_doubles() -> None:
    one = lane(concurrency=10)
    one.window = 2
    one.succeeded()
    one.succeeded()
    assert one.window == 8


def test_a_lane_that_goes_leaves_nothing_in_flight_and_sends_nothing_more() -> None:
    endpoint = EndpointState()
    one = lane(endpoint=endpoint)
    one.pending = [held(1, 1), held(2, 2), held(3, 3)]
    send(one, 1), send(one, 2)
    assert endpoint.in_flight == 2
    one.close()
    assert endpoint.in_flight == 0
    assert one.next_batch(0.0) == []
