"""A commitment that is learnt: the posterior of z*, its projection, and their file format.

A prefix fixes the commitment and is read once: the hidden state h of its last real token gives
q(z* | prefix) = N(μ(h), diag σ²(h)). The prior is N(0, I/k) as in the lab log (A1). The decoder,
which never sees the prefix, gets λ · W_c z* after every chosen layer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lablog.files import atomic_write, parsing

CANDIDATES = 16  # draws from the prior for each cell
NEAR = 8  # of those in a cell, how many the one nearest to a border is chosen from
MEMORY = 50  # batches over which the cells' running means reach back
Positions = Literal["all", "first"]
Code = Literal["gaussian", "label"]
Reader = Literal["adapted", "discriminant"]
RIDGE = 1e-3  # of the mean variance of a hidden unit, on the diagonal of their covariance
SIGMA_START = math.exp(-1)  # of the posterior, in the prior's
WEIGHTS, SETTINGS = "commitment.safetensors", "commitment.json"


class CommitmentSettings(BaseModel):
    """Shape of a learnt commitment: latent dimension k, the model's width d, the layers that
    receive it (0-based, inclusive) and the strength λ; the positions that receive it; whether z*
    is a Gaussian latent or a label's one-hot vector; what the head reads (`VariationalCommitment`);
    and the base model that it belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    k: int = Field(ge=1)
    width: int = Field(ge=1)
    layers: tuple[int, int]
    strength: float
    positions: Positions = "all"
    code: Code = "gaussian"
    reader: Reader = "adapted"
    base_sha256: str | None = None

    @model_validator(mode="after")
    def _check(self) -> CommitmentSettings:
        if self.k > self.width:
            raise ValueError(f"k = {self.k} is larger than the model's width {self.width}: W_c "
                             "could not tell all latents apart; choose k up to the width")
        if not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"layers = {self.layers}: expected 0 <= first <= last")
        return self


@dataclass(frozen=True)
class Posterior:
    """q(z* | prefix) in units of the prior's standard deviation: mean and log variance [n, k]."""

    mean: Tensor
    log_variance: Tensor

    def kl(self) -> Tensor:
        """KL(q ‖ prior) per latent dimension, nats [n, k]; the unit of z* cancels."""
        return 0.5 * (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """z* [n, k] by reparameterisation with standard normal `noise` (drawn if None)."""
        if noise is None:
            noise = torch.randn_like(self.mean)
        z = self.mean + (0.5 * self.log_variance).exp() * noise
        return z / math.sqrt(self.mean.shape[-1])


class Cells(nn.Module):
    """The prior, cut into one cell for each of the `n` commitments that there are.

    A draw lies in the cell of the commitment under whose posterior it is most probable. A decoder
    that learns on such draws decides for one commitment wherever the prior leads, also where the
    posteriors overlap or leave gaps. The posteriors that cut are running means over batches:
    prefixes of one commitment differ in topic and wording, and cut along those of a single batch,
    a draw near a border would belong to another cell in every batch.

    Whether two questions agree is decided at the borders, and few draws lie there. So half of the
    draws are the one of `NEAR` in the cell that is the nearest to its border (hard examples:
    Shrivastava et al., 2016).
    """

    mean: Tensor
    log_variance: Tensor
    seen: Tensor

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        for name, start in (("mean", torch.zeros(n, k)), ("log_variance", torch.zeros(n, k)),
                            ("seen", torch.zeros(n, dtype=torch.int64))):
            self.register_buffer(name, start, persistent=False)

    @torch.no_grad()
    def follow(self, posterior: Posterior, commitment: Tensor) -> None:
        """Take a batch, row i of commitment ``commitment[i]``, into the running means.

        Raises ValueError for a row whose commitment has no cell.
        """
        n = len(self.mean)
        if not bool(((commitment >= 0) & (commitment < n)).all()):
            raise ValueError(f"commitments {commitment.tolist()} of a batch: cells are cut for 0 "
                             f"to {n - 1}; these data list no commitments: set cells to 0")
        for row, number in enumerate(commitment.tolist()):
            self.seen[number] += 1
            share = max(1 / int(self.seen[number]), 1 / MEMORY)
            self.mean[number].lerp_(posterior.mean[row], share)
            self.log_variance[number].lerp_(posterior.log_variance[row], share)

    def sample(self, posterior: Posterior, commitment: Tensor, share: float) -> Tensor:
        """z* [rows, k] from `posterior`, for a random `share` of the rows from the prior in the
        row's cell instead; a row whose cell got no draw keeps its posterior."""
        rows, k = posterior.mean.shape
        with torch.no_grad():
            draws = torch.randn(CANDIDATES * len(self.mean), k, device=self.mean.device)
            owner, margin = self.owner(draws)
            inside = owner[:, None] == commitment
            used = inside.any(dim=0) & (torch.rand(rows, device=draws.device) < share)
            near = inside & (inside.cumsum(dim=0) <= NEAR)
            hard = margin[:, None].masked_fill(~near, math.inf).argmin(dim=0)
            some = torch.rand(rows, device=draws.device) < 0.5
            chosen = torch.where(some, hard, inside.int().argmax(dim=0))
            cells = draws[chosen] / math.sqrt(k)
        return torch.where(used[:, None], cells, posterior.sample())

    def owner(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The cell in which each of `draws` [m, k] lies, in units of the prior's deviation, and by
        how many nats its density exceeds the next."""
        distance = (draws[:, None] - self.mean) ** 2 / self.log_variance.exp()
        best = (-0.5 * (distance + self.log_variance)).sum(dim=2).topk(2, dim=1)
        return best.indices[:, 0], best.values[:, 0] - best.values[:, 1]


def decisive_states(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state [n, d] of the last real token of each row of [n, tokens, d], on whichever
    side its padding stands; mask [n, tokens] (1 = real token)."""
    last = (torch.arange(mask.shape[1], device=mask.device) * mask.bool()).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=mask.device), last]


