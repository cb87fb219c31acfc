"""Contexts of a whole text from a frozen network: token by token, or many tokens at once.

The recurrence c[i] = f(c[i-1], e[i]) is a fixed point of the parallel map
C -> f(shift(C), E). Jacobi iteration applies that map: after k passes the first k tokens are
exact. The quasi-Newton method adds a first-order correction with a diagonal Jacobian, carried
along the sequence by a linear scan (quasi-DEER, arXiv:2407.19115, with a damping factor as trust
region in the manner of ELK; DEER is arXiv:2309.12252). Both are only faster than the loop where
the recurrence contracts (arXiv:2508.16817), so both fall back to the loop where it does not.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lablog.cvfp.model import Context, CVFPBlock, Token, check_widths, mix_norm, shifted

Method = Literal["sequential", "jacobi", "quasi-newton"]
TOLERANCE = 1e-4  # largest relative error of a context that counts as exact


@dataclass
class Rollout:
    """Contexts [n, context_dim] and how they were found.

    `passes`: evaluations of the parallel map per token, on average. `sequential_tokens`: tokens
    computed by the loop: all for the method `sequential` and where another fell back to it, else
    0. `residuals`: per window of tokens, the largest relative change of a context in each pass.
    `seconds`: wall-clock time of the whole, fallback included.
    """

    contexts: Tensor
    method: Method
    passes: float = 0.0
    sequential_tokens: int = 0
    residuals: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0


class SequentialRollout:
    """The loop over tokens, arranged to read as few bytes of weights as possible.

    Weights are stored input-major, which the matrix-vector product reads fastest (measured here:
    1.2 times). Two twelfths of six layers are never read: the first layer's product with the
    token does not depend on the context and is one matrix product for many tokens, and the last
    layer's token half has no reader.
    """

    def __init__(self, block: CVFPBlock, dtype: torch.dtype | None = None) -> None:
        config = block.config
        self.config, self.split = config, config.context_dim
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.norms = [(layer.context_norm, layer.token_norm) for layer in block.stack]
        first = block.stack[0].linear
        dtype = dtype or first.weight.dtype
        last = len(block.layers) - 1
        with torch.no_grad():
            for i, layer in enumerate(block.stack):
                rows = self.split if i == last else config.hidden_dim
                columns = self.split if i == 0 else config.hidden_dim
                weight = layer.linear.weight[:rows, :columns]
                self.weights.append(weight.t().contiguous().to(dtype))
                self.biases.append(layer.linear.bias[:rows].to(dtype))
            rows = len(self.biases[0])
            self.from_token = first.weight[:rows, self.split :].to(dtype)
        self.dtype = dtype

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, start: Tensor, out: Tensor, rows: int = 1024) -> None:
        """Write the contexts of `tokens` [n, embed_dim] into `out` [n, context_dim]."""
        split, mix, last = self.split, self.config.layernorm_mix, len(self.weights) - 1
        context = start.to(self.dtype).unsqueeze(0)
        for begin in range(0, len(tokens), rows):
            part = tokens[begin : begin + rows].to(self.dtype)
            ready = F.linear(part, self.from_token, self.biases[0])
            for i in range(len(part)):
                token = part[i : i + 1]
                for k, (weight, bias, norms) in enumerate(
                    zip(self.weights, self.biases, self.norms, strict=True)
                ):
                    if k == 0:
                        delta = torch.addmm(ready[i : i + 1], context, weight).relu_()
                    else:
                        delta = torch.addmm(bias, torch.cat([context, token], 1), weight).relu_()
                    context = mix_norm(context + delta[:, :split], norms[0], mix)
                    if k < last:
                        token = mix_norm(token + delta[:, split:], norms[1], mix)
                out[begin + i] = context[0]


@torch.no_grad()
def rollout(
    block: CVFPBlock,
    tokens: Tensor,
    start: Tensor | None = None,
    method: Method = "sequential",
    tolerance: float = TOLERANCE,
    segment: int = 1,
    max_passes: int = 16,
    guess: Tensor | None = None,
) -> Rollout:
    """Contexts of `tokens` [n, embed_dim] from `start` (zeros [context_dim] unless given).

    `segment` > 1 (Jacobi only) iterates over segments of that many tokens, all of which advance
    token by token at the same time, each from the end that the one before had in the last pass
    (multiple shooting). A pass forgets `segment` tokens' worth of error for the price of one.
    `guess`: contexts [n, context_dim] that the parallel methods start from, such as those of the
    same text under slightly other weights; it changes how many passes are needed, not the result
    that they approach.

    The parallel methods solve a window of segments at a time, from the exact end of the window
    before, and stop when the error that is left, extrapolated from how residuals shrink, is below
    half of `tolerance` relative to the context's norm: an estimate, not a bound. As soon as a
    window would not get there within `max_passes` (about where the loop is as fast on two CPU
    cores), the loop does the whole text: where the recurrence does not contract, even the rounding
    of an exact prefix would grow.
    Raises ValueError for a wrong width, method, segment, tolerance or guess, FloatingPointError
    for NaN.
    """
    began, config = time.perf_counter(), block.config
    start = tokens.new_zeros(config.context_dim) if start is None else start
    check_widths(config, start, tokens)
    if method not in ("sequential", "jacobi", "quasi-newton"):
        raise ValueError(f"method = {method!r}, expected sequential, jacobi or quasi-newton")
    newton = method == "quasi-newton"
    if not 0 < tolerance < 1 or max_passes < 4 or segment < 1 or (newton and segment > 1):
        raise ValueError(
            f"tolerance {tolerance}, max_passes {max_passes}, segment {segment}: expected 0 < "
            "tolerance < 1, at least 4 passes, and segments of 1 token (more only for jacobi)"
        )
    if guess is not None and guess.shape != (len(tokens), config.context_dim):
        raise ValueError(f"guess of shape {tuple(guess.shape)}: expected a context for each of "
                         f"{len(tokens)} tokens, {(len(tokens), config.context_dim)}")
    out = tokens.new_empty(len(tokens), config.context_dim)
    result, window = Rollout(out, method), _Window(block, tolerance, max_passes, newton)
    begin, rows, here = 0, max(8, 256 // segment), start
    while begin < len(tokens) and method != "sequential":
        count = min(rows, -(-(len(tokens) - begin) // segment))
        size = min(segment, len(tokens) - begin) if count == 1 else segment
        count = min(count, (len(tokens) - begin) // size)
        end = begin + count * size
        begun = None if guess is None else guess[begin:end].view(count, size, -1)
        solved, residuals = window.solve(tokens[begin:end].view(count, size, -1), here, begun)
        result.passes += len(residuals) * (end - begin) / len(tokens)
        result.residuals.append(residuals)
        if solved is None:
            break
        out[begin:end] = solved.flatten(0, 1)
        begin, here, rows = end, out[end - 1], min(4 * rows, max(128, rows))
    if begin < len(tokens):
        SequentialRollout(block)(tokens, start, out)
        result.sequential_tokens = len(tokens)
    if not bool(torch.isfinite(out).all()):
        raise FloatingPointError(
            "contexts are not finite: weights or tokens are not, or without LayerNorm they grow"
        )
    result.seconds = time.perf_counter() - began
    return result


def relative_errors(guess: Tensor, exact: Tensor) -> Tensor:
    """Norm of the difference of each context to the exact one, relative to its norm: [n]."""
    return torch.linalg.vector_norm(guess - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1)


@torch.no_grad()
def exact_shares(block: CVFPBlock, tokens: Tensor, exact: Tensor, passes: int) -> list[float]:
    """Share of tokens within TOLERANCE of `exact` after each Jacobi pass, without any fallback.

    `tokens` [n, embed_dim]; `exact` [n, context_dim] is their rollout from the zero context, and
    the iteration starts from zero contexts. ValueError unless both have the same length.
    """
    if len(tokens) != len(exact):
        raise ValueError(f"{len(tokens)} tokens and {len(exact)} contexts: expected one for each")
    guess, shares = torch.zeros_like(exact), []
    for _ in range(passes):
        guess = block.chunked(shifted(guess, torch.zeros_like(guess[0])), tokens)
        shares.append(float((relative_errors(guess, exact) < TOLERANCE).float().mean()))
    return shares


class _Window:
    """Solves windows of segments; keeps the quasi-Newton diagonal from window to window."""

    def __init__(self, block: CVFPBlock, tolerance: float, max_passes: int, newton: bool) -> None:
        self.block, self.tolerance, self.max_passes = block, tolerance, max_passes
        self.newton, self.diagonal = newton, torch.empty(0)

    def solve(self, tokens: Tensor, start: Tensor,
              guess: Tensor | None = None) -> tuple[Tensor | None, list[float]]:
        """Contexts [s, segment, c] of tokens [s, segment, e] or None, and the residuals."""
        segments, length, _ = tokens.shape
        guess = start.expand(segments, length, -1) if guess is None else guess
        residuals: list[float] = []
        trust = 1.0  # multiplies the diagonal; 0 would be Jacobi, which is exact after s passes
        for done in range(1, segments + 1):
            before = shifted(guess[:, -1], start)
            context, new = before, torch.empty_like(guess)
            for i in range(length):
                context = self.block.chunked(context, tokens[:, i])
                new[:, i] = context
            if self.newton:
                if done == 2 and not len(self.diagonal):
                    self.diagonal = jacobian_diagonal(self.block, before, tokens[:, 0])
                if len(self.diagonal):
                    new = correct(new[:, 0], guess[:, 0], trust * self.diagonal).unsqueeze(1)
            change = torch.linalg.vector_norm(new - guess, dim=2)
            relative = change / torch.linalg.vector_norm(new, dim=2).clamp_min(1e-30)
            residuals.append(float(relative.max()))  # one synchronisation a pass, none a token
            guess = new
            if not math.isfinite(residuals[-1]):
                return None, residuals
            if self.newton and done > 2:
                trust = min(1.0, 2 * trust) if residuals[-1] < residuals[-2] else trust / 2
            verdict = self._judge(residuals)
            if verdict is not None:
                return (guess if verdict else None), residuals
        # As many passes as segments make all of them exact, but for rounding: where residuals do
        # not shrink nothing contracts, and that grows from segment to segment.
        shrunk = segments == 1 or residuals[-1] < residuals[0]
        return (guess if shrunk else None), residuals

    def _judge(self, residuals: list[float]) -> bool | None:
        """True: converged; False: will not be within the passes allowed; None: go on."""
        if residuals[-1] == 0:
            return True
        if len(residuals) < 3:
            return None
        # The slower of the last two steps, so that one lucky pass does not end the iteration.
        rate = max(residuals[-1] / residuals[-2], residuals[-2] / residuals[-3])
        if rate < 1 and residuals[-1] * rate / (1 - rate) <= self.tolerance / 2:
            return True
        if len(residuals) < 5:
            return None
        rate = (residuals[-1] / residuals[-4]) ** (1 / 3)
        if rate >= 1:
            return False
        missing = math.log(self.tolerance / residuals[-1]) / math.log(rate)
        return False if len(residuals) + missing > self.max_passes else None


def jacobian_diagonal(
    block: CVFPBlock, contexts: Tensor, tokens: Tensor, limit: float = 0.99
) -> Tensor:
    """Diagonal of df/dcontext [context_dim], averaged over tokens and clamped to +-`limit`.

    Hutchinson's estimate E[v * (J v)] with one vector of random signs per token; the mean over
    a block of 256 tokens has 1/16 of the noise of one token's.
    """
    generator = torch.Generator(device=contexts.device).manual_seed(0)
    signs = torch.randint(
        0, 2, contexts.shape, generator=generator, device=contexts.device, dtype=torch.int8
    ).to(contexts.dtype)
    signs = 2 * signs - 1
    product = torch.func.jvp(
        lambda c: block(Context(c), Token(tokens))[0], (contexts,), (signs,)
    )[1]
    return (signs * product).mean(0).clamp(-limit, limit)


def correct(new: Tensor, guess: Tensor, diagonal: Tensor) -> Tensor:
    """Solve y[i] = new[i] + diagonal * (y[i-1] - guess[i-1]), y[0] = new[0], along the tokens.

    With d = y - new this is d[i] = diagonal * (d[i-1] + new[i-1] - guess[i-1]): a linear scan
    with a constant diagonal, done by doubling in log2(n) steps.
    """
    step = torch.zeros_like(new)
    step[1:] = diagonal * (new - guess)[:-1]
    power, distance = diagonal, 1
    while distance < len(new):
        step = torch.cat([step[:distance], step[distance:] + power * step[:-distance]])
        power, distance = power * power, 2 * distance
    return new + step
