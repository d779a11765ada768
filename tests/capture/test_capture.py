"""Capture on a real Postgres: what is committed is in the log, exactly, once."""
from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from capture.disk import shortage
from capture.reader import NoRoom, Reader
from capture.reading import Reading
from consumers.models import Source
from consumers.store.appender import Appender
from tests.conftest import SLOWER, SourceDatabase, wait_until

pytestmark = pytest.mark.django_db(transaction=True)

ORDERS = "CREATE TABLE orders (id int PRIMARY KEY, status text, total numeric, big text)"


def rows(columns: str = "action, record, changes, key, old_key, unchanged, old_values_known") -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {columns} FROM messages ORDER BY id")
        return cursor.fetchall()


def captured(count: int, timeout: float = 20) -> list[tuple[Any, ...]]:
    wait_until(lambda: len(rows("id")) >= count, timeout, f"{count} messages in the log")
    return rows()


@pytest.fixture
def capture(source_database: SourceDatabase, make_source: Any, run: Any) -> Callable[..., Source]:
    """Tables, publication, source, and a running `run_capture`."""

    def begin(*tables: str) -> Source:
        for table in tables or (ORDERS,):
            source_database.execute(table)
        names = [row[0] for row in source_database.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        source_database.execute(f"CREATE PUBLICATION sequin_pub FOR TABLE {', '.join(names)}")
        source = make_source()
        run("run_capture")
        return source

    return begin


def test_insert_update_delete_truncate(capture: Any, source_database: SourceDatabase) -> None:
    capture()
    with source_database.connect() as conn:
        conn.execute("INSERT INTO orders VALUES (1, 'new', 12.50, NULL)")
        conn.execute("UPDATE orders SET status = 'paid' WHERE id = 1")
        conn.execute("UPDATE orders SET id = 2 WHERE id = 1")
        conn.execute("DELETE FROM orders")
        conn.execute("TRUNCATE orders")
    assert captured(5) == [
        ("I", '{"id":1,"status":"new","total":12.50,"big":null}', None, '["1"]', None, None, True),
        ("U", '{"id":1,"status":"paid","total":12.50,"big":null}', "{}", '["1"]', None, None, False),
        ("U", '{"id":2,"status":"paid","total":12.50,"big":null}', '{"id":1}', '["2"]', '["1"]', None, False),
        ("D", '{"id":2}', None, '["2"]', None, None, True),
        ("T", "{}", None, "[]", None, None, True),
    ]


def test_full_identity_and_unchanged_toast(capture: Any, source_database: SourceDatabase) -> None:
    capture(ORDERS, "ALTER TABLE orders ALTER big SET STORAGE EXTERNAL")
    with source_database.connect() as conn:
        conn.execute("INSERT INTO orders VALUES (1, 'new', 1, repeat('x', 9000))")
        conn.execute("UPDATE orders SET status = 'paid'")
        conn.execute("ALTER TABLE orders REPLICA IDENTITY FULL")
        conn.execute("UPDATE orders SET status = 'sent'")
        conn.execute("DELETE FROM orders")
    _, default, full, gone = captured(4)
    assert default[1] == '{"id":1,"status":"paid","total":1}' and default[5] == '["big"]'
    assert json.loads(full[1])["big"] == "x" * 9000 and full[2] == '{"status":"paid"}' and full[6]
    assert json.loads(gone[1])["status"] == "sent" and gone[3] == '["1"]', "under FULL the key still comes from the catalog"


def test_a_table_without_key_and_one_with_two(capture: Any, source_database: SourceDatabase) -> None:
    capture(
        "CREATE TABLE notes (a int, b text); ALTER TABLE notes REPLICA IDENTITY FULL",
        "CREATE TABLE pairs (x int, y text, z int, PRIMARY KEY (y, x))",
    )
    with source_database.connect() as conn:
        conn.execute("INSERT INTO notes VALUES (1, 'x')")
        conn.execute("INSERT INTO pairs VALUES (1, 'é\"', 3)")
    assert [row[3] for row in captured(2)] == ["[]", '["é\\"","1"]']


def test_a_changed_table_has_its_values_under_the_right_names(capture: Any, source_database: SourceDatabase) -> None:
    capture()
    with source_database.connect() as conn:
        conn.execute("INSERT INTO orders VALUES (1, 'a', 1)")
        conn.execute("ALTER TABLE orders ADD note text DEFAULT 'n'")
        conn.execute("ALTER TABLE orders RENAME status TO state")
        conn.execute("ALTER TABLE orders DROP big")
        conn.execute("INSERT INTO orders VALUES (2, 'b', 2)")
    assert [row[1] for row in captured(2)] == [
        '{"id":1,"status":"a","total":1,"big":null}', '{"id":2,"state":"b","total":2,"note":"n"}'
    ]  # fmt: skip


def test_a_huge_transaction_is_stored_in_parts_and_once(capture: Any, source_database: SourceDatabase) -> None:
    source = capture()
    reader = reader_pid(source)
    insert = threading.Thread(
        target=source_database.execute, args=("INSERT INTO orders SELECT i, 'x', i FROM generate_series(1, 60000) i",)
    )
    insert.start()
    wait_until(lambda: len(rows("id")) >= 2000, 20, "the first parts")
    os.kill(reader, signal.SIGKILL)
    insert.join()
    wait_until(lambda: len(rows("id")) >= 60000, 60, "all of it")
    assert rows("commit_idx") == [(i,) for i in range(60000)]


def reader_pid(source: Source) -> int:
    def find() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pid FROM heartbeats WHERE process = 'reader' AND detail = %s ORDER BY at DESC", [source.name])
            row = cursor.fetchone()
        return int(row[0]) if row else 0

    pid: int = wait_until(find, 20, "the reader's heartbeat")
    return pid


def test_an_idle_source_releases_its_wal(capture: Any, source_database: SourceDatabase) -> None:
    """WAL that is not ours is confirmed too, so that the slot does not hold the server's disk."""
    source = capture()
    source_database.execute("CREATE TABLE elsewhere AS SELECT i, repeat('x', 500) AS t FROM generate_series(1, 3000) i")
    here = source_database.execute("SELECT pg_current_wal_lsn() - '0/0'")[0][0]

    def confirmed() -> bool:
        query = "SELECT confirmed_flush_lsn - '0/0' FROM pg_replication_slots WHERE slot_name = %s"
        return bool(source_database.execute(query, [source.slot_name])[0][0] >= here)

    wait_until(confirmed, 20, "the slot to be confirmed beyond what is not ours")


def test_a_cut_connection_is_made_again(capture: Any, source_database: SourceDatabase) -> None:
    source = capture()
    source_database.execute("INSERT INTO orders VALUES (1, 'a')")
    captured(1)
    with source_database.admin() as admin:
        admin.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [source.slot_name])
    source_database.execute("INSERT INTO orders VALUES (2, 'b')")
    assert [row[3] for row in captured(2)] == ['["1"]', '["2"]']


