"""Calibration: the strength λ that spends a given budget of divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from lablog.commitment import coherence, latent
from lablog.commitment.sweep import Laboratory
from lablog.commitment.window import Injection, Speech
from lablog.models.llama_cpp import Commitment
from lablog.progress import progress

BRACKET = (1e-3, 1e3)
"""λ is sought in this range."""


@dataclass(frozen=True)
class Solution:
    """The smallest λ at which the divergence reaches the budget, and what was spent there."""

    strength: float
    divergence: float
    evaluations: int


def solve_budget(divergence: Callable[[float], float], budget: float,
                 tolerance: float = 1e-3) -> Solution | None:
    """Smallest λ in `BRACKET` with divergence(λ) = budget, to a relative `tolerance` in λ.

    The first crossing is bracketed on a grid of decades, then found by Brent's method on
    logarithmic axes. None when the divergence stays below the budget on the whole grid.

    divergence: non-negative, 0 at λ = 0; need not be monotone beyond the first crossing.
    """
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"KL budget = {budget}: expected a positive number of nats")
    calls = 0

    def excess(log_strength: float) -> float:
        nonlocal calls
        calls += 1
        return math.log(max(divergence(math.exp(log_strength)), 1e-30) / budget)

    low, high = (math.log(end) for end in BRACKET)
    grid = np.linspace(low, high, 1 + round((high - low) / math.log(10)))
    if excess(low) >= 0:
        return Solution(BRACKET[0], divergence(BRACKET[0]), calls + 1)
    crossing = next((i for i in range(1, len(grid)) if excess(grid[i]) >= 0), None)
    if crossing is None:
        return None
    root = brentq(excess, grid[crossing - 1], grid[crossing], xtol=tolerance)
    strength = math.exp(root)
    return Solution(strength, divergence(strength), calls + 1)


def calibrate(laboratory: Laboratory, ranges: Sequence[str], seeds: Sequence[int],
              budget: float) -> dict[str, list[Solution | None]]:
    """For each range and seed, λ at which the 95th percentile of KL per held-out token is `budget`.

    Ranges that name the same layers of this model are solved once. Raises ValueError for a budget
    that is no positive number of nats.
    """
    tasks = {(laboratory.layers(name), seed): name for name in ranges for seed in seeds}
    with (ThreadPoolExecutor(laboratory.workers) as pool,
          progress(len(tasks), "calibration", "λ") as bar):
        def solve(key: tuple[tuple[int, int], int]) -> Solution | None:
            solution = _solve(laboratory, *key, budget)
            bar.update()
            return solution

        found = dict(zip(tasks, pool.map(solve, tasks), strict=True))
    return {name: [found[laboratory.layers(name), seed] for seed in seeds] for name in ranges}


def _solve(laboratory: Laboratory, span: tuple[int, int], seed: int,
           budget: float) -> Solution | None:
    direction = latent.sample(seed, laboratory.settings.k, laboratory.model.width).direction

    def solve(speech: Speech) -> Solution | None:
        def divergence(strength: float) -> float:
            injection = Injection((Commitment(direction, strength, span),))
            _, kl, _ = coherence.read_divergence(speech, laboratory.material, injection)
            return float(np.percentile(kl, 95))

        return solve_budget(divergence, budget)

    return laboratory.with_speech(solve)
