"""Contexts of a whole text from a frozen network: token by token, or many tokens at once.

The recurrence c[i] = f(c[i-1], e[i]) is a fixed point of the parallel map
C -> f(shift(C), E). Jacobi iteration applies that map: after k passes the first k tokens are
exact. The quasi-Newton method adds a first-order correction with a diagonal Jacobian, carried
along the sequence by a linear scan (quasi-DEER, arXiv:2407.19115, with a damping factor as trust
region in the manner of ELK; DEER is arXiv:2309.12252). Shooting cuts the text into segments that
are read at the same time, each from a guess, and reads each once more from where the one before
ended, until both readings are one (multiple shooting; Bellen and Zennaro, J. Comput. Appl. Math.
25, 1989). All are only faster than the loop where the recurrence contracts (arXiv:2508.16817), so
all fall back to the loop where it does not.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lablog.cvfp.model import Context, CVFPBlock, Token, check_widths, mix_norm, shifted

Method = Literal["sequential", "jacobi", "quasi-newton", "shooting"]
TOLERANCE = 1e-4  # largest relative error of a context that counts as exact
ALIKE = 0.03
"""Difference, in tolerances, below which shooting takes two readings for one."""
FREE_ROWS = {"cpu": 10.0, "cuda": 200.0}
"""Rows whose products with a weight matrix take about as long as reading the matrix once: the
operations that the machine computes while it reads a number, over two. Measured on a CPU (between 5
and 40 the time changes by a fifth), estimated for a GPU."""
WINDOW = 256  # tokens that Jacobi iteration and the quasi-Newton method solve at a time
CHECKED = 8  # tokens between two comparisons of readings, each of which a GPU has to wait for


@dataclass
class Rollout:
    """Contexts [n, context_dim] and how they were found.

    `passes`: contexts that a parallel method computed per token. `sequential_tokens`: tokens
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


