"""What a process can ask of the kernel about its parent."""
from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Looked up once: between fork and exec nothing may be waited for that another thread had in hand.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send `how` to this process when its parent dies. Linux only; elsewhere nothing happens.

    Stays through an exec, so that as a Popen's preexec_fn it holds while the new program begins; not through a fork.
    """
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, int(how), 0, 0, 0)
