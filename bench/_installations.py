"""What the benchmarks of the whole product measure: an installation of its own, ended and removed afterwards."""
from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.installation import Installation


@contextmanager
def temporary(*arguments: str, **environment: str) -> Iterator[Installation]:
    """Started with these arguments of `up`. Beside its home there is room for other files."""
    base = Path(tempfile.mkdtemp(prefix="sequin-bench-"))
    base.chmod(0o711)
    installation = Installation(base / "home", *arguments, **environment)
    try:
        installation.start()
        try:
            yield installation
        finally:
            installation.stop()
    finally:
        shutil.rmtree(base, ignore_errors=True)
