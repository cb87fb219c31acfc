"""Steps of QLoRA training and of its evaluation, to be timed by ``make bench``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lablog.commitment import latent_sources
from lablog.commitment.conversations import (
    Conversation,
    Conversations,
    ConversationSettings,
    collate,
)
from lablog.commitment.novelty import probe_set
from lablog.commitment.qlora import (
    CommittedModel,
    Plan,
    Quantisation,
    committed_model,
    load_base,
    load_to_read,
)
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.text.datasets import Item
from lablog.text.dialogues import load_settings, trained_part
from lablog.text.tokenizer import Tokenizer

ITEMS, BATCH = 200, 12
TARGETS = ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # as in notebook 03, laptop


def _plan(k: int, quantisation: Quantisation) -> Plan:
    training = {"steps": 1, "batch_size": BATCH, "learning_rate": 3e-3, "warmup_steps": 0,
                "schedule": "cosine", "betas": (0.9, 0.98), "weight_decay": 0, "precision": "f32",
                "checkpoint_every": 1, "log_every": 1}
    return Plan.model_validate({
        "k": k, "strength": 10, "quantisation": quantisation, "training": training,
        "lora": {"r": 16, "alpha": 32, "dropout": 0, "targets": TARGETS},
        "schedule": {"beta": 0.07, "warmup": 0, "annealing": 0, "free_bits": 0, "cells": 0.7},
    })


def _in_window(conversation: Conversation) -> Conversation:
    """The same tokens with the prefix in the decoder's window, as LoRA alone would see them."""
    prefix, forks = conversation.prefix, conversation.forks
    item = Item(np.concatenate([prefix.ids, forks.ids]),
                np.concatenate([0 * prefix.weights, forks.weights]))
    fork = np.concatenate([np.zeros(len(prefix.ids), np.int64), conversation.fork])
    return Conversation(prefix, item, fork, conversation.commitment)


def step(base: Path, k: int, quantisation: Quantisation) -> Callable[[], None]:
    """A function that takes one optimiser step; k = 0 is LoRA alone on the same tokens."""
    plan = _plan(k, quantisation)
    torch.manual_seed(0)
    model = committed_model(load_base(base, quantisation, "f32"), plan, BATCH).train()
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-4, fused=True)
    count = 4 * BATCH  # three batches of choices, one of recall
    settings = ConversationSettings(trained_part(load_settings()), gap=(0, 2))
    data = Conversations(settings, Tokenizer(base / "tokenizer.model"), 0, count, BATCH)
    shown = [data[i] if k else _in_window(data[i]) for i in range(count)]
    batches = [collate(shown[i : i + BATCH]) for i in range(0, count, BATCH)]

    def run() -> None:
        for batch in batches:
            model(**batch, beta=plan.schedule.beta, cells=plan.schedule.cells)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def memory(base: Path, quantisation: Quantisation) -> int:
    """Bytes of the base's parameters."""
    return int(load_base(base, quantisation, "f32").get_memory_footprint())


def forks(base: Path) -> Callable[[], None]:
    """A function that evaluates `ITEMS` forked choices with a z* from the prior for each."""
    torch.manual_seed(0)
    plan = _plan(12, "nf4")
    model: CommittedModel = committed_model(load_to_read(base, plan), plan)
    speaker = TorchSpeaker(model, Tokenizer(base / "tokenizer.model"))
    asked = probe_set(0, ITEMS, 1)

    def run() -> None:
        latent_sources.fork(speaker, "prior", asked)

    return run
