"""Personas as commitments: conversations of a second source, a dialogue file of the user's.

The prefix is the second speaker's persona, which the decoder never sees; the continuation is the
dialogue, with the loss on the second speaker's turns. What the trained commitment is worth is told
by the negative log-likelihood of held-out dialogues, whose personas do not occur in training,
against LoRA trained on the same dialogues without z*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from lablog.commitment.conversations import (
    Conversation,
    Conversations,
    ConversationSettings,
    conversation,
)
from lablog.commitment.qlora import (
    CommittedModel,
    Plan,
    load_committed,
    train_commitment,
    training_key,
)
from lablog.intervals import t_interval
from lablog.keys import key
from lablog.record import Metric
from lablog.text.chat_tokenizer import AnyTokenizer, tokenizer_of
from lablog.text.datasets import Item
from lablog.text.dialogues import settings_for
from lablog.text.personas import PersonaDialogue, read_personas


class PersonaConversations(Dataset[Conversation]):
    """`count` conversations: the dialogues in random order, again and again.

    Of each dialogue the first `window` tokens are read. Raises ValueError for fewer than two
    dialogues, and for one in whose window the second speaker says nothing.
    """

    def __init__(self, dialogues: Sequence[PersonaDialogue], tokenizer: AnyTokenizer, seed: int,
                 count: int, window: int, chat: str = "plain") -> None:
        settings = ConversationSettings(settings_for(chat), word_weight=1.0)
        encode = Conversations(settings, tokenizer, seed, 0, 1, chat).item
        self.seed, self.count = seed, count
        self.conversations = []
        for dialogue in dialogues:
            told = encode(dialogue.turns)
            kept = Item(told.ids[:window], told.weights[:window])
            if not kept.weights.any():
                raise ValueError(f"User 2 with the persona {dialogue.persona!r} says nothing in "
                                 f"the first {window} tokens: leave the row out")
            self.conversations.append(conversation(encode([dialogue.prefix], last=True), [kept]))
        if len(self.conversations) < 2:
            raise ValueError(f"{len(self.conversations)} dialogue(s) in this split, needed are 2: "
                             "about one persona in five is held out, so give a longer file")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        epoch, at = divmod(index, len(self.conversations))
        order = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        return self.conversations[order.permutation(len(self.conversations))[at]]


@dataclass(frozen=True)
class PersonaResult:
    """Negative log-likelihood of each held-out dialogue, nats per token of the second speaker.

    With z* from its own persona, from the next dialogue's, and of LoRA alone; float64 [dialogues].
    kl: KL(q ‖ prior) of each persona, nats [dialogues].
    """

    own: np.ndarray
    shuffled: np.ndarray
    without: np.ndarray
    kl: np.ndarray
    trained: int  # dialogues in the training split


def measure_personas(path: Path, leave_out: Sequence[int], base: Path, plan: Plan,
                     artifacts: Path) -> PersonaResult:
    """Train by `plan`, and LoRA alone by the same, on a file's dialogues; read those held out.

    Without `cells`: a batch does not hold every persona that there is.
    """
    plan = plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"cells": 0.0})})
    dialogues = read_personas(path, leave_out)
    tokenizer, seed = tokenizer_of(base), plan.training.seed
    count = plan.training.steps * plan.training.batch_size * plan.training.gradient_accumulation
    split = [PersonaConversations([d for d in dialogues if d.split == name], tokenizer, seed,
                                  count, plan.window, plan.chat) for name in ("train", "held_out")]
    data = key(PersonaConversations, path, sorted(leave_out))

    def train(chosen: Plan) -> CommittedModel:
        folder = artifacts / f"personas-{training_key(base, chosen, data)}"
        return load_committed(base, train_commitment(base, split[0], chosen, folder, data))

    with_z, without = train(plan), train(plan.model_copy(update={"k": 0}))
    held = split[1].conversations
    moved = [replace(c, prefix=other.prefix)
             for c, other in zip(held, held[1:] + held[:1], strict=True)]
    own, kl = _likelihoods(with_z, held, seed)
    return PersonaResult(own, _likelihoods(with_z, moved, seed)[0],
                         _likelihoods(without, held, seed)[0], kl, len(split[0].conversations))


@torch.inference_mode()
def _likelihoods(model: CommittedModel, held: Sequence[Conversation],
                 seed: int) -> tuple[np.ndarray, np.ndarray]:
    """NLL per token and KL of each conversation, under one z* from its posterior."""
    torch.manual_seed(seed)
    parts = [model(**model.collated([c])) for c in held]  # loss summed over the tokens
    tokens = [c.forks.weights.sum() for c in held]
    return (np.array([p["lm"].item() for p in parts]) / tokens,
            np.array([p["kl"].item() if "kl" in p else 0.0 for p in parts]))


def of_personas(result: PersonaResult | None) -> list[Metric]:
    """The measures of a file's dialogues; without a result they are undefined, and say that
    nothing ran."""
    found = [Metric.of("held_out", len(result.own) if result else 0, "count"),
             Metric.of("trained", result.trained if result else 0, "count")]
    if result is None:
        return found + [Metric.of(name, None, "nat", undefined="not run: personas is empty")
                        for name in ("own", "shuffled", "without", "gap", "gap_shuffled", "kl")]
    measures = {"own": result.own, "shuffled": result.shuffled, "without": result.without,
                "gap": result.without - result.own, "gap_shuffled": result.shuffled - result.own,
                "kl": result.kl}
    for name, values in measures.items():
        interval = replace(t_interval(values.tolist()), method="t over dialogues")
        found.append(Metric.of(name, float(values.mean()), "nat", interval=interval,
                               n=len(values)))
    return found
