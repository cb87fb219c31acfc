"""Faults in reading and training context vectors (lab log, experiment B)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from lablog.cvfp import phase1
from lablog.cvfp.model import Context, CVFPBlock, ModelConfig, Token
from lablog.cvfp.rollout import rollout


@contextmanager
def loss_of_directions() -> Iterator[list[float]]:
    """Phase 1 compares normalised contexts; what is yielded collects the raw MSE of every pass."""
    right, raw = phase1.parallel_loss, []

    def normalised(contexts: Tensor, previous: Tensor, weight: float) -> Any:
        raw.append(F.mse_loss(contexts, previous).item())
        return right(F.normalize(contexts), F.normalize(previous), weight)

    with patch.object(phase1, "parallel_loss", normalised):
        yield raw


@contextmanager
def fixed_target() -> Iterator[None]:
    """A network's true passes are all compared with its first one."""
    right = phase1.true_pass_step
    first: WeakKeyDictionary[CVFPBlock, Tensor] = WeakKeyDictionary()

    def step(block: CVFPBlock, tokens: Tensor, previous: Tensor, *rest: Any) -> Any:
        return right(block, tokens, first.setdefault(block, previous), *rest)

    with patch.object(phase1, "true_pass_step", step):
        yield


def read_with_steps(block: CVFPBlock, tokens: Tensor, config: phase1.Phase1Config,
                    detach: bool) -> tuple[int, str]:
    """A step of Adam for every token, in the plain form: how many tokens were read, and the kind of
    error that ended it, if one did."""
    optimizer = phase1.make_optimizer(block, config)
    zero = torch.zeros(block.config.context_dim)
    context = zero
    for number, token in enumerate(tokens):
        before = context.detach() if detach else context
        new, _ = block(Context(before[None]), Token(token[None]))
        optimizer.zero_grad()
        try:
            phase1.token_loss(new[0], context.detach(), zero, 0.5)[0].backward()
        except RuntimeError as error:
            return number, type(error).__name__
        optimizer.step()
        context = new[0]
    return len(tokens), ""


def passes_from_zero(block: CVFPBlock, tokens: Tensor, passes: int) -> list[float]:
    """MSE between passes that all start from the zero context."""
    readings = [rollout(block, tokens).contexts for _ in range(passes + 1)]
    return [F.mse_loss(after, before).item() for before, after in pairwise(readings)]


@torch.no_grad()
def passes_swapped(block: CVFPBlock, tokens: Tensor, passes: int) -> tuple[Tensor, list[float]]:
    """Contexts [n, d] of passes whose calls have token and context in each other's place, and the
    MSE between passes; both must be equally wide."""
    context, readings = tokens.new_zeros(1, tokens.shape[1]), []
    for _ in range(passes + 1):
        rows = []
        for token in tokens[:, None]:
            context = block(Context(token), Token(context))[0]
            rows.append(context)
        readings.append(torch.cat(rows))
    return readings[-1], [F.mse_loss(b, a).item() for a, b in pairwise(readings)]


def call(shape: ModelConfig, swapped: bool) -> None:
    """One token through an untrained network, with the arguments as they should be or `swapped`."""
    context, token = torch.zeros(1, shape.context_dim), torch.zeros(1, shape.embed_dim)
    one, other = (token, context) if swapped else (context, token)
    CVFPBlock(shape, seed=0)(Context(one), Token(other))


def share_absent(dialogues: Tensor, held: int, seed: int) -> float:
    """`held` of the dialogues [many, tokens] split off at random: the share of their tokens that
    the others do not have."""
    rows = dialogues[torch.randperm(len(dialogues), generator=torch.Generator().manual_seed(seed))]
    return (~torch.isin(rows[:held], rows[held:])).float().mean().item()


def both_losses(result: phase1.Phase1Result, raw: Sequence[float] = ()) -> list[dict[str, float]]:
    """A training's iterations with the CVFP loss that it reports and the MSE between passes, which
    are the same where no `raw` ones are given."""
    errors = raw or [row.cvfp_loss for row in result.history]
    return [{"iteration": row.iteration, "reported loss": row.cvfp_loss,
             "MSE between passes": error}
            for row, error in zip(result.history, errors, strict=True)]


def identical(one: CVFPBlock, other: CVFPBlock) -> str:
    """``yes`` if all weights are bit-identical, else ``no``."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return "yes" if all(torch.equal(a, b) for a, b in pairs) else "no"
