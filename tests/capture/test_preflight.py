"""The pre-flight names what is wrong with a source and the SQL that mends it; running that SQL mends it."""
from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.management import call_command
from psycopg import sql

from consumers import changes
from consumers.models import Consumer, Source
from consumers.preflight import Finding, check
from consumers.source_connection import SourceUnreachable
from tests.conftest import SourceDatabase

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def source(source_database: SourceDatabase, make_source: Any) -> Source:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY, a int, b int)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE orders")
    return make_source()


def wrong(source: Source) -> dict[str, Finding]:
    return {finding.name: finding for finding in check(source) if not finding.ok}


def admin(source_database: SourceDatabase, statement: str) -> None:
    with source_database.admin(source_database.name) as conn:
        conn.execute(statement)


def test_a_good_source_has_nothing_that_blocks(source: Source) -> None:
    assert not [finding for finding in check(source) if finding.blocking and not finding.ok]
    names = {finding.name for finding in check(source)}
    assert {"version", "wal_level", "replication", "replication_connection", "max_replication_slots", "max_wal_senders", "slot",
            "retained_wal", "max_slot_wal_keep_size", "publication"} <= names  # fmt: skip


def test_a_role_that_may_not_replicate(source: Source, source_database: SourceDatabase) -> None:
    role = sql.Identifier(source_database.name)
    with source_database.admin() as conn:
        conn.execute(sql.SQL("ALTER ROLE {} NOREPLICATION").format(role))
    blocked = wrong(source)
    assert blocked["replication"].blocking and "REPLICATION" in blocked["replication"].sql
    assert "ALTER ROLE" in blocked["replication_connection"].text
    admin(source_database, blocked["replication"].sql)
    assert "replication" not in wrong(source) and "replication_connection" not in wrong(source)


def test_a_slot_that_is_gone_or_foreign(source: Source, source_database: SourceDatabase) -> None:
    source_database.execute("SELECT pg_drop_replication_slot(%s)", [source.slot_name])
    gone = wrong(source)["slot"]
    assert gone.blocking and "there is no slot" in gone.text
    admin(source_database, "SELECT pg_create_physical_replication_slot('other_kind_of_slot')")
    try:
        source.slot_name = "other_kind_of_slot"
        assert "choose another" not in wrong(source)["slot"].text and "expected pgoutput" in wrong(source)["slot"].text
    finally:
        admin(source_database, "SELECT pg_drop_replication_slot('other_kind_of_slot')")
    source.slot_name = Source.objects.get(pk=source.pk).slot_name
    admin(source_database, gone.sql)
    assert "slot" not in wrong(source)


def test_a_publication_that_is_gone_empty_or_leaves_actions_out(source: Source, source_database: SourceDatabase) -> None:
    source_database.execute("ALTER PUBLICATION sequin_pub SET (publish = 'insert, update')")
    partial = wrong(source)["publication_actions"]
    assert "leaves out delete, truncate" in partial.text
    admin(source_database, partial.sql)
    assert "publication_actions" not in wrong(source)
    source_database.execute("ALTER PUBLICATION sequin_pub DROP TABLE orders")
    assert "publishes 0 tables" in wrong(source)["publication"].text
    source_database.execute("DROP PUBLICATION sequin_pub")
    assert wrong(source)["publication"].blocking


def test_a_table_whose_updates_would_fail(source: Source, source_database: SourceDatabase) -> None:
    source_database.execute("CREATE TABLE keyless (a int)")
    source_database.execute("INSERT INTO keyless VALUES (1)")
    with pytest.raises(ValidationError, match="has neither a primary key nor another replica identity"):
        changes.save(Consumer(name="c", source=source, kind="pull", tables=["public.keyless"]))
    source_database.execute("UPDATE keyless SET a = 2")  # it was not published
    source_database.execute("ALTER PUBLICATION sequin_pub ADD TABLE keyless")
    with pytest.raises(Exception, match="does not have a replica identity"):
        source_database.execute("UPDATE keyless SET a = 3")
    failing = wrong(source)["replica_identity"]
    assert "public.keyless" in failing.text
    source_database.execute(failing.sql)
    source_database.execute("UPDATE keyless SET a = 3")
    assert "replica_identity" not in wrong(source)


@pytest.mark.parametrize(
    ("publish", "prepare", "name"),
    [
        ("orders (id, a)", "ALTER TABLE orders REPLICA IDENTITY FULL", "column_list"),
        ("orders (a, b)", "", "column_list"),
        ("orders WHERE (a > 1)", "", "row_filter"),
    ],
)
def test_lists_and_filters_that_make_updates_fail(
    source: Source, source_database: SourceDatabase, publish: str, prepare: str, name: str
) -> None:
    if source_database.version < 15:
        pytest.skip("Postgres 15 brought column lists and row filters")
    source_database.execute(f"ALTER PUBLICATION sequin_pub SET TABLE {publish}")
    if prepare:
        source_database.execute(prepare)
    source_database.execute("INSERT INTO orders VALUES (1, 2, 3)")
    with pytest.raises(Exception, match="cannot update table"):
        source_database.execute("UPDATE orders SET b = 4")
    failing = wrong(source)[name]
    assert "UPDATEs and DELETEs fail" in failing.text
    if failing.sql.startswith("ALTER"):
        source_database.execute(failing.sql)
        source_database.execute("UPDATE orders SET b = 4")
        assert name not in wrong(source)


