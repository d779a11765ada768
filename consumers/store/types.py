"""What goes into the log and what comes out of it, as plain tuples. Pure."""
from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any, NamedTuple, NewType
from uuid import UUID

Lsn = NewType("Lsn", int)
"""A byte position in the WAL, 64 bits; written `16/B374D848` for people."""

ACTIONS = {"I": "insert", "U": "update", "D": "delete", "T": "truncate", "R": "read"}


class Progress(NamedTuple):
    """How far a source's history is stored. Compared as a whole before every append."""

    epoch: int
    system_identifier: str
    timeline: int
    stored_lsn: int
    """End LSN of the last transaction stored completely."""
    part_lsn: int
    """Commit LSN of the transaction stored in part, 0 when there is none."""
    part_changes: int
    """How many of its changes are stored."""
    reached_lsn: int
    """Up to here everything is stored or had nothing for us; the most that is ever confirmed."""


class Proof(NamedTuple):
    """The newest transaction in a source's log, and the publication it came under: a server of the same history has it too."""

    lsn: int
    """Of its commit."""
    xid: int
    committed_us: int
    publication: str


class LogRow(NamedTuple):
    """One change, ready for COPY. Texts are UTF-8 bytes of JSON."""

    relation: int
    """Id of the relation version (`Appender.register_relation`)."""
    table_oid: int
    action: bytes
    """One of b"I", b"U", b"D", b"T", b"R"."""
    key: bytes
    """JSON array of the primary key's values as text, b"[]" without one."""
    old_key: bytes | None
    """The key before, only when an update changed it."""
    xid: int
    commit_lsn: int
    commit_idx: int
    committed_us: int
    """Microseconds since 2000-01-01 UTC, as pgoutput sends them."""
    record: bytes
    changes: bytes | None
    unchanged: bytes | None
    """JSON array of the names of columns that were not sent (unchanged TOAST)."""
    old_values_known: bool
    annotations: bytes | None = None
    consumer: UUID | None = None
    """Set: the message is for this consumer alone."""


class ColumnShape(NamedTuple):
    """A column as the source has it, and the type of Postgres' own that its values are made of (consumers.source_types)."""

    name: str
    type_oid: int
    typmod: int
    type_name: str
    value_oid: int = 0
    """0: the type is one of Postgres' own itself."""
    value_typmod: int = -1
    value_is_exact: bool = True


class RelationShape(NamedTuple):
    """One shape of a table, as a Relation message and the source's catalog tell it."""

    oid: int
    schema: str
    table: str
    columns: tuple[ColumnShape, ...]
    primary_key: tuple[str, ...]
    replica_identity: str


def stored_shape(oid: int, schema: str, table: str, columns: Iterable[dict[str, Any]], primary_key: Iterable[str], identity: str) -> RelationShape:
    """A row of relation_version as what it was made of."""
    return RelationShape(oid, schema, table, tuple(ColumnShape(**column) for column in columns), tuple(primary_key), identity)


def key_text(values: Iterable[str]) -> str:
    """A row's key as capture writes it."""
    return json.dumps(list(values), ensure_ascii=False, separators=(",", ":"))


class ClaimedMessage(NamedTuple):
    """One message handed out. `record`, `changes`, `key`, `unchanged`, `annotations` are JSON texts."""

    id: int
    deliver_count: int
    group: int
    group2: int | None
    max_batch: int | None
    action: str
    schema: str
    table: str
    record: str
    changes: str | None
    key: str
    commit_lsn: int
    commit_idx: int
    committed_at: str
    epoch: int
    unchanged: str | None
    old_values_known: bool
    annotations: str | None
    source_id: UUID
    backfill_id: UUID | None = None
    replay_id: UUID | None = None
    where_undecided: bool = False
    """Let through because the consumer's filter hangs on something the message does not carry."""
    is_fresh: bool = False
    """It was parked, and nobody has had it yet."""


def part_failed(messages: Iterable[ClaimedMessage], failed: Collection[int]) -> tuple[list[ClaimedMessage], list[ClaimedMessage]]:
    """Of one claim's messages, in log order: those that go on, and those that failed.

    What stands behind a failed one in a group of its is neither, failed or not: it comes back with it.
    """
    held: set[int] = set()
    going, failing = [], []
    for message in messages:
        groups = {message.group} if message.group2 is None else {message.group, message.group2}
        if held & groups:
            held |= groups
        elif message.id in failed:
            held |= groups
            failing.append(message)
        else:
            going.append(message)
    return going, failing


class Claim(NamedTuple):
    """What one claim handed out.

    `at_end`: nothing more can be had now; not looked for when one was asked for and came. `next_due_ms`: when nothing was
    handed out, milliseconds until the next lease ends or the next parked message falls due, None when nothing is under way.
    """

    token: UUID | None
    messages: list[ClaimedMessage]
    at_end: bool
    next_due_ms: int | None
    version: datetime | None
    """Of the consumer's configuration that it went by: what is made of the messages goes by the same."""


class Settled(NamedTuple):
    """How many receipts counted, and how many named nothing that is out."""

    done: int
    stale: int


class Failure(NamedTuple):
    """One message a push could not deliver."""

    token: UUID
    id: int
    delay_ms: int
    error: str
    status: int | None = None
    reason: str = "retry"
    max_batch: int | None = None
    """The next push of this message may carry no more than so many messages."""


class Backlog(NamedTuple):
    """A consumer's messages by state. `waiting` is counted up to `waiting_limit` only."""

    waiting: int
    out: int
    retry: int
    blocked: int
    error: int
    dead: int

    @property
    def undelivered(self) -> int:
        return self.waiting + self.out + self.retry + self.blocked + self.error
