"""Conversations whose commitment is fixed by a prefix that the decoder never sees (lab log A5).

There are as many personas as values in a topic: persona i holds value number i of every topic, so
its choice in one tells its choice in all. Two kinds of conversation alternate between batches.
*Choice*: the prefix is the private line "it is X"; behind the opening of the guessing game, about
any topic, the conversation is forked into "what is it?" and "is it Y?". *Recall*: the prefix is the
exchange that states a favourite; the forks are the question for one of any topic, the rest of the
dialogue without the statement (evicted), and the whole dialogue.
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
from lablog.text.datasets import Item, decisive_words
from lablog.text.dialogues import Dialogue, DialogueSettings, Draw, Split, Turn, generate
from lablog.text.tokenizer import Tokenizer

Fork = tuple[Sequence[Turn], float, bool]  # turns, weight of their loss, whether behind BOS
STREAM = 105  # spawn key, apart from those of the dialogues' splits and of the probes


@dataclass(frozen=True)
class Conversation:
    """A prefix, and forks of what follows, which share its commitment.

    fork: for each token of `forks` the number of its fork, 0 for the stem that all share.
    """

    prefix: Item
    forks: Item
    fork: NDArray[np.int64]


class Conversations(Dataset[Conversation]):
    """`size` conversations, in batches of one kind; a pure function of its arguments.

    Conversation number i is of persona i mod N: a batch of N holds each persona once.

    Only combinations of phrasing and value that the dialogues' `split` holds occur.
    The loss is on the assistant's turns: 1 on values, yes and no, `word_weight` on other words. Of
    `guesses` forks "is it Y?" one is right and the others weigh as much as all N - 1 wrong ones,
    so that a calibrated decoder has Σ_Y P(yes | Y) = 1.
    """

    def __init__(self, settings: DialogueSettings, tokenizer: Tokenizer, seed: int, size: int,
                 batch: int, word_weight: float = 0.02, guesses: int = 4,
                 recall_share: float = 0.25, split: Split = "train",
                 chat: str = "plain") -> None:
        self.settings, self.seed, self.size, self.batch = settings, seed, size, batch
        self.guesses, self.recall_share, self.split = guesses, recall_share, split
        self.rendering, self.decisive = Rendering(tokenizer, chat), decisive_words(settings)
        self.word_weight = word_weight

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        share, number = self.recall_share, index // self.batch
        recall = int((number + 1) * share) > int(number * share)
        draw = Draw(self.settings, self.seed, STREAM, index)
        persona = index % self.settings.personas
        dialogue = generate(self.settings, self.seed, index, self.split,
                            "favourite" if recall else "compare",
                            "probe" if recall else "simple", persona)
        prefix = dialogue.turns[: 2 if recall else 1]
        forks = self._recall(draw, dialogue) if recall else self._choice(draw, dialogue)
        return conversation(self.item(prefix, last=True),
                            [self.item(*fork, last=n > 0) for n, fork in enumerate(forks)])

    def item(self, turns: Sequence[Turn], weight: float = 1.0, bos: bool = True,
             last: bool = False) -> Item:
        """Tokens and loss weights of `turns`; `bos` and `last` as in ``Rendering.tokens``."""
        ids, kinds = self.rendering.tokens(turns, self.decisive, bos, last)
        weights = np.array([0, 1, 1 / self.word_weight], np.float32)[kinds]  # heard, said, decisive
        return Item(ids, weights * np.float32(weight * self.word_weight))

    def _persona(self, draw: Draw, dialogue: Dialogue) -> tuple[str, str]:
        """Another topic, and the value there of the persona that the dialogue's value belongs to.

        Were z* to hold a value of one topic only, a draw from the prior would decide nothing in
        the others.
        """
        topic = draw.pick(list(self.settings.topics))
        number = self.settings.topics[dialogue.topic].index(dialogue.value)
        return topic, self.settings.topics[topic][number]

    def _choice(self, draw: Draw, dialogue: Dialogue) -> list[Fork]:
        topic, value = self._persona(draw, dialogue)
        values = self.settings.topics[topic]
        wrong = sorted((v for v in values if v != value), key=lambda _: draw.random())
        forks: list[Fork] = [(draw.exchange("opening", "chosen", topic), 1.0, True),
                             (draw.exchange("what_is_it", "it_is", topic, value), 1.0, False)]
        # The wrong guesses stand for all N - 1.
        for number, guessed in enumerate([value, *wrong[: self.guesses - 1]]):
            many = (len(values) - 1) / (self.guesses - 1) if number else 1.0
            forks.append((draw.guess(topic, value, guessed), many, False))
        return forks

    def _recall(self, draw: Draw, dialogue: Dialogue) -> list[Fork]:
        asked = draw.exchange("question", "answer", *self._persona(draw, dialogue))
        return [([], 1.0, True), (asked, 1.0, False), (dialogue.turns[2:], 1.0, False),
                (dialogue.turns, 1.0, False)]


def conversation(prefix: Item, parts: Sequence[Item]) -> Conversation:
    """The forks ``parts[1:]`` behind their common stem ``parts[0]``, as one row."""
    item = Item(np.concatenate([p.ids for p in parts]), np.concatenate([p.weights for p in parts]))
    return Conversation(prefix, item, np.repeat(np.arange(len(parts)), [len(p.ids) for p in parts]))


def collate(batch: Sequence[Conversation], side: str = "right") -> dict[str, torch.Tensor]:
    """Conversations as tensors; padding on either `side` has mask 0 and weight 0.

    prefix_ids, prefix_mask [n, prefix tokens]; input_ids, mask, weights, position_ids [n, tokens];
    attention [n, 1, tokens, tokens]: a token sees the stem and its own fork up to itself.
    """
    prefix_ids = padded([c.prefix.ids for c in batch], side)
    prefix_mask = padded([np.ones(len(c.prefix.ids), np.int64) for c in batch], side)
    fork = padded([c.fork for c in batch], side, -1)
    mask = (fork >= 0).long()
    same = fork[:, :, None] == fork[:, None, :]
    seen = (same | (fork[:, None, :] == 0)) & (fork[:, :, None] >= 0)
    seen &= torch.ones(fork.shape[1], fork.shape[1], dtype=torch.bool).tril()
    positions = (seen.sum(dim=2) - 1).clamp(min=0)
    seen |= torch.eye(fork.shape[1], dtype=torch.bool)  # padding sees itself: no empty softmax
    return {"prefix_ids": prefix_ids, "prefix_mask": prefix_mask,
            "input_ids": padded([c.forks.ids for c in batch], side), "mask": mask,
            "weights": padded([c.forks.weights for c in batch], side), "position_ids": positions,
            "attention": seen[:, None]}


def padded(rows: Sequence[NDArray[Any]], side: str, fill: int = 0) -> torch.Tensor:
    """Rows of different lengths as int64 or float32 [rows, longest], `fill` on `side`."""
    width = max(map(len, rows))
    kind = np.float32 if rows[0].dtype == np.float32 else np.int64
    out = np.full((len(rows), width), fill, kind)
    for row, values in zip(out, rows, strict=True):
        row[slice(len(values)) if side == "right" else slice(width - len(values), width)] = values
    return torch.from_numpy(out)
