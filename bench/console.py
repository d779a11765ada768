"""Measure the console's pages with a full log: by default 10,000,000 messages and 200 consumers, some of them far behind.

    python bench/console.py [--messages 10000000] [--consumers 200]

An installation of its own; the log and the positions are filled by SQL, no capture runs. Prints the median of each page's time
from the request to the end of its answer, as a browser that is logged in waits for it.
"""
from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.installation import temporary  # noqa: E402

PASSWORD = "console-password"
ROUNDS = 7
PARTITION = 1_000_000
BEHIND = (0, 1_000, 1_000_000, 9_000_000)  # each fourth consumer
EVERYTHING = UUID(int=0)

FILL = """
INSERT INTO messages (source, id, relation, table_oid, action, key, xid, commit_lsn, commit_idx, committed_at, epoch, record, changes, old_values_known)
SELECT %(source)s, i, %(relation)s, 5, CASE WHEN i %% 3 = 0 THEN 'U' ELSE 'I' END::"char", '["' || i || '"]', i, i * 10, 0,
       now() - (%(all)s - i) * interval '10 ms', 1,
       '{"id":' || i || ',"customer_id":' || i %% 1000 || ',"status":"paid","total":' || i %% 100 || '.50,"note":"a text that makes the row longer"}',
       CASE WHEN i %% 3 = 0 THEN '{"status":"pending"}' END, true
FROM generate_series(%(first)s::bigint, %(last)s::bigint) i
"""
CONSUMER = """
INSERT INTO consumers_consumer (id, name, created_at, updated_at, kind, stream, tables, actions, "where", transform, group_columns, start_from,
    ack_wait_ms, max_ack_pending, max_parked, on_full, status, status_reason, path, batch_size, concurrency, source_id)
VALUES (%s, %s, now(), now(), 'pull', 'changes', '{public.orders}', '{insert,update,delete}', '', '', '{}', 'now',
    30000, 10000, 1000000, 'hold', 'active', '', '', 1, 10, %s)
"""
PARKED = """
INSERT INTO parked (consumer, source, grp, first_id, ids, reason, deliver_count, last_error, last_status)
SELECT %s, %s, n, n, ARRAY[n], CASE WHEN n <= 3 THEN 'dead' ELSE 'retry' END, 2, 'answered 500', 500 FROM generate_series(1, 23) n
"""
COUNTERS = """
INSERT INTO minute_counters (subject, minute, delivered, captured)
SELECT %s, date_trunc('minute', now()) - n * interval '1 minute', n, n FROM generate_series(1, 1440) n ON CONFLICT DO NOTHING
"""


def fill(conn: Any, messages: int, consumers: int) -> list[UUID]:
    """Returns the consumers' ids, in the order of BEHIND."""
    conn.execute("SET synchronous_commit = off")
    source = uuid4()
    conn.execute(
        "INSERT INTO consumers_source (id, name, created_at, updated_at, host, port, database, username, password, sslmode, ssl_root_cert, slot_name,"
        " publication_name, status, slot_failover, slot_created, publication_created) VALUES (%s, 'big', now(), now(), 'localhost', 5432, 'd', 'u', '',"
        " '', '', 'sequin_slot', 'sequin_pub', 'paused', false, false, false)",
        [source],
    )
    conn.execute(
        "INSERT INTO capture_progress (source, epoch, system_identifier, timeline, stored_lsn, reached_lsn, messages) VALUES (%s, 1, '1', 1, 1, 1, %s)",
        [source, messages],
    )
    relation = conn.execute(
        "INSERT INTO relation_version (source, epoch, oid, schema_name, table_name, columns, primary_key, replica_identity, digest)"
        " VALUES (%s, 1, 5, 'public', 'orders', '[]', '{id}', 'd', 'x') RETURNING id",
        [source],
    ).fetchone()[0]
    for first in range(0, messages, PARTITION):
        name = f"messages_{first:012d}"
        if conn.execute("SELECT to_regclass(%s)", [name]).fetchone()[0] is None:
            conn.execute(f"CREATE TABLE {name} (LIKE messages INCLUDING DEFAULTS INCLUDING INDEXES)")
            conn.execute(f"ALTER TABLE messages ATTACH PARTITION {name} FOR VALUES FROM ({first}) TO ({first + PARTITION})")
            conn.execute("INSERT INTO log_partition (name, from_id, to_id) VALUES (%s, %s, %s)", [name, first, first + PARTITION])
        last = min(first + PARTITION, messages) - 1
        conn.execute(FILL, {"source": source, "relation": relation, "all": messages, "first": max(1, first), "last": last})
        print(f"{last + 1:,} messages", flush=True)
    conn.execute("SELECT setval('messages_id', %s)", [messages - 1])
    made = []
    for number in range(consumers):
        consumer = uuid4()
        made.append(consumer)
        failing = 20 if number % 10 < len(BEHIND) else 0
        position = max(0, messages - 1 - BEHIND[number % len(BEHIND)])
        conn.execute(CONSUMER, [consumer, f"consumer-{number:03}", source])
        conn.execute(
            "INSERT INTO consumer_position (consumer, source, position, start_id, start_lsn, start_epoch, acked_count, parked_count, dead_count)"
            " VALUES (%s, %s, %s, 0, 0, 1, %s, %s, %s)",
            [consumer, source, position, position, failing, 3 if failing else 0],
        )
        if failing:
            conn.execute(PARKED, [consumer, source])
        conn.execute(COUNTERS, [consumer])
    conn.execute(COUNTERS, [EVERYTHING])
    conn.execute("ANALYZE")
    return made


def log_in(url: str) -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    page = session.get(f"{url}/admin/login/").text
    found = re.search(r'csrfmiddlewaretoken" value="([^"]+)', page)
    assert found is not None
    form = {"username": "admin", "password": PASSWORD, "csrfmiddlewaretoken": found[1]}
    answer = session.post(f"{url}/admin/login/", data=form, headers={"Referer": url})
    assert answer.ok and not answer.url.endswith("/login/"), answer.url
    return session


def measure(session: requests.Session, url: str, path: str) -> None:
    took = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        answer = session.get(url + path)
        took.append((time.monotonic() - began) * 1000)
        assert answer.ok, (answer.status_code, path)
    print(f"{statistics.median(took):6.0f} ms (slowest {max(took):4.0f}), {len(answer.content) // 1000:4} kB  {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--consumers", type=int, default=200)
    options = parser.parse_args()
    with temporary("--no-playground", SEQUIN_ADMIN_PASSWORD=PASSWORD) as installation:
        with installation.store() as conn:
            consumers = fill(conn, options.messages, options.consumers)
        session = log_in(installation.url)
        paths = ["/admin/", "/admin/?part=live"]
        for consumer in consumers[: len(BEHIND)]:
            page = f"/admin/consumers/consumer/{consumer}/"
            states = ("", "?state=waiting", "?state=parked", "?state=dead", "?state=passed", "?text=nothingsuch", "?key=4200")
            paths += [page, f"{page}numbers/", *(f"{page}messages/{state}" for state in states)]
        paths += [f"/admin/consumers/consumer/{consumers[0]}/message/{options.messages // 2}/"]
        paths += [f"/admin/consumers/{model}/" for model in ("consumer", "message", "parked", "attempt")]
        for path in [*paths, "/metrics", "/health"]:
            measure(session, installation.url, path)


if __name__ == "__main__":
    main()
