"""Repeated passes over one text with frozen weights: what check 3 and the convergence tool read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lablog.cvfp.model import CVFPBlock, shifted
from lablog.cvfp.rollout import rollout


@dataclass
class Passes:
    """Repeated passes with frozen weights: mean MSE to the pass before, from pass 1 on.

    `contexts` [n, context_dim] are those of the last pass; `converged` counts tokens below the
    threshold per pass; `changes` [passes, n] is the MSE of each token, for the heat map.
    """

    contexts: Tensor
    differences: list[float]
    converged: list[int]
    changes: Tensor = field(repr=False)

    @classmethod
    def unchanged(cls, contexts: Tensor, passes: int) -> Passes:
        """Passes of what does not depend on the context: a constant, the embeddings."""
        nothing = contexts.new_zeros(passes, len(contexts))
        return cls(contexts, [0.0] * passes, [len(contexts)] * passes, nothing)


@torch.no_grad()
def iterate_passes(
    block: CVFPBlock, tokens: Tensor, passes: int, mode: Literal["sequential", "parallel"],
    threshold: float, initial: Tensor | None = None,
) -> Passes:
    """Pass 0 from the zero context (or `initial`), then `passes` more over the same text.

    Each later pass starts from the last context of the one before. In `sequential` mode a pass
    is a whole rollout; in `parallel` mode it is one application of the parallel map, which can
    change no more than the first k tokens in k passes. A token counts as converged where the MSE
    to its context in the pass before is below `threshold`. Raises ValueError for another mode or
    less than one pass.
    """
    if mode not in ("sequential", "parallel") or passes < 1:
        raise ValueError(
            f"mode = {mode!r}, passes = {passes}: expected 'sequential' or 'parallel', and at "
            "least 1 pass after the first"
        )
    previous = rollout(block, tokens).contexts if initial is None else initial
    rows = []
    for _ in range(passes):
        if mode == "parallel":
            contexts = block.chunked(shifted(previous, previous[-1]), tokens)
        else:
            contexts = rollout(block, tokens, previous[-1]).contexts
        rows.append((contexts - previous).square().mean(1))
        previous = contexts
    changes = torch.stack(rows)
    return Passes(
        previous, changes.mean(1).tolist(), (changes < threshold).sum(1).tolist(), changes
    )
