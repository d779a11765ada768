"""`manage.py up` as a newcomer uses it: insert with psql, receive with curl, see it pushed; start and stop cleanly."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from tests.conftest import ROOT, wait_until
from tests.installation import Installation, kill, leftovers, temporary

PULL, PUSH = "playground-pull", "playground-push"


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    with temporary(SEQUIN_LOG_FORMAT="json") as made:
        yield made


def pushed(installation: Installation, text: str) -> Any:
    return wait_until(lambda: text in str(installation.call("GET", "/receiver/arrivals")[1]), 30, f"{text} at the receiver")


def test_a_change_reaches_the_waiting_client_and_the_receiver(installation: Installation) -> None:
    with installation.source() as source:
        source.execute("INSERT INTO orders (customer_id, status, total) VALUES (1, 'first-order', 99.50)")
    messages = wait_until(lambda: installation.receive(PULL, wait="5s"), 60, "the change by pull")
    record = messages[0]["data"]["record"]
    assert (record["status"], record["total"]) == ("first-order", 99.5) and messages[0]["deliver_count"] == 1
    assert messages[0]["data"]["metadata"]["consumer"]["name"] == PULL
    assert installation.ack(PULL, messages) == {"success": True, "acked": 1, "stale": 0}
    pushed(installation, "first-order")


def test_the_playground_command_makes_changes(installation: Installation) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "SECRET_KEY", "ENCRYPTION_KEYS")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), "playground"], capture_output=True, text=True, check=False,
        env={**environment, "SEQUIN_HOME": str(installation.home)},
    )  # fmt: skip
    assert done.returncode == 0 and "inserted order" in done.stdout, done.stderr
    actions: list[str] = []
    wait_until(lambda: actions.extend(take(installation)) or len(actions) >= 5, 20, "five changes")
    assert sorted(actions) == ["delete", "insert", "insert", "update", "update"]


def take(installation: Installation) -> list[str]:
    messages = installation.receive(PULL, wait="1s")
    if messages:
        installation.ack(PULL, messages)
    return [message["data"]["action"] for message in messages]


def test_what_is_logged_is_json(installation: Installation) -> None:
    lines = [line for line in installation.text().splitlines() if line.startswith("{")]
    assert any(json.loads(line)["message"].startswith("serving http://") for line in lines), lines


def test_a_second_up_is_refused_at_once(installation: Installation) -> None:
    second = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), "up", "--port", "1"], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "SEQUIN_HOME": str(installation.home)},
    )  # fmt: skip
    assert second.returncode == 2 and len(second.stderr.strip().splitlines()) == 1 and "SEQUIN_HOME" in second.stderr


@pytest.mark.parametrize("victim", ["run_capture --reader", "run_capture", "run_workers --cluster", "run_workers", "run_web"])
def test_what_is_killed_comes_back(installation: Installation, victim: str) -> None:
    """SIGKILL of each process in turn: the next change arrives by pull and by push all the same."""
    for pid in installation.pids(victim)[:1]:
        os.kill(pid, signal.SIGKILL)
    mark = f"after-{victim.replace(' ', '').replace('--', '-')}"
    with installation.source() as source:
        source.execute("INSERT INTO orders (customer_id, status) VALUES (2, %s)", [mark])

    wait_until(lambda: mark in str(take_records(installation)), 20, f"{mark} by pull")
    wait_until(lambda: web_answers(installation), 20, "web")
    pushed(installation, mark)


def test_every_process_of_the_cluster_may_be_killed(installation: Installation) -> None:
    """Pumps, the sentinel, its helpers: after each SIGKILL pushes go on, if need be by a cluster started anew."""
    for number in range(6):
        pids = wait_until(lambda: installation.pids("run_workers --cluster")[1:], 30, "the cluster")
        kill(pids[number % len(pids)])
        mark = f"cluster-{number}"
        with installation.source() as source:
            source.execute("INSERT INTO orders (customer_id, status) VALUES (2, %s)", [mark])
        pushed(installation, mark)


def test_a_stopped_pump_is_replaced(installation: Installation) -> None:
    """SIGSTOP: alive, but not getting on. The watcher goes by heartbeats."""
    for pid in installation.pids("run_workers --cluster")[1:]:
        os.kill(pid, signal.SIGSTOP)
    with installation.source() as source:
        source.execute("INSERT INTO orders (customer_id, status) VALUES (2, 'after-sigstop')")
    wait_until(lambda: "after-sigstop" in str(installation.call("GET", "/receiver/arrivals")[1]), 30, "pushes to go on")


def test_whatever_is_stopped_is_woken_or_replaced(installation: Installation) -> None:
    """SIGSTOP of every process at once, the embedded Postgres too: none ends by itself, none beats."""
    stopped = set(installation.pids()) - {installation.process.pid if installation.process else 0}
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    mark = "after-all-stopped"

    def inserted() -> bool:
        try:
            with installation.source() as source:
                source.execute("INSERT INTO orders (customer_id, status) VALUES (2, %s)", [mark])
            return True
        except psycopg.Error:
            return False

    wait_until(inserted, 60, "Postgres to be woken")
    wait_until(lambda: web_answers(installation) and mark in str(take_records(installation)), 90, f"{mark} by pull")
    wait_until(lambda: mark in str(installation.call("GET", "/receiver/arrivals")[1]), 60, f"{mark} at the receiver")
    for command in ("run_capture", "run_workers", "run_web"):
        wait_until(lambda: installation.pids(command) and not stopped & set(installation.pids(command)), 60, f"{command} to be replaced")  # noqa: B023


def take_records(installation: Installation) -> list[Any]:
    try:
        messages = installation.receive(PULL, wait="1s")
    except (OSError, AssertionError):  # the web server is coming back, or its store is
        return []
    if messages:
        installation.ack(PULL, messages)
    return [message["data"]["record"] for message in messages]


def web_answers(installation: Installation) -> bool:
    try:
        return installation.call("GET", "/health", timeout=5)[0] in (200, 503)
    except OSError:
        return False


def test_the_store_moves_when_another_process_has_taken_its_port(installation: Installation) -> None:
    assert installation.process is not None
    keys = installation.home / "keys"
    port = int((keys / "postgres_port").read_text())
    installation.process.send_signal(signal.SIGSTOP)  # it sees afterwards what happened
    with socket.socket() as taken:
        try:
            os.kill(installation.pids("/postgres -D")[0], signal.SIGKILL)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            wait_until(lambda: binds(taken, port), 20, "the port to be free")
            taken.listen()
        finally:
            installation.process.send_signal(signal.SIGCONT)
        wait_until(lambda: f"127.0.0.1:{port}/" not in installation.psql_url(), 30, "the new place to be said")
        with installation.source() as source:
            source.execute("INSERT INTO orders (customer_id, status) VALUES (2, 'after-the-move')")
        wait_until(lambda: web_answers(installation) and "after-the-move" in str(take_records(installation)), 30, "the change by pull")
        pushed(installation, "after-the-move")
    assert int((keys / "postgres_port").read_text()) != port


def binds(one: socket.socket, port: int) -> bool:
    try:
        one.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def test_ctrl_c_stops_everything_with_status_0_and_it_starts_again(installation: Installation) -> None:
    assert installation.stop() == 0
    wait_until(lambda: not leftovers(installation.home), 10, "every process to be gone")
    installation.start()
    with installation.source() as source:
        source.execute("INSERT INTO orders (customer_id, status) VALUES (2, 'after-restart')")
    wait_until(lambda: "after-restart" in str(installation.receive(PULL, wait="1s")), 20, "a change after the restart")


def test_a_cluster_that_does_not_end_is_told_again_and_ended_by_force(installation: Installation) -> None:
    assert installation.process is not None
    with closing(installation.store()) as store:
        store.execute("LISTEN sequin_stop")
        os.kill(installation.pids("run_workers --cluster")[0], signal.SIGSTOP)
        installation.process.send_signal(signal.SIGINT)
        assert len(list(store.notifies(timeout=60, stop_after=2))) == 2, "pumps are told until they end: one that begins hears no first word"
    assert installation.process.wait(60) == 0
    wait_until(lambda: not leftovers(installation.home), 10, "every process to be gone")
    installation.start()


def test_a_killed_up_leaves_nothing_behind(installation: Installation) -> None:
    assert installation.process is not None
    installation.process.kill()
    installation.process.wait(60)
    wait_until(lambda: not leftovers(installation.home), 15, "every process to be gone")


@pytest.mark.parametrize("command", ["up", "run_web"])
@pytest.mark.parametrize("port", ["0", "70000", "http"])
def test_a_port_that_is_none_is_refused(command: str, port: str) -> None:
    with pytest.raises(CommandError, match="expected a port from 1 to 65535"):
        call_command(command, "--port", port)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEQUIN_WORKERS", "many"), ("SEQUIN_RETENTION", "forever"), ("SEQUIN_ALLOWED_NETWORKS", "10.0.0.0/99"), ("DEBUG", "perhaps"),
        ("DATABASE_URL", "mysql://localhost/x"), ("ENCRYPTION_KEYS", "short"), ("SEQUIN_LOG_FORMAT", "xml"), ("SEQUIN_MAX_WAITERS", "-1"),
        ("SEQUIN_MIN_FREE_DISK", "a lot"), ("Q_BROKER_URL", "amqp://x"), ("SEQUIN_LOG_LEVEL", "loud"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_one_line_and_status_2(name: str, value: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "SECRET_KEY", "ENCRYPTION_KEYS")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), "up"], capture_output=True, text=True, check=False, timeout=120,
        env={**environment, "SEQUIN_HOME": str(tmp_path), name: value},
    )  # fmt: skip
    assert done.returncode == 2 and name in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