class Discriminant(nn.Module):
    """Coordinates [n, k] in which the hidden states h [n, d] of prefixes tell their commitments
    apart: linear discriminant analysis, canonical variates (Fisher, 1936). They are not trained,
    and zero before they are fitted."""

    centre: Tensor
    axes: Tensor

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("axes", torch.zeros(k, width))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden - self.centre) @ self.axes.T

    @torch.no_grad()
    def fit(self, hidden: Tensor, commitment: Tensor) -> None:
        """Find the axes for states [n, d] of prefixes of commitments int64 [n].

        A ridge regression of the commitment's one-hot vector; its predictions in their principal
        axes, so scaled that every coordinate, blurred by a posterior of σ = `SIGMA_START`, has the
        prior's variance. N commitments span N - 1 axes; those beyond are zero. Raises ValueError
        for states of one commitment alone.
        """
        h = hidden.double()
        target = nn.functional.one_hot(commitment).double()
        target = target[:, target.any(dim=0)]
        if target.shape[1] < 2:
            raise ValueError(f"{len(h)} prefixes of {target.shape[1]} commitment(s): a discriminant"
                             " needs two or more; give more steps or another reader")
        centre = h.mean(dim=0)
        x = h - centre
        covariance = x.T @ x / len(x)
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
        weights = torch.linalg.solve(covariance, x.T @ (target - target.mean(dim=0)) / len(x))
        between = weights.T @ (x.T @ x / len(x)) @ weights
        variance, axes = torch.linalg.eigh(between)
        rank = min(len(self.axes), target.shape[1] - 1)
        wanted = math.sqrt(1 - SIGMA_START**2) / variance[-rank:].sqrt()
        self.centre.copy_(centre)
        self.axes.zero_()
        self.axes[:rank] = (weights @ (axes[:, -rank:] * wanted)).T.flip(0)


