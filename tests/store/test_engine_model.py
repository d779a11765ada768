"""The delivery engine beside a simple model of it: every call in random order, and after each one all that must hold.

The model knows which messages are owed, how often each was handed out and under which token it may still be settled.
What is out, parked and dead is read from the rows, and must agree with the model and with the counters. No time passes
here: leases and delays end because a rule moves them into the past.
"""
from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from consumers.models import Consumer
from consumers.store import claims, lifecycle, rewinds
from consumers.store.types import ColumnShape, Failure, LogRow, RelationShape
from tests.store.world import OID, Log, fetch, unsent

pytestmark = pytest.mark.django_db(transaction=True)

HOUR_MS = 3_600_000
OTHER_OID = 6
TABLES = {OID: "public.orders", OTHER_OID: "public.customers"}
ACTIONS = {b"I": "insert", b"U": "update", b"D": "delete"}

Receipt = tuple[UUID, int]


class Message(NamedTuple):
    """What the model keeps of a message in the log."""

    groups: frozenset[tuple[int, int]]
    table: str
    action: str
    key: int


class Parked(NamedTuple):
    """A parked row."""

    ids: list[int]
    reason: str
    deliver_count: int
    due: bool
    elapsed: bool
    token: UUID | None

    @property
    def untouched(self) -> bool:
        """Taken from the log, and waiting since then."""
        return self.reason == "blocked" and self.deliver_count == 0


class Rows:
    """What the store says about one consumer."""

    def __init__(self, consumer: UUID) -> None:
        self.leases: list[tuple[UUID, list[int]]] = fetch("SELECT token, ids FROM leases WHERE consumer = %s", consumer)  # type: ignore[assignment]
        self.parked = [
            Parked(*row)
            for row in fetch(
                "SELECT ids, reason, deliver_count, due_at IS NOT NULL, coalesce(due_at <= clock_timestamp(), false), lease_token"
                " FROM parked WHERE consumer = %s ORDER BY first_id", consumer,
            )
        ]  # fmt: skip
        self.position, *counts = fetch(
            "SELECT position, out_count, parked_count, dead_count, acked_count FROM consumer_standing WHERE consumer = %s", consumer
        )[0]
        self.counts = tuple(counts)
        self.out = {message: token for token, ids in self.leases for message in ids}
        self.blocking = {message for row in self.parked if row.reason != "dead" for message in row.ids}
        self.dead = {message for row in self.parked if row.reason == "dead" for message in row.ids}


drawn_row = st.tuples(
    st.sampled_from([OID, OID, OTHER_OID]), st.sampled_from(sorted(ACTIONS)), st.integers(0, 5), st.integers(0, 5), st.booleans()
)
picks = st.lists(st.integers(0, 10_000), min_size=1, max_size=8)
"""Places in a list whose length is not known yet."""


