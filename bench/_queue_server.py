"""PGMQ and a SKIP LOCKED table behind the least HTTP there can be, for `bench/queues.py`: what a thin service of one's own would do.

Served by granian like the real one: the same threads, a pool of the same size. No tokens, no checks, JSON in and out.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from psycopg_pool import ConnectionPool

pool = ConnectionPool(
    os.environ["DATABASE_URL"], min_size=2, max_size=16, kwargs={"autocommit": True, "options": "-c synchronous_commit=off"}, open=True
)
STATEMENTS = {
    "pgmq": ("SELECT msg_id, message::text FROM pgmq.read('bench', 60, %s)", "SELECT pgmq.delete('bench', %s::bigint[])"),
    "skip": (
        "UPDATE plain_queue SET until = now() + interval '60 s', taken = taken + 1 WHERE id IN (SELECT id FROM plain_queue"
        " WHERE until <= now() ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED) RETURNING id, body::text",
        "DELETE FROM plain_queue WHERE id = ANY (%s) RETURNING 1",
    ),
}


def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    _, engine, call = environ["PATH_INFO"].split("/")
    given = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    take, settle = STATEMENTS[engine]
    with pool.connection() as conn:
        if call == "receive":
            rows = conn.execute(take, [given["batch_size"]]).fetchall()
            body = '{"data":[' + ",".join(f'{{"ack_id":{number},"data":{text}}}' for number, text in rows) + "]}"
        else:
            body = f'{{"acked":{len(conn.execute(settle, [given["ack_ids"]]).fetchall())}}}'
    data = body.encode()
    start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(data)))])
    return [data]
