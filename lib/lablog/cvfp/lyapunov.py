"""How fast a small difference of contexts grows along a text: the largest Lyapunov exponent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lablog.cvfp.model import Context, CVFPBlock, Token
from lablog.intervals import Interval, t_interval


def lyapunov_exponent(
    block: CVFPBlock, tokens: Tensor, start: Tensor, seed: int, warm_up: int
) -> Tensor:
    """Growth ln ||J v|| / ||v|| of a tangent vector at each token after `warm_up`, shape [n].

    Its mean is the largest Lyapunov exponent per token: negative where the recurrence forgets.
    Tangents smaller than 1e-30 (a constant network) count as that.
    """
    generator = torch.Generator().manual_seed(seed)
    tangent = F.normalize(torch.randn(1, len(start), generator=generator), dim=1).to(start)
    context, growth = start.unsqueeze(0), tokens.new_empty(len(tokens))
    with torch.no_grad():
        for i in range(len(tokens)):
            token = Token(tokens[i : i + 1])
            context, tangent = torch.func.jvp(
                lambda c, token=token: block(Context(c), token)[0], (context,), (tangent,)
            )[:2]
            norm = torch.linalg.vector_norm(tangent).clamp_min(1e-30)
            growth[i], tangent = norm.log(), tangent / norm
    return growth[warm_up:]


def batch_means(values: Tensor, batches: int = 10) -> Interval | None:
    """Interval of the mean of a correlated series [n] from the means of consecutive batches; None
    for a series too short for it."""
    size = len(values) // batches
    if size < 2:
        return None
    means = values[: size * batches].view(batches, size).mean(1)
    return t_interval(means.tolist(), "batch means")
