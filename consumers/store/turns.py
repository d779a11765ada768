"""Turns: a pump's time-limited right to serve a push consumer. One writer of the table `turns`."""
from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from uuid import UUID

from django.db import connection

TURN_S = 4.0  # a pump that dies is replaced after this long
ALIVE_S = 5.0


def take(holder: UUID, limit: int) -> list[UUID]:
    """Take up to `limit` turns that nobody holds, of active push consumers. What a dead holder had out comes back at once."""
    if limit <= 0:
        return []
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO turns AS t (consumer, holder, token, pid, host, until)"
            " SELECT c.id, %(holder)s, gen_random_uuid(), %(pid)s, %(host)s, clock_timestamp() + %(turn)s * interval '1 s'"
            " FROM consumers_consumer c LEFT JOIN turns x ON x.consumer = c.id"
            " WHERE c.kind = 'push' AND c.status = 'active' AND (x.consumer IS NULL OR x.until < clock_timestamp())"
            " ORDER BY c.id LIMIT %(limit)s"
            " ON CONFLICT (consumer) DO UPDATE SET holder = excluded.holder, token = excluded.token, pid = excluded.pid,"
            " host = excluded.host, until = excluded.until WHERE t.until < clock_timestamp() RETURNING consumer",
            {"holder": holder, "pid": os.getpid(), "host": socket.gethostname(), "turn": TURN_S, "limit": limit},
        )
        taken = [row[0] for row in cursor.fetchall()]
        if taken:
            cursor.execute(
                "UPDATE leases SET until = clock_timestamp() WHERE consumer = ANY (%s) AND holder IS DISTINCT FROM %s"
                " AND until > clock_timestamp()",
                [taken, holder],
            )
    return taken


def renew(holder: UUID) -> dict[UUID, str]:
    """Go on holding; returns the consumers still held, each with its status: nobody is given the turn of a paused one."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE turns t SET until = clock_timestamp() + %s * interval '1 s' FROM consumers_consumer c"
            " WHERE t.holder = %s AND t.until > clock_timestamp() AND c.id = t.consumer RETURNING t.consumer, c.status",
            [TURN_S, holder],
        )
        return dict(cursor.fetchall())


def release(holder: UUID, consumers: Iterable[UUID] | None = None) -> None:
    """Give turns up: these, or all. Other pumps hear of it and need not wait for their next look."""
    with connection.cursor() as cursor:
        if consumers is None:
            cursor.execute("DELETE FROM turns WHERE holder = %s", [holder])
        else:
            cursor.execute("DELETE FROM turns WHERE holder = %s AND consumer = ANY (%s)", [holder, list(consumers)])
        cursor.execute("SELECT pg_notify('sequin_turns', '')")


def shares() -> tuple[int, int]:
    """How many active push consumers there are, and how many pumps are alive to serve them."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT (SELECT count(*) FROM consumers_consumer WHERE kind = 'push' AND status = 'active'),"
            " (SELECT count(*) FROM heartbeats WHERE process = 'pump' AND at > clock_timestamp() - %s * interval '1 s')",
            [ALIVE_S],
        )
        consumers, pumps = cursor.fetchone() or (0, 0)
    return int(consumers), int(pumps)


def alive_pumps(cluster: str | None = None) -> int:
    """How many pumps have beaten lately, of one cluster or of all."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM heartbeats WHERE process = 'pump' AND at > clock_timestamp() - %s * interval '1 s'"
            " AND (%s::text IS NULL OR detail = %s)",
            [ALIVE_S, cluster, cluster],
        )
        row = cursor.fetchone()
    return int(row[0]) if row else 0


def forget_pump() -> None:
    """This process pumps no more."""
    with connection.cursor() as cursor:
        cursor.execute(
            "DELETE FROM heartbeats WHERE process = 'pump' AND host = %s AND pid = %s", [socket.gethostname(), os.getpid()]
        )