class Recurrence:
    """A frozen network, arranged to read as few bytes of weights as possible for each token.

    Weights are stored input-major, which the product with one vector reads fastest (measured here:
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

    def prepare(self, tokens: Tensor) -> Tensor:
        """What the first layer takes from tokens [..., embed_dim] alone: [..., hidden_dim]."""
        return F.linear(tokens, self.from_token, self.biases[0])

    def step(self, context: Tensor, token: Tensor, ready: Tensor) -> Tensor:
        """New contexts of rows: [m, context_dim], [m, embed_dim] and what `prepare` made of them.
        """
        split, mix, last = self.split, self.config.layernorm_mix, len(self.weights) - 1
        for k, (weight, bias, norms) in enumerate(
            zip(self.weights, self.biases, self.norms, strict=True)
        ):
            if k == 0:
                delta = torch.addmm(ready, context, weight).relu_()
            else:
                delta = torch.addmm(bias, torch.cat([context, token], 1), weight).relu_()
            context = mix_norm(context + delta[:, :split], norms[0], mix)
            if k < last:
                token = mix_norm(token + delta[:, split:], norms[1], mix)
        return context

    def advance(self, context: Tensor, tokens: Tensor) -> Tensor:
        """Contexts [m, b, context_dim] of rows of tokens [m, b, embed_dim], from those [m, ...]
        before."""
        ready, found = self.prepare(tokens), []
        for i in range(tokens.shape[1]):
            context = self.step(context, tokens[:, i], ready[:, i])
            found.append(context)
        return torch.stack(found, 1)

    @torch.inference_mode()
    def read(self, tokens: Tensor, start: Tensor, out: Tensor, rows: int = 1024) -> None:
        """The loop: write the contexts of `tokens` [n, embed_dim] into `out` [n, context_dim]."""
        context = start.to(self.dtype).unsqueeze(0)
        for begin in range(0, len(tokens), rows):
            part = tokens[None, begin : begin + rows].to(self.dtype)
            (found,) = self.advance(context, part)
            out[begin : begin + rows] = found
            context = found[-1:]


@torch.no_grad()
def rollout(
    block: CVFPBlock,
    tokens: Tensor,
    start: Tensor | None = None,
    method: Method = "sequential",
    tolerance: float = TOLERANCE,
    max_passes: int = 16,
    guess: Tensor | None = None,
) -> Rollout:
    """Contexts of `tokens` [n, embed_dim] from `start` (zeros [context_dim] unless given).

    `guess`: contexts [n, context_dim] that the parallel methods start from, such as those of the
    same text under slightly other weights; it changes how much work is needed, not the result
    that they approach.

    Shooting is described at :class:`Shooting`, and knows no `max_passes`. The others solve a window
    of tokens at a time, from the exact end of the window before, and stop when the error that is
    left, extrapolated from how residuals shrink, is below half of `tolerance` relative to the
    context's norm: an estimate, not a bound. As soon as a window would not get there within
    `max_passes` (about where the loop is as fast on two CPU cores), the loop does the whole text:
    where the recurrence does not contract, even the rounding of an exact prefix would grow.
    Raises ValueError for a wrong width, method, tolerance or guess, FloatingPointError for NaN.
    """
    began, config = time.perf_counter(), block.config
    start = tokens.new_zeros(config.context_dim) if start is None else start
    check_widths(config, start, tokens)
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r}, expected one of {', '.join(get_args(Method))}")
    if not 0 < tolerance < 1 or max_passes < 4:
        raise ValueError(f"tolerance {tolerance}, max_passes {max_passes}: expected 0 < tolerance "
                         "< 1 and at least 4 passes")
    if guess is not None and guess.shape != (len(tokens), config.context_dim):
        raise ValueError(f"guess of shape {tuple(guess.shape)}: expected a context for each of "
                         f"{len(tokens)} tokens, {(len(tokens), config.context_dim)}")
    result = Rollout(tokens.new_empty(len(tokens), config.context_dim), method)
    if method == "sequential":
        found = None
    elif method == "shooting":
        shooting = Shooting(block, tolerance)
        found = shooting.solve(tokens, start, guess)
        result.passes = shooting.computed / max(1, len(tokens))
    else:
        found = _by_windows(block, tokens, start, tolerance, max_passes, guess, result)
    if found is None:
        Recurrence(block).read(tokens, start, result.contexts)
        result.sequential_tokens = len(tokens)
    else:
        result.contexts = found
    if not bool(torch.isfinite(result.contexts).all()):
        raise FloatingPointError(
            "contexts are not finite: weights or tokens are not, or without LayerNorm they grow"
        )
    result.seconds = time.perf_counter() - began
    return result


def _by_windows(block: CVFPBlock, tokens: Tensor, start: Tensor, tolerance: float, max_passes: int,
                guess: Tensor | None, result: Rollout) -> Tensor | None:
    """Contexts by `result`'s method, Jacobi or quasi-Newton, or None; writes passes and residuals
    into `result`."""
    window = _Window(block, tolerance, max_passes, result.method == "quasi-newton")
    out, begin, here = torch.empty_like(result.contexts), 0, start
    while begin < len(tokens):
        end = min(begin + WINDOW, len(tokens))
        solved, residuals = window.solve(tokens[begin:end], here,
                                         None if guess is None else guess[begin:end])
        result.passes += len(residuals) * (end - begin) / len(tokens)
        result.residuals.append(residuals)
        if solved is None:
            return None
        out[begin:end] = solved
        begin, here = end, out[end - 1]
    return out


class Shooting:
    """Segments of a text, read at the same time and joined.

    How fast the network forgets is measured on the first tokens, by reading them from two contexts
    until they are one; two rows cost what one does. Where that does not come about within a
    sixteenth of the text, or the text has less than 64 tokens, nothing is tried. It decides how
    many segments the text is cut into: many share the reading of the weights, each costs the tokens
    that it needs to forget its guess.

    Every segment is read from a guess, and then again from where the one before has ended, until
    the difference to the reading before is below `ALIKE` of the tolerance relative to the context's
    norm; from there on that reading stands. A segment that comes to its end before passes its own
    end on. An estimate, not a bound: that a difference stays small once it is, is what contraction
    means on average.

    computed: contexts so far.
    """

    def __init__(self, block: CVFPBlock, tolerance: float) -> None:
        self.recurrence, self.alike, self.computed = Recurrence(block), ALIKE * tolerance, 0

    def _advance(self, context: Tensor, tokens: Tensor) -> Tensor:
        self.computed += tokens.shape[0] * tokens.shape[1]
        return self.recurrence.advance(context, tokens)

    def _apart(self, one: Tensor, other: Tensor) -> Tensor:
        """Which rows [m, context_dim] are not yet one, bool [m]; a NaN is one with nothing."""
        return ~(relative_errors(one, other) <= self.alike)

    def solve(self, tokens: Tensor, start: Tensor, guess: Tensor | None) -> Tensor | None:
        """Contexts of tokens [n, embed_dim], or None where the loop is to read them."""
        forgets = self._forgets(tokens, start)
        if forgets is None:
            return None
        free = FREE_ROWS[tokens.device.type]
        segments = min(math.sqrt(free * len(tokens) / forgets), len(tokens) / forgets)
        size = math.ceil(len(tokens) / segments)
        count = math.ceil(len(tokens) / size)
        fill = count * size - len(tokens)
        cut = torch.cat([tokens, tokens[-1:].expand(fill, -1)]).view(count, size, -1)
        begun = start.expand(count, -1) if guess is None else torch.cat(
            [start[None], guess[size - 1 : (count - 1) * size : size]])
        out = tokens.new_empty(count, size, len(start))
        for part in _parts(size):
            out[:, part] = self._advance(begun, cut[:, part])
            begun = out[:, part][:, -1]
        changed = torch.arange(1, count, device=tokens.device)
        while len(changed):
            if self.computed > 3 * len(tokens):
                return None
            left = self._join(out, cut, changed) + 1
            changed = left[left < count]
        return out.flatten(0, 1)[: len(tokens)]

    def _forgets(self, tokens: Tensor, start: Tensor) -> int | None:
        """After how many tokens two contexts, `start` and another, are one; None if not soon."""
        most = max(32, len(tokens) // 16)
        if len(tokens) < 2 * most:
            return None
        other = self._advance(start[None], tokens[None, most : most + 1])[:, 0]
        pair = torch.cat([start[None], other])
        for part in _parts(most):
            pair = self._advance(pair, tokens[part].expand(2, -1, -1))[:, -1]
            if not bool(self._apart(pair[1:], pair[:1])):
                return min(part.stop, most)
        return None

    def _join(self, out: Tensor, cut: Tensor, rows: Tensor) -> Tensor:
        """Read segments `rows` again, from where those before them have ended, until they are one
        with what `out` [segments, size, context_dim] holds; which were not to their end."""
        context = out[rows - 1, -1]
        for part in _parts(cut.shape[1]):
            before, found = out[rows, part][:, -1], self._advance(context, cut[rows, part])
            out[rows, part] = found
            apart = self._apart(found[:, -1], before)
            rows, context = rows[apart], found[apart, -1]
            if not len(rows):
                break
        return rows


def _parts(size: int) -> list[slice]:
    """Positions of a segment, those between two comparisons together."""
    return [slice(begin, begin + CHECKED) for begin in range(0, size, CHECKED)]


def relative_errors(guess: Tensor, exact: Tensor) -> Tensor:
    """Norm of the difference of each context to the exact one, relative to its norm: [n]."""
    norms = torch.linalg.vector_norm(exact, dim=1).clamp_min(1e-30)
    return torch.linalg.vector_norm(guess - exact, dim=1) / norms


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
    """Solves windows of tokens; keeps the quasi-Newton diagonal from window to window."""

    def __init__(self, block: CVFPBlock, tolerance: float, max_passes: int, newton: bool) -> None:
        self.block, self.tolerance, self.max_passes = block, tolerance, max_passes
        self.newton, self.diagonal = newton, torch.empty(0)

    def solve(self, tokens: Tensor, start: Tensor,
              guess: Tensor | None = None) -> tuple[Tensor | None, list[float]]:
        """Contexts [n, context_dim] of tokens [n, embed_dim] or None, and the residuals."""
        guess = start.expand(len(tokens), -1) if guess is None else guess
        residuals: list[float] = []
        trust = 1.0  # multiplies the diagonal; 0 would be Jacobi, which is exact after n passes
        for done in range(1, len(tokens) + 1):
            before = shifted(guess, start)
            new = self.block.chunked(before, tokens)
            if self.newton:
                if done == 2 and not len(self.diagonal):
                    self.diagonal = jacobian_diagonal(self.block, before, tokens)
                if len(self.diagonal):
                    new = correct(new, guess, trust * self.diagonal)
            residuals.append(float(relative_errors(guess, new).max()))  # a pass's synchronisation
            guess = new
            if not math.isfinite(residuals[-1]):
                return None, residuals
            if self.newton and done > 2:
                trust = min(1.0, 2 * trust) if residuals[-1] < residuals[-2] else trust / 2
            verdict = self._judge(residuals)
            if verdict is not None:
                return (guess if verdict else None), residuals
        # As many passes as tokens make all of them exact, but for rounding: where residuals do not
        # shrink nothing contracts, and that grows from token to token.
        shrunk = len(tokens) == 1 or residuals[-1] < residuals[0]
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
