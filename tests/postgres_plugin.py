"""Start one embedded Postgres for the whole session before Django reads its settings; pytest loads this with -p.

Nothing of the developer's environment is used: an empty home in a temporary directory, ended and removed afterwards.
SEQUIN_TEST_DATABASE_URL runs the suite on another server (wal_level=logical).
"""
from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_home = Path(tempfile.mkdtemp(prefix="sequin-tests-"))
_home.chmod(0o711)
_cluster: Any = None

for _name in ("DATABASE_URL", "Q_BROKER_URL", "SEQUIN_ALLOWED_NETWORKS", "SEQUIN_MAX_WAITERS", "SEQUIN_RETENTION", "SEQUIN_WORKERS"):
    os.environ.pop(_name, None)
os.environ["SEQUIN_HOME"] = str(_home)
os.environ["SEQUIN_ALLOWED_NETWORKS"] = "127.0.0.0/8,::1/128"
os.environ["SEQUIN_WORKERS"] = "2"

# Benchmarks ask for a server that waits for its disk, as a real one does.
_durable = os.environ.get("SEQUIN_TEST_DURABLE") == "1"
FAST = {} if _durable else {"fsync": "off", "full_page_writes": "off"}
ROOM = {"max_replication_slots": "60", "max_wal_senders": "60", "max_connections": "300"}


def _start() -> None:
    global _cluster
    given = os.environ.get("SEQUIN_TEST_DATABASE_URL")
    from cryptography.fernet import Fernet

    os.environ["SECRET_KEY"] = "for tests only"
    os.environ["ENCRYPTION_KEYS"] = Fernet.generate_key().decode()
    if given:
        os.environ["DATABASE_URL"] = given
        return
    from sequinapp.embedded_postgres import EmbeddedPostgres

    _cluster = EmbeddedPostgres(_home, FAST | ROOM)
    _cluster.start()
    os.environ["DATABASE_URL"] = f"postgres://postgres:{_cluster.password}@127.0.0.1:{_cluster.port}/sequin"


def pytest_unconfigure(config: Any) -> None:
    if _cluster is not None:
        _cluster.stop()
    shutil.rmtree(_home, ignore_errors=True)


_start()
