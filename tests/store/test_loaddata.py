"""Fixtures: loaded once with all effects, loaded twice without any, refused in one line with nothing left behind."""
from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import connection

from consumers import publishing
from consumers.models import Backfill, Consumer, HttpEndpoint, Source
from consumers.store import backfills
from tests.conftest import SourceDatabase
from tests.store.world import beginning

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def fixture(source_database: SourceDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Write the standard fixture with changes, load it, and return what the command said."""
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    monkeypatch.setenv("SHOP_PASSWORD", source_database.password)

    def load(backfills: Any = (), *, more: Any = (), backwards: bool = False, **changes: dict[str, Any]) -> str:
        entries = [
            {"model": "consumers.httpendpoint", "fields": {"name": "hooks", "url": "https://example.com/", **changes.get("endpoint", {})}},
            {"model": "consumers.source", "fields": {
                "name": "shop", "host": source_database.host, "port": source_database.port, "database": source_database.name,
                "username": source_database.user, "password": "env:SHOP_PASSWORD", "slot_name": source_database.name,
                **changes.get("source", {})}},
            {"model": "consumers.consumer", "fields": {
                "name": "push", "source": ["shop"], "kind": "push", "tables": ["public.orders"], "endpoint": ["hooks"],
                **changes.get("consumer", {})}},
            *({"model": "consumers.consumer", "fields": {"source": ["shop"], **fields}} for fields in more),
            *({"model": "consumers.backfill", "fields": {"consumer": ["push"], "table": "public.orders", **fields}} for fields in backfills),
        ]  # fmt: skip
        path = tmp_path / "shop.json"
        path.write_text(json.dumps(entries[::-1] if backwards else entries))
        capsys.readouterr()
        call_command("loaddata", str(path))
        return str(capsys.readouterr().out).strip()

    return load


def slots(database: SourceDatabase) -> int:
    return int(database.execute("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", [database.name])[0][0])


def test_what_is_edited_is_handed_out_while_a_source_is_waited_for(
    fixture: Any, source_database: SourceDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One consumer is changed, and the table of another one has an older writer that stays open."""
    fixture()
    source_database.execute("CREATE TABLE more (id int PRIMARY KEY)")
    waits, goes_on = threading.Event(), threading.Event()
    awaited = publishing._await_writers

    def await_writers(conn: Any, tables: Any, *rest: Any) -> Any:
        if tables == ["public.more"]:
            waits.set()
            goes_on.wait(60)
        return awaited(conn, tables, *rest)

    monkeypatch.setattr(publishing, "_await_writers", await_writers)
    (consumer,) = Consumer.objects.all()
    said: list[str] = []

    def load() -> None:
        said.append(fixture(consumer={"ack_wait_ms": 7000}, more=[{"name": "other", "tables": ["public.orders"], "kind": "pull"}]))
        said.append(fixture(consumer={"ack_wait_ms": 8000}, more=[{"name": "other", "tables": ["public.more"], "kind": "pull"}]))

    loading = beginning(load)
    try:
        assert waits.wait(60)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))", [str(consumer.pk)])
            assert cursor.fetchone() == (True,)
    finally:
        goes_on.set()
        loading.join(120)
    assert said == ["1 created, 1 changed, 2 unchanged", "0 created, 2 changed, 2 unchanged"]


def test_loading_makes_everything_and_loading_again_changes_nothing(fixture: Any, source_database: SourceDatabase) -> None:
    assert fixture() == "3 created, 0 changed, 0 unchanged"
    assert slots(source_database) == 1 and Source.objects.get().password == source_database.password
    secret, saved_at = HttpEndpoint.objects.get().signing_secret, Source.objects.get().updated_at
    Consumer.objects.update(status="paused")
    assert fixture() == "0 created, 0 changed, 3 unchanged"
    assert HttpEndpoint.objects.get().signing_secret == secret and Source.objects.get().updated_at == saved_at
    assert Consumer.objects.get().status == "paused", "what the fixture does not name stays"
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM consumer_position")
        assert cursor.fetchone() == (1,)


def test_the_order_of_the_objects_is_no_matter(fixture: Any) -> None:
    assert fixture([{}], backwards=True) == "4 created, 0 changed, 0 unchanged"


