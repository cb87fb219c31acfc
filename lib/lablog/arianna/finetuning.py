"""The base run, and fine-tunings of it that refuse the faults of the lab log (C3)."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lablog.arianna import guards
from lablog.files import atomic_folder, atomic_write, sha256
from lablog.keys import key
from lablog.models.shape import ModelShape
from lablog.models.training import TrainingSettings, train_causal_lm
from lablog.text.packing import Stream, Windows, pack, refuse_overlap
from lablog.text.tokenizer import Tokenizer, train_tokenizer

ADOPTED = ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json")
"""Files of a model from elsewhere that can be a base."""


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning: highest learning rate, windows of a micro-batch, optimiser steps."""

    rate: float
    batch_size: int
    steps: int

    @property
    def name(self) -> str:
        """For metrics and folders."""
        return f"lr{self.rate:g}.batch{self.batch_size}.steps{self.steps}"


@dataclass(frozen=True)
class Base:
    """A base model, trained here or elsewhere: its folder, and what its fine-tunings must share
    with it."""

    folder: Path
    shape: ModelShape
    settings: TrainingSettings
    tokenizer: Tokenizer


def feed_forward_width(width: int, multiple: int = 4) -> int:
    """Llama's rule: two thirds of 4 `width`, rounded up to a multiple.

    With multiples of 4, width 288 has the log's 768 and width 64 has 172 (llama2.c, ``model.py``).
    ValueError for a width or a multiple below 1.
    """
    if min(width, multiple) < 1:
        raise ValueError(f"width {width}, multiple {multiple}: expected at least 1")
    return multiple * math.ceil(8 * width // 3 / multiple)


def base_tokenizer(documents: Sequence[str], vocabulary: int, runs: Path,
                   megabytes: float = math.inf) -> Tokenizer:
    """Train a tokenizer on lines of about `megabytes` of the documents, evenly spread, in `runs`.

    Its pieces are those of llama2.c, see `train_tokenizer`. ValueError if `megabytes` is not above
    0 or `vocabulary` too small.
    """
    if not megabytes > 0:
        raise ValueError(f"a tokenizer of {megabytes} MB of text: expected more than 0")
    size = sum(len(document.encode()) for document in documents)
    every = documents[:: max(1, round(size / (1e6 * megabytes)))]
    lines = sorted({line for document in every for line in document.splitlines() if line})
    made_of = key(base_tokenizer, hashlib.sha256("\n".join(lines).encode()).hexdigest(), vocabulary)
    return train_tokenizer(lines, vocabulary, runs / f"tokenizer-{made_of}" / "tokenizer.model",
                           add_prefix_space=True, llama2c=True)


def _train(name: str, start: ModelShape | Path, shape: ModelShape, settings: TrainingSettings,
           stream: Stream, tokenizer: Tokenizer, runs: Path) -> Path:
    """Train on windows of `stream` into ``runs/<name>-<key>``, unless that is there."""
    origin = start.name if isinstance(start, Path) else ""
    made_of = key(_train, shape, settings, stream.key, origin)
    count = settings.steps * settings.batch_size * settings.gradient_accumulation
    return train_causal_lm(
        start, Windows(stream, shape.context, count, settings.seed), settings,
        runs / f"{name}-{made_of}", tokenizer=tokenizer.path, data_key=stream.key,
    )


def train_base(shape: ModelShape, settings: TrainingSettings, stream: Stream,
               tokenizer: Tokenizer, runs: Path) -> Base:
    """Train a base model on windows of `stream` into a folder of `runs`; it is made once.

    Errors are those of `train_causal_lm`.
    """
    folder = _train("base", shape, shape, settings, stream, tokenizer, runs)
    return Base(folder, shape, settings, tokenizer)


def adoptable(model: Path) -> Tokenizer:
    """The tokenizer of the Hugging Face folder `model`, if that can be a base model: a Llama of
    safetensors in one file with a SentencePiece tokenizer; ValueError if not."""
    if missing := [name for name in ADOPTED if not (model / name).is_file()]:
        raise ValueError(f"{model} cannot be fine-tuned here, it has no {', '.join(missing)}: "
                         "choose a llama2.c model or a Llama with a SentencePiece tokenizer")
    return Tokenizer(model / "tokenizer.model")


def adopt_base(model: Path, context: int, settings: TrainingSettings, runs: Path) -> Base:
    """Take the Hugging Face folder `model` for a base model, with `settings` for its tunings, in
    windows of `context` tokens.

    A folder of `runs` like that of a base run, but without its history. ValueError where the model
    is not :func:`adoptable`, or has a smaller window.
    """
    tokenizer, shape = adoptable(model), ModelShape.of(model)
    if context > shape.context:
        raise ValueError(f"context = {context}: {model.name} has a window of "
                         f"{shape.context} tokens")
    shape = shape.model_copy(update={"context": context})
    made_of = key(adopt_base, context, settings, *(sha256(model / name) for name in ADOPTED))
    folder = runs / f"adopted-{made_of}"
    if not folder.is_dir():
        with atomic_folder(folder) as scratch:
            for name in ADOPTED:
                shutil.copyfile(model / name, scratch / name)
            config = json.loads((model / "config.json").read_text())
            config["max_position_embeddings"] = context
            atomic_write(scratch / "config.json", json.dumps(config, indent=1) + "\n")
            weights = load_file(model / "model.safetensors")
            log = {"key": made_of, "tokenizer_sha256": tokenizer.hash,
                   "settings": settings.model_dump(), "history": [],
                   "parameters": sum(each.numel() for each in weights.values())}
            atomic_write(scratch / "training.json", json.dumps(log, indent=1) + "\n")
    return Base(folder, shape, settings, Tokenizer(folder / "tokenizer.model"))


def tune(base: Base, tuning: Tuning, texts: tuple[Sequence[str], Sequence[str]], fold: int,
         ablation: Collection[str] = ()) -> Path:
    """Fine-tune `base` on the first of `texts`, whose second is held out; returns the folder.

    It lies beside the base model's and is made once. Everything that `tuning` does not name is the
    base run's; `fold` is added to its seed. ValueError where the tuning or `base` differs from what
    the base model was trained with, unless `ablation` names the parameter, and where a held-out
    text is a training text; other errors are those of `train_causal_lm`.
    """
    guards.check_base(base.folder, {
        **base.shape.model_dump(include=set(guards.SHAPE.values())),
        **base.settings.model_dump(include=set(guards.SETTINGS)),
        "vocabulary": len(base.tokenizer), "tokenizer": base.tokenizer.hash,
        "batch_size": tuning.batch_size,
    }, ablation)
    refuse_overlap(*texts)
    runs = base.folder.parent
    stream = pack(texts[0], base.tokenizer, runs / f"dialogues.fold{fold}")
    settings = base.settings.model_copy(update={
        "steps": tuning.steps, "batch_size": tuning.batch_size, "learning_rate": tuning.rate,
        "warmup_steps": tuning.steps // 10, "checkpoint_every": max(tuning.steps, 100),
        "log_every": max(1, tuning.steps // 20), "seed": base.settings.seed + fold,
    })
    return _train(f"{tuning.name}.fold{fold}", base.folder, base.shape, settings, stream,
                  base.tokenizer, runs)


def training_log(folder: Path) -> dict[str, Any]:
    """What `train_causal_lm` noted in ``training.json``: settings, tokens, history and more."""
    log: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return log
