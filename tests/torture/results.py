"""Results that are made, disturbed, and made again: those of a small clone, or of a chapter.

`Results` says whether what is made after a disturbance is what an undisturbed run makes, with
nothing left beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from clone import Clone, finish, started

from lablog.files import repository
from lablog.record import Record
from lablog.runner import difference, figure_differences

EVENTS = ".tfevents."
"""In the names of TensorBoard's files, of which a resumed training has one more."""
LONG = 3600.0
"""Seconds that a run may take."""


class Results:
    """What a command makes in `built`, once, undisturbed, as what is `expected` of it."""

    root: Path
    built: Path
    command: tuple[str, ...]
    environment: dict[str, str]

    def learn(self, folder: Path) -> None:
        """Run the command once, undisturbed, and keep what it made in `folder`."""
        began = time.monotonic()
        whole = finish(self.start(), LONG)
        if whole.returncode:
            raise RuntimeError(f"{' '.join(self.command)} makes no results: {whole.stderr}")
        self.seconds = time.monotonic() - began
        self.expected = folder / "expected"
        shutil.copytree(self.built, self.expected)

    def start(self) -> subprocess.Popen[str]:
        """Start the command."""
        return started(self.command, self.root, self.environment)

    def forget(self) -> None:
        """Remove all results, so that the next run makes them anew."""
        shutil.rmtree(self.built, ignore_errors=True)

    def wrong_afterwards(self) -> str:
        """Make what is missing while nothing happens, and say how it differs, if it does."""
        again = finish(self.start(), LONG)
        if again.returncode:
            return f"the next run fails: {again.stderr.strip().splitlines()[-1:]}"
        names, expected = (
            {str(path.relative_to(folder)) for path in folder.rglob("*")
             if EVENTS not in path.name} for folder in (self.built, self.expected))
        if names != expected:
            return f"left behind or missing: {', '.join(sorted(names ^ expected)[:5])}"
        for path in sorted((self.expected / "records").glob("*.json")):
            name = path.relative_to(self.expected)
            if found := difference(Record.read(path), Record.read(self.built / name)):
                return f"{name} differs in {', '.join(found[:5])}"
            figures = [folder / "figures" / path.stem for folder in (self.expected, self.built)]
            if figures[0].is_dir() and (found := figure_differences(*figures)):
                return f"figures differ: {', '.join(found)}"
        return ""


class SmallClone(Results):
    """A clone in miniature: chapters that take no time, and the book."""

    def __init__(self, folder: Path) -> None:
        clone = Clone(folder / "clone")
        self.root, self.environment = clone.root, clone.environment
        self.built = self.root / "build" / "laptop"
        self.command = ("make", "reproduce")
        self.learn(folder)

    def forget(self) -> None:
        super().forget()
        shutil.rmtree(self.root / "build" / "book", ignore_errors=True)


class Chapter(Results):
    """A chapter of this book in the profile smoke, run in a clone of its own, which borrows
    environment and native library."""

    def __init__(self, folder: Path, notebook: str) -> None:
        self.root = folder / "clone"
        subprocess.run(["git", "clone", "--quiet", "--local", str(repository()), str(self.root)],
                       check=True)
        (self.root / "build").mkdir()
        for name in ("venv", "native", "source"):
            (self.root / "build" / name).symlink_to(repository() / "build" / name)
        self.built = self.root / "build" / "smoke"
        self.environment = {name: value for name, value in os.environ.items()
                            if not name.startswith(("LABLOG", "PYTEST", "MAKE"))} | {
            "PYTHONPATH": str(self.root / "lib"), "MPLBACKEND": "agg", "OMP_WAIT_POLICY": "passive"}
        runner = f"{sys.executable} -m lablog.runner"
        self.command = ("sh", "-c", f"{runner} plan --profile smoke -- {notebook} > build/plan && "
                                    f"exec {runner} run build/smoke {notebook}")
        self.learn(folder)


def tried_sequences(clone: Clone, count: int, seed: int) -> str:
    """Try sequences of what people do to a clone (`torture.sequences`); the shortest one that went
    wrong, if any did."""
    environment = clone.environment | {
        "PYTHONPATH": f"{clone.environment['PYTHONPATH']}:{Path(__file__).parents[1]}"}
    done = subprocess.run(
        [clone.python, "-m", "torture.sequences", str(count), str(seed)], cwd=clone.root,
        env=environment, text=True, capture_output=True, check=False)
    return done.stderr if done.returncode else ""
