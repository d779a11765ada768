"""Take away from this process what a transform does not need. Inside the child only, once everything is imported.

What counts is the kernel's word: no new file or socket, no process, no file growth, no core, bounded memory, no rights to
be gained, the end together with the parent. macOS knows only a part of it.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys

ADDRESS_SPACE_BYTES = 512 * 1024 * 1024
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h
NOBODY = 65534

LIMITS = {
    "RLIMIT_AS": ADDRESS_SPACE_BYTES,
    "RLIMIT_CORE": 0,
    "RLIMIT_FSIZE": 0,
    "RLIMIT_NPROC": 0,
    "RLIMIT_NOFILE": 0,  # those open stay open, no other can be had
}


def lock(parent: int) -> None:
    """Give up every right. `parent` is the process id to live as long as. Raises OSError where Linux refuses."""
    if os.geteuid() == 0:
        # Limits do not bind root. A container may have no other user to become.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    if sys.platform == "linux":
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    for name, value in LIMITS.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            if sys.platform == "linux":
                raise


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) refused")
