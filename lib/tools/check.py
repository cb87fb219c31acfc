"""Says what is missing on this machine, and how to get it, before anything is made.

``check.py python PATH [--venv]``: is it a Python that the project was tested with, and can it make
an environment?
``check.py programs NAME...``: are these installed? ``check.py size FILE...``: may these be
committed?
Needs the standard library only, of Python 3.8 or later.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

NATIVE = ("the native library needs CMake and a C++17 compiler (Debian: apt-get install cmake "
          "g++; macOS: xcode-select --install and cmake; conda: environment.yml brings both)")
REMEDIES = {"emcmake": "the engine of the book's live page needs Emscripten (Debian: apt-get "
                       "install emscripten; macOS: brew install emscripten)"}
LARGEST = 1_000_000  # bytes of a file in the repository
MANIFEST = Path(__file__).resolve().parents[2] / "pyproject.toml"


def supported() -> list[str]:
    """The versions of Python that pyproject.toml admits, as "3.11"."""
    first, last = re.findall(r"3\.(\d+)", re.findall(r"(?m)^requires-python = .*",
                                                     MANIFEST.read_text())[0])
    return [f"3.{minor}" for minor in range(int(first), int(last))]


def version(python: str, modules: str) -> str:
    """The version of an interpreter that has the modules; empty when it cannot tell."""
    code = f"import sys, {modules}; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL, check=False).stdout.strip()
    except OSError:
        return ""


def check_python(python: str, new: bool) -> None:
    """Refuse an interpreter that is not supported; `new`: an environment is to be made with it."""
    *some, last = supported()
    found = version(python, "venv" if new else "os")
    if found in (*some, last):
        return
    told = f"Python {found}" if found else "no Python with venv" if new else "no Python"
    remedy = (f"install one (Debian: apt-get install python{some[0]}-venv) or say "
              f"PYTHON=/path/to/python{some[0]}" if new else
              "activate an environment made from environment.yml, or deactivate conda")
    sys.exit(f"error: {python} is {told}; needed is {', '.join(some)} or {last}: {remedy}")


def check_programs(names: list[str]) -> None:
    """Refuse when a program is not to be found."""
    for name in names:
        if not shutil.which(name):
            sys.exit(f"error: {name} is not installed; {REMEDIES.get(name, NATIVE)}")


def check_size(names: list[str]) -> None:
    """Refuse a file that is too large for the repository."""
    for name in names:
        size = Path(name).stat().st_size
        if size > LARGEST:
            sys.exit(f"error: {name} has {size:,} bytes, more than {LARGEST:,}: what can be made "
                     "lies in build/; what cannot is named in data/models.yaml")


if __name__ == "__main__":
    if sys.argv[1] == "python":
        check_python(sys.argv[2], "--venv" in sys.argv)
    elif sys.argv[1] == "size":
        check_size(sys.argv[2:])
    else:
        check_programs(sys.argv[2:])
