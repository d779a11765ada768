"""The connections that the web server's threads lend each other."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.conf import settings
from django.db import OperationalError, connection, connections, transaction

from consumers.store.connection import store_connection
from sequinapp.postgres import base
from sequinapp.postgres.base import DatabaseWrapper

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def of_threads() -> Iterator[Any]:
    """What `connection` is in each of several threads of the web server."""
    made: list[DatabaseWrapper] = []

    def another() -> DatabaseWrapper:
        made.append(DatabaseWrapper({**connection.settings_dict, "CONN_MAX_AGE": 0}))
        return made[-1]

    yield another
    for one in made:
        one.close()
    while base._kept:
        base._kept.pop().connection.close()
    assert base._places._free == settings.WEB_POOL_SIZE


def pid(wrapper: DatabaseWrapper) -> int:
    with wrapper.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])


def test_the_last_one_given_back_is_the_next(of_threads: Any) -> None:
    one, two, three = of_threads(), of_threads(), of_threads()
    first, second = pid(one), pid(two)
    two.close()
    one.close()
    assert first != second and [pid(three), pid(one)] == [first, second]


def test_one_that_the_server_closed_is_not_lent(of_threads: Any) -> None:
    one = of_threads()
    gone = pid(one)
    one.close()
    with store_connection() as conn:
        conn.execute("SELECT pg_terminate_backend(%s, 5000)", [gone])
    assert pid(one) != gone


def test_one_that_broke_in_use_is_not_lent(of_threads: Any) -> None:
    one = of_threads()
    broken = pid(one)
    with store_connection() as conn:
        conn.execute("SELECT pg_terminate_backend(%s, 5000)", [broken])
    with pytest.raises(OperationalError):
        pid(one)
    one.close()
    assert not base._kept and pid(one) != broken


def test_what_was_begun_and_not_ended_is_undone_and_not_lent(of_threads: Any) -> None:
    one = of_threads()
    with _as_default(one):
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            unfinished = pid(one)
            one.close()
            raise ZeroDivisionError
    assert pid(one) != unfinished and not one.in_atomic_block
    one.set_autocommit(False)
    one.close()
    pid(one)
    assert one.get_autocommit() and one.connection.autocommit


def test_transactions_work_on_one_that_is_lent(of_threads: Any) -> None:
    one = of_threads()
    pid(one)
    one.close()
    told: list[int] = []
    with _as_default(one):
        with transaction.atomic(), one.cursor() as cursor:
            cursor.execute("CREATE TEMPORARY TABLE passing AS SELECT 1 AS a")
            transaction.on_commit(lambda: told.append(1))
        with pytest.raises(ZeroDivisionError), transaction.atomic(), one.cursor() as cursor:
            cursor.execute("DROP TABLE passing")
            raise ZeroDivisionError
    with one.cursor() as cursor:
        cursor.execute("SELECT a FROM passing")
        assert cursor.fetchall() == [(1,)] and told == [1]


def test_there_are_so_many_and_no_more(of_threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrappers = [of_threads() for _ in range(settings.WEB_POOL_SIZE)]
    assert len({pid(one) for one in wrappers}) == settings.WEB_POOL_SIZE
    monkeypatch.setattr(base, "WITHIN_S", 0.05)
    late = of_threads()
    with pytest.raises(OperationalError, match="became free"):
        pid(late)
    freed = pid(wrappers[3])
    wrappers[3].close()
    assert pid(late) == freed


@pytest.mark.parametrize("name", ["OLD_S", "UNUSED_S"])
def test_old_ones_and_those_that_nobody_used_for_long_are_closed(of_threads: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    one = of_threads()
    first = pid(one)
    monkeypatch.setattr(base, name, -1)
    one.close()
    assert not base._kept
    with store_connection() as conn:
        conn.execute("SELECT pg_terminate_backend(%s, 5000)", [first])  # waits until it has gone, whoever ended it
        assert conn.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [first]).fetchone() == (0,)


@contextmanager
def _as_default(wrapper: DatabaseWrapper) -> Iterator[None]:
    """So that this thread's transactions are on this one."""
    before = connections["default"]
    connections["default"] = wrapper
    try:
        yield
    finally:
        connections["default"] = before
