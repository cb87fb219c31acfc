"""Signals at random moments: results are being made, and something ends or stops that.

SIGKILL goes to the whole process group, as when memory runs out or a machine is switched off, at
times twice in a row; SIGTERM, SIGHUP, Ctrl-C and Ctrl-C twice as people and systems send them; a
stopped group goes on after a while. Nothing may run on, nothing may end in a traceback, and the
next run must make what an undisturbed one does, with nothing left beside it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
from clone import finish

from torture.results import LONG, Results

WAYS: dict[str, tuple[signal.Signals, ...]] = {
    "killed": (signal.SIGKILL,), "terminated": (signal.SIGTERM,), "hung up": (signal.SIGHUP,),
    "interrupted": (signal.SIGINT,), "interrupted twice": (signal.SIGINT, signal.SIGINT),
    "stopped for a while": (signal.SIGSTOP, signal.SIGCONT),
}
WHILE = 1.0  # seconds between two signals
PATIENCE = 20.0  # seconds in which what was ended must be gone


@dataclass(frozen=True)
class Trial:
    """How a run was ended, when (seconds from its start), how often in a row, and what was wrong
    with what followed, if anything."""

    way: str
    moment: float
    times: int
    fault: str


def chosen(seconds: float, count: int, seed: int) -> list[tuple[str, float, int]]:
    """`count` ways, half of them SIGKILL, moments within a run of so many `seconds`, and times."""
    rng = np.random.default_rng(seed)
    others = [way for way in WAYS if way != "killed"]
    return [("killed" if one % 2 == 0 else others[one // 2 % len(others)],
             float(rng.uniform(0, seconds)), int(rng.integers(1, 3)) if one % 2 == 0 else 1)
            for one in range(count)]


class Kills:
    """Results whose making is ended as told."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def trial(self, way: str, moment: float, times: int = 1) -> Trial:
        """Start anew, end the run at that moment, as often as told, then let it be whole."""
        self.results.forget()
        fault = ""
        for _ in range(times):
            fault = fault or self._ended(way, moment)
        return Trial(way, moment, times, fault or self.results.wrong_afterwards())

    def _ended(self, way: str, moment: float) -> str:
        process = self.results.start()
        time.sleep(moment)
        for number, sent in enumerate(WAYS[way]):
            time.sleep(WHILE * bool(number))
            try:
                os.killpg(process.pid, sent)
            except ProcessLookupError:  # it has ended by itself
                break
        ended = finish(process, LONG)
        if left := _left(str(self.results.root)):
            return f"{', '.join(left)} ran on for {PATIENCE:.0f} s"
        said = ended.stdout + ended.stderr
        return f"a traceback: {said[-300:]!r}" if "Traceback" in said else ""


def _left(folder: str) -> Sequence[str]:
    """Processes of a clone that are still there after a while."""
    end = time.monotonic() + PATIENCE
    while True:
        found = [process.info["cmdline"] for process in psutil.process_iter(["cmdline", "cwd"])
                 if (process.info["cwd"] or "").startswith(folder)]
        if not found or time.monotonic() > end:
            return [" ".join(command)[:80] for command in found]
        time.sleep(0.1)
