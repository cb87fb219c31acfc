"""The N-th call fails: a small clone makes its results while one change of a file after the other
is refused by the system, as SQLite is tested.

Each trial must end well, or in words and without a traceback; and what the next run makes, to which
nothing happens, must be what was made without any fault, with nothing left beside it.
"""

from __future__ import annotations

import errno
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from clone import finish

from torture.results import SmallClone

CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
SOURCE = Path(__file__).with_name("failing.c")


def chosen(calls: int, count: int, seed: int) -> list[tuple[int, int, bool]]:
    """`count` of the calls 1 to `calls`, evenly, each with a code and whether later ones fail too;
    other seeds choose others."""
    rng = np.random.default_rng(seed)
    ends = np.linspace(1, calls + 1, min(count, calls) + 1).astype(int)
    return [(int(rng.integers(first, max(last, first + 1))), int(rng.choice(CODES)),
             bool(rng.random() < 0.5)) for first, last in pairwise(ends)]


@dataclass(frozen=True)
class Trial:
    """A call's number, how it failed, what it was, and what was wrong with how that ended, if
    anything. `what` is empty if there was no such call."""

    call: int
    code: int
    lasting: bool
    what: str
    fault: str


def preloaded(folder: Path) -> Path:
    """Compile the library that lets calls fail."""
    library = folder / "failing.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"],
                   check=True)
    return library


class Faults(SmallClone):
    """A small clone whose calls fail as told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.library = preloaded(folder)
        self.counter = folder / "counter"

    def calls(self) -> int:
        """How many calls there are that can fail."""
        self.failing(0, 0, lasting=False)
        return int.from_bytes(self.counter.read_bytes(), "little")

    def failing(self, call: int, code: int, lasting: bool) -> subprocess.CompletedProcess[str]:
        """Make everything anew while calls fail."""
        self.forget()
        self.counter.write_bytes(bytes(8))
        self._file.unlink(missing_ok=True)
        before = dict(self.environment)
        self.environment |= {
            "LD_PRELOAD": str(self.library), "FAILING_FOLDER": str(self.root / "build"),
            "FAILING_COUNTER": str(self.counter), "FAILING_CALL": str(call),
            "FAILING_ERRNO": str(code), "FAILING_ON": "1" if lasting else ""}
        try:
            return finish(self.start())
        finally:
            self.environment = before

    @property
    def _file(self) -> Path:
        return self.counter.with_name(f"{self.counter.name}.what")

    @property
    def what(self) -> str:
        """The call that failed last, and of which file; empty if none did."""
        return self._file.read_text().strip() if self._file.is_file() else ""

    def trial(self, call: int, code: int, lasting: bool) -> Trial:
        """Let a call fail, then make what is missing without a fault."""
        ended = self.failing(call, code, lasting)
        what = self.what
        return Trial(call, code, lasting, what, wrong_end(ended) or self.wrong_afterwards())


def wrong_end(ended: subprocess.CompletedProcess[str]) -> str:
    """How a command ended that should have ended well or in words; empty if it did."""
    said = ended.stdout + ended.stderr
    if "Traceback" in said:
        return f"a traceback: {said.strip().splitlines()[-1]}"
    if ended.returncode and not any(mark in said for mark in ("error: ", " failed: ")):
        return f"exit code {ended.returncode} without a word: {said[-200:]!r}"
    return ""