def test_a_backfill_is_begun_once(fixture: Any, source_database: SourceDatabase) -> None:
    assert fixture([{}, {"start_value": 5, "sort_column": "id"}]) == "5 created, 0 changed, 0 unchanged"
    first = list(Backfill.objects.order_by("created_at").values_list("pk", "start_value"))
    assert [value for _, value in first] == [None, "5"]
    backfills.cancel(first[0][0])
    assert fixture([{}, {"start_value": 5, "sort_column": "id"}]) == "0 created, 0 changed, 5 unchanged"
    assert list(Backfill.objects.order_by("created_at").values_list("pk", "start_value")) == first
    assert fixture([{}, {"start_value": 6, "sort_column": "id"}]) == "1 created, 0 changed, 4 unchanged"
    for fields, words in (({"table": "public.nowhere"}, "is not one of the consumer's tables"), ({"sort_column": "x"}, "no column x"),
                          ({"start_value": "x"}, "is no value of id"), ({"status": "paused"}, "status: is not a field"),
                          ({"consumer": ["nobody"]}, "there is no consumer"), ({"table": 7}, "expected a text")):  # fmt: skip
        with pytest.raises(CommandError, match=words):
            fixture([fields])
    assert Backfill.objects.count() == 3


def test_a_consumer_from_the_beginning_is_backfilled_once(fixture: Any) -> None:
    assert fixture(consumer={"start_from": "beginning"}) == "3 created, 0 changed, 0 unchanged"
    assert [backfill.table for backfill in Backfill.objects.all()] == ["public.orders"]
    assert fixture(consumer={"start_from": "beginning"}) == "0 created, 0 changed, 3 unchanged"
    assert Backfill.objects.count() == 1


def test_only_what_differs_is_saved(fixture: Any) -> None:
    fixture()
    assert fixture(consumer={"batch_size": 10}) == "0 created, 1 changed, 2 unchanged"
    assert Consumer.objects.get().batch_size == 10


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("consumer", {"tables": ["public.nowhere"]}, ["object 3", "consumers.consumer push", "tables", "no table public.nowhere"]),
        ("consumer", {"batch_size": "many"}, ["object 3", "batch_size", "whole number"]),
        ("consumer", {"where": "a > 1"}, ["object 3", "where", "line 1, column 1", "no column 'a'"]),
        ("consumer", {"group_columns": ["nowhere"]}, ["object 3", "group_columns", "public.orders", "'nowhere'"]),
        ("consumer", {"tables": None}, ["object 3", "tables", "a list of texts"]),
        ("consumer", {"colour": "red"}, ["object 3", "colour", "is not a field"]),
        ("consumer", {"source": ["nowhere"]}, ["object 3", "source", "no source"]),
        ("consumer", {"slot_created": True}, ["object 3", "slot_created", "is not a field"]),
        ("endpoint", {"url": "nonsense"}, ["object 1", "url"]),
        ("source", {"password": "env:NOT_SET_ANYWHERE"}, ["object 2", "password", "NOT_SET_ANYWHERE is not set"]),
        ("source", {"password": "hush-hush"}, ["object 2", "host", "cannot connect"]),
        ("source", {"name": "a b"}, ["object 2", "name"]),
    ],
)
def test_a_bad_fixture_is_one_line_and_leaves_nothing(
    fixture: Any, source_database: SourceDatabase, part: str, change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(CommandError) as refused:
        fixture(**{part: change})
    line = str(refused.value)
    assert all(word in line for word in ["shop.json", *words]) and "\n" not in line and "hush-hush" not in line, line
    assert not Source.objects.exists() and not HttpEndpoint.objects.exists() and slots(source_database) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"), ("{}", "expected a list"), ("[1]", "expected"), ('[{"model": "auth.user", "fields": {}}]', "expected one of"),
        ('[{"model": "consumers.backfill", "fields": {}}]', "consumer: is required"),
        ('[{"model": "consumers.apitoken", "fields": {"name": "x"}}]', "create_api_token"), ('[{"model": "consumers.source", "fields": {}}]', "name"),
    ],
)  # fmt: skip
def test_what_is_no_fixture(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(CommandError, match=words):
        call_command("loaddata", str(path))


def test_a_missing_file_is_said() -> None:
    with pytest.raises(CommandError, match="no such file"):
        call_command("loaddata", "nowhere.json")
