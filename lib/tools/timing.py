"""How long work takes, and how two kinds of work compare within one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(work: Callable[[], Result], device: str = "cpu") -> tuple[float, Result]:
    """Seconds that `work` takes and what it returns; on ``cuda`` until the device is done."""
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that `work` takes, once."""
    return timed(work, device)[0]


def median_seconds(work: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Median over `repeats` runs of `work`, after one run that is not counted."""
    return statistics.median([seconds(work, device) for _ in range(repeats + 1)][1:])


def paired(reference: Callable[[], object], candidate: Callable[[], object], pairs: int) -> float:
    """Median of reference time over candidate time (speed of candidate over reference).

    Each pair runs both, in alternating order; one unrecorded pair warms up.
    """
    ratios = []
    for number in range(-1, pairs):
        if number % 2:
            first, second = seconds(reference), seconds(candidate)
        else:
            second, first = seconds(candidate), seconds(reference)
        if number >= 0:
            ratios.append(first / second)
    return statistics.median(ratios)
