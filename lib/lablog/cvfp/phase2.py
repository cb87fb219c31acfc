"""Phase 2: predict the next token from contexts that Phase 1 left behind and that stay fixed.

v2.0 (complete fixing): the block reads [C*[i-1], e[i]], its context output is discarded, and
logits = head([C*[i], token_out]); gradients reach the block through token_out only.
v1.0 (soft): the head reads the block's own context output, which an MSE pulls towards C*[i].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablog.cvfp.model import Context, CVFPBlock, Token, shifted
from lablog.progress import progress as progress_bar


@dataclass(frozen=True, kw_only=True)
class Phase2Config:
    """Settings of Phase 2: `patience` counts epochs without a lower loss on the watched text (3);
    `context_weight` multiplies v1.0's MSE; `head_std` is the head's initial deviation;
    `train_norm` trains gain and bias of the embedding's norm, which otherwise stay 1 and 0."""

    version: Literal["v2.0", "v1.0"]
    epochs: int
    patience: int
    batch_tokens: int
    learning_rate: float
    clip_norm: float
    context_weight: float
    head_std: float
    seed: int
    train_norm: bool = False

    def __post_init__(self) -> None:
        if self.version not in ("v2.0", "v1.0"):
            raise ValueError(f"version = {self.version!r}, expected 'v2.0' or 'v1.0'")
        if min(self.epochs, self.patience, self.batch_tokens) < 1:
            raise ValueError(f"epochs, patience and batch_tokens must be at least 1: {self}")


@dataclass(frozen=True)
class FixedText:
    """A text for Phase 2: ids [n], normalised embeddings [n, e] and C* [n, c], all constant."""

    ids: Tensor
    tokens: Tensor
    contexts: Tensor

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.tokens) == len(self.contexts) or len(self.ids) < 2:
            raise ValueError(
                f"{len(self.ids)} ids, {len(self.tokens)} embeddings, {len(self.contexts)} "
                "contexts: expected the same number, at least 2"
            )

    def inputs(self) -> tuple[Context, Token, Tensor, Tensor]:
        """(C*[i-1] with zeros first, e[i], C*[i], next id) for the n - 1 predictions."""
        fixed = self.contexts.detach()
        before = shifted(fixed, fixed.new_zeros(fixed.shape[1]))
        return Context(before[:-1]), Token(self.tokens[:-1]), fixed[:-1], self.ids[1:]


class Phase2Model(nn.Module):
    """A block and a linear head [context_dim + embed_dim -> vocabulary]."""

    def __init__(self, block: CVFPBlock, vocabulary: int, config: Phase2Config) -> None:
        super().__init__()
        self.block, self.version = block, config.version
        self.head = nn.Linear(block.config.hidden_dim, vocabulary)
        generator = torch.Generator().manual_seed(config.seed)
        nn.init.normal_(self.head.weight, std=config.head_std, generator=generator)
        nn.init.zeros_(self.head.bias)
        self.train_norm = config.train_norm
        if config.train_norm:
            width = block.config.embed_dim
            self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, before: Context, token: Token, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, vocabulary] and the block's context output [n, context_dim]."""
        if self.train_norm:
            token = Token(token * self.gain + self.bias)
        context_out, token_out = self.block(before, token)
        context = fixed if self.version == "v2.0" else context_out
        return self.head(torch.cat([context, token_out], dim=1)), context_out


