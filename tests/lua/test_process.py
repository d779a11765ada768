"""The child process: what it has, and what happens when it is killed, stopped, or left alone."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from consumers.lua.pool import Pool
from consumers.lua.transformer import Transformer
from consumers.lua.types import LuaError
from tests.lua.world import call, until

ROOT = Path(__file__).parents[2]
IDS = "function transform(action, record) return record.id end"
SLOW = "function transform(action, record) local n = 0 for i = 1, 60000 do n = n + i end return record.id end"
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@linux
def test_the_child_has_no_secrets_and_no_rights(transformer, monkeypatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "a secret of the service")
    one = transformer(IDS)
    assert one.run([call()]) == [b"1"]
    process = Path(f"/proc/{one.pid}")
    environment = (process / "environ").read_bytes()
    assert b"SECRET" not in environment
    assert b"DATABASE" not in environment
    assert {entry.partition(b"=")[0] for entry in environment.split(b"\0") if entry} <= {b"TZ", b"LC_ALL", b"PYTHONUTF8"}
    status = (process / "status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "Uid:\t0" not in status
    assert os.readlink(process / "cwd") == "/"
    limits = {line[:26].strip(): line[26:].split()[1] for line in (process / "limits").read_text().splitlines()[1:]}
    for name in ("Max open files", "Max core file size", "Max file size", "Max processes"):
        assert limits[name] == "0", name
    assert int(limits["Max address space"]) <= 512 * 1024 * 1024
    # Its socket, and what was standard input, output and error.
    assert {os.readlink(path).partition(":")[0] for path in (process / "fd").iterdir()} <= {"socket", "/dev/null"} | {
        os.readlink(process / "fd" / "1").partition(":")[0]
    }
    assert len(list((process / "fd").iterdir())) == 4


def test_a_killed_child_loses_no_message(transformer) -> None:
    one = transformer(SLOW)
    assert one.run([call()]) == [b"1"]
    first = one.pid
    messages = [call({"id": number}) for number in range(300)]
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.extend(one.run(messages)))
    thread.start()
    os.kill(first, signal.SIGKILL)
    thread.join()
    assert results == [str(number).encode() for number in range(300)]
    assert one.run([call()]) == [b"1"]  # it may have been killed after its last answer
    assert one.pid != first


def test_a_child_killed_while_idle_is_replaced(transformer) -> None:
    one = transformer(IDS)
    one.run([call()])
    for _ in range(3):
        os.kill(one.pid, signal.SIGKILL)
        assert one.run([call({"id": 5}), call({"id": 6})]) == [b"5", b"6"]


def test_a_child_that_hangs_is_replaced(transformer, monkeypatch) -> None:
    monkeypatch.setattr("consumers.lua.child.DEADLINE_S", 1.5)
    one = transformer(IDS)
    one.run([call()])
    os.kill(one.pid, signal.SIGSTOP)
    assert one.run([call({"id": number}) for number in range(3)]) == [b"0", b"1", b"2"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_message_that_ends_two_children_gets_an_error(transformer, monkeypatch, how: signal.Signals) -> None:
    monkeypatch.setattr("consumers.lua.child.DEADLINE_S", 1.5)
    ready = Transformer._ready
    hit: list[int] = []

    def ready_and_hit(self: Transformer):
        child = ready(self)
        if child is not None and len(hit) < 2:
            hit.append(child.pid)
            os.kill(child.pid, how)
        return child

    monkeypatch.setattr(Transformer, "_ready", ready_and_hit)
    first, *others = transformer(IDS).run([call({"id": number}) for number in range(3)])
    assert isinstance(first, LuaError)
    assert others == [b"1", b"2"]
    assert len(set(hit)) == 2


@linux
def test_the_child_ends_with_its_parent() -> None:
    program = (
        "import sys, time\nfrom consumers.lua.transformer import Transformer\nfrom tests.lua.world import call\n"
        f"one = Transformer({IDS!r})\none.run([call()])\nprint(one.pid, flush=True)\nsys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdin is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    until(lambda: not alive(child))
    parent.stdin.close()
    parent.stdout.close()


@linux
def test_a_stopped_child_ends_with_its_parent() -> None:
    program = (
        "import os, signal, sys\nfrom consumers.lua.transformer import Transformer\nfrom tests.lua.world import call\n"
        f"one = Transformer({IDS!r})\none.run([call()])\nos.kill(one.pid, signal.SIGSTOP)\nprint(one.pid, flush=True)\nsys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdin is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until(lambda: not alive(child))
    parent.stdin.close()
    parent.stdout.close()


@linux
def test_a_child_outlives_the_thread_that_started_it(transformer) -> None:
    one = transformer(IDS)
    thread = threading.Thread(target=lambda: one.run([call()]))
    thread.start()
    thread.join()
    pid = one.pid
    assert one.run([call()]) == [b"1"]
    assert one.pid == pid


def test_a_closed_transformer_leaves_no_process(transformer) -> None:
    one = transformer(IDS)
    one.run([call()])
    pid = one.pid
    one.close()
    assert one.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert one.run([call()]) == [b"1"]


def test_a_large_batch_and_large_messages_come_through(transformer) -> None:
    one = transformer("function transform(action, record) return record end")
    messages = [call({"id": number, "text": "x" * 20_000}) for number in range(1_000)]
    results = one.run(messages)
    assert [json.loads(result)["id"] for result in results] == list(range(1_000))


def test_dropped_messages_and_errors_stay_in_their_places(transformer) -> None:
    one = transformer("function transform(a, r) if r.id % 3 == 0 then return nil elseif r.id % 3 == 1 then error('odd', 0) end return r.id end")
    assert one.run([call({"id": number}) for number in range(6)]) == [
        None, LuaError("odd", 1), b"2", None, LuaError("odd", 1), b"5",
    ]  # fmt: skip


def test_an_empty_batch(transformer) -> None:
    one = transformer(IDS)
    assert one.run([]) == []
    assert one.pid is None


def test_a_bomb_in_the_middle_costs_the_others_nothing(transformer, monkeypatch) -> None:
    monkeypatch.setattr("consumers.lua.child.DEADLINE_S", 30)  # by the clock, and the machine may give it no CPU for seconds
    one = transformer(
        "function transform(a, r) if r.id == 250 then return (('a'):rep(60)):find(('a?'):rep(60) .. ('a'):rep(60) .. 'b') end return r.id end"
    )
    results = one.run([call({"id": number}) for number in range(500)])
    assert results[250] == LuaError("took longer than 50 ms CPU", None)
    assert [result for result in results if isinstance(result, bytes)] == [b"%d" % n for n in range(500) if n != 250]


def test_a_forked_copy_starts_a_child_of_its_own(transformer) -> None:
    one = transformer(IDS)
    one.run([call()])
    pid = one.pid
    copy = os.fork()
    if copy == 0:
        same = one.run([call({"id": 9})]) == [b"9"] and one.pid != pid
        one.close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) == 0
    assert one.run([call()]) == [b"1"]
    assert one.pid == pid


def test_threads_share_a_transformer(transformer) -> None:
    one = transformer(IDS)
    results: dict[int, list[object]] = {}

    def work(number: int) -> None:
        results[number] = list(one.run([call({"id": number})] * 20))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [str(number).encode()] * 20 for number in range(8)}


def test_the_pool_ends_the_least_recently_used() -> None:
    pool = Pool(live=2)
    try:
        for consumer in ("a", "b", "a", "c"):
            assert pool.run(consumer, IDS, [call()]) == [b"1"]
        assert [consumer for consumer, _ in pool._transformers] == ["a", "c"]
        pool.forget("a")
        assert len(pool) == 1
        assert pool.run("c", SLOW, [call()]) == [b"1"]
        assert len(pool) == 2
    finally:
        pool.close()
    assert len(pool) == 0


def test_the_pool_ends_what_was_idle_for_long() -> None:
    pool = Pool(idle_s=0)
    try:
        pool.run("a", IDS, [call()])
        pool.run("b", IDS, [call()])
        assert len(pool) <= 1 or all(key[0] != "a" for key in pool._transformers)
    finally:
        pool.close()
