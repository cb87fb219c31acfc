"""Races: several commands that make the same results are started in one clone, each at a random
moment, as by two people, or by one in two terminals.

Each may end well, or be refused in words and without a traceback; and what is there afterwards must
be what one command alone makes, with nothing left beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from clone import finish

from torture.faults import wrong_end
from torture.results import LONG, SmallClone

COMMANDS = {
    "make reproduce": ("make", "reproduce"),
    "make reproduce NOTEBOOKS=02": ("make", "reproduce", "NOTEBOOKS=02"),
    "make verify": ("make", "verify"),
    "make why": ("make", "why"),
    "the book": ("build/venv/bin/python", "-m", "lablog.runner", "book", "--profile", "laptop"),
}
MOST = 4  # commands at once


@dataclass(frozen=True)
class Trial:
    """Which commands were started, when (seconds from the first one's start), and what was wrong,
    if anything."""

    started: tuple[tuple[str, float], ...]
    fault: str


def chosen(seconds: float, count: int, seed: int) -> list[tuple[tuple[str, float], ...]]:
    """`count` times two to MOST commands, and moments within a run of so many `seconds`. The first
    one makes everything, so that there is something to disturb."""
    rng = np.random.default_rng(seed)
    names = list(COMMANDS)
    return [((names[0], 0.0), *sorted(
        ((names[int(rng.integers(len(names)))], float(rng.uniform(0, seconds)))
         for _ in range(int(rng.integers(1, MOST)))), key=lambda one: one[1]))
        for _ in range(count)]


class Races(SmallClone):
    """A small clone in which several commands run."""

    def trial(self, started: tuple[tuple[str, float], ...]) -> Trial:
        """Start the commands at their moments, from nothing; then let everything be whole."""
        self.forget()
        began, running = time.monotonic(), []
        for name, moment in started:
            time.sleep(max(began + moment - time.monotonic(), 0))
            self.command = COMMANDS[name]
            running.append(self.start())
        self.command = COMMANDS["make reproduce"]
        ends = [wrong_end(finish(process, LONG)) for process in running]
        return Trial(started, next(filter(None, ends), "") or self.wrong_afterwards())
