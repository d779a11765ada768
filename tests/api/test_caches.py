"""What a request looks up of its token and its consumer: once for all who ask at the same time, and never from before a change."""
from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import connection

from consumers import tokens
from consumers.lookups import KEPT_S, Lookups
from consumers.store.connection import store_connection
from consumers.tokens import Caller
from delivery.pull import directory
from tests.api.pull_world import make_consumer, make_source, until
from tests.api.test_pull import waiting_for_table

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(params=["token", "consumer"])
def lookup(request: pytest.FixtureRequest) -> Any:
    """The function that looks something up, where that is kept, and the table it reads."""
    plain = tokens.create_token("one", "pull")[1]
    make_consumer(make_source("asked"), "asked")
    caller = tokens.find_caller(plain)
    assert isinstance(caller, Caller)
    tokens.forget()
    if request.param == "token":
        return (lambda: tokens.find_caller(plain)), tokens._callers, "consumers_apitoken"
    return (lambda: directory.find("asked", caller)), directory._receivers, "consumers_consumer"


def test_those_who_ask_at_once_look_once(lookup: Any) -> None:
    find, lookups, table = lookup
    with store_connection(autocommit=False) as conn:
        conn.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        found: list[Any] = []
        askers = [threading.Thread(target=_ask, args=(find, found)) for _ in range(8)]
        for asker in askers:
            asker.start()
        until(lambda: [gate.users for gate in lookups._loading._gates.values()] == [8])
        until(lambda: waiting_for_table(conn, table) == 1)
        assert not found
    for asker in askers:
        asker.join(60)
    assert len(found) == 8 and len(set(map(id, found))) == 1


def test_what_was_read_before_a_change_is_not_kept(lookup: Any) -> None:
    find, lookups, table = lookup
    with store_connection(autocommit=False) as conn:
        conn.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        found: list[Any] = []
        asker = threading.Thread(target=_ask, args=(find, found))
        asker.start()
        until(lambda: waiting_for_table(conn, table) == 1)
        lookups.forget()
    asker.join(60)
    assert found and not lookups._kept
    find()
    assert lookups._kept


def test_what_took_long_to_find_is_kept_as_long_as_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("consumers.lookups.time", SimpleNamespace(monotonic=lambda: now[0]))

    def load(key: str) -> str:
        now[0] += 2 * KEPT_S
        return key.upper()

    kept: Lookups[str] = Lookups()
    assert kept.find("a", load) == kept.known("a") == "A"
    now[0] += KEPT_S
    assert kept.known("a") is None


def _ask(find: Any, found: list[Any]) -> None:
    try:
        found.append(find())
    finally:
        connection.close()
