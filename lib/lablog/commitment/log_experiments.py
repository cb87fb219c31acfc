"""Named ranges of layers, and the lab log's four experiments in its model and in another."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

RANGES = ("all", "last quarter", "first quarter", "layer 0")
"""Ranges that every model has, for a sweep; also ``middle layer``, and ``last 8`` and the like."""


class NamedRow(NamedTuple):
    """A row that has a name in the records and in figures: λ in a named range."""

    key: str
    label: str
    strength: float
    layers: str


NAMED_ROWS = (
    NamedRow("lambda1.all", "λ = 1, all layers", 1.0, "all"),
    NamedRow("lambda0.1.all", "λ = 0.1, all layers", 0.1, "all"),
    NamedRow("lambda0.01.all", "λ = 0.01, all layers", 0.01, "all"),
    NamedRow("lambda0.01.last_quarter", "λ = 0.01, last quarter", 0.01, "last quarter"),
)
"""The log's four experiments; its "last 8 layers" of 32 are the last quarter."""
AT_LOG_DOSE = tuple(
    row._replace(key=f"log_dose.{row.key}", label=f"the log's dose of {row.label}")
    for row in NAMED_ROWS
)
"""The same four with the dose, not the λ, that they had in the log; λ depends on the model."""
PROMPT = ("What is your favorite language?",
          "What did you say your favorite language was again?")
"""The log's only probe: asked, and a little later asked again."""
LOG_WIDTH, LOG_LAYERS, LOG_K = 4096, 32, 64
"""The log's model, Llama-2-7B, and the dimension of its z*."""
LOG_RESIDUAL_NORM = 23.0
"""Mean ‖h‖ of ordinary tokens of Llama-2-7B, derived from published quantiles.

Sun, Chen, Kolter and Liu, Massive Activations in Large Language Models (COLM 2024,
arXiv:2402.17762), table 1: of the magnitudes |h_i| in a hidden state of LLaMA2-7B the median is
0.2, the upper 10 % begin at 0.6 and the upper 1 % at 1.1. For coordinates N(0, σ²) these are
0.674 σ, 1.645 σ and 2.576 σ, so that ‖h‖ = √4096 σ is 19, 23 or 27; the middle one is taken. One
hidden state stands for 32 layers here, and norms grow along the layers; the quantiles are quoted
from memory, the table was not at hand: trust it to a factor of two or three, no better.
"""


def layer_range(name: str, layers: int) -> tuple[int, int]:
    """A named range of a model's layers, 0-based and inclusive; a quarter is rounded up, and the
    ``middle layer`` of an even number is the later one.

    Raises ValueError for another name, or more layers than the model has.
    """
    quarter = math.ceil(layers / 4)
    ranges = {"all": (0, layers - 1), "last quarter": (layers - quarter, layers - 1),
              "first quarter": (0, quarter - 1), "layer 0": (0, 0),
              "middle layer": (layers // 2, layers // 2)}
    if (counted := re.fullmatch(r"last ([1-9]\d*)", name)) and int(counted[1]) <= layers:
        return layers - int(counted[1]), layers - 1
    if name not in ranges:
        raise ValueError(f"layer range {name!r}: expected one of {', '.join(ranges)}, or last N "
                         f"with N up to the model's {layers} layers")
    return ranges[name]


def expected_norm(width: int, k: int) -> float:
    """‖W_c z*‖ of a typical commitment, sqrt(2d/(d + k))."""
    return math.sqrt(2 * width / (width + k))


def log_dose(strength: float, layers: str) -> float:
    """The dose that λ in a named range was in the log's model."""
    first, last = layer_range(layers, LOG_LAYERS)
    return strength * (last - first + 1) * expected_norm(LOG_WIDTH, LOG_K) / LOG_RESIDUAL_NORM


def span(name: str, layers: int) -> str:
    """The layers of a named range as text; equal for names that mean the same in a model."""
    first, last = layer_range(name, layers)
    return f"{first}" if first == last else f"{first}–{last}"


def rows_at_the_logs_dose(width: int, layers: int, k: int,
                          residual_norm: float) -> tuple[NamedRow, ...]:
    """The log's four experiments at the λ that has their dose in a model of `width` and `layers`.

    The dose is that of a commitment of typical norm, so that one λ holds for all seeds.
    residual_norm: mean ‖h‖ of the model.
    """
    norm, rows = expected_norm(width, k), []
    for row in AT_LOG_DOSE:
        first, last = layer_range(row.layers, layers)
        unit = (last - first + 1) * norm / residual_norm
        rows.append(row._replace(strength=log_dose(row.strength, row.layers) / unit))
    return tuple(rows)