def test_a_second_capture_stands_by_and_takes_over(capture: Any, source_database: SourceDatabase, run: Any) -> None:
    source = capture()
    source_database.execute("INSERT INTO orders VALUES (1, 'a')")
    captured(1)
    first = reader_pid(source)
    run("run_capture")
    os.kill(os.getpgid(first), signal.SIGKILL)  # the first run_capture; its reader ends with it
    source_database.execute("INSERT INTO orders VALUES (2, 'b')")
    assert len(captured(2)) == 2


def test_sigterm_stops_capture_cleanly(source_database: SourceDatabase, make_source: Any, run: Any) -> None:
    source_database.execute(ORDERS)
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE orders")
    make_source()
    process = run("run_capture")
    source_database.execute("INSERT INTO orders VALUES (1, 'a')")
    captured(1)
    process.terminate()
    assert process.wait(60) == 0


def test_a_slot_made_anew_is_a_gap_and_not_healthy(source_database: SourceDatabase, make_source: Any, run: Any) -> None:
    source_database.execute(ORDERS)
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE orders")
    source = make_source()
    process = run("run_capture")
    source_database.execute("INSERT INTO orders VALUES (1, 'a')")
    captured(1)
    process.terminate()
    process.wait(60)
    source_database.execute("SELECT pg_drop_replication_slot(%s)", [source.slot_name])
    source_database.execute("INSERT INTO orders VALUES (2, 'lost')")
    source_database.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [source.slot_name])
    run("run_capture")
    source_database.execute("INSERT INTO orders VALUES (3, 'c')")
    captured(2)
    with connection.cursor() as cursor:
        cursor.execute("SELECT gap FROM capture_progress WHERE source = %s", [source.pk])
        assert "changes in between are missing" in cursor.fetchone()[0]


