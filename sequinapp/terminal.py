"""Hear Ctrl-C without make hearing it: make, interrupted, would end with status 130 however cleanly we stopped.

Below make on a terminal we move into a process group of our own and make it the terminal's foreground one.
"""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminal_of_our_own() -> Iterator[None]:
    """For the length of the block; without make or without a terminal nothing changes."""
    group = os.getpgrp()
    if not os.environ.get("MAKELEVEL") or group == os.getpid() or not _is_foreground(group):
        yield
        return
    terminal = sys.stdin.fileno()
    # To set the foreground group from the background would stop us. And Ctrl-Z would stop us without the shell noticing.
    for number in (signal.SIGTTOU, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.tcsetpgrp(terminal, os.getpgrp())
    try:
        yield
    finally:
        try:
            os.tcsetpgrp(terminal, group)
        except OSError:
            pass  # the terminal is gone, or make is


def _is_foreground(group: int) -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == group
    except (OSError, ValueError):
        return False  # stdin is no terminal, or closed
