"""Speed of QLoRA training and of its evaluation, for ``make bench``."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lablog import layout
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
    compile_layers,
    load_base,
    load_to_read,
)
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.intervals import bootstrap_percentile
from lablog.models import locate
from lablog.profiles import load
from lablog.run import Run
from lablog.text.datasets import Item
from lablog.text.dialogues import load_settings, trained_part
from lablog.text.tokenizer import Tokenizer
from tools.timing import paired, seconds

ITEMS = 200
SETTINGS = load("laptop").parameters["03_qlora_commitment"]
"""Sizes and rates of what is timed: those of chapter 3."""


def _plan(k: int, quantisation: Quantisation) -> Plan:
    training = {
        "steps": 1, "batch_size": SETTINGS["batch_size"], "warmup_steps": 0,
        "learning_rate": SETTINGS["learning_rate"], "schedule": "cosine",
        "betas": (SETTINGS["adam_beta1"], SETTINGS["adam_beta2"]),
        "weight_decay": SETTINGS["weight_decay"], "precision": "f32", "checkpoint_every": 1,
        "log_every": 1,
    }
    schedule = {"beta": SETTINGS["beta"], "warmup": 0, "annealing": 0,
                "free_bits": SETTINGS["free_bits"], "cells": SETTINGS["cells"]}
    lora = {"r": SETTINGS["lora_rank"], "alpha": SETTINGS["lora_alpha"],
            "dropout": SETTINGS["lora_dropout"], "targets": SETTINGS["targets"]}
    return Plan.model_validate({
        "k": k, "strength": SETTINGS["strength"], "quantisation": quantisation,
        "training": training, "schedule": schedule, "lora": lora,
    })


def _in_window(conversation: Conversation) -> Conversation:
    """The same tokens with the prefix in the decoder's window, as LoRA alone would see them."""
    prefix, forks = conversation.prefix, conversation.forks
    item = Item(np.concatenate([prefix.ids, forks.ids]),
                np.concatenate([0 * prefix.weights, forks.weights]))
    fork = np.concatenate([np.zeros(len(prefix.ids), np.int64), conversation.fork])
    return Conversation(prefix, item, fork, conversation.commitment)


def step(base: Path, k: int, quantisation: Quantisation,
         compiled: bool = False) -> Callable[[], None]:
    """A function that takes one optimiser step; k = 0 is LoRA alone on the same tokens."""
    plan, batch = _plan(k, quantisation), SETTINGS["batch_size"]
    torch.manual_seed(0)
    model = committed_model(load_base(base, quantisation, "f32"), plan, batch).train()
    if compiled:
        compile_layers(model)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-4, fused=True)
    count = 4 * batch  # three batches of choices, one of recall
    settings = ConversationSettings(trained_part(load_settings()),
                                    gap=(SETTINGS["gap_least"], SETTINGS["gap_most"]))
    data = Conversations(settings, Tokenizer(base / "tokenizer.model"), 0, count, batch)
    shown = [data[i] if k else _in_window(data[i]) for i in range(count)]
    batches = [collate(shown[i : i + batch]) for i in range(0, count, batch)]

    def run() -> None:
        for tensors in batches:
            model(**tensors, beta=plan.schedule.beta, cells=plan.schedule.cells)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def memory(base: Path, quantisation: Quantisation) -> int:
    """Bytes of the base's parameters."""
    return int(load_base(base, quantisation, "f32").get_memory_footprint())


def forks(base: Path) -> Callable[[], None]:
    """A function that evaluates `ITEMS` forked choices with a z* from the prior for each."""
    torch.manual_seed(0)
    plan = _plan(SETTINGS["k"], "nf4")
    model: CommittedModel = committed_model(load_to_read(base, plan), plan)
    speaker = TorchSpeaker(model, Tokenizer(base / "tokenizer.model"))
    asked = probe_set(0, ITEMS, 1)

    def run() -> None:
        latent_sources.fork(speaker, "prior", asked)

    return run


def record(run: Run) -> None:
    """Record a training step with the commitment over LoRA alone on the same tokens, 4 bits over
    f32, compiled over not, and forked choices a second; with one thread, as chapter 3 trains
    several such models at a time."""
    base = locate.hugging_face_folder("offline:laptop", layout.artifacts(layout.results("laptop")))
    k, threads = SETTINGS["k"], torch.get_num_threads()
    plain, committed, whole = step(base, 0, "nf4"), step(base, k, "nf4"), step(base, k, "none")
    for name, reference, candidate, used in (
        ("step.commitment_over_lora.all_threads", plain, committed, threads),
        ("step.commitment_over_lora", plain, committed, 1),
        ("step.nf4_over_f32", whole, committed, 1),
        ("step.compiled_over_eager", committed, step(base, k, "nf4", compiled=True), 1),
    ):
        torch.set_num_threads(used)
        ratios = [1 / paired(reference, candidate, 1) for _ in range(20)]
        run.metric(f"qlora.{name}", statistics.median(ratios), "ratio", n=len(ratios),
                   interval=bootstrap_percentile(ratios, 50))
    run.metric("qlora.memory.nf4_over_f32", memory(base, "nf4") / memory(base, "none"), "ratio")
    run.metric("qlora.forks_per_s", ITEMS / seconds(forks(base)), "items/s")
    torch.set_num_threads(threads)
