"""The django-q2 task of the replay cluster: steps of backfills, as long as some are due and the slice lasts."""
from __future__ import annotations

import logging
import os
import signal
import time

import psycopg
from django.db import DatabaseError, connection

from capture.backfilling import step
from consumers.parent import die_with_parent
from consumers.store import lifecycle
from consumers.store.connection import why_away

log = logging.getLogger(__name__)

SLICE_S = 2.0


def replay() -> None:
    """Work on what is due. The watcher enqueues the next one when more is."""
    die_with_parent(signal.SIGKILL)
    parent = os.getppid()
    connection.close()  # nothing is inherited over a fork
    end = time.monotonic() + SLICE_S
    try:
        _beat()
        while time.monotonic() < end and os.getppid() == parent and step(alive=_beat):
            pass
    except (psycopg.Error, DatabaseError) as error:
        log.warning("a step of a backfill lost the store: %s", why_away(error))
    finally:
        connection.close()


def _beat() -> None:
    lifecycle.beat("replay", os.environ.get("SEQUIN_CLUSTER", ""))
