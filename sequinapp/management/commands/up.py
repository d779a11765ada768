"""`manage.py up`: everything in one foreground process tree."""
from __future__ import annotations

import fcntl
import logging
import os
import secrets
import signal
import time
import urllib.error
import urllib.request
from argparse import ArgumentParser
from pathlib import Path
from typing import IO, Any

import psycopg
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError, connection, connections
from psycopg import sql

from consumers.models import ApiToken
from consumers.tokens import create_token, find_caller
from sequinapp import playground
from sequinapp.embedded_postgres import EmbeddedPostgres
from sequinapp.env import read_or_make
from sequinapp.management.commands.run_web import demand_free, dialled, port_number
from sequinapp.supervision import Child, Supervisor
from sequinapp.terminal import terminal_of_our_own

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.0/8,::1/128"
WEB_START_S = 60
STOP_WITHIN_S = 9.5  # of the ten seconds that are promised; the processes have their share in supervision.py
TOKEN_NAME = "up"
OLDEST_STORE = 140_000
WAKE_STORE_AFTER_S, KILL_STORE_AFTER_S = 15.0, 60.0


class Command(BaseCommand):
    help = "Run everything: embedded Postgres (when DATABASE_URL is unset), migrations, capture, workers, web."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=port_number, default=8000)
        parser.add_argument("--no-playground", action="store_true")

    def handle(self, *_: Any, **options: Any) -> None:
        with terminal_of_our_own():
            self._run(**options)

    def _run(self, **options: Any) -> None:
        self._host, self._port, self._with_playground = options["host"], options["port"], not options["no_playground"]
        self._postgres: EmbeddedPostgres | None = None
        self._server: Any = None
        self._restart_at = self._woken_at = 0.0
        lock = _lock_home(settings.SEQUIN_HOME)
        supervisor = self._supervisor = Supervisor([], lambda: None)
        lines: list[str] = []
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            demand_free(self._host, self._port)
            self._start_store()
            lines += self._allow_loopback()
            call_command("migrate", interactive=False, verbosity=0)
            lines += [*self._administrator(), *self._token()]
            lines += self._playground(self._with_playground)
            connections.close_all()
            supervisor = self._supervisor = self._make_supervisor()
            signal.signal(signal.SIGTERM, supervisor.stop)
            signal.signal(signal.SIGINT, supervisor.stop)
            supervisor.start()
            self._wait_for_web(supervisor)
            if not supervisor.stopping:
                self._say(lines, "", "Ctrl-C stops everything.")
            supervisor.run()
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._say(lines)  # a password is shown once, also when the start failed after making it
            deadline = time.monotonic() + STOP_WITHIN_S
            supervisor.stop_all()
            connections.close_all()
            if self._postgres is not None:
                self._postgres.stop(within_s=deadline - time.monotonic())
            lock.close()

    def _say(self, lines: list[str], *more: str) -> None:
        if lines:
            self.stdout.write("\n".join(["", *lines, *more]))
            self.stdout.flush()
            lines.clear()

    # The store ------------------------------------------------------------------------------------------------------

    def _start_store(self) -> None:
        if os.environ.get("DATABASE_URL"):
            _check_store()
            return
        self._postgres = EmbeddedPostgres(settings.SEQUIN_HOME)
        self._server = self._postgres.start()
        self._use_port()
        parameters = settings.DATABASES["default"]
        with psycopg.connect(
            host="127.0.0.1", port=self._postgres.port, user="postgres", password=self._postgres.password, dbname="postgres",
            autocommit=True,
        ) as conn:  # fmt: skip
            if conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", [parameters["NAME"]]).fetchone() is None:
                conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(parameters["NAME"])))

    def _use_port(self) -> None:
        """The settings were made before the port was known."""
        assert self._postgres is not None
        settings.DATABASES["default"]["PORT"] = str(self._postgres.port)
        connection.settings_dict["PORT"] = str(self._postgres.port)

    def _keep_store(self) -> None:
        """Start the embedded Postgres again when it has died; wake it, in the end kill it, when it answers nobody."""
        if self._server is None or self._postgres is None:
            return
        if self._server.poll() is None:
            self._keep_store_awake()
            return
        if time.monotonic() < self._restart_at:
            return
        log.warning("the embedded Postgres ended with status %s: started again", self._server.returncode)
        self._restart_at = time.monotonic() + 2
        connections.close_all()
        try:
            self._server = self._postgres.start()
            if str(self._postgres.port) != settings.DATABASES["default"]["PORT"]:
                self._move()
        except (ImproperlyConfigured, DatabaseError) as error:
            log.error("%s", error)
        connections.close_all()

    def _move(self) -> None:
        """Somebody took the port while nobody was there: tell all who know the old one."""
        assert self._postgres is not None
        log.warning("the embedded Postgres is on port %s now: another process has its old one. Everything starts anew", self._postgres.port)
        self._use_port()
        self._supervisor.ask_to_end()
        if self._with_playground:
            self._say(self._playground(True))

    def _keep_store_awake(self) -> None:
        assert self._postgres is not None
        silent_s = self._supervisor.beats.silent_s()
        if silent_s < WAKE_STORE_AFTER_S or time.monotonic() < self._woken_at + WAKE_STORE_AFTER_S:
            return
        self._woken_at = time.monotonic()
        how = signal.SIGKILL if silent_s > KILL_STORE_AFTER_S else signal.SIGCONT
        log.warning("the embedded Postgres has not answered for %.0f s: %s", silent_s, how.name)
        self._postgres.signal_all(how)

    # What a newcomer needs ----------------------------------------------------------------------------------------------

    def _allow_loopback(self) -> list[str]:
        if os.environ.get("SEQUIN_ALLOWED_NETWORKS"):
            return []
        os.environ["SEQUIN_ALLOWED_NETWORKS"] = LOOPBACK
        return [f"push endpoints may reach loopback here (SEQUIN_ALLOWED_NETWORKS={LOOPBACK})"]

    def _administrator(self) -> list[str]:
        users = get_user_model().objects
        name = settings.SEQUIN_ADMIN_USER
        line = f"console      {self._url('/admin/')}   user {name}"
        if users.filter(is_superuser=True).exists():
            return [line + "   (the password was printed at the first start; `manage.py changepassword` sets another)"]
        password = settings.SEQUIN_ADMIN_PASSWORD
        shown = "from SEQUIN_ADMIN_PASSWORD" if password else (password := secrets.token_urlsafe(12))
        users.create_superuser(name, "", password)
        return [line + f"   password {shown}"]

    def _token(self) -> list[str]:
        """An admin token of this installation: made once, kept beside the keys."""
        path = settings.SEQUIN_HOME / "keys" / "api_token"
        self._plain = path.read_text().strip() if path.exists() else ""
        if not self._plain or find_caller(self._plain) is None:
            path.unlink(missing_ok=True)
            ApiToken.objects.filter(name=TOKEN_NAME).delete()
            self._plain = read_or_make(path, lambda: create_token(TOKEN_NAME, "admin")[1])
        return [f"API token    {self._plain}"]

    def _playground(self, wanted: bool) -> list[str]:
        if not wanted:
            playground.remove()
            return []
        try:
            url = playground.prepare(self._url("/receiver/"))
        except (playground.NoPlayground, CommandError) as error:
            return [f"no playground: {error}"]
        base = self._url(f"/api/http_pull_consumers/{playground.PULL}")
        auth = f'-H "Authorization: Bearer {self._plain}"'
        return [
            f"receiver     {self._url('/receiver/')}   shows what the push consumer delivers",
            "",
            "Change a row:",
            f"  psql {url} -c \"insert into orders (customer_id, total) values (1, 99.50)\"",
            "  (or, without psql: make playground)",
            "Receive it, waiting up to a minute:",
            f'  curl -s {auth} "{base}/receive?batch_size=10&wait_for=60s"',
            "Acknowledge it with the ack_id you got:",
            f"  curl -s {auth} -d '{{\"ack_ids\": [\"…\"]}}' -H \"Content-Type: application/json\" {base}/ack",
        ]

    # The processes --------------------------------------------------------------------------------------------------------

    def _make_supervisor(self) -> Supervisor:
        web = ["run_web", "--host", self._host, "--port", str(self._port)]
        children = [Child("web", web), Child("capture", ["run_capture"]), Child("workers", ["run_workers"])]
        return Supervisor(children, self._keep_store)

    def _wait_for_web(self, supervisor: Supervisor) -> None:
        deadline = time.monotonic() + WEB_START_S
        while not supervisor.stopping and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self._url("/health"), timeout=2):
                    return
            except urllib.error.HTTPError:
                return  # it answers
            except OSError:
                time.sleep(0.1)

    def _url(self, path: str) -> str:
        return f"http://{dialled(self._host)}:{self._port}{path}"


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _lock_home(home: Path) -> IO[str]:
    """One `up` a SEQUIN_HOME. Exit status 2 when there is one already."""
    keys = home / "keys"
    try:
        keys.parent.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        keys.mkdir(mode=0o700, exist_ok=True)
        lock = os.fdopen(os.open(keys / "up.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+")  # held as long as the process lives
    except OSError as error:
        raise CommandError(f"SEQUIN_HOME: cannot write to {home}: {error.strerror}", returncode=2) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CommandError(f"another `up` runs on {home} already (SEQUIN_HOME)", returncode=2) from None
    return lock


def _check_store() -> None:
    """DATABASE_URL has to answer, and be new enough; one line otherwise."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SHOW server_version_num")
            row = cursor.fetchone()
    except Exception as error:  # whatever the driver says, in one line
        raise CommandError(f"DATABASE_URL: the store does not answer: {' '.join(str(error).split())}", returncode=1) from None
    version = int(row[0]) if row else 0
    if version < OLDEST_STORE:
        raise CommandError(f"DATABASE_URL: the store is Postgres {version // 10_000}; 14 or newer is needed", returncode=2)

