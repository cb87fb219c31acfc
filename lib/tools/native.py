"""Configures and builds native/, quietly: ``native.py FOLDER CMAKE JOBS LOG [OPTION...]``.

CMAKE may be two words, ``emcmake cmake``: the first only configures.
Output goes to FOLDER/configure.log and FOLDER/LOG; a failure shows what it said. How long the first
build of a folder took, in seconds, is written into FOLDER/build_seconds.
Needs the standard library only, of Python 3.8 or later.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

STARTED = ".started"
"""File with the time, since the epoch, at which the first build began; gone when it ended well."""


def quietly(command: list[str], log: Path, shown: int) -> None:
    """Run a command; when it fails, print the last `shown` lines of what it said and exit."""
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text(errors="replace").splitlines(keepends=True)
        sys.stderr.write("".join(lines[-shown:]))
        sys.exit(1)


def main() -> None:
    """Configure and build."""
    folder, cmake, jobs, log, *options = sys.argv[1:]
    build = Path(folder)
    build.mkdir(parents=True, exist_ok=True)
    started = build / STARTED
    if not (build / "CMakeCache.txt").exists():
        started.write_text(str(time.time()))
    command = cmake.split()
    quietly([*command, "-S", "native", "-B", folder, *options], build / "configure.log", 1000)
    quietly([command[-1], "--build", folder, "-j", jobs], build / log, 40)
    if started.exists():
        seconds = time.time() - float(started.read_text())
        (build / "build_seconds").write_text(f"{seconds:.0f}\n")
        started.unlink()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
