"""The quick way of a claim hands out what the other would: twins with the same settings, one taken from by each, in random use."""
from __future__ import annotations

import json
import random
from typing import Any
from uuid import UUID

import pytest

from consumers.store import claims
from tests.store.world import SHAPE, Log, fetch

pytestmark = pytest.mark.django_db(transaction=True)

STEPS = 60
HOUR_MS = 3_600_000
SAME = (
    "deliver_count", "grp", "grp2", "max_batch", "relation", "action", "record", "changes", "key", "commit_idx", "committed_at", "epoch",
    "unchanged", "old_values_known", "annotations", "backfill", "replay",
)  # fmt: skip
STANDING = "SELECT out_count, parked_count, dead_count, acked_count, failed_count FROM consumer_standing WHERE consumer = %s"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "of some tables": {"tables": ["public.orders"]},
    "of a schema": {"tables": ["other.*"]},
    "of some actions": {"actions": ["update", "truncate"]},
    "soon full": {"max_ack_pending": 4},
    "one at a time": {"max_ack_pending": 1},
    "two tries": {"max_deliver": 2, "max_ack_pending": 50},
    "per group": {"max_per_group": 1},
    "groups of its own": {"group_columns": ["n"]},
    "filtered": {"where": "action = 'insert'"},
    "latest rows": {"stream": "rows"},
    "paused": {"status": "paused"},
}


def claimed(function: str, consumer: UUID, limit: int) -> list[dict[str, Any]]:
    fetch("SELECT setseed(0.5)")  # whether what is parked comes first is left to chance
    rows = fetch(f"SELECT to_jsonb(c) FROM {function}(%s, %s, {HOUR_MS}, NULL, 20000, 1000000) c", consumer, limit)
    return [json.loads(row[0]) for row in rows]


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """What twins have in common. What is for one of them alone has an id of its own, by which it may be in what is repeated."""
    of_both = {name: row[name] for name in SAME if not (name == "replay" and row["action"] == "R")}
    return {**of_both, "needs_verdicts": bool(row["needs_verdicts"]), "fresh": bool(row["fresh"])}


class Twins:
    def __init__(self, log: Log, randomly: random.Random, settings: dict[str, Any]) -> None:
        self.log, self.randomly = log, randomly
        self.quick, self.other = log.consumer(1000, **settings), log.consumer(1000, **settings)
        self.out: list[tuple[list[tuple[UUID, int]], list[tuple[UUID, int]]]] = []
        self.taken = 0

    def both(self) -> tuple[UUID, UUID]:
        return self.quick, self.other

    def append(self) -> None:
        key = self.randomly.randrange(6)
        row = self.log.row(
            key, self.randomly.randrange(6) if self.randomly.random() < 0.15 else None, self.randomly.choice([b"I", b"I", b"U", b"D", b"T"])
        )
        if self.randomly.random() < 0.2:
            row = row._replace(relation=self.elsewhere())
        self.log.append(row)

    def elsewhere(self) -> int:
        return self.log.appender.register_relation(1, SHAPE._replace(oid=7777, schema=self.randomly.choice(["other", "public"]), table="others"))

    def append_for_each(self) -> None:
        """As a backfill does: a message for one consumer alone, here the same for both."""
        self.log.append(self.log.row(9, action=b"I"), self.log.row(9, action=b"I"))
        for twin, back in zip(self.both(), (1, 0), strict=True):
            fetch("UPDATE messages SET consumer = %s, record = '{\"id\":9}', action = 'R'"
                  " WHERE id = (SELECT id FROM messages ORDER BY id DESC OFFSET %s LIMIT 1)", twin, back)  # fmt: skip

    def begin_later(self) -> None:
        fetch("UPDATE consumer_position SET start_lsn = %s WHERE consumer = ANY (%s)", self.log.lsn + 25, list(self.both()))

    def repeat(self) -> None:
        [(last,)] = fetch("SELECT coalesce(max(id), 0) FROM messages")
        fetch("UPDATE consumer_position SET replay = '00000000-0000-0000-0000-000000000001', replay_from = %s, replay_to = %s"
              " WHERE consumer = ANY (%s)", last + 1, last + 3, list(self.both()))  # fmt: skip

    def claim(self) -> None:
        limit = self.randomly.choice([1, 1, 1, 3, 20])
        quick, other = claimed("sequin_claim", self.quick, limit), claimed("sequin_claim_any", self.other, limit)
        assert [comparable(row) for row in quick] == [comparable(row) for row in other]
        if quick[0]["token"] is None:
            assert quick[0]["at_end"] == other[0]["at_end"]
            due = quick[0]["next_due_ms"], other[0]["next_due_ms"]
            assert None not in due and abs(due[0] - due[1]) < 60_000 or due == (None, None), due
            return
        self.taken += len(quick)
        first, second = ([(UUID(rows[0]["token"]), row["id"]) for row in rows] for rows in (quick, other))
        self.out.append((first, second))

    def settle(self) -> None:
        if not self.out:
            return
        held = self.out.pop(self.randomly.randrange(len(self.out)))
        how = self.randomly.choice(["ack", "ack", "ack", "some", "nack", "expire"])
        for twin, receipts in zip(self.both(), held, strict=True):
            if how == "ack":
                claims.ack(twin, receipts)
            elif how == "some":
                claims.ack(twin, receipts[: len(receipts) // 2])
            elif how == "nack":
                claims.nack(twin, receipts)
            else:
                fetch("UPDATE leases SET until = clock_timestamp() - interval '1 s' WHERE token = %s", receipts[0][0])

    def check(self) -> None:
        assert fetch(STANDING, self.quick) == fetch(STANDING, self.other)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", sorted(SETTINGS))
def test_the_quick_way_gives_what_the_other_gives(log: Log, settings: str, seed: int) -> None:
    randomly = random.Random(f"{settings} {seed}")
    twins = Twins(log, randomly, SETTINGS[settings])
    steps = [twins.append] * 6 + [twins.claim] * 5 + [twins.settle] * 4 + [twins.append_for_each, twins.repeat]
    twins.append()
    twins.begin_later()
    for _ in range(8):
        twins.append()
    for _ in range(STEPS):
        randomly.choice(steps)()
        twins.check()
    assert twins.taken > 3 or settings in ("paused", "filtered", "latest rows")
