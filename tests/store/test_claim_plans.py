"""No step of the engine grows with the backlog: the blocks it touches are counted, with little and with much waiting."""
from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import connection

from consumers.store import claims, lifecycle
from tests.store.world import Log, fetch

pytestmark = pytest.mark.django_db(transaction=True)

FEW = 3_000


def fill(log: Log, count: int, keys: int) -> None:
    """Messages straight into the log, as an append would put them there."""
    from consumers.store.connection import store_connection
    from consumers.store.partitions import ensure_ahead

    log.append(log.row(1))
    with store_connection() as conn:
        for begin in range(0, count, 500_000):
            conn.execute(
                "INSERT INTO messages (source, relation, table_oid, action, key, xid, commit_lsn, commit_idx, committed_at, epoch, record,"
                " old_values_known) SELECT %s, %s, 7, 'I', format('[\"%%s\"]', g %% %s), 1, 1000000, g, now(), 1,"
                " '{\"id\":1,\"filler\":\"' || repeat('x', 100) || '\"}', true FROM generate_series(%s::bigint, %s) g",
                [log.source.pk, log.relation, keys, begin + 1, min(count, begin + 500_000)],
            )
            ensure_ahead(conn)


def seed(rare: bool) -> float:
    """A seed after which the server's next random number is below 1/16, or is above a half: the engine leaves some of its work to chance."""
    for number in range(1, 1000):
        [[_, drawn]] = fetch("SELECT setseed(%s), random()", number / 1000)
        if drawn < 0.0625 if rare else drawn > 0.5:
            return number / 1000
    raise AssertionError("no such number in 1,000 seeds")


def blocks(query: str, parameters: list[Any], rare: bool = False) -> int:
    """Blocks that a call touches, statements inside functions included; the call is undone."""
    chance = seed(rare)
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT setseed(%s)", [chance])
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", parameters)
        plan = cursor.fetchone()[0][0]["Plan"]
        cursor.execute("ROLLBACK")
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def least_blocks(query: str, parameters: list[Any], rare: bool) -> int:
    """The first call also reads catalogs, as does any after autovacuum has been there."""
    return min(blocks(query, parameters, rare) for _ in range(4))


def claim_blocks(consumer: UUID, limit: int) -> tuple[int, ...]:
    """Of a claim, and of one that does not go the quick way; each where the log comes first and where what is parked does."""
    found = []
    for function in ("sequin_claim", "sequin_claim_any"):
        for rare in (True, False):
            query = f"SELECT * FROM {function}(%s, %s, 60000, NULL, 20000, 16000000)"
            fetch("VACUUM parked, leases, consumer_position")  # what was undone before has left its traces
            found.append(least_blocks(query, [consumer, limit], rare))
    return tuple(found)


def settle_blocks(consumer: UUID, limit: int) -> tuple[int, ...]:
    """Of an ack in both ways, each timed and not, a nack and an extend of one claim."""
    claim = claims.claim(consumer, limit, lease_ms=600_000)
    assert claim.token is not None and len(claim.messages) == limit
    tokens, ids = [claim.token] * limit, [message.id for message in claim.messages]
    nulls: list[Any] = [None] * limit
    lease = "SELECT * FROM sequin_ack_lease(%s, %s, %s::bigint[], false)", [consumer, claim.token, ids]
    anyway = "SELECT * FROM sequin_ack(%s, %s::uuid[], %s::bigint[])", [consumer, tokens, ids]
    nack = (
        "SELECT * FROM sequin_return(%s, %s::uuid[], %s::bigint[], %s::bigint[], %s::text[], %s::text[], %s::integer[], %s::integer[], true)",
        [consumer, tokens, ids, [0] * limit, ["retry"] * limit, nulls, nulls, nulls],
    )
    extend = "SELECT * FROM sequin_extend(%s, %s::uuid[], %s::bigint[], 1000)", [consumer, tokens, ids]
    found = []
    for (query, parameters), rare in ((lease, True), (lease, False), (anyway, True), (anyway, False), (nack, False), (extend, False)):
        found.append(least_blocks(query, parameters, rare))
    claims.ack(consumer, list(zip(tokens, ids, strict=True)))
    return tuple(found)


