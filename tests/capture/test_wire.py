"""Every kind of protocol message, as each server sends it: whole it is decoded, cut or bent it is a typed error or another message."""
from __future__ import annotations

import pytest

from capture import pgoutput
from capture.pgoutput import MalformedMessage, decode
from tests.conftest import SourceDatabase

pytestmark = pytest.mark.django_db(transaction=True)

STATEMENTS = [
    "CREATE TYPE mood AS ENUM ('calm')",
    "CREATE DOMAIN percent AS numeric(5, 2)",
    "CREATE TABLE t (id int PRIMARY KEY, m mood, p percent, ts text[], big text, d timestamptz, b bytea)",
    "ALTER TABLE t ALTER big SET STORAGE EXTERNAL",
    "CREATE TABLE f (a text, b int); ALTER TABLE f REPLICA IDENTITY FULL",
    "CREATE PUBLICATION p FOR ALL TABLES",
    "SELECT pg_create_logical_replication_slot('wire_' || (SELECT oid FROM pg_database WHERE datname = current_database()), 'pgoutput')",
    "INSERT INTO t VALUES (1, 'calm', 1.5, '{a,NULL}', repeat('x', 3000), 'infinity', '\\x00ff'), (2, NULL, NULL, NULL, NULL, NULL, NULL)",
    "UPDATE t SET m = NULL",
    "UPDATE t SET id = id + 10",
    "DELETE FROM t",
    "INSERT INTO f VALUES ('é', 1)",
    "UPDATE f SET b = NULL",
    "DELETE FROM f",
    "TRUNCATE t, f RESTART IDENTITY CASCADE",
    "SELECT pg_logical_emit_message(true, 'prefix', 'content'), pg_logical_emit_message(false, '', '')",
    "SELECT pg_replication_origin_create('wire')",
    "SELECT pg_replication_origin_session_setup('wire')",
    "INSERT INTO f VALUES ('from elsewhere', 1)",
    "SELECT pg_replication_origin_session_reset()",
    "SELECT pg_replication_origin_drop('wire')",
]


def messages(database: SourceDatabase) -> list[bytes]:
    with database.admin(database.name) as conn:
        for statement in STATEMENTS:
            conn.execute(statement)  # type: ignore[arg-type]
        rows = conn.execute(
            "SELECT data FROM pg_replication_slots, pg_logical_slot_get_binary_changes(slot_name, NULL, NULL, 'proto_version', '1',"
            " 'publication_names', 'p', 'messages', 'true') WHERE database = current_database()"
        ).fetchall()
    return [bytes(row[0]) for row in rows]


def test_every_message_of_every_server(source_database: SourceDatabase) -> None:
    sent = messages(source_database)
    kinds = {type(decode(data)) for data in sent}
    assert kinds == set(pgoutput.Message.__args__), "every kind of message there is"  # type: ignore[attr-defined]
    for data in sent:
        short = data if len(data) < 500 else data[:250] + data[-250:]
        for length in [*range(min(len(data), 400)), *range(max(0, len(data) - 100), len(data))]:
            with pytest.raises(MalformedMessage):
                decode(data[:length])
        for at in range(len(short)):
            for bit in (0x01, 0x10, 0x80, 0xFF):
                place = at if at < 250 else len(data) - len(short) + at
                bent = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
                try:
                    decode(bent)
                except MalformedMessage:
                    pass
