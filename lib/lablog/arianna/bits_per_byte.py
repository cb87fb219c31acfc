"""Bits per byte of what a model reads, with intervals over the texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from lablog.arianna.finetuning import training_log
from lablog.intervals import Interval, percentiles, ratio_replicas
from lablog.models.trainer import pad_items
from lablog.record import Metric
from lablog.text.datasets import Item
from lablog.text.tokenizer import Tokenizer

Floats = NDArray[np.float64]  # [texts]: bits, or bytes
DRAWS = 2000  # bootstrap samples of an interval

# --- what is read ---------------------------------------------------------------------------------


def evenly(total: int, count: int) -> slice:
    """Slice of at most `count` of `total` texts at equal distances, from the first on.

    ValueError unless `count` is at least 1.
    """
    if count < 1:
        raise ValueError(f"{count} of {total} texts: expected at least 1")
    step = max(1, total // count)
    return slice(0, step * count, step)


def text_items(texts: Sequence[str], tokenizer: Tokenizer) -> list[Item]:
    """Ids of each text after BOS, weight 1 for every token but BOS."""
    return [Item(ids, (np.arange(len(ids)) > 0).astype(np.float32))
            for ids in tokenizer.encode_all(texts)]


def byte_sizes(texts: Iterable[str]) -> Floats:
    """UTF-8 bytes of each text, float64 [texts]."""
    return np.array([len(text.encode()) for text in texts], float)


# --- reading --------------------------------------------------------------------------------------


def windows(item: Item, context: int) -> list[Item]:
    """An item as windows of at most `context` tokens, half of each overlapping the one before.

    Every weight is kept exactly once, at the first window that sees the token.
    """
    found = [Item(item.ids[:context], item.weights[:context])]
    half, known = context // 2, context - context // 2
    for start in range(half, len(item.ids) - known, half):
        weights = item.weights[start : start + context].copy()
        weights[:known] = 0
        found.append(Item(item.ids[start : start + context], weights))
    return found


@torch.inference_mode()
def bits(model: LlamaForCausalLM, items: Sequence[Item]) -> Floats:
    """Weighted negative log-likelihood of each item in bits, float64 [items].

    Items longer than the model's context are read in :func:`windows`.
    """
    model.eval()
    context = model.config.max_position_embeddings
    rows = [(i, part) for i, item in enumerate(items) for part in windows(item, context)]
    rows.sort(key=lambda row: len(row[1].ids))
    total = np.zeros(len(items))
    for first in range(0, len(rows), 16):
        chunk = rows[first : first + 16]
        batch = pad_items([part for _, part in chunk])
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        weights, targets = batch["weights"][:, 1:], batch["input_ids"][:, 1:]
        nll, weighed = torch.zeros_like(weights), weights > 0
        nll[weighed] = cross_entropy(logits[weighed].float(), targets[weighed], reduction="none")
        weighted = (nll * weights).double().sum(1) / math.log(2)
        np.add.at(total, [i for i, _ in chunk], weighted.numpy())
    return total


def read_bits(folder: Path, items: Sequence[Item]) -> Floats:
    """:func:`bits` of a folder that `train_causal_lm` made, in float32.

    It is read with as many threads as it was trained with, which fixes the order of sums.
    """
    torch.set_num_threads(training_log(folder)["settings"]["threads"])
    return bits(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), items)


# --- estimates ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of `n` texts together, or a difference of two, with its 95 % interval.

    A single text has no interval.
    """

    value: float
    interval: Interval | None
    n: int

    def metric(self, name: str) -> Metric:
        """The same for the record."""
        return Metric.of(name, self.value, "bits/byte", interval=self.interval, n=self.n)

    @property
    def row(self) -> dict[str, float]:
        """bits/byte, low and high, for a table; all the value where there is no interval."""
        low, high = ((self.interval.low, self.interval.high) if self.interval
                     else (self.value, self.value))
        return {"bits/byte": self.value, "low": low, "high": high}


def estimate(bits: Floats, sizes: Floats, draws: int = DRAWS) -> BitsPerByte:
    """sum(bits) / sum(sizes) with its percentile bootstrap over texts; both float64 [texts].

    For the difference of two conditions pass the difference of their bits: the same texts are
    drawn for both. ValueError if the two do not belong to the same texts, or if there are none.
    """
    if len(bits) != len(sizes) or not len(bits):
        raise ValueError(f"bits of {len(bits)} texts, bytes of {len(sizes)}: expected as many")
    value, count = float(bits.sum() / sizes.sum()), len(bits)
    if count < 2:
        return BitsPerByte(value, None, count)
    method = f"bootstrap over {count} texts, {draws} draws"
    return BitsPerByte(value, percentiles(ratio_replicas(bits, sizes, draws), method), count)


def gap(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> BitsPerByte:
    """Difference of two bits per byte, each (bits, sizes), of texts that are not the same."""
    value = one[0].sum() / one[1].sum() - other[0].sum() / other[1].sum()
    replicas = ratio_replicas(*one, DRAWS, seed=0) - ratio_replicas(*other, DRAWS, seed=1)
    interval = percentiles(replicas, "bootstrap over texts of both sides")
    return BitsPerByte(float(value), interval, len(one[0]) + len(other[0]))
