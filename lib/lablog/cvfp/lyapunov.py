"""How fast a small difference of contexts grows along a text: the largest Lyapunov exponent."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablog.cvfp.model import CVFPBlock, CVFPLayer, check_widths, mix_norm
from lablog.intervals import Interval, t_interval


def lyapunov_exponent(
    block: CVFPBlock, tokens: Tensor, start: Tensor, seed: int, warm_up: int
) -> Tensor:
    """Growth ln ||J v|| / ||v|| of a tangent vector at each token after `warm_up`, shape [n].

    Its mean is the largest Lyapunov exponent per token: negative where the recurrence forgets.
    Tangents smaller than 1e-30 (a constant network) count as that. A layer's weights, which do not
    fit a processor's cache at full width, are read once a token, for context and tangent together.
    """
    check_widths(block.config, start, tokens)
    generator = torch.Generator().manual_seed(seed)
    tangent = F.normalize(torch.randn(1, len(start), generator=generator), dim=1).to(start)
    context, growth = start.unsqueeze(0), tokens.new_empty(len(tokens))
    with torch.no_grad():
        for i in range(len(tokens)):
            token, rate = tokens[i : i + 1], tangent.new_zeros(1, tokens.shape[1])
            for layer in block.stack:
                context, token, tangent, rate = _pushed(layer, context, token, tangent, rate)
            norm = torch.linalg.vector_norm(tangent).clamp_min(1e-30)
            growth[i], tangent = norm.log(), tangent / norm
    return growth[warm_up:]


def _pushed(layer: CVFPLayer, context: Tensor, token: Tensor, tangent: Tensor,
            rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer's outputs [1, ...] for context and token, and how they change along tangent and rate.

    By hand: automatic forward differentiation of the same takes several times as long.
    """
    here, along = torch.cat([context, token], 1), torch.cat([tangent, rate], 1)
    value, change = F.linear(torch.cat([here, along]), layer.linear.weight).split(1)
    value = value + layer.linear.bias
    here, along = here + F.relu(value), along + change * (value > 0)
    split, mix = layer.config.context_dim, layer.config.layernorm_mix
    context, tangent = _normed(here[:, :split], along[:, :split], layer.context_norm, mix)
    token, rate = _normed(here[:, split:], along[:, split:], layer.token_norm, mix)
    return context, token, tangent, rate


def _normed(x: Tensor, along: Tensor, norm: nn.LayerNorm, mix: float) -> tuple[Tensor, Tensor]:
    """`mix_norm` of x [1, n], and how it changes along [1, n]."""
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    scale = (variance + norm.eps).rsqrt()
    unit = (x - mean) * scale
    change = along - along.mean(1, keepdim=True) - unit * (unit * along).mean(1, keepdim=True)
    return mix_norm(x, norm, mix), torch.lerp(along, scale * change * norm.weight, mix)


def batch_means(values: Tensor, batches: int = 10) -> Interval | None:
    """Interval of the mean of a correlated series [n] from the means of consecutive batches; None
    for a series too short for it."""
    size = len(values) // batches
    if size < 2:
        return None
    means = values[: size * batches].view(batches, size).mean(1)
    return t_interval(means.tolist(), "batch means")
