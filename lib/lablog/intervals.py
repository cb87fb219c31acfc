"""Confidence intervals for the quantities that the records hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval and the method that gave it."""

    low: float
    high: float
    method: str
    level: float = 0.95


def wilson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (E. B. Wilson, JASA 22, 1927)."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"successes = {successes} of trials = {trials}: need 0 <= k <= n, n > 0")
    result = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return Interval(float(result.low), float(result.high), "Wilson score", level)


def over_seeds(values: Sequence[float], level: float = 0.95,
               within: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """Student's t interval of the mean over independent seeds; needs at least two.

    It is cut at the bounds `within` which the quantity lies by definition (0 and 1 for a share).
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} value(s): an interval over seeds needs at least two seeds")
    array = np.asarray(values, dtype=float)
    half = float(stats.t.ppf((1 + level) / 2, len(array) - 1) * stats.sem(array))
    centre = float(array.mean())
    low, high = max(centre - half, within[0]), min(centre + half, within[1])
    return Interval(low, high, f"t over {len(array)} seeds", level)


def geometric_over_seeds(values: Sequence[float], level: float = 0.95) -> Interval:
    """t interval of the mean logarithm, for positive quantities on a log scale (λ, perplexity)."""
    interval = over_seeds([math.log(value) for value in values], level)
    return Interval(
        math.exp(interval.low), math.exp(interval.high), f"log-{interval.method}", level
    )


def bootstrap_percentile(
    values: Sequence[float] | np.ndarray, percentile: float, seed: int = 0, draws: int = 1000
) -> Interval:
    """Percentile-bootstrap interval of a percentile of independent values."""
    array = np.asarray(values, dtype=float)
    if array.size < 2:
        raise ValueError(f"{array.size} value(s): a bootstrap needs at least two")
    picks = np.random.default_rng(seed).integers(0, array.size, size=(draws, array.size))
    replicas = np.percentile(array[picks], percentile, axis=1)
    low, high = np.percentile(replicas, [2.5, 97.5])
    return Interval(float(low), float(high), f"percentile bootstrap, {draws} draws")
