"""Ctrl-C on a terminal ends `make run` with status 0, not with make's own 130, and gives the terminal back."""
from __future__ import annotations

import os
import pty
import select
import signal
import sys
from pathlib import Path

from tests.conftest import ROOT

PROGRAM = """
import signal, sys
sys.path.insert(0, {root!r})
from sequinapp.terminal import terminal_of_our_own
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # it may come before it is waited for
with terminal_of_our_own():
    print("ready", flush=True)
    signal.sigwait([signal.SIGINT])
"""


def typed(command: list[str], directory: Path, *answers: tuple[bytes, bytes]) -> tuple[int, bytes]:
    """Run a command on a terminal; when it has printed a text, type the keys that go with it. Its status and output."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background of a shell's script has it ignored, and so would these
        os.execvpe(command[0], command, {name: value for name, value in os.environ.items() if not name.startswith("MAKE")})
    printed = b""
    todo = list(answers)
    try:
        while select.select([terminal], [], [], 120)[0]:
            printed += os.read(terminal, 4096)
            if todo and todo[0][0] in printed:
                os.write(terminal, todo.pop(0)[1])
    except OSError:
        pass  # Linux's way to say that the other side is closed
    os.close(terminal)  # hangs up on whoever is still there
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), printed


def test_make_does_not_hear_ctrl_c_and_the_shell_behind_it_can_read_again(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    (tmp_path / "Makefile").write_text(f"run:\n\t@exec {sys.executable} program.py\n")
    status, printed = typed(["sh", "-c", "make run; echo status $?; read word; echo read $word"], tmp_path,
                            (b"ready", b"\x1a\x03"), (b"status", b"typed\n"))  # fmt: skip
    assert status == 0 and b"status 0" in printed and b"read typed" in printed, printed


def test_without_make_nothing_is_changed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    script = f"trap 'echo heard' INT; {sys.executable} program.py; echo status $?"
    status, printed = typed(["sh", "-c", script], tmp_path, (b"ready", b"\x03"))
    assert status == 0 and b"heard" in printed and b"status 0" in printed, printed
