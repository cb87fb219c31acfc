"""Validation convergence: do repeated passes over unseen order change ever less?

    python -m lablog.cvfp.convergence --num_trials 10 --network phase1.pt \\
        --embedding embedding.safetensors --tokenizer tokenizer.model --validation val.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lablog.cvfp.data import read_validation, tokenizer_from
from lablog.cvfp.model import CVFPBlock, ModelConfig, TokenEmbedding
from lablog.cvfp.passes import iterate_passes
from lablog.cvfp.phase1 import load_checkpoint

SLOPE, SPREAD = 0.001, 0.01  # the log's thresholds


@dataclass(frozen=True)
class Trials:
    """Loss of each trial against the one before; the first trial has none (N/A)."""

    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.losses) < 2:
            raise ValueError("a slope needs at least 3 trials (2 losses)")
        if not np.isfinite(self.losses).all():
            raise FloatingPointError(f"a loss is not finite: {self.losses}")

    @property
    def slope(self) -> float:
        """Slope of a linear fit of loss against trial, per trial."""
        return float(np.polyfit(np.arange(len(self.losses)), self.losses, 1)[0])

    @property
    def spread(self) -> float:
        """Standard deviation of the losses."""
        return float(np.std(self.losses))

    @property
    def reduction(self) -> float | None:
        """(first - last) / first, None if the first loss is 0."""
        return 1 - self.losses[-1] / self.losses[0] if self.losses[0] else None

    @property
    def verdict(self) -> str:
        """CONVERGED, CONVERGING, DIVERGING or UNSTABLE, by the log's thresholds."""
        if abs(self.slope) < SLOPE and self.spread < SPREAD:
            return "CONVERGED"
        if self.slope < -SLOPE:
            return "CONVERGING"
        return "DIVERGING" if self.slope > SLOPE else "UNSTABLE"

    def __str__(self) -> str:
        rows = ["trial 1: loss N/A"]
        rows += [f"trial {i}: loss {loss:.6f}" for i, loss in enumerate(self.losses, 2)]
        reduction = "undefined" if self.reduction is None else f"{100 * self.reduction:.1f}%"
        rows.append(
            f"initial {self.losses[0]:.6f}, final {self.losses[-1]:.6f}, reduction {reduction}, "
            f"slope {self.slope:+.6f} per trial, std {self.spread:.6f}: {self.verdict}"
        )
        return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; prints the table and returns 0 whatever the verdict."""
    parser = argparse.ArgumentParser(prog="lablog.cvfp.convergence", description=__doc__)
    parser.add_argument("--num_trials", type=int, default=10, help="passes, at least 3")
    parser.add_argument("--network", type=Path, required=True, help="Phase 1 checkpoint")
    parser.add_argument("--embedding", type=Path, required=True, help="safetensors, key `table`")
    parser.add_argument("--tokenizer", type=Path, required=True, help=".model or .gguf")
    parser.add_argument("--validation", type=Path, required=True, help="text file")
    options = parser.parse_args(arguments)
    if options.num_trials < 3:
        parser.error(f"--num_trials {options.num_trials}: a slope needs at least 3")
    state = load_checkpoint(options.network, None)
    names = {field.name for field in fields(ModelConfig)}
    config = ModelConfig(**{k: v for k, v in state["identity"].items() if k in names})
    block = CVFPBlock(config, seed=0)
    block.load_state_dict(state["block"])
    ids = read_validation("text_file", options.validation, tokenizer_from(options.tokenizer))
    tokens = TokenEmbedding(load_file(options.embedding)["table"], config)(torch.tensor(ids))
    passes = iterate_passes(block, tokens, options.num_trials - 1, "sequential", threshold=0.1)
    print(f"{len(ids)} validation tokens, {options.num_trials} trials")
    print(Trials(tuple(passes.differences)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
