"""A whole installation as a user starts it: `manage.py up` in an empty home, its processes, its database, its API."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tests.conftest import ROOT, wait_until
from tests.ports import new_port

NOT_INHERITED = ("DATABASE_URL", "SECRET_KEY", "ENCRYPTION_KEYS", "SEQUIN_HOME", "SEQUIN_ALLOWED_NETWORKS")


@contextmanager
def temporary(*arguments: str, **environment: str) -> Iterator[Installation]:
    """Started with these arguments of `up`, stopped and removed afterwards. Beside its home there is room for other files."""
    base = Path(tempfile.mkdtemp(prefix="sequin-installation-"))
    base.chmod(0o711)  # for the user Postgres runs as when we are root
    made = Installation(base / "home", *arguments, **environment)
    try:
        made.start()
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.stop()
        shutil.rmtree(base, ignore_errors=True)


class Installation:
    """Starts with `start`, ends with `stop` or `kill`; the home stays, so it can be started again."""

    def __init__(self, home: Path, *arguments: str, **environment: str) -> None:
        self.home, self.environment = home, environment
        self.port = new_port()
        self.arguments = arguments
        self.output = home.parent / f"{home.name}.out"
        self.process: subprocess.Popen[bytes] | None = None
        self.token = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        environment["SEQUIN_HOME"] = str(self.home)
        environment["SEQUIN_MIN_FREE_DISK"] = "10MB"  # whatever the machine of the tests has left
        environment.update(self.environment)
        self._choose_port_of_the_store()
        with open(self.output, "ab") as out:
            begin = out.tell()
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "manage.py"), "up", "--port", str(self.port), *self.arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True,
            )  # fmt: skip

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"up ended: {self.text()[-2000:]}"
            return "Ctrl-C stops everything" in self.text()[begin:]

        wait_until(ready, 90, "up to be ready")
        found = re.search(r"sqn_[\w-]+", self.text())
        assert found is not None
        self.token = found[0]

    def _choose_port_of_the_store(self) -> None:
        """One that no other process is given by the kernel while this store is down: then it would move."""
        keys = self.home / "keys"
        if not keys.exists():
            self.home.mkdir(mode=0o711, exist_ok=True)
            keys.mkdir(mode=0o700)
            (keys / "postgres_port").write_text(f"{new_port()}\n")

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(60)

    def kill(self) -> None:
        """Everything at once, as a power cut would."""
        for pid in self.pids():
            kill(pid)
        if self.process is not None:
            self.process.wait(60)

    def pids(self, containing: str = "") -> list[int]:
        """The processes of this installation whose command line contains a text, `up` itself included."""
        assert self.process is not None
        return [pid for pid in process_tree(self.process.pid) if containing in command_of(pid)]

    def psql_url(self) -> str:
        found = re.findall(r"postgresql://\S+", self.text())
        return str(found[-1])

    def source(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.psql_url(), autocommit=True)

    def store(self) -> psycopg.Connection[Any]:
        keys = self.home / "keys"
        return psycopg.connect(
            host="127.0.0.1", port=int((keys / "postgres_port").read_text()), user="postgres",
            password=(keys / "postgres_password").read_text().strip(), dbname="sequin", autocommit=True,
        )  # fmt: skip

    def call(self, method: str, path: str, body: Any = None, timeout: float = 70) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.url + path, None if body is None else json.dumps(body).encode(), method=method,
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text[:1] == b"{" else text.decode()

    def receive(self, consumer: str, size: int = 100, wait: str = "0") -> list[dict[str, Any]]:
        status, body = self.call("GET", f"/api/http_pull_consumers/{consumer}/receive?batch_size={size}&wait_for={wait}")
        assert status == 200, body
        return list(body["data"])

    def ack(self, consumer: str, messages: list[dict[str, Any]]) -> Any:
        return self.call("POST", f"/api/http_pull_consumers/{consumer}/ack", {"ack_ids": [m["ack_id"] for m in messages]})[1]


def leftovers(home: Path) -> list[str]:
    """Command lines of processes that still run on this home, or are told its name in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                command = command_of(int(entry.name))
            except OSError:
                continue
            if command and (f"SEQUIN_HOME={home}\0".encode() in environment + b"\0" or f"{home}/" in command):
                found.append(command)
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def process_tree(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo.extend(children.get(pid, []))
    return found


def kill(pid: int) -> None:
    """SIGKILL; nothing when it has gone already, with its parent perhaps."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass

