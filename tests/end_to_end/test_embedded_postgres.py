"""The embedded server comes back after its postmaster was killed, whatever its other processes are doing; and what it does without its keys."""
from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from django.core.exceptions import ImproperlyConfigured

from sequinapp.embedded_postgres import EmbeddedPostgres
from tests.conftest import wait_until


@pytest.fixture
def home() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="sequin-embedded-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def test_a_busy_backend_of_a_killed_postmaster_does_not_keep_it_from_starting(home: Path) -> None:
    server = EmbeddedPostgres(home, {"fsync": "off"})
    postmaster = server.start()

    def connect() -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(
            host="127.0.0.1", port=server.port, user="postgres", password=server.password, dbname="postgres", autocommit=True
        )

    def keep_busy() -> None:
        with pytest.raises(psycopg.Error), connect() as conn:
            conn.execute("SELECT max(md5(g::text || h::text)) FROM generate_series(1, 30000) g, generate_series(1, 30000) h")

    busy = threading.Thread(target=keep_busy)
    try:
        busy.start()
        with connect() as conn:
            wait_until(lambda: conn.execute("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%30000%' AND state = 'active'"
                                            " AND pid <> pg_backend_pid()").fetchone() == (1,), 10, "a busy backend")  # fmt: skip
        postmaster.kill()
        postmaster.wait(60)
        server.start()
        with connect() as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
        busy.join(60)
        assert not busy.is_alive()
    finally:
        server.stop()


@pytest.fixture
def closed_home(tmp_path: Path) -> Iterator[Path]:
    """A home where the user Postgres runs as may not look, as root's own directory is."""
    tmp_path.chmod(0o700)
    made = tmp_path / "home"
    shutil.rmtree(EmbeddedPostgres(made).root, ignore_errors=True)
    yield made
    shutil.rmtree(EmbeddedPostgres(made).root, ignore_errors=True)


def test_data_whose_keys_are_gone_are_not_touched(closed_home: Path) -> None:
    server = EmbeddedPostgres(closed_home, {"fsync": "off"})
    server.start()
    server.stop()
    assert server.root.is_relative_to(closed_home) == (os.geteuid() != 0)
    shutil.rmtree(closed_home / "keys")
    with pytest.raises(ImproperlyConfigured) as refused:
        EmbeddedPostgres(closed_home).django_database()
    assert f"rm -r {server.root}" in str(refused.value) and (server.data / "PG_VERSION").exists()
    shutil.rmtree(server.root)
    server.start()
    try:
        with psycopg.connect(host="127.0.0.1", port=server.port, user="postgres", password=server.password, dbname="postgres") as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
    finally:
        server.stop()
