"""Phase 1: train contexts that reproduce themselves from pass to pass and stay diverse.

Loss = (1 - w) MSE(contexts, previous contexts) + w diversity, raw values (lab log, experiment B).
The variants differ in what a pass is and in when the optimiser steps. Sequential: the text is read
token by token, with a step after every token. Parallel: token i starts from context i - 1 of the
pass before, all tokens in one batch, one step. True pass: the text is read token by token with
frozen weights; then one step by the gradients of all tokens, each from the context that it really
started from, which counts as a constant.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Literal, Protocol, get_args

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from lablog.cvfp.model import (
    Context,
    CVFPBlock,
    ModelConfig,
    Token,
    check_normalised,
    shifted,
)
from lablog.cvfp.rollout import Method, rollout
from lablog.files import atomic_write
from lablog.keys import key
from lablog.progress import progress as progress_bar

Variant = Literal["parallel", "sequential", "true_pass"]
KEPT_EVERY = 20.0
"""Seconds between checkpoints, at least: at full width one holds 190 MB."""


class Observer(Protocol):
    """Measures a network behind every pass, by names and plain values, and changes nothing.

    key: tells it from every other; what another one measured is not taken for its own.
    """

    @property
    def key(self) -> str:
        """Key of all that decides what is measured."""
        ...

    def __call__(self, block: CVFPBlock) -> dict[str, Any]:
        """What the network is like now."""
        ...



@dataclass(frozen=True, kw_only=True)
class Phase1Config:
    """Settings of Phase 1 (the log's values in brackets).

    `iterations` includes iteration 0, which learns nothing (10). `learning_rate` is Adam's
    (0.002), `clip_norm` the norm that gradients are cut to (1.0). `convergence_threshold`: MSE
    to the previous context below which a token counts as converged (0.1). Training stops early
    when `early_stop_fraction` of the tokens (0.95) converged in iteration `early_stop_from` or
    later; from 2 on, because iteration 1 repeats iteration 0 whatever the network.
    `ema_decay` belongs to the sequential variant's moving mean, which starts at zero or at the mean
    of the first pass (`ema_start`; the log does not say where). `autocast` computes the products
    of a batch in bfloat16 (not the sequential variant). `reading`: how a true pass is read, by the
    loop or from the contexts of the pass before, as exact as :func:`lablog.cvfp.rollout.rollout`
    says.
    """

    variant: Variant
    diversity_weight: float
    iterations: int
    learning_rate: float
    clip_norm: float
    convergence_threshold: float
    early_stop_fraction: float
    early_stop_from: int
    ema_decay: float
    seed: int
    autocast: bool = False
    reading: Method = "sequential"
    ema_start: Literal["zero", "first_pass"] = "zero"

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant = {self.variant!r}, expected one of "
                             f"{', '.join(get_args(Variant))}")
        shares = (self.diversity_weight, self.early_stop_fraction, self.ema_decay)
        if not all(0 <= share <= 1 for share in shares) or self.iterations < 2:
            raise ValueError(
                "diversity_weight, early_stop_fraction and ema_decay lie in [0, 1] and "
                f"iterations is at least 2, given: {asdict(self)}"
            )
        if self.autocast and self.variant == "sequential":
            raise ValueError("autocast = True needs a variant that steps once a pass")
        if self.ema_start not in ("zero", "first_pass") or (
            self.ema_start != "zero" and self.variant != "sequential"
        ):
            raise ValueError(f"ema_start = {self.ema_start!r} with variant {self.variant!r}: "
                             "expected 'zero', or 'first_pass' with 'sequential'")
        if self.reading not in get_args(Method) or (
            self.reading != "sequential" and self.variant != "true_pass"
        ):
            raise ValueError(f"reading = {self.reading!r} with variant {self.variant!r}: expected "
                             f"'sequential', or with 'true_pass' one of {get_args(Method)}")


@dataclass(frozen=True)
class Iteration:
    """One pass: mean losses over its tokens, and how many tokens converged."""

    iteration: int
    loss: float
    cvfp_loss: float
    diversity_loss: float
    converged: int
    tokens: int


@dataclass
class Phase1Result:
    """History of iterations 1..., and the contexts [n, context_dim] of the last one.

    These are the contexts that the log evaluates: computed before the last optimiser step.
    observed: what the observer, if there was one, measured behind each of these iterations.
    """

    history: list[Iteration]
    contexts: Tensor
    planned: int
    observed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def iterations_done(self) -> int:
        """Iterations that ran, iteration 0 included."""
        return len(self.history) + 1


@dataclass
class DiversityTracker:
    """Exponential moving mean and variance per dimension, O(context_dim) memory."""

    mean: Tensor
    variance: Tensor
    decay: float

    def update(self, context: Tensor) -> None:
        """Take in one context [context_dim]."""
        self.mean.lerp_(context, 1 - self.decay)
        self.variance.lerp_((context - self.mean).square_(), 1 - self.decay)


def parallel_loss(
    contexts: Tensor, previous: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, CVFP loss, diversity loss) of all contexts [n, d]; diversity is -||C - mean|| / n."""
    cvfp = F.mse_loss(contexts, previous)
    diversity = -torch.linalg.vector_norm(contexts - contexts.mean(0)) / len(contexts)
    return (1 - weight) * cvfp + weight * diversity, cvfp, diversity


def token_loss(
    context: Tensor, previous: Tensor, mean: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for one context [d] against the moving mean [d]: diversity is -||c - mean||."""
    cvfp = F.mse_loss(context, previous)
    diversity = -torch.linalg.vector_norm(context - mean)
    return (1 - weight) * cvfp + weight * diversity, cvfp, diversity


def make_optimizer(block: CVFPBlock, config: Phase1Config) -> torch.optim.Adam:
    """Adam in its fused form: one pass over weights, moments and gradients."""
    return torch.optim.Adam(block.parameters(), lr=config.learning_rate, fused=True)


def parallel_step(
    block: CVFPBlock,
    tokens: Tensor,
    previous: Tensor,
    optimizer: torch.optim.Optimizer,
    config: Phase1Config,
) -> tuple[Tensor, Tensor]:
    """One iteration over all tokens and one optimiser step.

    Returns the contexts [n, context_dim], detached, and a vector of (loss, CVFP loss, diversity
    loss, converged tokens) that is still on the device.
    """
    contexts, losses = _batch_step(
        block, tokens, shifted(previous, previous[-1]), previous, optimizer, config)
    return contexts, _stats(contexts, previous, losses, config)


def true_pass_step(
    block: CVFPBlock,
    tokens: Tensor,
    previous: Tensor,
    optimizer: torch.optim.Optimizer,
    config: Phase1Config,
) -> tuple[Tensor, Tensor]:
    """One reading of the text with frozen weights and one step; returns as :func:`parallel_step`.

    The contexts are those that were read. The gradient is that of the loss between this pass and
    the one before, with what each token started from held constant.
    """
    start = previous[-1]
    contexts = rollout(block, tokens, start, config.reading, guess=previous).contexts
    _, losses = _batch_step(block, tokens, shifted(contexts, start), previous, optimizer, config)
    return contexts, _stats(contexts, previous, losses, config)


def _batch_step(
    block: CVFPBlock, tokens: Tensor, before: Tensor, previous: Tensor,
    optimizer: torch.optim.Optimizer, config: Phase1Config,
) -> tuple[Tensor, Tensor]:
    """One optimiser step on the contexts that tokens [n, e] reach from those `before` [n, c].

    Returns them, detached, and the losses [3].
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.autocast):
        contexts = block.chunked(before, tokens)
    losses = parallel_loss(contexts.to(previous.dtype), previous, config.diversity_weight)
    optimizer.zero_grad(set_to_none=True)
    losses[0].backward()
    torch.nn.utils.clip_grad_norm_(block.parameters(), config.clip_norm)
    optimizer.step()
    return contexts.detach().to(previous.dtype), torch.stack([x.detach() for x in losses])


def _stats(contexts: Tensor, previous: Tensor, losses: Tensor, config: Phase1Config) -> Tensor:
    """The losses [3] and the number of tokens that converged, on the device."""
    error = (contexts - previous).square().mean(1)
    converged = (error < config.convergence_threshold).sum()
    return torch.cat([losses, converged.to(losses.dtype).unsqueeze(0)])


class SequentialStep:
    """One token: forward, backward and optimiser step.

    A token's weight gradient is an outer product of two vectors. Autograd is asked only for the
    vectors; norm and clipping are computed from them, and each gradient is written once, already
    clipped, into memory that is allocated once. What remains is bound by memory: two readings of
    the weights, one writing of the gradient and seven streams of Adam.
    """

    def __init__(self, block: CVFPBlock, config: Phase1Config, optimizer: torch.optim.Optimizer):
        self.block, self.config, self.optimizer = block, config, optimizer
        self.linears = [layer.linear for layer in block.stack]
        self.norms = [p for name, p in block.named_parameters() if ".linear." not in name]
        self.gradients = [torch.zeros_like(linear.weight) for linear in self.linears]
        for linear, gradient in zip(self.linears, self.gradients, strict=True):
            linear.weight.grad = gradient

    def __call__(
        self, context: Tensor, token: Tensor, previous: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New context [context_dim] and (loss, CVFP loss, diversity loss), both on the device."""
        c, t = Context(context.detach().unsqueeze(0)), Token(token.unsqueeze(0))
        inputs, preactivations = [], []
        for layer in self.block.stack:
            x = torch.cat([c, t], dim=1)
            h = F.linear(x, layer.linear.weight.detach(), layer.linear.bias.detach())
            h = h if h.requires_grad else h.requires_grad_()
            inputs.append(x.detach())
            preactivations.append(h)
            c, t = layer.residual(c, t, h)
        losses = token_loss(c[0], previous, mean, self.config.diversity_weight)
        wanted = [*preactivations, *self.norms]
        grads = torch.autograd.grad(losses[0], wanted, allow_unused=True)
        deltas, rest = grads[: len(inputs)], grads[len(inputs) :]
        squares = [
            d.square().sum() * (x.square().sum() + 1) for d, x in zip(deltas, inputs, strict=True)
        ]
        squares += [g.square().sum() for g in rest if g is not None]
        norm = torch.stack(squares).sum().sqrt()
        scale = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for linear, gradient, d, x in zip(
            self.linears, self.gradients, deltas, inputs, strict=True
        ):
            d = d * scale
            torch.mul(d.t(), x, out=gradient)
            linear.bias.grad = d[0]
        for parameter, g in zip(self.norms, rest, strict=True):
            parameter.grad = None if g is None else g * scale
        self.optimizer.step()
        return c[0].detach(), torch.stack([x.detach() for x in losses])


def sequential_iteration(
    step: SequentialStep,
    tokens: Tensor,
    previous: Tensor,
    tracker: DiversityTracker,
    tick: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """One pass with a step per token; the same return values as :func:`parallel_step`."""
    context, contexts = previous[-1], torch.empty_like(previous)
    losses = tokens.new_empty(len(tokens), 3)
    for i in range(len(tokens)):
        context, losses[i] = step(context, tokens[i], previous[i], tracker.mean)
        contexts[i] = context
        tracker.update(context)
        tick()
    return contexts, _stats(contexts, previous, losses.mean(0), step.config)


def train(
    block: CVFPBlock,
    tokens: Tensor,
    config: Phase1Config,
    checkpoint: Path | None = None,
    initial: Tensor | None = None,
    progress: bool = False,
    observe: Observer | None = None,
) -> Phase1Result:
    """Train `block` in place on normalised embeddings [n, embed_dim]; see the module.

    `initial`: contexts of iteration 0 where they are known already (they do not depend on w).
    With `checkpoint`, state is written there at the end and behind the first iteration that ends
    KEPT_EVERY seconds after the last writing; a later call continues from it to bit-identical
    weights, and a finished one is only read. What `observe` measures does not tell trainings
    apart: one that another or none has watched is done again. Raises ValueError when the checkpoint
    belongs to another configuration, text, source or thread count, and FloatingPointError when a
    loss is not finite.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} token(s): Phase 1 needs at least 2")
    identity = _identity(block, tokens, config)
    optimizer = make_optimizer(block, config)
    zeros = tokens.new_zeros(block.config.context_dim)
    tracker = DiversityTracker(zeros.clone(), zeros.clone(), config.ema_decay)
    history: list[Iteration] = []
    observed: list[dict[str, Any]] = []
    contexts, seen_by = initial, ""
    state = None
    if checkpoint is not None and checkpoint.is_file():
        state = load_checkpoint(checkpoint, identity, tokens.device)
        if observe is not None and state["observer"] != observe.key:
            state = None
    if state is not None:
        block.load_state_dict(state["block"])
        history = [Iteration(**row) for row in state["history"]]
        contexts, observed, seen_by = state["contexts"], state["observed"], state["observer"]
        if state["done"]:
            return Phase1Result(history, contexts, config.iterations, observed)
        optimizer.load_state_dict(state["optimizer"])
        tracker.mean, tracker.variance = state["tracker"]
    elif contexts is None:
        contexts = rollout(block, tokens).contexts
    if not history and config.ema_start == "first_pass":
        tracker.mean.copy_(contexts.mean(0))
    step = SequentialStep(block, config, optimizer) if config.variant == "sequential" else None
    bar = progress_bar(
        (config.iterations - 1) * len(tokens),
        f"{config.variant}, w = {config.diversity_weight:g}, seed {config.seed}", "token",
        len(history) * len(tokens), show=progress,
    )
    kept = monotonic()
    for iteration in range(len(history) + 1, config.iterations):
        if step is not None:
            contexts, stats = sequential_iteration(step, tokens, contexts, tracker, bar.update)
        else:
            once = parallel_step if config.variant == "parallel" else true_pass_step
            contexts, stats = once(block, tokens, contexts, optimizer, config)
            bar.update(len(tokens))
        loss, cvfp, diversity, converged = stats.tolist()  # the iteration's one synchronisation
        if not torch.isfinite(stats).all():
            raise FloatingPointError(
                f"loss {loss} (CVFP {cvfp}, diversity {diversity}) in iteration {iteration}: "
                f"lower learning_rate = {config.learning_rate} or check the embeddings for NaN"
            )
        history.append(Iteration(iteration, loss, cvfp, diversity, int(converged), len(tokens)))
        if observe is not None:
            observed.append(observe(block))
        else:
            seen_by = ""  # of this pass nobody saw anything, so of the training nobody saw all
        enough = converged >= config.early_stop_fraction * len(tokens)
        done = iteration + 1 == config.iterations or (
            enough and iteration >= config.early_stop_from
        )
        if checkpoint is not None and (done or monotonic() - kept >= KEPT_EVERY):
            state = {
                "identity": identity, "block": block.state_dict(), "contexts": contexts,
                "history": [asdict(row) for row in history], "done": done, "observed": observed,
                "observer": observe.key if observe is not None else seen_by,
                "tracker": (tracker.mean, tracker.variance),
            }
            if not done:
                state["optimizer"] = optimizer.state_dict()
            buffer = io.BytesIO()
            torch.save(state, buffer)
            atomic_write(checkpoint, buffer.getvalue())
            kept = monotonic()
        if done:
            break
    bar.close()
    return Phase1Result(history, contexts, config.iterations, observed)


def trained(
    folder: Path, shape: ModelConfig, tokens: Tensor, config: Phase1Config,
    initial: Tensor | None = None, observe: Observer | None = None,
) -> tuple[CVFPBlock, Phase1Result]:
    """The network of `config.seed`, trained on `tokens` [n, embed_dim], and how it went.

    Its checkpoint lies in `folder` under a name that holds a hash of all it depends on: what one
    notebook has trained, another finds, and what was cut off goes on. `initial` [n, context_dim]
    and `observe` as in :func:`train`, which says what is refused; so are tokens that are not
    normalised.
    """
    check_normalised(tokens)
    block = CVFPBlock(shape, config.seed).to(tokens.device)
    path = _stored(folder, "phase1", _identity(block, tokens, config), ".pt")
    return block, train(block, tokens, config, path, initial, True, observe)


def contexts_of(folder: Path, block: CVFPBlock, tokens: Tensor,
                reading: Method = "sequential") -> Tensor:
    """Contexts [n, context_dim] of one pass of `block` over `tokens` [n, embed_dim] from zero.

    Kept in `folder` for the notebook that asks again, under a name as in :func:`trained`.
    `reading`: how they are found, as exact as :func:`lablog.cvfp.rollout.rollout` says. Raises
    ValueError for tokens that are not normalised.
    """
    check_normalised(tokens)
    identity = _pass_identity(block, tokens) | {"reading": reading}
    path = _stored(folder, "contexts", identity, ".safetensors")
    if not path.is_file():
        found = rollout(block, tokens, method=reading).contexts
        atomic_write(path, save({"contexts": found}))
    return load_file(path, str(tokens.device))["contexts"]


def _pass_identity(block: CVFPBlock, tokens: Tensor) -> dict[str, Any]:
    """Everything that a pass of `block` over `tokens` depends on, as names and plain values."""
    return {
        **asdict(block.config), "code": key(contexts_of),
        "start and tokens": key(contexts_of, *block.state_dict().values(), tokens),
        "threads": torch.get_num_threads(), "device": tokens.device.type,
    }


def _identity(block: CVFPBlock, tokens: Tensor, config: Phase1Config) -> dict[str, Any]:
    """Everything that the result of :func:`train` depends on."""
    return _pass_identity(block, tokens) | asdict(config)


def _stored(folder: Path, kind: str, identity: dict[str, Any], suffix: str) -> Path:
    """A file in `folder` whose name holds a hash of everything that its content depends on."""
    return folder / f"{kind}-{key(trained, identity)}{suffix}"


def load_checkpoint(
    path: Path, identity: dict[str, Any] | None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Read a checkpoint; ValueError names what differs from `identity` (None: not compared)."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found = state["identity"]
    except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{path} is not a Phase 1 checkpoint: {error}") from error
    if identity is not None and found != identity:
        differing = [
            f"{name}: checkpoint {found.get(name)!r}, now {identity.get(name)!r}"
            for name in identity.keys() | found.keys()
            if found.get(name) != identity.get(name)
        ]
        raise ValueError(
            f"{path} belongs to another configuration ({'; '.join(sorted(differing))}): "
            "delete it or name another file"
        )
    return state