@pytest.mark.parametrize("limit", [1, 100])
def test_nothing_grows_with_what_waits(log: Log, limit: int, long_run: bool) -> None:
    consumer = log.consumer(1000)  # acks of the first thousand are timed
    fill(log, FEW, 1000)
    fetch("ANALYZE messages")  # statistics of a small log, as they stay for a while when it grows
    few = *claim_blocks(consumer, limit), *settle_blocks(consumer, limit)
    fill(log, 1_000_000 if long_run else 200_000, 1000)
    for what in ("old statistics", "new statistics"):
        connection.close()  # plans are made anew
        many = *claim_blocks(consumer, limit), *settle_blocks(consumer, limit)
        assert all(m <= 2 * f + 30 for f, m in zip(few, many, strict=True)), f"{what}: blocks went from {few} to {many}"
        fetch("ANALYZE messages")


@pytest.mark.parametrize("groups", [1, 20_000], ids=["one group", "many groups"])
def test_nothing_grows_with_what_is_parked(log: Log, groups: int, long_run: bool) -> None:
    count = 100_000 if long_run else 20_000
    consumer, other = log.consumer(max_ack_pending=1_000_000), log.consumer(max_ack_pending=1_000_000)
    fill(log, 2 * count, 10**9)
    few = *claim_blocks(consumer, 100), *settle_blocks(consumer, 100)
    assert max(few) < 4000, few  # some forty a message, also where the statistics are those of an empty table
    fetch(
        "INSERT INTO parked (consumer, source, grp, first_id, ids, reason, not_before, due_at, deliver_count)"
        " SELECT %s, source, CASE WHEN %s = 1 THEN 1 ELSE id END, id, ARRAY[id], CASE WHEN %s = 1 AND n > 1 THEN 'blocked' ELSE 'retry' END,"
        " now() + interval '1 hour', CASE WHEN %s = 1 AND n > 1 THEN NULL ELSE now() + interval '1 hour' END, 1"
        " FROM (SELECT *, row_number() OVER (ORDER BY id) AS n FROM messages ORDER BY id LIMIT %s) m RETURNING 1",
        other, groups, groups, groups, count,
    )  # fmt: skip
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE consumer_position SET parked_count = %s, position = (SELECT max(first_id) FROM parked) WHERE consumer = %s", [count, other]
        )
    for what in ("old statistics", "new statistics"):
        connection.close()
        many = *claim_blocks(other, 100), *settle_blocks(other, 100)
        # Each message asks whether its group is parked: a few blocks more for each, whatever the number parked.
        assert all(m <= 2 * f + 1500 for f, m in zip(few, many, strict=True)), f"{what}: blocks went from {few} to {many}"
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE parked")


def test_dead_letters_by_the_thousand_are_retried_and_discarded_by_filter(log: Log, long_run: bool) -> None:
    count = 100_000 if long_run else 20_000
    consumer = log.consumer()
    fill(log, count, 10**9)
    fetch(
        "INSERT INTO parked (consumer, source, grp, first_id, ids, reason, deliver_count, lease_token) SELECT %s, source, id, id, ARRAY[id],"
        " 'dead', 3, %s FROM messages WHERE commit_lsn = 1000000 RETURNING 1",
        consumer, uuid4(),
    )  # fmt: skip
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE consumer_position SET dead_count = %s, position = (SELECT max(first_id) FROM parked) WHERE consumer = %s", [count, consumer]
        )
    half = fetch("SELECT array_agg(first_id) FROM (SELECT first_id FROM parked ORDER BY id LIMIT %s) x", count // 2)[0][0]
    assert lifecycle.retry(consumer, half) == count // 2
    assert lifecycle.backlog(consumer).retry == count // 2 and lifecycle.backlog(consumer).dead == count // 2
    assert lifecycle.discard(consumer, state="dead") == count // 2
    assert lifecycle.backlog(consumer).dead == 0
    assert len(claims.claim(consumer, 1000, lease_ms=1000).messages) == 1000
