"""The store of a benchmark: a server of its own, which waits for its disk as a real one does, ended and removed afterwards.

Importing this starts the server and names it to the settings, so it comes before whatever reads those.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["SEQUIN_TEST_DURABLE"] = "1"
os.environ["DJANGO_SETTINGS_MODULE"] = "sequinapp.settings"

import tests.postgres_plugin as cluster  # noqa: E402


@contextmanager
def store() -> Iterator[None]:
    """Django set up, on an empty, migrated store."""
    import django
    import psycopg
    from django.core.management import call_command

    try:
        with psycopg.connect(os.environ["DATABASE_URL"].rsplit("/", 1)[0] + "/postgres", autocommit=True) as conn:
            conn.execute("CREATE DATABASE sequin")
        django.setup()
        from django.db import connection

        call_command("migrate", verbosity=0)
        connection.close()
        yield
        connection.close()
    finally:
        cluster.pytest_unconfigure(None)
