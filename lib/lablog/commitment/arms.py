"""What is trained and what is compared: the rows of the result table (lab log A5).

A *training* is a change of the chapter's plan or of its conversations; an *arm* is a trained model,
or the base, together with where its z* comes from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from lablog.commitment import latent_sources, sampler
from lablog.commitment.chats import chats_hash, from_hub
from lablog.commitment.conversations import Conversation, Conversations, ConversationSettings
from lablog.commitment.diagnostics import choices
from lablog.commitment.latent_sources import Source
from lablog.commitment.novelty import HEADLINE, ProbeSet, probe_set
from lablog.commitment.posterior import VariationalCommitment
from lablog.commitment.qlora import (
    CommittedModel,
    LoraSettings,
    Plan,
    load_committed,
    load_to_read,
    plan_of,
    train_commitment,
    training_key,
)
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.determinism import seed_everything
from lablog.files import atomic_write
from lablog.keys import key
from lablog.models.training import model_hash
from lablog.tasks import Tasks
from lablog.text.chat_tokenizer import tokenizer_of
from lablog.text.dialogues import ASKED, load_settings, new_phrasings, settings_for, things


@dataclass(frozen=True)
class Training:
    """One thing to train: what differs from the chapter's plan (`plan`, and of that `schedule`;
    the layers as fractions of the model's, `layers`) and from its conversations (`conversations`,
    and the number of `values`: that many things to choose from, all in one topic; 0: the topics as
    they are)."""

    label: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[float, float] | None = None
    conversations: Mapping[str, Any] = field(default_factory=dict)
    values: int = 0


@dataclass(frozen=True)
class Arm:
    """A row of the table: which training (``base``: none; ``random``: the base under an untrained
    W_c of the trained one's length), and where its z* comes from."""

    label: str
    training: str
    source: Source


NO_CELLS = {"cells": 0.0}
ADAPTED = {"reader": "adapted"}
LOG = ADAPTED | {"k": 64, "lora": LoraSettings(r=8, alpha=16, dropout=0.05,
                                               targets=["q_proj", "v_proj"])}
"""The lab log's configuration (A5), with β = 0.1; it knew no cells and no discriminant."""
TRAININGS = {
    "commitment": Training("z*"),
    "lora": Training("no z*", {"k": 0}),
    "note": Training("a line of text", {"k": 0}, conversations={"note": True}),
    "first_position": Training("z* at the first position", {"positions": "first"}),
    "steering": Training("a table of steering vectors", ADAPTED | {"code": "label"}, NO_CELLS),
    "frozen": Training("frozen random W_c", {"projection": "frozen"}),
    "no_cells": Training("no cells", schedule=NO_CELLS),
    "log": Training("the log's configuration", LOG, NO_CELLS | {"beta": 0.1}),
    "one_layer": Training("z* in the middle layer", layers=(0.5, 0.5)),
    "first_half": Training("z* in the first half", layers=(0.0, 0.5)),
    "last_half": Training("z* in the last half", layers=(0.5, 1.0)),
    "no_gaps": Training("no talk in between", conversations={"gap": (0, 0)}),
    **{f"values_{n}": Training(f"one of {n}", values=n) for n in (4, 12, 24, 48, 96)},
    **{f"independent_{n}": Training(f"{n} topics at once", ADAPTED, NO_CELLS,
                                    conversations={"independent": n}) for n in (1, 2, 4)},
}
ARMS = {
    "base": Arm("base", "base", "none"),
    "lora": Arm("LoRA without z*", "lora", "none"),
    "random": Arm("untrained random z*", "random", "prior"),
    "prefix": Arm("trained z* from the prefix", "commitment", "prefix"),
    "prior": Arm("trained z* from the prior", "commitment", "prior"),
    "redrawn": Arm("trained z*, redrawn for every question", "commitment", "redrawn"),
    "window": Arm("base with the choice as text", "base", "text"),
    "note": Arm("LoRA with the choice as text", "note", "text"),
    **{f"{name}.{source}": Arm(f"{TRAININGS[name].label}, from the {source}", name, source)
       for name in TRAININGS if name not in ("commitment", "lora", "note")
       for source in ("prefix", "prior")},
}
"""The last ones are ``<training>.<source>``: baselines at equal bits, and the parts of the method
left out one at a time."""


def conversations(training: Training, settings: ConversationSettings) -> ConversationSettings:
    """The conversations of a training, which differ from `settings`.

    With `values` there is one topic, `thing`, with values of all topics in turn; nothing of them
    is held out, since it is asked how many can be told apart.
    """
    if training.values:
        whole = settings.dialogues.model_copy(update={"topics": load_settings().topics})
        settings = replace(settings, dialogues=things(whole, training.values))
    return replace(settings, **training.conversations)


def planned(training: Training, plan: Plan, layers: int, commitments: int) -> Plan:
    """The plan of a training for a model of so many `layers`."""
    changes = dict(training.plan)
    if training.layers:
        begin, end = (at * layers for at in training.layers)
        first = min(math.floor(begin), layers - 1)
        changes["layers"] = (first, max(first, math.ceil(end) - 1))
    if changes.get("code") == "label":
        changes["k"] = commitments
    if training.schedule:
        changes["schedule"] = plan.schedule.model_copy(update=training.schedule)
    return plan.model_copy(update=changes)


@dataclass(frozen=True)
class Asked:
    """What a row is measured on: seed and number of the items and texts, their kind of new and the
    exchanges of other talk in between (None: as the kind has), and which measures: ``fork``,
    ``recall``, ``language``, ``hangman`` (behind `guesses` guesses), ``reached`` (of the prior)."""

    seed: int
    items: int
    texts: int = 0
    kind: str = HEADLINE
    gap: int | None = None
    families: tuple[str, ...] = ("fork", "recall")
    guesses: int = 4


@dataclass(frozen=True)
class Experiment:
    """What all trainings share: where the bases lie by seed, plan, data, and conversations.

    elsewhere: a folder that holds all trainings, made on another machine; they are taken over
    instead of trained if their plans are those of this experiment.
    """

    bases: Mapping[int, Path]
    plan: Plan
    data: str
    settings: ConversationSettings
    artifacts: Path
    elsewhere: Path | None = None

    def plan_of(self, base: int, seed: int, name: str) -> Plan:
        """The plan of the training `name` with `seed` on a base."""
        shape = json.loads((self.bases[base] / "config.json").read_text())
        training = self.plan.training.model_copy(update={"seed": seed})
        made = planned(TRAININGS[name], self.plan, shape["num_hidden_layers"],
                       self.settings.dialogues.personas)
        return made.model_copy(update={"training": training})

    def data_key(self, name: str) -> str:
        """What the conversations of a training are made of."""
        if self.data != "dialogues":
            return key(from_hub, chats_hash(self.data.removeprefix("hub:")))
        return key(Conversations, conversations(TRAININGS[name], self.settings))

    def folder(self, base: int, seed: int, name: str) -> Path:
        """Where a training lies: under the digest of all that decides it.

        One from elsewhere has the digest that it got there; FileNotFoundError if it is not there.
        """
        if self.elsewhere is not None:
            found = sorted(self.elsewhere.glob(f"qlora-{name}-{base}-{seed}-*"))
            if len(found) != 1:
                raise FileNotFoundError(
                    f"{self.elsewhere} holds {len(found)} folders qlora-{name}-{base}-{seed}-…: "
                    "copy the one that belongs to these settings there, and no other")
            return found[0]
        made_of = training_key(self.bases[base], self.plan_of(base, seed, name),
                               self.data_key(name))
        return self.artifacts / f"qlora-{name}-{base}-{seed}-{made_of}"

    def dataset(self, base: int, seed: int, name: str, held_out: bool = False,
                count: int | None = None) -> Dataset[Conversation]:
        """The conversations of a training, as many as its plan sees: ``dialogues``, or of
        ``hub:NAME`` or a local folder of chats, of which the held-out ones are the split ``test``.
        """
        plan = self.plan_of(base, seed, name)
        tokenizer = tokenizer_of(self.bases[base])
        if self.data != "dialogues":
            chats = from_hub(self.data.removeprefix("hub:"), tokenizer, plan.window,
                             "test" if held_out else "train", plan.chat)
            return Subset(chats, range(min(count or len(chats), len(chats))))
        made, run = conversations(TRAININGS[name], self.settings), plan.training
        if held_out:
            new = new_phrasings(settings_for(plan.chat))
            made = replace(made, dialogues=made.dialogues.model_copy(
                update={name: getattr(new, name) for name in ASKED}))
        size = count or run.steps * run.batch_size * run.gradient_accumulation
        return Conversations(made, tokenizer, seed, size, run.batch_size, plan.chat)

    def train(self, base: int, seed: int, name: str) -> Path:
        """Train once; a finished folder is returned as it is.

        Raises ValueError if a training from elsewhere has another plan, naming the setting.
        """
        if self.elsewhere is not None:
            return _as_planned(self.folder(base, seed, name), self.plan_of(base, seed, name))
        return train_commitment(
            self.bases[base], self.dataset(base, seed, name), self.plan_of(base, seed, name),
            self.folder(base, seed, name), self.data_key(name))

    def model(self, base: int, seed: int, arm: Arm) -> CommittedModel:
        """The model of an arm, which is trained if it has not been.

        The untrained W_c is the native sampler's, and its λ gives it the trained one's length.
        """
        folder = self.bases[base]
        if arm.training in TRAININGS:
            return load_committed(folder, self.train(base, seed, arm.training))
        model = load_to_read(folder, self.plan)
        if arm.training == "base":
            return CommittedModel(model)
        trained = VariationalCommitment.load(self.train(base, seed, "commitment"))
        settings, length = trained.settings, trained.projection.norm().item()
        sampled = torch.from_numpy(sampler.sample(seed, settings.k, settings.width).projection)
        strength = settings.strength * length / sampled.norm().item()
        untrained = VariationalCommitment(settings.model_copy(update={"strength": strength}))
        with torch.no_grad():
            untrained.projection.copy_(sampled)
        return CommittedModel(model, untrained.to(model.device))

    def _kept(self, base: int, seed: int, name: str, asked: Asked) -> Path:
        """Where the measures of an arm are kept: under the digest of all that decides them."""
        arm = ARMS[name]
        made = "commitment" if arm.training == "random" else arm.training
        trained = self.folder(base, seed, made).name if made in TRAININGS else ""
        made_of = key(Experiment.measure, trained, model_hash(self.bases[base]), self.plan, arm,
                      seed, asked)
        return self.artifacts / "measured" / f"{made_of}.json"

    def measured(self, tasks: Tasks, kind: str, calls: Sequence[tuple[int, int, str, Asked]],
                 gpus: float = 0) -> list[dict[str, list[float]]]:
        """The measures of all `calls` (base, seed, arm, question), by `tasks`: all questions of an
        arm are one. What is kept in `artifacts` is taken from there."""
        kept = [self._kept(*call) for call in calls]
        missing: dict[tuple[int, int, str], dict[Asked, Path]] = {}
        for (base, seed, arm, asked), path in zip(calls, kept, strict=True):
            if not path.is_file():
                missing.setdefault((base, seed, arm), {})[asked] = path
        made = {ARMS[name].training for _, _, name, _ in calls} & {*TRAININGS}
        folders = {self.folder(base, seed, training) for base, seed, *_ in calls
                   for training in {*made, "commitment"}}
        asked_of = list(missing.values())

        def keep(index: int, found: list[dict[str, list[float]]]) -> None:
            for path, values in zip(asked_of[index].values(), found, strict=True):
                if not path.is_file():  # the worker has folders of its own
                    atomic_write(path, json.dumps(values))

        tasks.map(kind, Experiment.measure, [(*arm, *asked) for arm, asked in missing.items()],
                  common=(self,), gpus=gpus, done=keep,
                  reads=[*self.bases.values(), *sorted(path for path in folders if path.is_dir())])
        return [json.loads(path.read_text()) for path in kept]

    def measure(self, base: int, seed: int, name: str,
                *questions: Asked) -> list[dict[str, list[float]]]:
        """The measures of an arm for each question, a list over items or texts each; kept in
        `artifacts`. Every question is answered with the same draws, alone or with others."""
        kept = [self._kept(base, seed, name, asked) for asked in questions]
        if not all(path.is_file() for path in kept):
            seed_everything(seed, threads=1)
            speaker = TorchSpeaker(self.model(base, seed, ARMS[name]),
                                   tokenizer_of(self.bases[base]), self.plan.chat)
            for path, asked in zip(kept, questions, strict=True):
                if not path.is_file():
                    found = self._answered(speaker, base, seed, ARMS[name], asked)
                    atomic_write(path, json.dumps(found))
        return [json.loads(path.read_text()) for path in kept]

    def _answered(self, speaker: TorchSpeaker, base: int, seed: int, arm: Arm,
                  asked: Asked) -> dict[str, list[float]]:
        training = TRAININGS.get(arm.training, Training(""))
        values, independent = training.values, training.conversations.get("independent", 0)
        probes = probe_set(asked.seed, asked.items, asked.texts, asked.kind, asked.gap, values,
                           independent, self.plan.chat)
        found = _measures(speaker, arm.source, probes, asked, lambda: TorchSpeaker(
            CommittedModel(load_to_read(self.bases[base], self.plan)), speaker.tokenizer,
            self.plan.chat))
        if arm.source == "prior" and "reached" in asked.families:
            _, named = choices(speaker, 120, seed)
            found["reached"] = [len(set(row.tolist())) / self.settings.dialogues.personas
                                for row in named]
        return found


def _as_planned(trained: Path, plan: Plan) -> Path:
    """`trained`, if it was trained by `plan`, on whatever device and in however many threads."""
    where = {"training": {"cpu", "threads"}}
    made, asked = (each.model_dump(exclude=where) for each in (plan_of(trained), plan))
    for part, inner in asked.items():
        for name, value in inner.items() if isinstance(inner, dict) else [("", inner)]:
            found = made[part][name] if name else made[part]
            if found != value:
                setting = f"{part}.{name}" if name else part
                raise ValueError(f"{trained} was trained with {setting} = {found}, and this "
                                 f"experiment has {value}: set it so, or train here")
    return trained


def _measures(speaker: TorchSpeaker, source: Source, probes: ProbeSet, asked: Asked,
              base: Callable[[], TorchSpeaker]) -> dict[str, list[float]]:
    found: dict[str, Any] = {}
    if "recall" in asked.families:
        recall = latent_sources.recall(speaker, source, probes)
        found |= {"answered": recall.answered, "recall": recall.recalled,
                  "eviction": recall.recalled_after_eviction}
    if "fork" in asked.families:
        fork = latent_sources.fork(speaker, source, probes)
        found |= {"same_choice": fork.same, "yes_sum": fork.yes_sum, "yes_named": fork.yes_named,
                  "yes_largest": fork.yes.max(axis=1), "kept": fork.kept}
        commitment = speaker.model.commitment
        if commitment is not None and source == "prefix" and commitment.settings.code == "gaussian":
            posterior = speaker.posterior(probes.prefixes)
            found["kl"] = posterior.kl().sum(dim=1).double().cpu().numpy()
    if "hangman" in asked.families:
        found["hangman"] = latent_sources.game(speaker, source, probes, asked.guesses)
    if "language" in asked.families:
        words = latent_sources.own_words(speaker, source, probes, base())
        found |= {"nll": words.nll, "own_tokens": words.tokens, "kl_base": words.kl}
    return {name: np.asarray(values).astype(float).tolist() for name, values in found.items()}