class Engine(RuleBasedStateMachine):
    """One consumer under every call that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        shape = RelationShape(OTHER_OID, "public", "customers", (ColumnShape("id", 20, -1, "bigint"),), ("id",), "d")
        self.relations = {OID: self.log.relation, OTHER_OID: self.log.appender.register_relation(1, shape)}
        self.messages: dict[int, Message] = {}
        self.owed: set[int] = set()  # taken from the log, neither finished nor given up
        self.delivered: Counter[int] = Counter()  # as deliver_count should say
        self.valid: dict[int, UUID] = {}  # the token that still settles a message
        self.used: list[Receipt] = []  # every receipt ever given
        self.delayed: set[int] = set()
        self.acked = 0
        self.position = 0

    @initialize(
        per_group=st.sampled_from([None, None, 1, 2]),
        max_out=st.sampled_from([3, 20, 1000]),
        max_deliver=st.sampled_from([None, 1, 2, 4]),
        columns=st.booleans(),
        moves=st.booleans(),
        acked=st.sampled_from([0, 1000]),
    )
    def begin(self, per_group: int | None, max_out: int, max_deliver: int | None, columns: bool, moves: bool, acked: int) -> None:
        self.columns, self.moves, self.acked = columns, moves, acked
        self.max_deliver = max_deliver
        self.settings: dict[str, Any] = {
            "max_per_group": per_group, "max_ack_pending": max_out, "actions": list(ACTIONS.values()), "tables": [],
            "status": "active",
        }  # fmt: skip
        self.id = self.log.consumer(acked, max_deliver=max_deliver, group_columns=["g"] if columns else [], **self.settings)
        self.position = self.rows().position

    def teardown(self) -> None:
        self.log.appender.close()

    # The log ------------------------------------------------------------------------------------------------

    @rule(drawn=st.lists(drawn_row, min_size=1, max_size=25))
    def append(self, drawn: list[tuple[int, bytes, int, int, bool]]) -> None:
        made = []
        for oid, action, key, before, moved in drawn:
            old = before if self.moves and moved and action == b"U" else None
            made.append((self.row(oid, action, key, old), oid, action, key, old))
        self.log.append(*[row for row, *_ in made])
        last = fetch("SELECT id FROM messages WHERE source = %s ORDER BY id DESC LIMIT %s", self.log.source.pk, len(made))
        for (id_,), (_, oid, action, key, old) in zip(reversed(last), made, strict=True):
            groups = {(oid, key % 3), (oid, (key if old is None else old) % 3)} if self.columns else {(oid, key), (oid, key if old is None else old)}
            self.messages[id_] = Message(frozenset(groups), TABLES[oid], ACTIONS[action], key)

    def row(self, oid: int, action: bytes, key: int, old: int | None) -> LogRow:
        self.log.lsn += 10
        changes = None if old is None else b'{"g":%d}' % (old % 3)
        return LogRow(
            self.relations[oid], oid, action, b'["%d"]' % key, None if old is None else b'["%d"]' % old, 7, self.log.lsn, 0, 0,
            b'{"id":%d,"g":%d}' % (key, key % 3), changes, None, True,
        )  # fmt: skip

    # Receivers ----------------------------------------------------------------------------------------------

    @rule(limit=st.sampled_from([1, 1, 2, 5, 20, 100]), times=st.integers(1, 3), most_bytes=st.sampled_from([None, None, 1, 60]))
    def receive(self, limit: int, times: int, most_bytes: int | None) -> None:
        for _ in range(times):
            self.claim(limit, most_bytes)

    def claim(self, limit: int, most_bytes: int | None = None) -> list[Receipt]:
        before = self.rows()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(claims, "MAX_CLAIM_BYTES", most_bytes or claims.MAX_CLAIM_BYTES)
            claim = claims.claim(self.id, limit, lease_ms=HOUR_MS, holder=uuid4())
        after = self.rows()
        batch = [message.id for message in claim.messages]
        self.note_taken(before, after)
        if self.settings["status"] != "active":
            assert not batch and claim.at_end
            return []
        assert batch == sorted(set(batch)) and len(batch) <= limit
        assert not batch or len(after.out) <= self.settings["max_ack_pending"]
        assert not self.delayed & set(batch), "handed out before its delay was over"
        for message in claim.messages:
            self.check_handed_out(message.id, batch, before, after)
        if self.settings["max_per_group"] is not None:
            assert max(Counter(group for id_ in batch for group in self.messages[id_].groups).values(), default=0) <= self.settings["max_per_group"]
        for message in claim.messages:
            self.delivered[message.id] += 1
            assert message.deliver_count == self.delivered[message.id] and claim.token is not None
            self.valid[message.id] = claim.token
            self.used.append((claim.token, message.id))
        if not batch and claim.at_end and len(after.out) < self.settings["max_ack_pending"]:
            assert not [row for row in after.parked if row.elapsed], ("something was due", before.counts, after.counts, fetch("select extract(epoch from due_at-clock_timestamp()), ids, reason, first_id, not_before, grp from parked where consumer=%s", self.id), self.settings, claim)
            assert after.position >= max(self.messages, default=0), "the log goes on"
        return [(claim.token, id_) for id_ in batch if claim.token is not None]

    def note_taken(self, before: Rows, after: Rows) -> None:
        """Messages the claim took from the log, and parked ones that the settings leave out by now."""
        assert after.position >= before.position
        self.position = after.position
        self.owed |= {id_ for id_ in self.messages if before.position < id_ <= after.position and self.wanted(id_)}
        for row in before.parked:
            if row.untouched:
                held = after.out.keys() | after.blocking | after.dead
                self.drop({id_ for id_ in row.ids if id_ not in held and not self.wanted(id_)})
        ended = before.out.keys() - after.out.keys()
        assert ended <= after.blocking | after.dead

    def check_handed_out(self, id_: int, batch: list[int], before: Rows, after: Rows) -> None:
        fresh = id_ > before.position or any(id_ in row.ids and row.untouched for row in before.parked)
        assert id_ in self.owed and (self.wanted(id_) or not fresh)
        groups = self.messages[id_].groups
        waits = {other for other in self.owed - after.dead if other < id_ and self.messages[other].groups & groups}
        assert waits <= set(batch), "a group was overtaken"

    @rule(chosen=picks, junk=st.booleans())
    def ack(self, chosen: list[int], junk: bool) -> None:
        self.settle_ack(self.any_receipts(chosen) + (self.junk() if junk else []))

    @rule()
    def ack_everything(self) -> None:
        out = self.rows().out
        self.settle_ack([(token, id_) for id_, token in out.items()])

    def settle_ack(self, named: list[Receipt]) -> None:
        good = {id_ for token, id_ in named if self.valid.get(id_) == token}
        assert claims.ack(self.id, named) == (len(good), len(named) - len(good))
        self.acked += len(good)
        self.drop(good)

    @rule(chosen=picks, delay=st.sampled_from([0, 0, HOUR_MS]), junk=st.booleans(), failed=st.booleans())
    def nack(self, chosen: list[int], delay: int, junk: bool, failed: bool) -> None:
        named = self.any_receipts(chosen) + (self.junk() if junk else [])
        before = self.rows()
        good = {id_ for token, id_ in named if self.valid.get(id_) == token and id_ not in before.dead}
        if failed:
            settled = claims.fail(self.id, [Failure(token, id_, delay, "answered 500", 500) for token, id_ in named])
        else:
            settled = claims.nack(self.id, named, delay)
        assert settled == (len(good), len(named) - len(good))
        after = self.rows()
        assert not good & after.out.keys()
        for id_ in good:
            del self.valid[id_]
            self.delayed.discard(id_)
            if delay and id_ not in after.dead:
                self.delayed.add(id_)
            if id_ in before.out:
                assert (id_ in after.dead) == (self.max_deliver is not None and self.delivered[id_] >= self.max_deliver)
        for id_ in before.out.keys() - after.out.keys() - good:
            leading = {other for other in before.out if other < id_ and other not in after.out and before.out[other] == before.out[id_]}
            assert any(self.messages[other].groups & self.messages[id_].groups for other in leading)
            if failed:
                self.delivered[id_] -= 1
                del self.valid[id_]

    @rule(chosen=picks, junk=st.booleans())
    def extend(self, chosen: list[int], junk: bool) -> None:
        named = self.any_receipts(chosen) + (self.junk() if junk else [])
        before = self.rows()
        good = {id_ for token, id_ in named if before.out.get(id_) == token}
        settled = claims.extend(self.id, named, HOUR_MS)
        after = self.rows()
        late = {id_ for token, id_ in named if self.valid.get(id_) == token} - before.out.keys() - before.dead
        revived = after.out.keys() - before.out.keys()
        assert settled == (len(good | revived), len(named) - len(good | revived)) and revived <= late
        assert after.out == before.out | {id_: self.valid[id_] for id_ in revived}
        leading = {id_ for row in before.parked if row.due for id_ in row.ids}
        assert late & leading <= revived or len(after.out) >= self.settings["max_ack_pending"]

    @rule(chosen=picks)
    def undo(self, chosen: list[int]) -> None:
        named = self.any_receipts(chosen)
        out = self.rows().out
        good = {id_ for token, id_ in named if out.get(id_) == token}
        assert claims.give_back(self.id, unsent(named, 7)) == len(good)
        for id_ in good:
            self.delivered[id_] -= 1
            del self.valid[id_]

    @rule(chosen=picks, junk=st.booleans())
    def another_consumer_settles(self, chosen: list[int], junk: bool) -> None:
        named = self.any_receipts(chosen) + (self.junk() if junk else [])
        other = getattr(self, "other", None) or self.log.consumer()
        self.other = other
        assert claims.ack(other, named) == claims.nack(other, named) == claims.extend(other, named, 1000) == (0, len(named))

    # Time ---------------------------------------------------------------------------------------------------

    @rule(every=st.integers(1, 3))
    def leases_end(self, every: int) -> None:
        """Receivers that died or dawdle; every one of them, or only some."""
        fetch("UPDATE leases SET until = clock_timestamp() - interval '1 s' WHERE consumer = %s AND id %% %s = 0", self.id, every)

    @rule()
    def delays_end(self) -> None:
        fetch("UPDATE parked SET not_before = clock_timestamp() WHERE consumer = %s AND not_before IS NOT NULL", self.id)
        fetch("UPDATE parked SET due_at = clock_timestamp() WHERE consumer = %s AND due_at > clock_timestamp()", self.id)
        self.delayed.clear()

    @rule()
    def a_partition_is_about_to_go(self) -> None:
        """What is out or parked is copied before the partition is detached; until then both hold it."""
        fetch(
            "INSERT INTO kept_messages SELECT m.* FROM messages m JOIN (SELECT unnest(ids) AS id FROM leases UNION"
            " SELECT unnest(ids) FROM parked) needed USING (id) ON CONFLICT DO NOTHING"
        )

    # People -------------------------------------------------------------------------------------------------

    @rule(chosen=picks, drop=st.booleans())
    def redrive_by_id(self, chosen: list[int], drop: bool) -> None:
        known = sorted(self.messages)
        ids = {known[pick % len(known)] for pick in chosen} if known else set()
        self.redrive(drop, ids, ids=[*ids, *ids, 10**15])

    @rule(state=st.sampled_from(["dead", "parked", None]), drop=st.sampled_from([False, False, True]))
    def redrive_by_state(self, state: str | None, drop: bool) -> None:
        rows = self.rows()
        chosen = {"dead": rows.dead, "parked": rows.blocking, None: rows.dead | rows.blocking}[state]
        self.redrive(drop, chosen, state=state)

    @rule(key=st.integers(0, 5), state=st.sampled_from(["dead", None]), drop=st.booleans())
    def redrive_by_key(self, key: int, state: str | None, drop: bool) -> None:
        rows = self.rows()
        chosen = {id_ for id_ in rows.dead | (rows.blocking if state is None else set()) if self.messages[id_].key == key}
        self.redrive(drop, chosen, state=state, key=[str(key)])

    @rule()
    def redrive_of_the_future(self) -> None:
        later = lifecycle.clock() + timedelta(hours=1)
        self.redrive(True, set(), since=later)
        self.redrive(False, set(), until=later - timedelta(days=1))

    def redrive(self, drop: bool, chosen: set[int], **how: Any) -> None:
        before = self.rows()
        meant = chosen & (before.dead | before.blocking)
        assert (lifecycle.discard if drop else lifecycle.retry)(self.id, **how) == len(meant)
        if drop:
            self.drop(meant)
        else:
            for id_ in meant & before.dead:
                self.delivered[id_] = 0
            self.delayed -= meant

    @rule(
        actions=st.sampled_from([["insert"], ["insert", "update"], ["insert", "update", "delete"]]),
        tables=st.sampled_from([[], ["public.orders"], ["public.*"]]),
        per_group=st.sampled_from([None, 1, 3]),
        max_out=st.sampled_from([2, 30, 1000]),
    )
    def edit(self, actions: list[str], tables: list[str], per_group: int | None, max_out: int) -> None:
        self.change(actions=actions, tables=tables, max_per_group=per_group, max_ack_pending=max_out)

    @rule()
    def pause_or_resume(self) -> None:
        if self.settings["status"] != "disabled":
            self.change(status="paused" if self.settings["status"] == "active" else "active")

    @precondition(lambda self: self.messages)
    @rule(pick=st.integers(0, 10_000), ahead=st.booleans())
    def rewind(self, pick: int, ahead: bool) -> None:
        known = sorted(self.messages)
        point = known[pick % len(known)] - 1
        if point >= self.position and not ahead:
            point = max(known[0], self.position) - 1
        done = rewinds.rewind(self.id, self.log.source.pk, point)
        moved = point < self.position
        self.position = min(self.position, point)
        assert (done.replay_id is not None, done.position) == (moved, self.position)
        if not moved:
            return
        self.drop({id_ for id_ in self.owed if id_ > point})
        self.valid.clear()
        for id_ in known:
            if id_ > point:
                self.delivered[id_] = 0
        assert not self.rows().out
        assert self.settings["status"] == "disabled" or done.messages_estimate == sum(id_ > point and self.wanted(id_) for id_ in known)

    @rule(really=st.integers(0, 3))
    def disable(self, really: int) -> None:
        if really or not self.owed or self.settings["status"] == "disabled":  # what is owed is no precondition: it may differ when a run is repeated
            return
        self.change(status="disabled")
        lifecycle.disable(self.id)
        self.drop(set(self.owed))

    @rule()
    def activate(self) -> None:
        was = self.settings["status"]
        self.change(status="active")
        if was == "disabled":
            lifecycle.enable(self.id)
            self.position = self.rows().position

    @rule()
    def work_all_off(self) -> None:
        """Nothing is lost: after all leases and delays have ended, everything owed comes, dead letters apart."""
        self.activate()
        self.change(max_ack_pending=1000)
        self.leases_end(1)
        self.delays_end()
        for _ in range(10 * len(self.messages) + 10):
            got = self.claim(100)
            if not got:
                break
            self.settle_ack(got)
        assert self.owed == self.rows().dead

    # What must hold -----------------------------------------------------------------------------------------

    @invariant()
    def rows_agree(self) -> None:
        if not hasattr(self, "id"):
            return
        rows = self.rows()
        parked = [id_ for row in rows.parked for id_ in row.ids]
        out = [id_ for _, ids in rows.leases for id_ in ids]
        assert len(set(parked + out)) == len(parked) + len(out), "a message in two places"
        assert set(parked + out) == self.owed
        assert rows.counts == (len(out), len(rows.blocking), len(rows.dead), self.acked)
        assert not fetch("SELECT FROM leases l JOIN consumer_position p USING (consumer) WHERE l.id < p.lease_floor"), "a lease below the floor"
        assert rows.position == self.position

    @invariant()
    def groups_are_out_once(self) -> None:
        if not hasattr(self, "id"):
            return
        rows = self.rows()
        holders: dict[tuple[int, int], UUID] = {}
        for id_, token in rows.out.items():
            for group in self.messages[id_].groups:
                assert holders.setdefault(group, token) == token, "a group is out twice at once"
        led: set[tuple[int, int]] = set()
        for row in rows.parked:
            groups = self.messages[row.ids[0]].groups
            assert all(self.messages[id_].groups == groups for id_ in row.ids) and row.ids == sorted(row.ids)
            if row.reason == "dead":
                assert not row.due
                continue
            leads = not groups & led and not groups & holders.keys()
            assert row.due == leads, "due although it must wait" if row.due else "nothing will ever make it due"
            led |= groups

    @invariant()
    def deliveries_are_counted(self) -> None:
        if not hasattr(self, "id"):
            return
        for row in self.rows().parked:
            assert all(self.delivered[id_] == row.deliver_count for id_ in row.ids)
            assert row.token is None or all(self.valid.get(id_) == row.token for id_ in row.ids)

    # Small things -------------------------------------------------------------------------------------------

    def rows(self) -> Rows:
        return Rows(self.id)

    def wanted(self, id_: int) -> bool:
        message = self.messages[id_]
        return message.action in self.settings["actions"] and self.settings["tables"] in ([], ["public.*"], [message.table])

    def change(self, **fields: Any) -> None:
        self.settings.update(fields)
        Consumer.objects.filter(pk=self.id).update(**fields)

    def drop(self, ids: set[int]) -> None:
        self.owed -= ids
        self.delayed -= ids
        for id_ in ids:
            self.valid.pop(id_, None)

    def any_receipts(self, chosen: list[int]) -> list[Receipt]:
        """Receipts by their place from the newest: valid ones more often, used up ones too, some twice."""
        valid = [(token, id_) for id_, token in self.valid.items()]
        known = valid + valid + self.used[-20:]
        return [known[pick % len(known)] for pick in chosen] if known else []

    def junk(self) -> list[Receipt]:
        valid = list(self.valid.items())[:1]
        return [(uuid4(), 1), *[(uuid4(), id_) for id_, _ in valid], *[(token, id_ + 10**9) for id_, token in valid]]


def test_the_engine_does_what_a_simple_model_says(long_run: bool) -> None:
    bounds = {"max_examples": 300, "stateful_step_count": 100} if long_run else {"max_examples": 40, "stateful_step_count": 40}
    run_state_machine_as_test(
        Engine,
        settings=settings(
            **bounds, deadline=None, database=None, derandomize=not long_run, suppress_health_check=list(HealthCheck), print_blob=False, phases=[Phase.generate]
        ),
    )
