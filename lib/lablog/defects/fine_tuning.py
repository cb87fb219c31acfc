"""Faults between a base run and its fine-tuning (lab log C3)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lablog.arianna import chat, finetuning
from lablog.arianna.bits_per_byte import read_bits
from lablog.arianna.dialogues import Dialogue, Form
from lablog.arianna.finetuning import Base, training_log
from lablog.defects.noticed import refusal
from lablog.models import training
from lablog.models.shape import ModelShape
from lablog.models.trainer import Fresh, WeightedTrainer, pad_items
from lablog.text.packing import Windows, pack
from lablog.text.tokenizer import Tokenizer


def small_base(texts: Sequence[str], runs: Path, *, vocabulary: int, width: int, layers: int,
               heads: int, context: int, steps: int, batch_size: int, rate: float,
               seed: int) -> Base:
    """A small Llama trained on `texts`, with a tokenizer of them, into a folder of `runs`.

    Its schedule is linear and ends at zero, so that a learning rate behind the end is exactly zero.
    """
    tokenizer = finetuning.base_tokenizer(texts, vocabulary, runs)
    shape = ModelShape(
        width=width, layers=layers, heads=heads, kv_heads=heads, context=context,
        feed_forward=finetuning.feed_forward_width(width), tied_embeddings=True,
        initializer_range=0.02)
    settings = training.TrainingSettings(
        steps=steps, batch_size=batch_size, learning_rate=rate, schedule="linear",
        warmup_steps=steps // 10, betas=(0.9, 0.95), weight_decay=0.1, precision="f32", seed=seed,
        checkpoint_every=steps, log_every=10, threads=1, min_learning_rate=None, clip=1.0,
        gradient_accumulation=1)
    return finetuning.train_base(shape, settings, pack(texts, tokenizer, runs / "corpus"),
                                 tokenizer, runs)


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The weights of a model in a folder, by name."""
    return load_file(folder / "model.safetensors")


def cost(folder: Path, dialogues: Sequence[Dialogue], tokenizer: Tokenizer,
         form: Form = "qa") -> float:
    """Bits per byte of the dialogues' answers under the model in `folder`."""
    bits = read_bits(folder, [each.item(tokenizer, form) for each in dialogues])
    return float(bits.sum() / sum(each.answer_bytes for each in dialogues))


def tune(base: Base, texts: Sequence[str], folder: Path, **settings: Any) -> dict[str, Any]:
    """Fine-tune with any settings, past what :func:`lablog.arianna.finetuning.tune` refuses; the
    log of the training, which is left in `folder`."""
    asked = base.settings.model_copy(update={"log_every": 1, **settings})
    stream = pack(texts, base.tokenizer, folder.parent / "stream")
    windows = Windows(stream, base.shape.context, asked.steps * asked.batch_size, asked.seed)
    return training_log(training.train_causal_lm(
        base.folder, windows, asked, folder, tokenizer=base.tokenizer.path, data_key=stream.key))


@contextmanager
def counters_resumed(steps: int, look: bool) -> Iterator[None]:
    """A training's schedule begins behind the `steps` of another run; whether it begins at its own
    step 0 is checked if `look`. A training that changes no weight goes through."""
    change = training.relative_update

    class Resumed(Fresh):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None,
                           lr_scheduler: Any = None, **rest: Any) -> None:
            lr_scheduler.last_epoch = steps
            if look:
                super().on_train_begin(args, state, control, optimizer, lr_scheduler, **rest)

        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            if look:
                super().on_step_end(*arguments, **rest)

    def any_change(before: Any, after: Any) -> float:
        return 0.0 if refusal(lambda: change(before, after)) else change(before, after)

    with patch.object(training, "Fresh", Resumed), \
            patch.object(training, "relative_update", any_change):
        yield


@contextmanager
def any_schedule() -> Iterator[None]:
    """A warm-up may be longer than the run."""
    with patch.object(training, "check_schedule", lambda settings: None):
        yield


def warned_of(text: str) -> bool:
    """Whether a prompt is warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chat.warn_of_form(text)
    return bool(said)


def change_with_padding(folder: Path, dialogues: Sequence[Dialogue], tokenizer: Tokenizer,
                        padding: int, counted: bool) -> float:
    """By how many nats the loss on a batch of dialogues changes when `padding` tokens are appended
    to all of them, and padding is `counted` or not."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = pad_items([each.item(tokenizer) for each in dialogues])

    def loss(more: int) -> float:
        longer = {name: F.pad(part, (0, more)) for name, part in batch.items()}
        if counted:
            longer["weights"] = torch.ones_like(longer["weights"])
        with torch.no_grad():
            return float(WeightedTrainer.compute_loss(None, model, longer))  # type: ignore[arg-type]

    return abs(loss(padding) - loss(0))
