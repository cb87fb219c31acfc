"""Faults in carrying a commitment (lab log, experiment A)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
from torch import Tensor

from lablog.arianna.finetuning import Base
from lablog.commitment import diagnostics, qlora, training_metrics
from lablog.commitment.conversations import Conversations, ConversationSettings
from lablog.commitment.posterior import VariationalCommitment
from lablog.determinism import seed_everything
from lablog.models.llama_cpp import Commitment, Context, Model
from lablog.models.training import TrainingSettings
from lablog.text.dialogues import settings_for, trained_part
from lablog.text.tokenizer import Tokenizer

BATCH = 12  # conversations: one of each persona


def talks(tokenizer: Tokenizer, seed: int, count: int) -> Conversations:
    """`count` conversations as chapter 3 trains on."""
    settings = ConversationSettings(trained_part(settings_for("plain")))
    return Conversations(settings, tokenizer, seed, count, BATCH)


def small_plan(training: TrainingSettings, *, k: int, strength: float, window: int, beta: float,
               steps: int, learning_rate: float) -> qlora.Plan:
    """Chapter 3's method for a small model, with the optimiser of `training`."""
    return qlora.Plan(
        k=k, strength=strength, quantisation="none", window=window,
        lora=qlora.LoraSettings(r=4, alpha=8, dropout=0.0, targets="all-linear"),
        schedule=qlora.Schedule(beta=beta, warmup=4, annealing=4, free_bits=0.0, cells=0.0),
        training=training.model_copy(update={
            "steps": steps, "batch_size": BATCH, "warmup_steps": 2, "weight_decay": 0.0,
            "schedule": "cosine", "checkpoint_every": steps, "log_every": 2,
            "learning_rate": learning_rate}))


def at_once(plan: qlora.Plan, beta: float) -> qlora.Plan:
    """The plan with the whole weight of the KL, `beta`, from the first step on."""
    return plan.model_copy(update={"schedule": qlora.Schedule(
        beta=beta, warmup=0, annealing=0, free_bits=0.0, cells=0.0)})


@contextmanager
def padding_only() -> Iterator[None]:
    """The commitment is added where the mask says padding, and nowhere else."""
    right = VariationalCommitment.addition

    def addition(self: VariationalCommitment, z: Tensor, mask: Tensor) -> Tensor:
        return right(self, z, 1 - mask)

    with patch.object(VariationalCommitment, "addition", addition):
        yield


def read_untrained(base: Base, plan: qlora.Plan, seed: int) -> dict[str, Any]:
    """What `diagnostics.diagnose` says of an untrained commitment on two batches."""
    seed_everything(seed, threads=1)
    model = qlora.committed_model(qlora.load_base(base.folder, plan.quantisation, "f32"), plan)
    return diagnostics.diagnose(model.eval(), talks(base.tokenizer, seed, 2 * BATCH), BATCH)


def trained(base: Base, plan: qlora.Plan, seeds: Sequence[int], folder: Path) -> pd.DataFrame:
    """The history of a training of each seed, into folders below `folder`."""
    runs, count = {}, plan.training.steps * plan.training.batch_size
    for seed in seeds:
        asked = plan.model_copy(
            update={"training": plan.training.model_copy(update={"seed": seed})})
        runs[0, seed] = qlora.train_commitment(
            base.folder, talks(base.tokenizer, seed, count), asked, folder / str(seed), str(seed))
    return training_metrics.history(runs)


def collapses(history: pd.DataFrame) -> int:
    """How many of the trainings of a history chapter 3 counts as collapsed."""
    found = {metric.name: metric.value for metric in training_metrics.of_training(history)}
    return int(found["collapsed"] or 0)


def bystander(model: Model, commitment: Commitment | None, sequence: int | None) -> np.ndarray:
    """Logits [1, vocabulary] of the second of two conversations in one context, whose first one
    (`sequence` 0), or all of which (None), have the commitment."""
    with Context(model, sequences=2, window=64) as context:
        if commitment is not None:
            context.commit(commitment, sequence)
        one, other = (model.tokenize(text, bos=True) for text in ("A: hello", "B: hello"))
        return context.prefill({0: one, 1: other})[1]


def moved_bystanders(gguf: Path, seeds: Sequence[int]) -> dict[str, list[float]]:
    """By how much at most a logit of the second conversation moves when a random commitment of each
    seed is set for the whole context (``planted``) or for the first conversation (``right``)."""
    moved: dict[str, list[float]] = {"planted": [], "right": []}
    with Model(gguf) as model:
        alone = bystander(model, None, None)
        for seed in seeds:
            draw = np.random.default_rng(seed).standard_normal(model.width).astype(np.float32)
            commitment = Commitment(draw, 1.0, (0, model.layers - 1))
            for name, sequence in (("planted", None), ("right", 0)):
                logits = bystander(model, commitment, sequence)
                moved[name].append(float(np.abs(logits - alone).max()))
    return moved