def phase2_loss(
    model: Phase2Model, batch: tuple[Context, Token, Tensor, Tensor], context_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, accuracy); in v1.0 the loss adds `context_weight` MSE(context, C*)."""
    before, token, fixed, target = batch
    logits, context_out = model(before, token, fixed)
    loss = entropy = F.cross_entropy(logits, target)
    if model.version == "v1.0":
        loss = entropy + context_weight * F.mse_loss(context_out, fixed)
    accuracy = (logits.argmax(1) == target).to(loss.dtype).mean()
    return loss, entropy.detach(), accuracy


@dataclass(frozen=True)
class Predictions:
    """Negative log-likelihood in nats and correctness of each of the n - 1 predictions."""

    nll: Tensor
    correct: Tensor

    @property
    def perplexity(self) -> float:
        """exp(mean nll); infinite where that is beyond a float."""
        return _exp(float(self.nll.double().mean()))

    @property
    def accuracy(self) -> float:
        """Share of predictions whose most probable token is the next one."""
        return float(self.correct.double().mean())


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


@torch.no_grad()
def predict(model: Phase2Model, text: FixedText, rows: int = 1024) -> Predictions:
    """Predictions on a text whose contexts are given (in v1.0 as inputs only)."""
    nll, correct = [], []
    for before, token, fixed, target in zip(*(x.split(rows) for x in text.inputs()), strict=True):
        logits, _ = model(Context(before), Token(token), fixed)
        nll.append(F.cross_entropy(logits.float(), target, reduction="none"))
        correct.append(logits.argmax(1) == target)
    return Predictions(torch.cat(nll), torch.cat(correct))


@dataclass(frozen=True)
class Epoch:
    """Training as met during the epoch, the watched text after it."""

    epoch: int
    train_perplexity: float
    train_accuracy: float
    watched_perplexity: float


@dataclass
class Phase2History:
    """All epochs, and the best one by the loss on the watched text."""

    history: list[Epoch]
    best: Epoch
    config: Phase2Config


@dataclass
class Phase2Result(Phase2History):
    """The same with the model of the best epoch."""

    model: Phase2Model


def train_phase2(
    block: CVFPBlock,
    vocabulary: int,
    training: FixedText,
    watched: FixedText,
    config: Phase2Config,
    label: str = "",
    progress: bool = False,
) -> Phase2Result:
    """Train a copy of `block` and a new head; early stopping on the text that is `watched`.

    Positions are drawn in a new order each epoch (the contexts are constants, so every position
    is an independent sample). Raises FloatingPointError when a loss is not finite.
    """
    model = Phase2Model(copy.deepcopy(block), vocabulary, config).to(training.tokens.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    before, token, fixed, target = training.inputs()
    generator = torch.Generator().manual_seed(config.seed)
    history: list[Epoch] = []
    best, weights = None, copy.deepcopy(model.state_dict())
    with progress_bar(config.epochs, label, "epoch", show=progress) as bar:
        for epoch in range(1, config.epochs + 1):
            order = torch.randperm(len(target), generator=generator).to(target.device)
            totals = fixed.new_zeros(3)
            for rows in order.split(config.batch_tokens):
                batch = (Context(before[rows]), Token(token[rows]), fixed[rows], target[rows])
                losses = phase2_loss(model, batch, config.context_weight)
                optimizer.zero_grad(set_to_none=True)
                losses[0].backward()
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                optimizer.step()
                totals += len(rows) * torch.stack([x.detach() for x in losses])
            loss, entropy, accuracy = (totals / len(target)).tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{label or config.version}: loss {loss} in epoch {epoch}: lower "
                    f"learning_rate = {config.learning_rate} or check the contexts for NaN"
                )
            seen = predict(model, watched)
            now = Epoch(epoch, _exp(entropy), accuracy, seen.perplexity)
            history.append(now)
            if best is None or now.watched_perplexity < best.watched_perplexity:
                best, weights = now, copy.deepcopy(model.state_dict())
            reached = f"perplexity {history[-1].watched_perplexity:.1f}"
            bar.set_postfix_str(reached, refresh=False)
            bar.update()
            if epoch - best.epoch >= config.patience:
                break
    assert best is not None  # epochs >= 1
    model.load_state_dict(weights)
    return Phase2Result(history, best, config, model)


def train_at_best_rate(
    block: CVFPBlock, vocabulary: int, training: FixedText, watched: FixedText,
    config: Phase2Config, rates: Sequence[float], label: str = "", progress: bool = False,
) -> Phase2Result:
    """:func:`train_phase2` at each learning rate; the result with the lowest watched perplexity.

    A rate at which the loss is not finite is out of the question; FloatingPointError where all are.
    """
    best: Phase2Result | None = None
    for rate in rates:
        named = f"{label}, rate {rate:g}"
        try:
            found = train_phase2(block, vocabulary, training, watched,
                                 replace(config, learning_rate=rate), named, progress)
        except FloatingPointError:
            if best is None and rate == rates[-1]:
                raise
            continue
        if best is None or found.best.watched_perplexity < best.best.watched_perplexity:
            best = found
    if best is None:
        raise ValueError("rates is empty: expected at least one learning rate")
    return best


def trained_and_read(
    block: CVFPBlock, vocabulary: int, texts: Mapping[str, FixedText], config: Phase2Config,
    rates: Sequence[float], label: str,
) -> tuple[Phase2History, dict[str, Predictions]]:
    """How :func:`train_at_best_rate` went on the text ``training``, watched on ``dev``, and what
    the model predicts of ``validation`` and ``test``, each read once."""
    best = train_at_best_rate(block, vocabulary, texts["training"], texts["dev"], config, rates,
                              label, progress=True)
    return (Phase2History(best.history, best.best, best.config),
            {k: predict(best.model, texts[k]) for k in ("validation", "test")})


def window_contexts(table: Tensor, ids: Tensor, width: int, size: int, known: Tensor) -> Tensor:
    """A context without learning: the last `size` tokens in `width` numbers, [n, width].

    Each token is given by the leading width / size principal components of the embedding `table`
    [vocabulary, e] over the tokens that occur in the ids `known`, those of the training text
    whatever text is read, so that a token has the same numbers in all of them; row i holds tokens
    i, i-1, ... and zeros before the text. Raises ValueError when `size` does not divide `width`.
    """
    if width % size:
        raise ValueError(f"a window of {size} tokens does not divide {width} dimensions")
    used = table[known.unique()]
    _, vectors = torch.linalg.eigh((used.t() @ used).double())
    components = vectors.flip(1)[:, : width // size].to(table)
    parts = F.layer_norm(table[ids] @ components, (width // size,))
    rows = [F.pad(parts, (0, 0, k, 0))[: len(ids)] for k in range(size)]
    return torch.cat(rows, dim=1)


def unigram(training: Sequence[int], text: Sequence[int], vocabulary: int) -> Predictions:
    """Token frequencies of the training text with one added to each count."""
    return _ngram(_unigram(training, vocabulary)[None].repeat(len(text) - 1, 0), text)


def bigram(training: Sequence[int], text: Sequence[int], vocabulary: int) -> Predictions:
    """Bigram frequencies, Witten-Bell smoothed with the unigram (no parameter to tune).

    p(b|a) = (count(a, b) + T(a) p(b)) / (count(a) + T(a)), T(a) the number of distinct
    successors of a; for an unseen a the unigram (Witten and Bell 1991).
    """
    # Of a vocabulary of 50,000 only the rows that the text asks for: all of them are ten gigabytes.
    rows, before = np.unique(np.asarray(text[:-1]), return_inverse=True)
    row_of = np.full(vocabulary, -1)
    row_of[rows] = np.arange(len(rows))
    first, second = row_of[np.asarray(training[:-1])], np.asarray(training[1:])
    counts = np.zeros((len(rows), vocabulary), dtype=np.float32)
    np.add.at(counts, (first[first >= 0], second[first >= 0]), 1)
    seen, kinds = counts.sum(1)[before, None], (counts > 0).sum(1)[before, None]
    kinds = np.maximum(kinds, 1)
    p = (counts[before] + kinds * _unigram(training, vocabulary)) / (seen + kinds)
    return _ngram(p, text)


def _unigram(training: Sequence[int], vocabulary: int) -> np.ndarray:
    counts = np.bincount(np.asarray(training), minlength=vocabulary) + 1.0
    return np.asarray(counts / counts.sum())


def _ngram(p: np.ndarray, text: Sequence[int]) -> Predictions:
    target = np.asarray(text[1:])
    nll = -np.log(p[np.arange(len(target)), target])
    return Predictions(torch.from_numpy(nll), torch.from_numpy(p.argmax(1) == target))
