"""Look at the room that the embedded store's disk has left. Below SEQUIN_MIN_FREE_DISK capture stops storing."""
from __future__ import annotations

import re
import shutil
from pathlib import Path

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


def shortage(directory: Path | None, least: str) -> str | None:
    """What is wrong with the room on the directory's disk, or None. `least` is a share such as 10% or a size such as 20GB.

    No directory: the store is elsewhere, and its disk cannot be seen from here.
    """
    if directory is None or not directory.exists():
        return None
    disk = shutil.disk_usage(directory)
    if least.endswith("%"):
        needed = disk.total * int(least[:-1]) // 100
    else:
        match = re.fullmatch(r"(\d+)\s*(MB|GB|TB)", least)
        assert match is not None  # sequinapp/env.py has seen to it
        needed = int(match[1]) * UNITS[match[2]]
    if disk.free >= needed:
        return None
    return (
        f"the store's disk is nearly full: {disk.free / 1e9:.1f} GB of {disk.total / 1e9:.1f} GB are free, SEQUIN_MIN_FREE_DISK is"
        f" {least}. Nothing is stored or confirmed until there is room"
    )
