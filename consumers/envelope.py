"""Make the message that consumers see out of a stored one. Pure.

The stored JSON texts are put in as they are, never decoded: values stay exact and it is fast. The same bytes are a push's
body and a pull's `data`.
"""
from __future__ import annotations

import binascii
import json
from functools import lru_cache
from typing import NamedTuple, Protocol
from uuid import UUID


class StoredMessage(Protocol):
    """What `render` reads of a message; consumers.store.types.ClaimedMessage has it."""

    @property
    def action(self) -> str: ...
    @property
    def schema(self) -> str: ...
    @property
    def table(self) -> str: ...
    @property
    def record(self) -> str: ...
    @property
    def changes(self) -> str | None: ...
    @property
    def key(self) -> str: ...
    @property
    def commit_lsn(self) -> int: ...
    @property
    def commit_idx(self) -> int: ...
    @property
    def committed_at(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def unchanged(self) -> str | None: ...
    @property
    def old_values_known(self) -> bool: ...
    @property
    def annotations(self) -> str | None: ...
    @property
    def source_id(self) -> UUID: ...
    @property
    def backfill_id(self) -> UUID | None: ...
    @property
    def replay_id(self) -> UUID | None: ...
    @property
    def where_undecided(self) -> bool: ...


def idempotency_key(message: StoredMessage) -> str:
    """The same for every delivery of one change, for ever: base64 of `source id.epoch:commit_lsn:commit_idx`.

    Of a backfilled row: of `backfill id:schema.table:key`; where there is no key, its number in the backfill.
    """
    if message.backfill_id is None:
        text = f"{_uuid(message.source_id.int)}.{message.epoch}:{message.commit_lsn}:{message.commit_idx}"
    else:
        key = message.commit_idx if message.key == "[]" else message.key
        text = f"{message.backfill_id}:{message.schema}.{message.table}:{key}"
    return binascii.b2a_base64(text.encode(), newline=False).decode()


class Addressing(NamedTuple):
    """What all messages of one consumer have in common, made once for many."""

    tail: str
    """The end of their metadata: `consumer` and `database`, as JSON."""
    latest: bool
    """A stream of rows: `record` and `metadata` only."""


def addressing(
    *, consumer_id: UUID, consumer_name: str, source_id: UUID, source_name: str, database: str, stream: str = "changes"
) -> Addressing:
    tail = (
        f'"consumer":{{"id":"{consumer_id}","name":{_text(consumer_name)}}},'
        f'"database":{{"id":"{source_id}","name":{_text(source_name)},"database":{_text(database)}}}}}'
    )
    return Addressing(tail, stream == "rows")


def render(message: StoredMessage, to: Addressing, key: str = "") -> bytes:
    """The message as JSON, UTF-8. `key`: its idempotency key, where that is known."""
    if to.latest:
        return f'{{"record":{message.record},"metadata":{metadata(message, to, key)}}}'.encode()
    return (
        f'{{"record":{message.record},"changes":{message.changes or "null"},"action":"{message.action}",'
        f'"metadata":{metadata(message, to, key)}}}'
    ).encode()


def metadata(message: StoredMessage, to: Addressing, key: str = "") -> str:
    """The message's `metadata` as JSON."""
    extra = ""
    if message.unchanged is not None:
        extra = f'"unchanged_columns":{message.unchanged},'
    if message.action == "update" and not message.old_values_known:
        extra += '"old_values_known":false,'
    if message.where_undecided:
        extra += '"where_undecided":true,'
    if message.replay_id is not None:
        extra += f'"replay_id":"{message.replay_id}",'
    return (
        f'{{"table_schema":{_text(message.schema)},"table_name":{_text(message.table)},'
        f'"record_pks":{message.key},"commit_timestamp":"{message.committed_at}","commit_lsn":{message.commit_lsn},'
        f'"commit_idx":{message.commit_idx},"idempotency_key":"{key or idempotency_key(message)}",{extra}'
        f'"transaction_annotations":{message.annotations or "null"},{to.tail}'
    )


@lru_cache(maxsize=4096)  # by its number: a UUID's own hash is a call of Python code
def _uuid(number: int) -> str:
    return str(UUID(int=number))


@lru_cache(maxsize=4096)  # names of tables: a few, again and again
def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
