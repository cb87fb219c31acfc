"""Token sequences with loss weights, in the order in which a model is to see them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lablog.text.dialogues import DialogueSettings, generate
from lablog.text.tokenizer import Tokenizer

FEW = 3  # phrasings of each question in the simple form


@dataclass(frozen=True, slots=True)
class Item:
    """`ids` of a text (beginning with BOS) and, for each, the weight of predicting it (f32)."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]


def decisive_words(settings: DialogueSettings) -> re.Pattern[str]:
    """What weighs more than other words: every value, yes and no, with the space before it; to a
    model that was taught to chat also with a capital, and at the beginning."""
    values = {value for names in settings.topics.values() for value in names}
    words = "|".join(sorted(values | {"yes", "no"}))
    if settings.chat.system:
        return re.compile(rf"(?:^| )(?:{words})\b", re.IGNORECASE)
    return re.compile(rf" (?:{words})\b")


class DialogueDataset(Dataset[Item]):
    """`count` training dialogues, ordered so that a batch holds dialogues of similar length.

    Windows of `window` batches are sorted by length and the batches of a window shuffled, so
    that almost nothing is padding. The first `simple` dialogues are comparisons in the simple form
    and in few phrasings: equality is learnt there, and its wordings later. Items are a pure
    function of (arguments, index).
    """

    def __init__(
        self,
        settings: DialogueSettings,
        tokenizer: Tokenizer,
        seed: int,
        count: int,
        batch: int,
        user_weight: float,
        value_weight: float,
        simple: int = 0,
        window: int = 16,
    ):
        self.settings, self.tokenizer, self.seed, self.count = settings, tokenizer, seed, count
        self.batch, self.size, self.simple = batch, batch * window, simple
        self.decisive = decisive_words(settings)
        self.user_weight, self.value_weight = user_weight, value_weight
        self.encode = lru_cache(maxsize=1 << 16)(self._encode)
        self.window = lru_cache(maxsize=1)(self._window)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        return self.window(index // self.size)[index % self.size]

    def _window(self, number: int) -> list[Item]:
        first = number * self.size
        indices = range(first, min(first + self.size, self.count))
        items = sorted((self.item(i) for i in indices), key=lambda item: len(item.ids))
        batches = [items[i : i + self.batch] for i in range(0, len(items), self.batch)]
        order = np.random.Generator(np.random.PCG64([self.seed, number])).permutation(len(batches))
        return [item for i in order for item in batches[i]]

    def item(self, index: int) -> Item:
        """Training dialogue number `index`."""
        if index < self.simple:
            turns = generate(self.settings, self.seed, index, "train", "compare", "simple",
                             few=FEW).turns
        else:
            turns = generate(self.settings, self.seed, index).turns
        lines = [self.encode(turn.speaker, turn.text) for turn in turns]
        start = np.array([self.tokenizer.bos], np.int32)
        return Item(
            np.concatenate([start, *(ids for ids, _ in lines)]),
            np.concatenate([np.zeros(1, np.float32), *(weights for _, weights in lines)]),
        )

    def _encode(self, speaker: str, text: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and weights of one line: encoding is line by line, because no piece spans two."""
        head = self.tokenizer.encode(f"{speaker}:")
        ids = self.tokenizer.encode(f"{speaker}: {text}\n")
        weights = np.full(len(ids), self.user_weight, np.float32)
        if speaker == "A":
            weights[len(head) :] = 1
            for found in self.decisive.finditer(f" {text}"):
                at = len(head) + len(self.tokenizer.encode(f" {text}"[: found.start()]))
                weights[at : at + len(self.tokenizer.encode(found.group()))] = self.value_weight
        return np.array(ids, np.int32), weights
