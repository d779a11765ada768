"""Measure how soon a rewind delivers: from the POST to the first message at a waiting pull client, and at a push endpoint.

    python bench/rewind.py [--messages 1000000] [--rounds 5]

Everything runs on this machine, in an installation of its own. The log holds so many messages, which all lie behind consumers
made afterwards; in each round one of each kind is made, rewound to the beginning, to the oldest row, to a time and to an LSN,
and deleted. The service is not told to be quick: nothing is warmed up but its processes.
"""
from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.push import sink  # noqa: E402
from tests.installation import Installation, temporary  # noqa: E402

PIECE = 50_000  # rows a transaction
FILL = "INSERT INTO many SELECT g, g %% 1000, 'paid', g * 1.25, now(), jsonb_build_object('n', g) FROM generate_series(%s::bigint, %s) g"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with temporary() as installation:
        first_push = installation.home.parent / "pushed"
        with sink(lambda body: first_push.exists() or first_push.write_text(str(time.time()))) as port:
            call(installation, "POST", "/api/http_endpoints", {"name": "sink", "url": f"http://127.0.0.1:{port}/"})
            prepare(installation, options.messages)
            points = points_of(installation)
            took: dict[tuple[str, str], list[float]] = defaultdict(list)
            for _ in range(options.rounds):
                for name, point in points.items():
                    took["pull", name].append(pulled(installation, point))
                    took["push", name].append(pushed(installation, point, first_push))
            print(f"rewinds of {options.messages} messages, ms from the POST to the first message, {options.rounds} rounds")
            for (kind, name), each in took.items():
                print(f"  {kind}, to {name}: median {sorted(each)[len(each) // 2]:.0f}, most {max(each):.0f}")


def prepare(installation: Installation, messages: int) -> None:
    with installation.source() as conn:
        conn.execute("CREATE TABLE many (id bigint PRIMARY KEY, customer_id int, status text, total numeric, created_at timestamptz, meta jsonb)")
        make(installation, "first", {"kind": "pull", "status": "disabled"})
        for first in range(1, messages + 1, PIECE):
            conn.execute(FILL, [first, min(messages, first + PIECE - 1)])
    began = time.monotonic()
    while stored(installation) < messages:
        assert time.monotonic() - began < 300, f"{stored(installation)} of {messages} are in the log"
        time.sleep(0.2)
    make(installation, "warm", {"kind": "pull"})
    installation.receive("warm")


def points_of(installation: Installation) -> dict[str, Any]:
    """Where the log begins, said in each way."""
    with installation.store() as conn:
        row = conn.execute("SELECT ('0/0'::pg_lsn + commit_lsn)::text, committed_at FROM messages WHERE key = '[\"1\"]' ORDER BY id LIMIT 1").fetchone()
    assert row is not None
    return {"the beginning": "beginning", "a row": {"pk": ["1"]}, "a time": {"time": row[1].isoformat()}, "an LSN": {"lsn": row[0]}}


def pulled(installation: Installation, point: Any) -> float:
    make(installation, "again", {"kind": "pull"})
    arrived: list[float] = []

    def wait() -> None:
        if installation.receive("again", wait="60s"):
            arrived.append(time.time())

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(1.0)  # until it waits
    began = time.time()
    call(installation, "POST", "/api/consumers/again/rewind", {"to": point})
    waiting.join()
    call(installation, "DELETE", "/api/consumers/again?discard=true")
    return (arrived[0] - began) * 1000


def pushed(installation: Installation, point: Any, first: Path) -> float:
    make(installation, "again", {"kind": "push", "endpoint": "sink", "batch_size": 100})
    first.unlink(missing_ok=True)
    began = time.time()
    call(installation, "POST", "/api/consumers/again/rewind", {"to": point})
    while not (first.exists() and first.read_text()):
        assert time.time() - began < 60, "nothing was pushed"
        time.sleep(0.002)
    call(installation, "DELETE", "/api/consumers/again?discard=true")
    time.sleep(1.0)  # until what was under way has arrived
    return (float(first.read_text()) - began) * 1000


def make(installation: Installation, name: str, fields: dict[str, Any]) -> None:
    call(installation, "POST", "/api/consumers", {"name": name, "source": "playground", "tables": ["public.many"], **fields})


def stored(installation: Installation) -> int:
    with installation.store() as conn:
        row = conn.execute("SELECT coalesce(sum(messages), 0) FROM capture_progress").fetchone()
    return int(row[0]) if row else 0


def call(installation: Installation, method: str, path: str, body: Any = None) -> Any:
    status, answer = installation.call(method, path, body)
    assert status < 300, (method, path, status, answer)
    return answer


if __name__ == "__main__":
    main()
