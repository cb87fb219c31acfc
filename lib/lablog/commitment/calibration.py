"""Calibration: the strength λ that spends a given budget of divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq

from lablog.commitment import coherence
from lablog.commitment.llama_cpp_speaker import Engine, EngineSettings, Injection
from lablog.commitment.log_experiments import layer_range
from lablog.commitment.sweep import Conditions, Task, injection
from lablog.tasks import Tasks

BRACKET = (1e-3, 1e3)
"""λ is sought in this range."""


@dataclass(frozen=True)
class Solution:
    """The smallest λ at which the divergence reaches the budget, and what was spent there."""

    strength: float
    divergence: float
    evaluations: int


def check_budget(budget: float) -> None:
    """Raise ValueError for a budget that is no positive number of nats."""
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"KL budget = {budget}: expected a positive number of nats")


def solve_budget(divergence: Callable[[float], float], budget: float,
                 tolerance: float = 1e-3) -> Solution | None:
    """Smallest λ in `BRACKET` with divergence(λ) = budget, to a relative `tolerance` in λ.

    The first crossing is bracketed on a grid of decades, then found by Brent's method on
    logarithmic axes. None when the divergence stays below the budget on the whole grid.

    divergence: non-negative, 0 at λ = 0; need not be monotone beyond the first crossing.
    """
    check_budget(budget)
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


def calibrate(tasks: Tasks, engine: Engine, ranges: Sequence[str], seeds: Sequence[int],
              budget: float, conditions: Conditions) -> dict[str, list[Solution | None]]:
    """For each range and seed, λ at which the 95th percentile of KL per held-out token is `budget`.

    Ranges that name the same layers of this model are solved once. Raises ValueError for a budget
    that is no positive number of nats.
    """
    check_budget(budget)
    layers = {name: layer_range(name, engine.model.layers) for name in ranges}
    cells = {(layers[name], seed): name for name in ranges for seed in seeds}
    asked = engine.settings
    engine.make_room()
    solutions = tasks.map(
        "calibration", solve_alone, [(name, seed) for (_, seed), name in cells.items()],
        common=(asked, conditions, budget), reads=[asked.gguf], threads=asked.threads,
        gpus=float(asked.gpu_layers > 0), unit="λ")
    found = dict(zip(cells, solutions, strict=True))
    return {name: [found[layers[name], seed] for seed in seeds] for name in ranges}


def solve_alone(settings: EngineSettings, conditions: Conditions, budget: float, layers: str,
                seed: int) -> Solution | None:
    """The solution for one range and seed, by an engine of its own."""
    with Engine(settings) as engine:
        (unit,) = injection(Task("commitment", 1.0, layers, seed), engine.model,
                            conditions.k).commitments

        def percentile(strength: float) -> float:
            scaled = Injection((replace(unit, strength=strength),))
            kl = coherence.divergence(engine.speaker, conditions.material, scaled,
                                      conditions.baseline)
            return float(np.percentile(kl, 95))

        return solve_budget(percentile, budget)
