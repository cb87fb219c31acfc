"""Where the z* of a trained commitment comes from, and the probes under each source (lab log A5).

Every conversation has a z* of its own. It is drawn once, from the prefix that fixes the commitment
or from the prior, or anew for every turn and question, which is the control of constancy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lablog.commitment import probes
from lablog.commitment.language import reading
from lablog.commitment.novelty import ProbeSet
from lablog.commitment.probes import Turns
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.text.dialogues import Draw

Source = Literal["none", "prefix", "prior", "redrawn", "text"]
"""The ``prefix`` that fixes the commitment, the ``prior`` once a conversation, or the prior again
for every turn and every question (``redrawn``); ``text`` has no z* but leaves the prefix in the
window."""
EXCHANGES = 64  # more than a conversation and the questions that it is forked into have
RECALL, FORK, LANGUAGE = 1, 2, 3  # streams of the noise that z* is drawn with
ORDER = 107  # a spawn key, apart from those of dialogues, probes, conversations


def draw_latents(speaker: TorchSpeaker, source: Source, seed: int, stream: int, n: int,
                 prefixes: Sequence[Turns] | None = None,
                 labels: Sequence[int] | None = None) -> Tensor | None:
    """z* [n, exchanges, k] by `source`; None for a model without a commitment.

    Without `prefixes` the prefix has not been said yet, and z* comes from the prior. A code of
    labels reads no prefix: it is told `labels`, where −1, nothing named, leaves the draw from the
    prior.
    """
    commitment = speaker.model.commitment
    if commitment is None:
        return None
    generator = torch.Generator().manual_seed(1000 * seed + stream)
    k = commitment.settings.k
    if source == "prefix" and prefixes is not None:
        if commitment.settings.code == "label":
            told = torch.tensor(labels)
            drawn = commitment.prior(n, generator)
            return torch.where(told[:, None] < 0, drawn,
                               commitment.label(told.clamp(min=0)))[:, None]
        posterior = speaker.posterior(prefixes)
        noise = torch.randn(n, k, generator=generator).to(posterior.mean)
        return posterior.sample(noise)[:, None]
    turns = EXCHANGES if source == "redrawn" else 1
    return commitment.prior(n * turns, generator).view(n, turns, k)


def fork_latents(speaker: TorchSpeaker, source: Source, asked: ProbeSet) -> Tensor | None:
    """z* of each hidden choice."""
    return draw_latents(speaker, source, asked.seed, FORK, len(asked.items.fork), asked.prefixes,
                        [item.noted for item in asked.items.fork])


def recall(speaker: TorchSpeaker, source: Source, asked: ProbeSet) -> probes.RecallResult:
    """Recall in the window and after eviction; a prefix is known once the first answer is said."""
    items = asked.items.recall

    def told(begun: list[Turns], named: np.ndarray) -> Tensor | None:
        return draw_latents(speaker, source, asked.seed, RECALL, len(items), begun,
                            named.tolist())

    under = draw_latents(speaker, source, asked.seed, RECALL, len(items))
    return probes.recall(speaker, items, under, told, aid="note" if source == "text" else None)


def fork(speaker: TorchSpeaker, source: Source, asked: ProbeSet) -> probes.ForkResult:
    """Every fork of every hidden choice."""
    return probes.fork(speaker, asked.items.fork, fork_latents(speaker, source, asked),
                       aid="note" if source == "text" else None)


def game(speaker: TorchSpeaker, source: Source, asked: ProbeSet, guesses: int) -> np.ndarray:
    """Whether a game of several turns has exactly one answer, bool [items]."""
    items = asked.items.fork
    draws = [Draw(asked.settings, asked.seed, ORDER, i) for i in range(len(items))]
    orders = np.array([np.argsort([draw.random() for _ in item.values])
                       for draw, item in zip(draws, items, strict=True)])
    return probes.game(speaker, items, fork_latents(speaker, source, asked), orders[:, :guesses],
                       aid="note" if source == "text" else None)


@dataclass(frozen=True)
class OwnWords:
    """For each text the negative log-likelihood of the model's own words behind the first exchange
    (nats, summed), their number, and the KL to the base's distribution (nats, summed over them);
    float64 [texts]."""

    nll: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray


def own_words(speaker: TorchSpeaker, source: Source, asked: ProbeSet,
              base: TorchSpeaker) -> OwnWords:
    """How the model's own words in the held-out texts fare, and how far from the `base`.

    The first exchange is left out for every source: a z* from the ``prefix`` has read it, and
    would be told the words that are asked for.
    """
    texts = asked.texts
    z = draw_latents(speaker, source, asked.seed, LANGUAGE, len(texts), [t[:2] for t in texts],
                     [-1] * len(texts))
    nll, tokens, drift = [], [], []
    for turns, mine, before in zip(texts, speaker.read(texts, z), base.read(texts, None),
                                   strict=True):
        prompt = speaker.prompt(turns)
        own = (prompt.own & (prompt.exchange > 0))[1:]
        found = reading(mine[own].astype(float), before[own].astype(float), prompt.ids[1:][own])
        nll.append(float(found.loss.sum()))
        tokens.append(int(own.sum()))
        drift.append(float(found.divergence.sum()))
    return OwnWords(np.array(nll), np.array(tokens, float), np.array(drift))