@pytest.mark.parametrize(("publish", "prepare"), [("orders (id, a)", ""), ("orders WHERE (id > 1)", ""), ("orders", "FULL")])
def test_lists_and_filters_that_do_not(source: Source, source_database: SourceDatabase, publish: str, prepare: str) -> None:
    if source_database.version < 15:
        pytest.skip("Postgres 15 brought column lists and row filters")
    source_database.execute(f"ALTER PUBLICATION sequin_pub SET TABLE {publish}")
    if prepare:
        source_database.execute("ALTER TABLE orders REPLICA IDENTITY FULL")
    source_database.execute("INSERT INTO orders VALUES (1, 2, 3)")
    source_database.execute("UPDATE orders SET b = 4")
    assert not {"column_list", "row_filter"} & set(wrong(source))


def test_old_values_that_a_consumer_asks_for(source: Source, source_database: SourceDatabase) -> None:
    changes.save(Consumer(name="c", source=source, kind="pull", tables=["public.*"]))
    assert "old_values" not in wrong(source)
    Consumer.objects.update(where="new.a IS DISTINCT FROM old.a")
    weak = wrong(source)["old_values"]
    assert "public.orders does not give its old values" in weak.text
    source_database.execute(weak.sql)
    assert "old_values" not in wrong(source)


def test_a_role_that_may_not_read_the_table(source: Source, source_database: SourceDatabase) -> None:
    reader = f"{source_database.name}_r"
    with source_database.admin() as conn:
        conn.execute(f"CREATE ROLE {reader} LOGIN REPLICATION PASSWORD 'p'")
    try:
        source.username, source.password = reader, "p"
        missing = wrong(source)["select"]
        assert not missing.blocking and "public.orders" in missing.text
        admin(source_database, missing.sql)
        assert "select" not in wrong(source)
    finally:
        admin(source_database, f"DROP OWNED BY {reader}")
        admin(source_database, f"DROP ROLE {reader}")


def test_a_slot_waits_for_an_open_transaction_and_says_whose(
    source_database: SourceDatabase, make_source: Any, monkeypatch: Any
) -> None:
    with source_database.connect(autocommit=False) as conn, monkeypatch.context() as patch:
        patch.setattr("consumers.source_setup.SLOT_TIMEOUT_S", 1)
        conn.execute("CREATE TABLE blocker (id int)")  # has a transaction id
        with pytest.raises(ValidationError, match=rf"process {conn.info.backend_pid}, open for"):
            make_source()
        conn.rollback()
    assert source_database.execute("SELECT count(*) FROM pg_replication_slots WHERE database = current_database()") == [(0,)]
    assert make_source().slot_created


def test_poolers_and_plaintext_are_refused_before_anything_is_dialled(monkeypatch: Any) -> None:
    monkeypatch.setattr("consumers.source_setup.connect", lambda *_, **__: pytest.fail("dialled"))
    fields = {"database": "postgres", "username": "postgres.abc", "password": "p"}
    with pytest.raises(ValidationError, match=r"host db\.abc\.supabase\.co"):
        changes.save(Source(name="s", host="aws-0-eu-central-1.pooler.supabase.com", port=6543, **fields))
    with pytest.raises(ValidationError, match="would send data unencrypted"):
        changes.save(Source(name="s", host="db.example.com", sslmode="prefer", **fields))


def test_ssl_is_demanded_of_a_remote_host(source: Source) -> None:
    source.host = "db.example.com"
    source.sslmode = ""
    assert source.effective_sslmode == "require"


def test_errors_of_connections_say_what_to_do(source: Source, free_port: int) -> None:
    source.port = free_port
    with pytest.raises(SourceUnreachable, match="Nothing listens there"):
        check(source)


def test_check_source_prints_one_line_a_finding(source: Source, source_database: SourceDatabase, capsys: Any) -> None:
    call_command("check_source", source.name)
    assert all(line.split()[0] in ("ok", "warning") for line in capsys.readouterr().out.splitlines())
    source_database.execute("DROP PUBLICATION sequin_pub")
    with pytest.raises(SystemExit) as ended:
        call_command("check_source", source.name)
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1 and any(line.startswith("BLOCKS") and "CREATE PUBLICATION" in line for line in lines)


def test_full_slots_are_told(source: Source, monkeypatch: Any) -> None:
    from consumers import preflight

    real = preflight.read_server
    def scarce(*arguments: Any) -> Any:
        server = real(*arguments)
        return server._replace(settings={**server.settings, "max_replication_slots": ("1", ""), "max_wal_senders": ("1", "")})

    monkeypatch.setattr(preflight, "read_server", scarce)
    scant = wrong(source)
    assert "raise max_replication_slots" in scant["max_replication_slots"].text and "ALTER SYSTEM" in scant["max_wal_senders"].sql


def test_recover_makes_a_slot_that_is_gone_anew(source: Source, source_database: SourceDatabase) -> None:
    source_database.execute("SELECT pg_drop_replication_slot(%s)", [source.slot_name])
    before = source.updated_at
    changes.recover(source)
    assert "slot" not in wrong(source)
    assert Source.objects.get(pk=source.pk).updated_at > before, "the reader starts anew"
