"""What a commitment does to the model that it was trained with: the probes of chapter 1, where
every conversation has a z* of its own, and the model's language (lab log A5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lablog.commitment import novelty, probes
from lablog.commitment.conversations import Conversation
from lablog.commitment.qlora import ACTIVE, CommittedModel
from lablog.commitment.reader import Reader, name_values
from lablog.commitment.rendering import Prompt
from lablog.text.dialogues import Draw, Turn, load_settings, things, trained_part

Source = Literal["none", "prefix", "prior", "redrawn", "text"]
"""Where z* comes from: the ``prefix`` that fixes the commitment, the ``prior`` once a conversation,
or the prior again for every turn and every question (``redrawn``); ``text`` has no z* but leaves
the prefix in the window."""
EXCHANGES = 64  # more than a conversation and the questions that it is forked into have
HEADLINE = "new phrasing"  # the kind of probe on which the chapter's table stands
ORDER, PREFIX = 107, 109  # spawn keys, apart from those of dialogues, probes, conversations


@dataclass(frozen=True)
class Language:
    """For each text the negative log-likelihood of the model's own words (nats, summed), their
    number, and the KL to the base's distribution (nats, summed over them); float64 [texts]."""

    nll: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray


class Probes:
    """The probes of one kind of new and the texts that every arm is measured on."""

    def __init__(self, seed: int, items: int, texts: int, kind: str = HEADLINE,
                 gap: int | None = None, values: int = 0, independent: int = 0) -> None:
        """`values`: as many things to choose from in one topic, instead of the topics.
        independent: so many topics are asked about, and a prefix states a value of each, as in
        the training that has them.
        """
        self.settings, self.seed = load_settings(), seed
        material = novelty.material(self.settings, kind, gap)
        if values:
            whole = material.settings.model_copy(update={"topics": self.settings.topics})
            material = probes.Material(things(whole, values), (), gap)
        stated = list(trained_part(self.settings).topics)[:independent]
        if independent:
            material = replace(material, topics=tuple(stated))
        self.items = probes.make_items(material, seed, items)
        self.prefixes = [_prefix(Draw(material.settings, seed, PREFIX, index), item, stated)
                         for index, item in enumerate(self.items.fork)]
        """What fixes the commitment of each hidden choice."""
        self.texts = novelty.held_out_texts(self.settings, seed, texts)

    def latents(self, reader: Reader, source: Source, stream: int, n: int,
                prefixes: Sequence[Sequence[Turn]] | None = None,
                labels: Sequence[int] | None = None) -> Tensor | None:
        """z* [n, exchanges, k] by `source`; without `prefixes` the prefix has not been said yet,
        and z* comes from the prior. A code of labels reads no prefix: it is told `labels`, where
        −1, nothing named, leaves the draw from the prior."""
        commitment = reader.model.commitment
        if commitment is None:
            return None
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        k = commitment.settings.k
        if source == "prefix" and prefixes is not None:
            if commitment.settings.code == "label":
                told = torch.tensor(labels)
                drawn = commitment.prior(n, generator)
                return torch.where(told[:, None] < 0, drawn,
                                   commitment.label(told.clamp(min=0)))[:, None]
            posterior = reader.posterior(prefixes)
            noise = torch.randn(n, k, generator=generator).to(posterior.mean)
            return posterior.sample(noise)[:, None]
        turns = EXCHANGES if source == "redrawn" else 1
        return commitment.prior(n * turns, generator).view(n, turns, k)

    def recall(self, reader: Reader, source: Source) -> probes.RecallResult:
        """Recall in the window and after eviction; the model writes both answers."""
        items = self.items.recall
        uniforms = np.stack([item.uniforms for item in items])
        z = self.latents(reader, source, 1, len(items))
        asked = [reader.prompt([item.question], "") for item in items]
        said = reader.answers(asked, z, probes.ANSWER_TOKENS, uniforms)
        firsts = [[item.question, Turn("A", text, "answer")]
                  for item, text in zip(items, said, strict=True)]
        named = [self._named(said)]
        z = self.latents(reader, source, 1, len(items), firsts, named[0].tolist())
        rest = [[*item.distractors, item.requestion] for item in items]
        inside = [reader.prompt([*first, *turns], "")
                  for first, turns in zip(firsts, rest, strict=True)]
        note = [[first[1]] if source == "text" else [] for first in firsts]
        outside = [reader.prompt([*kept, *turns], "", first=1)
                   for kept, turns in zip(note, rest, strict=True)]
        named += [self._named(reader.answers(prompts, z, probes.ANSWER_TOKENS))
                  for prompts in (inside, outside)]
        return probes.RecallResult(*named)

    def _named(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([probes.value_index(text, item.values)
                         for text, item in zip(texts, self.items.recall, strict=True)])

    def _hidden(self, reader: Reader, source: Source) -> tuple[Tensor | None, list[list[Turn]]]:
        """z* of each hidden choice, and what its window begins with."""
        items = self.items.fork
        z = self.latents(reader, source, 2, len(items), self.prefixes,
                         [item.noted for item in items])
        return z, [[*([item.note] if source == "text" else []), *item.opening] for item in items]

    def fork(self, reader: Reader, source: Source) -> probes.ForkResult:
        """Every fork of every hidden choice."""
        z, histories = self._hidden(reader, source)
        return self._forked(reader, z, histories)

    def _forked(self, reader: Reader, z: Tensor | None,
                histories: Sequence[Sequence[Turn]]) -> probes.ForkResult:
        """The questions behind each history, each the only one and an exchange of its own."""
        items = self.items.fork
        rows = [(i, x, [*history, guess]) for i, (item, history) in
                enumerate(zip(items, histories, strict=True))
                for x, guess in enumerate(item.guesses)]
        owner = [i for i, _, _ in rows]
        pairs = reader.yes_no([asked_as(reader.prompt(turns, ""), 1 + x) for _, x, turns in rows],
                              None if z is None else z[owner]).view(len(items), -1, 2)
        named = name_values(reader, [
            (reader.prompt([*history, item.naming], item.stem), item.values)
            for item, history in zip(items, histories, strict=True)
        ], z)
        return probes.ForkResult(
            (pairs[:, :, 0] / pairs.sum(dim=2)).numpy(), named.numpy(),
            pairs.sum(dim=2).mean(dim=1).numpy(), np.array([item.noted for item in items]))

    def hangman(self, reader: Reader, source: Source, guesses: int) -> np.ndarray:
        """Whether a game of several turns has exactly one answer, bool [items].

        After the fork protocol of Baldelli et al. (2026, arXiv 2601.06973): the model answers
        `guesses` different guesses; then the conversation is forked into "what is it?" and "is it
        X?" for every X. Consistent: exactly the named value is confirmed in the forks, and the
        guesses before were answered as is true of it.
        """
        items = self.items.fork
        z, histories = self._hidden(reader, source)
        draws = [Draw(self.settings, self.seed, ORDER, i) for i in range(len(items))]
        orders = np.array([np.argsort([draw.random() for _ in item.values])
                           for draw, item in zip(draws, items, strict=True)])
        confirmed = np.zeros((len(items), guesses), bool)
        for turn in range(guesses):
            asked = [[*history, item.guesses[order[turn]]]
                     for history, item, order in zip(histories, items, orders, strict=True)]
            prompts = [reader.prompt(turns, "") for turns in asked]
            pairs = reader.yes_no(prompts, z).numpy()
            confirmed[:, turn] = pairs[:, 0] > pairs[:, 1]
            said = reader.answers(prompts, z, probes.ANSWER_TOKENS)
            histories = [[*turns, Turn("A", text, "verdict")]
                         for turns, text in zip(asked, said, strict=True)]
        result = self._forked(reader, z, histories)
        named = result.named.argmax(axis=1)[:, None]
        one = (result.yes > 0.5) == (np.arange(result.yes.shape[1]) == named)
        earlier = confirmed == (orders[:, :guesses] == named)
        found: np.ndarray = one.all(axis=1) & earlier.all(axis=1)
        return found

    def language(self, reader: Reader, source: Source, base: Reader) -> Language:
        """How the model's own words in the held-out texts fare, and how far from the `base`."""
        z = self.latents(reader, source, 3, len(self.texts), [t[:2] for t in self.texts],
                         [-1] * len(self.texts))
        prompts = [reader.prompt(turns) for turns in self.texts]
        nll, tokens, drift = [], [], []
        for prompt, mine, before in zip(prompts, reader.log_probabilities(prompts, z),
                                        base.log_probabilities(prompts, None), strict=True):
            own = prompt.own[1:]
            found, plain = mine[own].double(), before[own].double()
            targets = torch.from_numpy(prompt.ids[1:][own])
            nll.append(-float(found.gather(1, targets[:, None]).sum()))
            tokens.append(int(own.sum()))
            drift.append(float((found.exp() * (found - plain)).sum()))
        return Language(np.array(nll), np.array(tokens, float), np.array(drift))


def _prefix(draw: Draw, item: probes.ForkItem, topics: Sequence[str]) -> list[Turn]:
    """The private line of a hidden choice, among such lines about the other `topics`."""
    if not topics:
        return [item.note]
    values = draw.settings.topics
    return [item.note if tuple(values[topic]) == item.values
            else draw.turn("A", "private", topic, draw.pick(values[topic])) for topic in topics]


def asked_as(prompt: Prompt, number: int) -> Prompt:
    """`prompt` with its last exchange numbered `number` further on: questions that a conversation
    is forked into are exchanges of their own."""
    last = prompt.exchange.max()
    return replace(prompt, exchange=np.where(prompt.exchange == last, last + number,
                                             prompt.exchange))


def choices(reader: Reader, draws: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """z* from the prior [draws, k] and, for each topic of which nothing is held out, the value
    that each draw names (int [topics, draws]); the same draws in every topic."""
    settings = load_settings()
    assert reader.model.commitment is not None
    z = reader.model.commitment.prior(draws, torch.Generator().manual_seed(seed))
    named = []
    for number, topic in enumerate(novelty.whole_topics(settings)):
        draw = Draw(trained_part(settings), seed, 106, number)
        turns = [*draw.exchange("opening", "chosen", topic), draw.turn("U", "what_is_it", topic)]
        prompt = reader.prompt(turns, settings.it_is[0].split(" {value}")[0])
        asked = [(prompt, settings.topics[topic])] * draws
        named.append(name_values(reader, asked, z[:, None]).argmax(dim=1))
    return z, torch.stack(named).numpy()


@torch.inference_mode()
def diagnose(model: CommittedModel, dataset: Dataset[Conversation], batch: int) -> dict[str, Any]:
    """KL per dimension, active units, and the LM loss (nats per conversation) under the true z*,
    z* of another conversation of the batch, and none; on `dataset`."""
    losses: dict[str, list[float]] = {"true": [], "shuffled": [], "zero": []}
    kls, means = [], []
    size: int = len(dataset)  # type: ignore[arg-type]  # Dataset does not say that it is sized
    for begin in range(0, size, batch):
        inputs = model.collated([dataset[i] for i in range(begin, min(begin + batch, size))])
        posterior = model.posterior(inputs["prefix_ids"], inputs["prefix_mask"])
        noise = torch.randn(
            posterior.mean.shape, generator=torch.Generator().manual_seed(begin))
        z = posterior.sample(noise.to(posterior.mean))
        for name, used in (("true", z), ("shuffled", z.roll(1, dims=0)), ("zero", 0 * z)):
            losses[name].append(model(**inputs, z=used)["lm"].item())
        kls.append(posterior.kl())
        means.append(posterior.mean)
    mean = torch.cat(means)
    return {"kl_per_dimension": torch.cat(kls).mean(dim=0).tolist(),
            "active_units": int((mean.var(dim=0) > ACTIVE).sum()),
            **{f"nll_{name}": float(np.mean(values)) for name, values in losses.items()}}
