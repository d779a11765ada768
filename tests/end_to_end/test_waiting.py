"""Tables come and change while every kind of consumer waits for each change: pumps and long polls are idle when it arrives.

Under load a consumer finds its messages whatever woke it; here each change meets a claim that has just looked in vain.
"""
from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from typing import Any

import pytest

from consumers import changes
from consumers.models import HttpEndpoint
from tests.conftest import SourceDatabase, wait_until
from tests.push.endpoint import Endpoint

pytestmark = pytest.mark.django_db(transaction=True)

KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "schema": {"tables": ["public.*"]},
    "table": {"tables": ["public.t0"]},
    "where": {"where": "id >= 0"},
    "transform": {"transform": "function transform(action, record) return {record = record} end"},
    "rows": {"stream": "rows"},
    "groups": {"tables": ["public.t0"], "group_columns": ["g"]},
}
ONE_TABLE = ("table", "groups")


def test_each_change_reaches_everybody_who_waits(
    source_database: SourceDatabase, make_source: Any, make_consumer: Any, run: Any, web: str, token: Any, long_run: bool
) -> None:
    with source_database.admin(source_database.name) as conn:
        conn.execute("CREATE PUBLICATION sequin_pub FOR ALL TABLES")
    source_database.execute("CREATE TABLE t0 (id int PRIMARY KEY, mark int, g int)")
    source, bearer = make_source(), token()
    endpoints, pulled = {}, {}
    for kind, fields in KINDS.items():
        endpoints[kind] = Endpoint()
        endpoint = HttpEndpoint(name=kind, url=endpoints[kind].url)
        changes.save(endpoint)
        make_consumer(source, f"push-{kind}", kind="push", endpoint=endpoint, **fields)
        make_consumer(source, f"pull-{kind}", **fields)
        pulled[kind] = list[int]()
    run("run_capture")
    run("run_workers", SEQUIN_WORKERS="2")
    stopping, errors = threading.Event(), list[Exception]()

    def call(consumer: str, verb: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{web}/api/http_pull_consumers/{consumer}/{verb}", json.dumps(body).encode(),
            {"Authorization": f"Bearer {bearer}", "Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def receive(kind: str) -> None:
        try:
            while not stopping.is_set():
                messages = call(f"pull-{kind}", "receive", batch_size=10, wait_for=500)["data"]
                pulled[kind] += [message["data"]["record"]["mark"] for message in messages]
                if messages:
                    call(f"pull-{kind}", "ack", ack_ids=[message["ack_id"] for message in messages])
        except Exception as error:
            errors.append(error)

    receivers = [threading.Thread(target=receive, args=[kind]) for kind in KINDS for _ in range(2)]
    for receiver in receivers:
        receiver.start()
    try:
        written = write(source_database, 4_000 if long_run else 250)

        def missing() -> dict[str, set[int]]:
            got = {f"pull-{kind}": pulled[kind] for kind in KINDS} | {f"push-{kind}": marks(endpoints[kind]) for kind in KINDS}
            found = {name: {mark for mark, table in written.items() if table == "t0" or name[5:] not in ONE_TABLE} - {*marks} for name, marks in got.items()}
            return {name: lost for name, lost in found.items() if lost}

        wait_until(lambda: errors or not missing(), 60, "everything to arrive")
        assert not errors and not missing()
    finally:
        stopping.set()
        for receiver in receivers:
            receiver.join(35)
        for where in endpoints.values():
            where.close()
    assert {*pulled["table"]} == {mark for mark, table in written.items() if table == "t0"}


def write(database: SourceDatabase, count: int) -> dict[int, str]:
    """One row a commit, with pauses in which all come to rest; returns which table each mark was written to."""
    chance = random.Random(7)
    sizes, written = {"t0": 0}, {}
    with database.connect() as conn:
        for mark in range(count):
            table = chance.choice(list(sizes))
            what = chance.random()
            if what < 0.15:
                conn.execute(f"ALTER TABLE {table} ADD COLUMN c{mark} int")
            elif what < 0.2:
                table = f"t{len(sizes)}"
                conn.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, mark int, g int)")
                sizes[table] = 0
            sizes[table] += 1
            conn.execute(f"INSERT INTO {table} (id, mark, g) VALUES (%s, %s, %s)", [sizes[table], mark, chance.randrange(5)])
            written[mark] = table
            time.sleep(chance.choice([0, 0, 0.002, 0.01, 0.03, 0.1]))  # the writer's pace; not a wait for anything
    return written


def marks(where: Endpoint) -> list[int]:
    return [got.json["record"]["mark"] for got in list(where.got)]