class VariationalCommitment(nn.Module):
    """The variational head (h [d] → μ, log σ² [k]) and the projection W_c [d, k], float32.

    W_c begins with variance 2/(d + k) (A1), σ as e^-1 of the prior's. With the reader ``adapted``
    the head reads the hidden state of the model that is being trained, and μ begins as W_c's
    transpose, so that both together already pass on what the hidden state holds, as an autoencoder
    with tied weights. With ``discriminant`` it reads the `Discriminant` of the hidden state of the
    base as it is, and μ begins as its coordinates. `cells`: how many commitments there are, for
    training on `Cells`; they are not saved.
    """

    def __init__(self, settings: CommitmentSettings, cells: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.cells = Cells(cells, settings.k) if cells else None
        read = settings.reader == "discriminant"
        self.discriminant = Discriminant(settings.width, settings.k) if read else None
        self.head = nn.Linear(settings.k if read else settings.width, 2 * settings.k)
        self.projection = nn.Parameter(torch.empty(settings.width, settings.k))
        with torch.no_grad():
            nn.init.xavier_normal_(self.projection)
            self.head.weight.zero_()
            scale = 0.5 / math.sqrt(settings.width) / self.projection.std()
            self.head.weight[: settings.k] = (
                torch.eye(settings.k) if read else scale * self.projection.T)
            self.head.bias.zero_()
            self.head.bias[settings.k :] = 2 * math.log(SIGMA_START)

    def posterior(self, hidden: Tensor, mask: Tensor) -> Posterior:
        """q for each prefix: hidden states [n, tokens, d], mask [n, tokens] (1 = real token).

        Reads the last real token of each row, on whichever side the padding stands. Raises
        ValueError for a row without real tokens.
        """
        if not bool(mask.any(dim=1).all()):
            empty = (~mask.bool().any(dim=1)).nonzero().flatten().tolist()
            raise ValueError(f"the prefix of row(s) {empty} is empty: nothing fixes a commitment")
        decisive = decisive_states(hidden, mask).to(self.head.weight.dtype)
        with torch.autocast(decisive.device.type, enabled=False):  # also where the base has bf16
            read = self.head(self.discriminant(decisive) if self.discriminant else decisive)
        mean, log_variance = read.chunk(2, dim=-1)
        return Posterior(mean, log_variance.clamp(-10, 4))

    def prior(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws of z* ~ N(0, I/k), [n, k], drawn on the CPU for equal numbers everywhere; of
        labels, each as probable as the others."""
        if self.settings.code == "label":
            return self.label(torch.randint(self.settings.k, (n,), generator=generator))
        z = torch.randn(n, self.settings.k, generator=generator) / math.sqrt(self.settings.k)
        return z.to(self.projection)

    def label(self, commitment: Tensor) -> Tensor:
        """The one-hot z* [n, k] of commitments number 0 … k − 1, int64 [n]."""
        return nn.functional.one_hot(commitment, self.settings.k).to(self.projection)

    def direction(self, z: Tensor) -> Tensor:
        """W_c z*, [..., d] for z [..., k]; what the native library and a control vector receive."""
        return z @ self.projection.T

    def addition(self, z: Tensor, mask: Tensor) -> Tensor:
        """λ · W_c z* at the real positions of each row and 0 at padding, [n, tokens, d].

        z: [n, k], or [n, tokens, k] for one that changes. The decoder's window begins behind the
        decisive token, so every real position gets it, or the first of each row alone.
        """
        if self.settings.positions == "first":
            mask = mask * (mask.cumsum(dim=1) == 1)
        direction = self.settings.strength * self.direction(z if z.ndim == 3 else z[:, None])
        return direction * mask[:, :, None].to(direction)

    def save(self, folder: Path, base_sha256: str) -> Path:
        """Write ``commitment.safetensors`` and ``commitment.json`` into `folder`, atomically."""
        settings = self.settings.model_copy(update={"base_sha256": base_sha256})
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}
        atomic_write(folder / WEIGHTS, save(tensors))
        atomic_write(folder / SETTINGS, settings.model_dump_json(indent=1) + "\n")
        return folder

    @classmethod
    def load(cls, folder: Path) -> VariationalCommitment:
        """Read what `save` wrote; ValueError or FileNotFoundError name the file and the fault."""
        for name in (SETTINGS, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: train the commitment first")
        with parsing(folder / SETTINGS, "a description of a commitment"):
            settings = CommitmentSettings.model_validate(
                json.loads((folder / SETTINGS).read_text())
            )
        try:
            tensors = load_file(folder / WEIGHTS)
            with torch.device("meta"):  # no memory is taken because a file says so
                cls(settings).load_state_dict(tensors, assign=True)
            commitment = cls(settings)
            commitment.load_state_dict(tensors)
        except (SafetensorError, RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(f"{folder / WEIGHTS} does not fit {SETTINGS}: {error}") from error
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ValueError(f"{folder / WEIGHTS} holds values that are not finite")
        return commitment
