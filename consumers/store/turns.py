"""Turns: a pump's time-limited right to serve a push consumer. One writer of the table `turns`."""
from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from uuid import UUID

from django.db import connection, transaction

from consumers.store import lifecycle

TURN_S = 4.0  # a pump that dies is replaced after this long
ALIVE_S = 5.0
PUMP, ENDING = "pump", "ending pump"  # as they beat: one that ends takes no turns, the others share without it


def beat(cluster: str, *, ending: bool = False) -> None:
    """Say that this process pumps."""
    lifecycle.beat(ENDING if ending else PUMP, cluster)


def join(cluster: str) -> None:
    """Begin to pump: the others hear of it and give up what is too much for them."""
    beat(cluster)
    _tell()


def retire(cluster: str) -> None:
    """Begin to end: from now on the others take what this process gives up."""
    with transaction.atomic():
        _forget(PUMP)
        beat(cluster, ending=True)


def take(holder: UUID, limit: int) -> list[UUID]:
    """Take up to `limit` turns that nobody holds, of active push consumers. What a dead holder had out comes back at once."""
    taken: list[UUID] = []
    with connection.cursor() as cursor:
        while limit > len(taken):
            cursor.execute(
                # Any of them, because several pumps look at the same time; written in one order, so that none waits for another in a ring.
                "WITH free AS (SELECT c.id FROM consumers_consumer c LEFT JOIN turns x ON x.consumer = c.id"
                " WHERE c.kind = 'push' AND c.status = 'active' AND (x.consumer IS NULL OR x.until < clock_timestamp())"
                " ORDER BY random() LIMIT %(limit)s),"
                " taken AS (INSERT INTO turns AS t (consumer, holder, token, pid, host, until)"
                " SELECT id, %(holder)s, gen_random_uuid(), %(pid)s, %(host)s, clock_timestamp() + %(turn)s * interval '1 s'"
                " FROM free ORDER BY id"
                " ON CONFLICT (consumer) DO UPDATE SET holder = excluded.holder, token = excluded.token, pid = excluded.pid,"
                " host = excluded.host, until = excluded.until WHERE t.until < clock_timestamp() RETURNING consumer)"
                " SELECT (SELECT count(*) FROM free), (SELECT array_agg(consumer) FROM taken)",
                {"holder": holder, "pid": os.getpid(), "host": socket.gethostname(), "turn": TURN_S, "limit": limit - len(taken)},
            )
            free, got = cursor.fetchone() or (0, None)
            taken += got or []
            if free == len(got or []):
                break  # else somebody was faster with some: there may be others
        if taken:
            cursor.execute(
                "UPDATE leases SET until = clock_timestamp() WHERE consumer = ANY (%s) AND holder IS DISTINCT FROM %s"
                " AND until > clock_timestamp()",
                [taken, holder],
            )
    return taken


def renew(holder: UUID) -> dict[UUID, str]:
    """Go on holding; returns the consumers still held, each with its status: nobody is given the turn of a paused one.

    A turn whose time was over, but which nobody took, is held on: what is in flight need not be sent again.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE turns t SET until = clock_timestamp() + %s * interval '1 s' FROM consumers_consumer c"
            " WHERE t.holder = %s AND c.id = t.consumer RETURNING t.consumer, c.status",
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
        gone = cursor.rowcount
    if gone:
        _tell()


def shares() -> tuple[int, int]:
    """How many active push consumers there are, and how many pumps are alive to serve them; those that end not counted."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT (SELECT count(*) FROM consumers_consumer WHERE kind = 'push' AND status = 'active'),"
            " (SELECT count(*) FROM heartbeats WHERE process = %s AND at > clock_timestamp() - %s * interval '1 s')",
            [PUMP, ALIVE_S],
        )
        consumers, pumps = cursor.fetchone() or (0, 0)
    return int(consumers), int(pumps)


def alive_pumps(cluster: str | None = None) -> int:
    """How many pumps have beaten lately, of one cluster or of all: so many slots are taken."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM heartbeats WHERE process IN (%s, %s) AND at > clock_timestamp() - %s * interval '1 s'"
            " AND (%s::text IS NULL OR detail = %s)",
            [PUMP, ENDING, ALIVE_S, cluster, cluster],
        )
        row = cursor.fetchone()
    return int(row[0]) if row else 0


def forget_pump() -> None:
    """This process pumps no more: its slot is free."""
    _forget(PUMP, ENDING)
    _tell()


def _forget(*processes: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "DELETE FROM heartbeats WHERE process = ANY (%s) AND host = %s AND pid = %s",
            [list(processes), socket.gethostname(), os.getpid()],
        )


def _tell() -> None:
    """Pumps and watchers look at once."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify('sequin_turns', '')")
