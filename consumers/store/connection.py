"""Raw psycopg connections to the store, for COPY, LISTEN and session locks; everything else uses Django's."""
from __future__ import annotations

from typing import Any

import psycopg
from django.db import connections


# A store whose machine is gone is noticed, not waited for.
ALIVE = {"connect_timeout": 10, "keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
# The same the other way round, and sooner: the lock of a reader whose machine is gone has to be free for the one that stands by.
HELD = {"tcp_keepalives_idle": "2", "tcp_keepalives_interval": "1", "tcp_keepalives_count": "2", "tcp_user_timeout": "5000",
        "idle_session_timeout": "0"}  # fmt: skip


def store_connection(*, application_name: str = "sequin", **overrides: Any) -> psycopg.Connection[Any]:
    """Open a connection of its own to the store, autocommit unless told otherwise. The caller closes it."""
    return psycopg.connect(**{**store_parameters(application_name), **overrides})


def store_parameters(application_name: str) -> dict[str, Any]:
    """What psycopg needs to open such a connection."""
    parameters = connections["default"].get_connection_params()
    for django_only in ("cursor_factory", "context", "prepare_threshold", "pool", "assume_role"):
        parameters.pop(django_only, None)
    for name, value in ALIVE.items():
        parameters.setdefault(name, value)
    parameters.update({"autocommit": True, "application_name": application_name})
    return parameters


def held_connection(application_name: str) -> psycopg.Connection[Any]:
    """A store connection that keeps a session's lock: never ended for being idle, and ended soon when its machine is gone.

    What it commits is on the store's disk, whatever the store's own setting: the source forgets what we confirm.
    """
    conn = store_connection(application_name=application_name)
    for name, value in HELD.items():
        conn.execute("SELECT set_config(%s, %s, false)", [name, value])
    conn.execute("SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'")
    return conn


def why_away(error: BaseException) -> str:
    """What keeps us from the store, as one line for the log."""
    if isinstance(error.__cause__ or error, (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.UndefinedFunction)):
        return "it is not migrated, run `manage.py migrate`"
    return " ".join(str(error).split())[:200]
