"""What a context carries: which of the tokens before can be read off it, by a linear map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the penalty to choose from, in units of the mean squared context."""


def _pairs(contexts: Tensor, ids: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Contexts with a constant one behind them, and the ids of the tokens `lag` before."""
    kept = contexts[lag:]
    return torch.cat([kept, kept.new_ones(len(kept), 1)], 1), ids[: len(ids) - lag]


def _accuracy(contexts: Tensor, weights: Tensor, table: Tensor, ids: Tensor) -> float:
    guessed = F.normalize(contexts @ weights, dim=1) @ table.t()
    return float((guessed.argmax(1) == ids).double().mean())


@torch.no_grad()
def readable(
    table: Tensor, training: tuple[Tensor, Tensor], dev: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor], lags: Sequence[int], ridges: Sequence[float] = RIDGES,
) -> list[float]:
    """For each lag k: in which share of `test` the token k before is the one that a linear map
    reads off the context, [lags]; lag 0 is the context's own token.

    The map goes from context to the token's embedding in `table` [vocabulary, e], by ridge
    regression on `training`, with the penalty that reads most on `dev`; the guess is the embedding
    that points most nearly the same way. Each text is its contexts [n, c] and its ids [n].
    ValueError where a text is not longer than the largest lag.
    """
    for name, (contexts, ids) in (("training", training), ("dev", dev), ("test", test)):
        if len(ids) <= max(lags) or len(ids) != len(contexts):
            raise ValueError(f"{name}: {len(contexts)} contexts, {len(ids)} ids: expected equally "
                             f"many, more than the lag {max(lags)}")
    directions, found = F.normalize(table.double(), dim=1), []
    for lag in lags:
        x, ids = _pairs(training[0].double(), training[1], lag)
        gram, target = x.t() @ x, x.t() @ directions[ids]
        unit = gram.diagonal().mean()
        best = (-1.0, 0.0)
        for ridge in ridges:
            damped = gram + ridge * unit * torch.eye(len(gram), dtype=gram.dtype,
                                                     device=gram.device)
            weights = torch.linalg.solve(damped, target)
            scores = [_accuracy(*_read(text, lag, weights, directions)) for text in (dev, test)]
            best = max(best, (scores[0], scores[1]), key=lambda pair: pair[0])
        found.append(best[1])
    return found


def _read(text: tuple[Tensor, Tensor], lag: int, weights: Tensor,
          directions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contexts, ids = _pairs(text[0].double(), text[1], lag)
    return contexts, weights, directions, ids
