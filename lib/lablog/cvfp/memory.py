"""How long a changed token is seen in the contexts that follow."""

from __future__ import annotations

import torch
from torch import Tensor

from lablog.cvfp.model import Context, CVFPBlock, Token


@torch.no_grad()
def memory_curve(
    block: CVFPBlock, tokens: Tensor, contexts: Tensor, positions: Tensor, distance: int, seed: int
) -> Tensor:
    """How much a changed token matters later: relative context difference [distance + 1, p].

    At each of p `positions` the token is replaced by one drawn from the same text; the contexts
    that follow are compared with `contexts` (a rollout of `tokens`) after 0..distance tokens.
    """
    if int(positions.min()) < 1 or int(positions.max()) + distance >= len(tokens):
        raise ValueError(
            f"positions {int(positions.min())}..{int(positions.max())} with distance {distance} "
            f"leave the text of {len(tokens)} tokens (the first position is 1)"
        )
    generator = torch.Generator().manual_seed(seed)
    other = torch.randint(0, len(tokens), (len(positions),), generator=generator)
    context, token = contexts[positions - 1], tokens[other.to(tokens.device)]
    curve = tokens.new_empty(distance + 1, len(positions))
    for d in range(distance + 1):
        context = block(Context(context), Token(token))[0]
        true = contexts[positions + d]
        curve[d] = torch.linalg.vector_norm(context - true, dim=1) / torch.linalg.vector_norm(
            true, dim=1
        ).clamp_min(1e-30)
        token = tokens[(positions + d + 1).clamp_max(len(tokens) - 1)]
    return curve


def memory_length(curve: Tensor, threshold: float) -> int | None:
    """Last distance at which the median difference is above `threshold`; None: beyond the curve."""
    above = curve.median(dim=1).values > threshold
    if bool(above[-1]):
        return None
    return int(above.nonzero().max()) if bool(above.any()) else 0
