"""Conversations whose commitment is fixed by a prefix that the decoder never sees (lab log A5).

There are as many personas as values in a topic: persona i holds value number i of every topic, so
its choice in one tells its choice in all. Two kinds of conversation alternate between batches.
*Choice*: the prefix is the private line "it is X"; behind the opening of the guessing game, about
any topic, and some other talk the conversation is forked into "what is it?" and "is it Y?".
*Recall*: the prefix is the exchange that states a favourite; the forks are the questions for one
of any topic, and either the rest of the dialogue, without the statement (evicted), or a dialogue of
another persona, whose statement is in the window: what can be read there is what counts.

What training may meet is `dialogues.trained_part`: everything else is new to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lablog.commitment.rendering import Rendering
from lablog.text.chat_tokenizer import AnyTokenizer
from lablog.text.datasets import Item, decisive_words
from lablog.text.dialogues import Dialogue, DialogueSettings, Draw, Turn, generate

IN_WINDOW = 0.5  # share of recall conversations with a statement of another in the window
OTHERS = 1 << 30  # number of the first dialogue of another persona
STREAM, GAPS = 105, 108  # spawn keys, apart from those of the dialogues' splits and of the probes


@dataclass(frozen=True)
class Fork:
    """Turns, the `weight` of their loss, and how many of them are only `heard`, whoever speaks."""

    turns: Sequence[Turn]
    weight: float = 1.0
    heard: int = 0


@dataclass(frozen=True)
class Conversation:
    """A prefix, and forks of what follows, which share its commitment.

    fork: for each token of `forks` the number of its fork, 0 for the stem that all share.
    commitment: number of the commitment that the prefix fixes; −1 where there is no list of them.
    """

    prefix: Item
    forks: Item
    fork: NDArray[np.int64]
    commitment: int = -1


@dataclass(frozen=True)
class ConversationSettings:
    """What conversations are made of.

    Dialogue settings (the phrasings, topics and values that may occur). gap: least and most
    distractor exchanges between the opening of the guessing game and its questions. independent:
    number of topics that a prefix states, one value of each drawn by itself; 0 is the personas,
    of whom one topic tells all. note: the decoder's
    window begins with what the model says in the prefix.
    """

    dialogues: DialogueSettings
    gap: tuple[int, int] = (0, 0)
    independent: int = 0
    word_weight: float = 0.1
    named_weight: float = 2.0
    guesses: int = 3
    recall_share: float = 0.4
    note: bool = False


class Conversations(Dataset[Conversation]):
    """`size` conversations, in batches of one kind; a pure function of its arguments.

    Conversation number i is of persona i mod N: a batch of N holds each persona once.

    The loss is on the assistant's turns: 1 on values, yes and no, `word_weight` of that on other
    words. Of `guesses` forks "is it Y?" one is right and the others weigh as much as all N - 1
    wrong ones, so that a calibrated decoder has Σ_Y P(yes | Y) = 1; naming, which is asked once
    where twelve guesses are, weighs `named_weight`.
    """

    def __init__(self, settings: ConversationSettings, tokenizer: AnyTokenizer, seed: int,
                 size: int, batch: int, chat: str = "plain") -> None:
        self.settings, self.seed, self.size, self.batch = settings, seed, size, batch
        self.dialogues, self.word_weight = settings.dialogues, settings.word_weight
        self.rendering = Rendering(tokenizer, chat, self.dialogues.chat.system)
        self.decisive = decisive_words(self.dialogues)

    def __len__(self) -> int:
        return self.size

    @property
    def commitments(self) -> int:
        """How many commitments there are to be numbered; 0 where they are not listed."""
        return 0 if self.settings.independent else self.dialogues.personas

    def __getitem__(self, index: int) -> Conversation:
        share, number = self.settings.recall_share, index // self.batch
        recall = int((number + 1) * share) > int(number * share)
        draw = Draw(self.dialogues, self.seed, STREAM, index)
        if self.settings.independent:
            return self._independent(draw)
        persona = index % self.dialogues.personas
        dialogue = generate(self.dialogues, self.seed, index, "train",
                            "favourite" if recall else "compare",
                            "probe" if recall else "simple", persona)
        prefix = dialogue.turns[: 2 if recall else 1]
        topic, value = self._persona(draw, persona)
        # One gap for a whole batch: rows of one length, and little padding.
        gap = Draw(self.dialogues, self.seed, GAPS, number).integer(*self.settings.gap)
        forks = (self._recall(draw, dialogue, index, persona) if recall
                 else self._choice(draw, topic, value, gap))
        return self._forked(prefix, forks, persona)

    def item(self, turns: Sequence[Turn], weight: float = 1.0, bos: bool = True,
             last: bool = False) -> Item:
        """Tokens and loss weights of `turns`; `bos` and `last` as in ``Rendering.tokens``."""
        ids, kinds = self.rendering.tokens(turns, self.decisive, bos, last)
        weights = np.array([0, 1, 1 / self.word_weight], np.float32)[kinds]  # heard, said, decisive
        return Item(ids, weights * np.float32(weight * self.word_weight))

    def _forked(self, prefix: Sequence[Turn], forks: Sequence[Fork],
                commitment: int = -1) -> Conversation:
        """A stem and its forks; one of a single exchange ends with the word that decides.

        With `note` what the model says in the prefix also begins the decoder's window.
        """
        stem, *others = forks
        note = prefix[-1:] if self.settings.note else []
        return conversation(self.item(prefix, last=True), [
            self.item([*note, *stem.turns], stem.weight), *map(self._fork, others)], commitment)

    def _fork(self, fork: Fork) -> Item:
        item = self.item(fork.turns, fork.weight, bos=False, last=True)
        if fork.heard:
            told = self.item(fork.turns[: fork.heard], bos=False)
            item.weights[: len(told.ids)] = 0
        return up_to_decision(item) if len(fork.turns) == 2 else item

    def _persona(self, draw: Draw, persona: int) -> tuple[str, str]:
        """A topic that the persona has a value of, and that value.

        Were z* to hold a value of one topic only, a draw from the prior would decide nothing in
        the others.
        """
        topics = self.dialogues.topics
        topic = draw.pick([t for t, values in topics.items() if persona < len(values)])
        return topic, topics[topic][persona]

    def _choice(self, draw: Draw, topic: str, value: str, gap: int) -> list[Fork]:
        values, guesses = self.dialogues.topics[topic], self.settings.guesses
        wrong = sorted((v for v in values if v != value), key=lambda _: draw.random())
        stem = [*draw.exchange("opening", "chosen", topic), *draw.distractors(topic, gap)]
        asked = draw.exchange("what_is_it", "it_is", topic, value)
        forks = [Fork(stem), Fork(asked, self.settings.named_weight)]
        # The wrong guesses stand for all N - 1.
        for number, guessed in enumerate([value, *wrong[: guesses - 1]]):
            many = (len(values) - 1) / (guesses - 1) if number else 1.0
            forks.append(Fork(draw.guess(topic, value, guessed), many))
        return forks

    def _recall(self, draw: Draw, dialogue: Dialogue, index: int, persona: int) -> list[Fork]:
        weight, forks = self.settings.named_weight, [Fork([])]
        for asked, answered in (("question", "answer"), ("requestion", "reanswer")):
            topic, value = self._persona(draw, persona)
            forks.append(Fork(draw.exchange(asked, answered, topic, value), weight))
        if draw.random() < IN_WINDOW:
            another = (persona + draw.integer(1, self.dialogues.personas - 1)) % \
                self.dialogues.personas
            other = generate(self.dialogues, self.seed, OTHERS + index, "train", "favourite",
                             "probe", another)
            return [*forks, Fork(other.turns, weight, heard=2)]
        return [*forks, Fork(dialogue.turns[2:], weight)]

    def _independent(self, draw: Draw) -> Conversation:
        """A prefix that states a value of each of the first `independent` topics; the guessing
        game is about one of them."""
        topics = list(self.dialogues.topics)[: self.settings.independent]
        held = {topic: draw.pick(self.dialogues.topics[topic]) for topic in topics}
        prefix = [draw.turn("A", "private", topic, value) for topic, value in held.items()]
        topic = draw.pick(topics)
        forks = self._choice(draw, topic, held[topic], 0)
        return self._forked(prefix, forks)


def up_to_decision(item: Item) -> Item:
    """`item` without what follows the first word of the greatest weight: the decision has made the
    rest predictable, so that it would cost a fifth of the training and teach next to nothing."""
    decisive = item.weights == item.weights.max()
    begin = int(decisive.argmax())
    end = begin + int(np.append(~decisive[begin:], True).argmax())
    return Item(item.ids[:end], item.weights[:end])


def conversation(prefix: Item, parts: Sequence[Item], commitment: int = -1) -> Conversation:
    """The forks ``parts[1:]`` behind their common stem ``parts[0]``, as one row."""
    item = Item(np.concatenate([p.ids for p in parts]), np.concatenate([p.weights for p in parts]))
    fork = np.repeat(np.arange(len(parts)), [len(p.ids) for p in parts])
    return Conversation(prefix, item, fork, commitment)


def collate(batch: Sequence[Conversation], side: str = "right") -> dict[str, torch.Tensor]:
    """Conversations as tensors; padding on either `side` has mask 0 and weight 0.

    commitment [n], the number of each row's; prefix_ids, prefix_mask [n, prefix tokens];
    input_ids, mask, weights, position_ids [n, tokens];
    attention [n, 1, tokens, tokens]: a token sees the stem and its own fork up to itself.
    """
    prefix_ids = padded([c.prefix.ids for c in batch], side)
    prefix_mask = padded([np.ones(len(c.prefix.ids), np.int64) for c in batch], side)
    fork = padded([c.fork for c in batch], side, -1)
    mask = (fork >= 0).long()
    positions, seen = visible(fork)
    return {"commitment": torch.tensor([c.commitment for c in batch]),
            "prefix_ids": prefix_ids, "prefix_mask": prefix_mask,
            "input_ids": padded([c.forks.ids for c in batch], side), "mask": mask,
            "weights": padded([c.forks.weights for c in batch], side), "position_ids": positions,
            "attention": seen[:, None]}


def visible(fork: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [n, tokens] and what each token sees [n, tokens, tokens] of a row of forks: the
    stem (fork 0) and its own fork, up to itself. Padding (−1) sees itself: no empty softmax."""
    same = fork[:, :, None] == fork[:, None, :]
    seen = (same | (fork[:, None, :] == 0)) & (fork[:, :, None] >= 0)
    seen &= torch.ones(fork.shape[1], fork.shape[1], dtype=torch.bool, device=fork.device).tril()
    positions = (seen.sum(dim=2) - 1).clamp(min=0)
    return positions, seen | torch.eye(fork.shape[1], dtype=torch.bool, device=fork.device)


def padded(rows: Sequence[NDArray[Any]], side: str, fill: int = 0) -> torch.Tensor:
    """Rows of different lengths as int64 or float32 [rows, longest], `fill` on `side`."""
    width = max(map(len, rows))
    kind = np.float32 if rows[0].dtype == np.float32 else np.int64
    out = np.full((len(rows), width), fill, kind)
    for row, values in zip(out, rows, strict=True):
        row[slice(len(values)) if side == "right" else slice(width - len(values), width)] = values
    return torch.from_numpy(out)