def test_without_room_nothing_is_stored_or_confirmed_until_there_is(source_database: SourceDatabase, make_source: Any) -> None:
    source_database.execute(ORDERS)
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE orders")
    source = make_source()
    source_database.execute("INSERT INTO orders VALUES (1, 'a')")
    with Appender(source.pk) as appender:
        assert appender.lock_source()
        with pytest.raises(NoRoom, match="nearly full"):
            Reader(source, appender, stopping=lambda: False, shortage=lambda: shortage(Path("/"), "999999TB")).run()
        assert rows("id") == []
        free = f"SELECT 1 FROM pg_replication_slots WHERE slot_name = '{source.slot_name}' AND NOT active"
        wait_until(lambda: source_database.execute(free), 10, "the slot to be free")
        Reader(source, appender, stopping=lambda: bool(rows("id")), shortage=lambda: shortage(Path("/"), "0%")).run()
    assert len(rows("id")) == 1


# Under SIGKILL ------------------------------------------------------------------------------------------------------------


class ConfirmsFirst(Reader):
    """The control: confirms what it has read before it is stored, and at once. Must lose changes when it is killed."""

    def _store(self, stream: Any) -> None:
        if self._transactions.rows:
            stream.confirm(max(self._transactions.done_lsn, self._progress.reached_lsn))
            stream.send_status()
            time.sleep(0.05)  # the window in which the kill strikes; not a wait for anything
        super()._store(stream)


def read_until_killed(source_id: Any, reader_class: type[Reader]) -> None:
    """In a forked child: read as `run_capture --reader` does."""
    connection.close()
    reading = Reading(Source.objects.get(pk=source_id))
    reading.reader_class = reader_class
    reading.run()
    os._exit(0)


def kill_loop(source: Source, source_database: SourceDatabase, reader_class: type[Reader], kills: int, above: int = 0) -> tuple[set[int], list[int]]:
    """Write all the time, kill the reader again and again; what was committed, numbers `above` that one, and what is in the log."""
    stopping = threading.Event()
    committed: set[int] = set()

    def write() -> None:
        with source_database.connect() as conn:
            number = above
            while not stopping.is_set():
                number += 1
                conn.execute("INSERT INTO orders (id, status) VALUES (%s, 'x')", [number])
                committed.add(number)
                stopping.wait(0.002)

    writer = threading.Thread(target=write)
    connection.close()
    writer.start()
    try:
        for _ in range(kills):
            seen = len(rows("id"))
            connection.close()
            child = os.fork()
            if child == 0:
                read_until_killed(source.pk, reader_class)
            try:
                wait_until(lambda: len(rows("id")) > seen + 20, 20, "the reader to store")  # noqa: B023
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    finally:
        stopping.set()
        writer.join()
    # Read by nobody who was killed: when this one is there, nothing else will come.
    last = max(committed) + 1
    source_database.execute(f"INSERT INTO orders (id, status) VALUES ({last}, 'x')")
    committed.add(last)
    return committed, [int(record["id"]) for record in map(json.loads, finish(source, committed)) if record]


def finish(source: Source, committed: set[int]) -> list[str]:
    """Let an honest reader take what is left: up to the source's present end."""
    appender = Appender(source.pk)
    last = max(committed)
    try:
        assert appender.wait_for_source(20)

        def done() -> bool:
            found = rows("record")
            return bool(found) and json.loads(found[-1][0]).get("id", 0) >= last

        deadline = time.monotonic() + SLOWER * 30
        while time.monotonic() < deadline:
            try:
                Reader(source, appender, stopping=done).run()
                break
            except Exception:  # the slot is still held by the killed reader's walsender
                time.sleep(0.1)
    finally:
        appender.close()
    return [row[0] for row in rows("record")]


def test_sigkill_loses_nothing_and_doubles_nothing(source_database: SourceDatabase, make_source: Any, long_run: bool) -> None:
    source_database.execute(ORDERS)
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE orders")
    committed, logged = kill_loop(make_source(), source_database, Reader, 40 if long_run else 6)
    assert logged == sorted(committed)


def test_the_control_loses(source_database: SourceDatabase, make_source: Any) -> None:
    """The same test with store and confirm exchanged fails: the test above can."""
    source_database.execute(ORDERS)
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE orders")
    source = make_source()
    for round_ in range(20):
        committed, logged = kill_loop(source, source_database, ConfirmsFirst, 4, above=round_ * 1_000_000)
        if committed - set(logged):
            return
    raise AssertionError("confirming before storing lost nothing: this test cannot see a loss")
