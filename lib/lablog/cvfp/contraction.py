"""Contraction while it is learnt: what a training does to a network's recurrence, pass by pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lablog.cvfp.lyapunov import lyapunov_exponent
from lablog.cvfp.memory import memory_curve, memory_length
from lablog.cvfp.model import CVFPBlock
from lablog.cvfp.rollout import rollout
from lablog.keys import key

FORGOTTEN = 0.01  # median relative difference below which a changed token is forgotten


@dataclass(frozen=True)
class Contraction:
    """Of a network at one time.

    exponent: the largest Lyapunov exponent per token; below 0 two contexts that read the same text
    come together. spectral_norm: the largest singular value of the part of a layer's weights that
    maps context to context, largest over layers; of the weights alone, without the path around them
    and the norm behind.
    memory: last distance in tokens at which a changed token is seen; None: beyond all that was
    looked at.
    """

    exponent: float
    spectral_norm: float
    memory: int | None


def spectral_norm(block: CVFPBlock) -> float:
    """The largest singular value of context to context over all layers."""
    width = block.config.context_dim
    norms = [torch.linalg.matrix_norm(layer.linear.weight.detach()[:width, :width], 2)
             for layer in block.stack]
    return float(torch.stack(norms).max())


def contraction_of(block: CVFPBlock, tokens: Tensor, distance: int, changed: int,
            seed: int) -> Contraction:
    """On a text [n, embed_dim], read once from zero; the first fifth warms the tangent up.

    changed: how many tokens, evenly spread, are changed one at a time; distance: how far behind
    each one is looked. ValueError where the text is shorter than that.
    """
    zero = tokens.new_zeros(block.config.context_dim)
    growth = lyapunov_exponent(block, tokens, zero, seed, len(tokens) // 5)
    last = len(tokens) - distance - 1
    positions = torch.linspace(1, max(last, 1), changed).long().unique().to(tokens.device)
    curve = memory_curve(block, tokens, rollout(block, tokens).contexts, positions, distance, seed)
    return Contraction(float(growth.mean()), spectral_norm(block),
                       memory_length(curve, FORGOTTEN))


@dataclass(frozen=True)
class ContractionObserver:
    """:func:`contraction_of` as ``phase1.train`` calls it behind every pass."""

    tokens: Tensor
    distance: int
    changed: int
    seed: int

    @property
    def key(self) -> str:
        """Key of the measurement, its code and its text."""
        return key(contraction_of, self.tokens, self.distance, self.changed, self.seed)

    def __call__(self, block: CVFPBlock) -> dict[str, float | int | None]:
        """The network's contraction, by name."""
        return asdict(contraction_of(block, self.tokens, self.distance, self.changed, self.seed))
