"""Run every benchmark: `make bench`, or some: `make bench ARGS="drain push"`."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    here = Path(__file__).parent
    chosen = sys.argv[1:] or sorted(path.stem for path in here.glob("*.py") if not path.stem.startswith("_"))
    status = 0
    for name in chosen:
        print(f"\n== {name}", flush=True)
        status = subprocess.call([sys.executable, str(here / f"{name}.py")], cwd=here.parent) or status
    return status


if __name__ == "__main__":
    sys.exit(main())
