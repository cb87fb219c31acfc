"""What a trained commitment does: the result table of lab log A5, and its diagnostics.

The probes are those of ``probes``; here every conversation has a z* of its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lablog.commitment import latent, probes
from lablog.commitment.chats import from_hub
from lablog.commitment.conversations import Conversation, Conversations
from lablog.commitment.qlora import (
    ACTIVE,
    CommittedModel,
    Plan,
    load_committed,
    load_to_read,
    train_commitment,
    training_key,
)
from lablog.commitment.readable import check_readable
from lablog.commitment.reader import Reader, name_values
from lablog.commitment.variational import VariationalCommitment
from lablog.determinism import seed_everything
from lablog.progress import progress
from lablog.text.dialogues import Draw, Split, Turn, generate, load_settings
from lablog.text.tokenizer import Tokenizer

Source = Literal["none", "prefix", "prior", "redrawn", "text"]
EXCHANGES = 16  # more than a dialogue has
PROBES = 5  # seed of the probes; settings were chosen on those of others


@dataclass(frozen=True)
class Arm:
    """A row of the table: which model, and where its z* comes from.

    model: ``base``, ``lora`` (trained without z*), ``random`` (the base under an untrained W_c)
    or ``commitment``. source: z* from the ``prefix``, from the ``prior`` once a conversation, or
    ``redrawn`` from it every turn; ``text`` leaves everything in the window instead.
    """

    label: str
    model: Literal["base", "lora", "random", "commitment"]
    source: Source


ARMS = {
    "base": Arm("base", "base", "none"),
    "lora": Arm("LoRA without z*", "lora", "none"),
    "random": Arm("untrained random z*", "random", "prior"),
    "prefix": Arm("trained z* from the prefix", "commitment", "prefix"),
    "prior": Arm("trained z* from the prior", "commitment", "prior"),
    "redrawn": Arm("trained z*, redrawn every turn", "commitment", "redrawn"),
    "window": Arm("everything in the window", "base", "text"),
}


def training_data(base: Path, seed: int, plan: Plan, data: str, split: Split = "train",
                  count: int | None = None) -> Dataset[Conversation]:
    """The conversations of one seed: ``dialogues`` (as many as the plan sees), or ``hub:NAME`` or
    a local folder of chats, of which the held-out ones are the split ``test``.

    Raises ValueError where the schedule's `cells` do not fit the data.
    """
    batch, tokenizer = plan.training.batch_size, Tokenizer(base / "tokenizer.model")
    known = load_settings().personas if data == "dialogues" else None
    if plan.schedule.cells and batch != known:
        raise ValueError(
            f"cells = {plan.schedule.cells:g} with micro-batches of {batch} conversations of "
            f"{data}: cells need every commitment once in a micro-batch "
            f"({known or 'unknown'} of them); set the schedule's cells to 0"
        )
    if data != "dialogues":
        chats = from_hub(data.removeprefix("hub:"), tokenizer, plan.window,
                         "train" if split == "train" else "test", plan.chat)
        return Subset(chats, range(min(count or len(chats), len(chats))))
    return Conversations(load_settings(), tokenizer, seed, count or plan.training.steps * batch,
                         batch, split=split, chat=plan.chat)


def train_seed(base: Path, plan: Plan, data: str, output: Path) -> Path:
    """Train one arm on its own seed's conversations."""
    dataset = training_data(base, plan.training.seed, plan, data)
    return train_commitment(base, dataset, plan, output, data)


class Probes:
    """The probes and texts that every arm is measured on."""

    def __init__(self, seed: int, items: int, texts: int) -> None:
        self.settings, self.seed = load_settings(), seed
        self.items = probes.make_items(self.settings, seed, items)
        self.texts = [generate(self.settings, seed, i, "held_out", "favourite", "probe").turns
                      for i in range(texts)]

    def latents(self, reader: Reader, source: Source, stream: int, n: int,
                prefixes: Sequence[Sequence[Turn]] | None = None) -> Tensor | None:
        """z* [n, exchanges, k] by `source`; without `prefixes` the prefix has not been said yet,
        and z* comes from the prior."""
        if reader.model.commitment is None:
            return None
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        k = reader.model.commitment.settings.k
        if source == "prefix" and prefixes is not None:
            posterior = reader.posterior(prefixes)
            noise = torch.randn(n, k, generator=generator).to(posterior.mean)
            return posterior.sample(noise)[:, None]
        turns = EXCHANGES if source == "redrawn" else 1
        return reader.model.commitment.prior(n * turns, generator).view(n, turns, k)

    def recall(self, reader: Reader, source: Source) -> probes.RecallResult:
        """Recall in the window and after eviction; the model writes both answers."""
        items = self.items.recall
        uniforms = np.stack([item.uniforms for item in items])
        z = self.latents(reader, source, 1, len(items))
        asked = [reader.prompt([item.question], "") for item in items]
        said = reader.answers(asked, z, probes.ANSWER_TOKENS, uniforms)
        firsts = [[item.question, Turn("A", text, "answer")]
                  for item, text in zip(items, said, strict=True)]
        z = self.latents(reader, source, 1, len(items), firsts)
        rest = [[*item.distractors, item.requestion] for item in items]
        inside = [reader.prompt([*first, *turns], "")
                  for first, turns in zip(firsts, rest, strict=True)]
        note = [[first[1]] if source == "text" else [] for first in firsts]
        outside = [reader.prompt([*kept, *turns], "", first=1)
                   for kept, turns in zip(note, rest, strict=True)]
        named = [
            np.array([probes.value_index(text, item.values)
                      for text, item in zip(texts, items, strict=True)])
            for texts in (said, *(reader.answers(prompts, z, probes.ANSWER_TOKENS)
                                  for prompts in (inside, outside)))
        ]
        return probes.RecallResult(*named)

    def fork(self, reader: Reader, source: Source) -> probes.ForkResult:
        """Every fork of every hidden choice."""
        items = self.items.fork
        z = self.latents(reader, source, 2, len(items), [[item.note] for item in items])
        histories = [[*([item.note] if source == "text" else []), *item.opening]
                     for item in items]
        rows = [(i, [*history, guess]) for i, (item, history) in
                enumerate(zip(items, histories, strict=True)) for guess in item.guesses]
        owner = [i for i, _ in rows]
        pairs = reader.yes_no([reader.prompt(turns, "") for _, turns in rows],
                              None if z is None else z[owner]).view(len(items), -1, 2)
        named = name_values(reader, [
            (reader.prompt([*history, item.naming], item.stem), item.values)
            for item, history in zip(items, histories, strict=True)
        ], z)
        return probes.ForkResult(
            (pairs[:, :, 0] / pairs.sum(dim=2)).numpy(), named.numpy(),
            pairs.sum(dim=2).mean(dim=1).numpy(), np.array([item.noted for item in items]))

    def language(self, reader: Reader, source: Source) -> list[tuple[Tensor, Tensor]]:
        """For each held-out text the log probabilities behind its tokens and the targets that are
        the model's own words, (rows [own, vocabulary], targets [own])."""
        z = self.latents(reader, source, 3, len(self.texts), [t[:2] for t in self.texts])
        prompts = [reader.prompt(turns) for turns in self.texts]
        return [(rows[p.own[1:]], torch.from_numpy(p.ids[1:][p.own[1:]]))
                for rows, p in zip(reader.log_probabilities(prompts, z), prompts, strict=True)]


def choices(reader: Reader, draws: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """z* from the prior [draws, k] and, for each topic, the value that each draw names
    (int [topics, draws]); the same draws in every topic."""
    settings = load_settings()
    assert reader.model.commitment is not None
    z = reader.model.commitment.prior(draws, torch.Generator().manual_seed(seed))
    named = []
    for number, (topic, values) in enumerate(settings.topics.items()):
        draw = Draw(settings, seed, 106, number)
        turns = [*draw.exchange("opening", "chosen", topic), draw.turn("U", "what_is_it", topic)]
        prompt = reader.prompt(turns, settings.it_is[0].split(" {value}")[0])
        named.append(name_values(reader, [(prompt, values)] * draws, z[:, None]).argmax(dim=1))
    return z, torch.stack(named).numpy()


@torch.inference_mode()
def diagnose(model: CommittedModel, dataset: Dataset[Conversation], batch: int) -> dict[str, Any]:
    """KL per dimension, active units, and the LM loss (nats per conversation) under the true z*,
    z* of another conversation of the batch, and none; on `dataset`."""
    losses: dict[str, list[float]] = {"true": [], "shuffled": [], "zero": []}
    kls, means = [], []
    size: int = len(dataset)  # type: ignore[arg-type]  # Dataset does not say that it is sized
    for begin in range(0, size, batch):
        inputs = model.collated([dataset[i] for i in range(begin, min(begin + batch, size))])
        posterior = model.posterior(inputs["prefix_ids"], inputs["prefix_mask"])
        noise = torch.randn(
            posterior.mean.shape, generator=torch.Generator().manual_seed(begin))
        z = posterior.sample(noise.to(posterior.mean))
        for name, used in (("true", z), ("shuffled", z.roll(1, dims=0)), ("zero", 0 * z)):
            losses[name].append(model(**inputs, z=used)["lm"].item())
        kls.append(posterior.kl())
        means.append(posterior.mean)
    mean = torch.cat(means)
    return {"kl_per_dimension": torch.cat(kls).mean(dim=0).tolist(),
            "active_units": int((mean.var(dim=0) > ACTIVE).sum()),
            **{f"nll_{name}": float(np.mean(values)) for name, values in losses.items()}}


def arm_model(arm: Arm, base: Path, folders: Mapping[str, Path], plan: Plan,
              seed: int) -> CommittedModel:
    """The model of an arm; `folders` holds what was trained, by the name of the model.

    The untrained W_c is the native sampler's, and its λ gives it the trained one's mean length.
    """
    if arm.model in ("lora", "commitment"):
        return load_committed(base, folders[arm.model])
    model = load_to_read(base, plan)
    if arm.model == "base":
        return CommittedModel(model)
    trained = VariationalCommitment.load(folders["commitment"])
    settings, length = trained.settings, trained.projection.norm().item()
    sampled = torch.from_numpy(latent.sample(seed, settings.k, settings.width).projection)
    strength = settings.strength * length / sampled.norm().item()
    untrained = VariationalCommitment(settings.model_copy(update={"strength": strength}))
    with torch.no_grad():
        untrained.projection.copy_(sampled)
    return CommittedModel(model, untrained.to(model.device))


def measure(name: str, base: Path, folders: Mapping[str, Path], plan: Plan, seed: int,
            size: tuple[int, int, int]) -> dict[str, Any]:
    """One row of the table for one seed; `size`: seed and number of the probes, held-out texts."""
    seed_everything(seed, threads=1)
    arm, material = ARMS[name], Probes(*size)
    reader = Reader(arm_model(arm, base, folders, plan, seed),
                    Tokenizer(base / "tokenizer.model"), plan.chat)
    recall, fork = material.recall(reader, arm.source), material.fork(reader, arm.source)
    rows = material.language(reader, arm.source)
    plain = material.language(
        Reader(CommittedModel(load_to_read(base, plan)), reader.tokenizer, plan.chat), "none"
    )
    loss = torch.cat([-found.gather(1, targets[:, None])[:, 0] for found, targets in rows])
    drift = torch.cat([(found.exp() * (found - before)).sum(dim=1)
                       for (found, _), (before, _) in zip(rows, plain, strict=True)])
    result: dict[str, Any] = {
        "arm": name, "seed": seed, "items": len(recall.first),
        "answered": float(recall.answered.mean()), "recall": float(recall.recalled.mean()),
        "eviction": float(recall.recalled_after_eviction.mean()),
        "same_choice": float(fork.same.mean()), "yes_sum": float(fork.yes_sum.mean()),
        "perplexity": float(loss.double().mean().exp()), "kl_base": float(drift.double().mean()),
    }
    if arm.source == "prefix":
        posterior = reader.posterior([[item.note] for item in material.items.fork])
        result["kl"] = float(posterior.kl().sum(dim=1).mean())
        result["kept"] = float((fork.named.argmax(axis=1) == fork.noted).mean())
    if arm.source == "prior" and arm.model == "commitment":
        _, named = choices(reader, 10 * fork.named.shape[1], seed)
        result["reached"] = float(np.mean([len(set(row)) / fork.named.shape[1] for row in named]))
    return result


def _together(pool: ProcessPoolExecutor, description: str,
              calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Results of independent calls, in order, each in one of the pool's processes."""
    with progress(len(calls), description, "run") as bar:
        futures = [pool.submit(function, *arguments) for function, arguments in calls]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        return [future.result() for future in futures]


def study(base: Path, plan: Plan, data: str, seeds: Sequence[int], artifacts: Path,
          size: tuple[int, int, int], workers: int,
          ) -> tuple[pd.DataFrame, dict[tuple[int, str], Path]]:
    """Train z* and its control for every seed, measure every arm; rows, and the trained folders
    by seed and by ``commitment`` or ``lora``.

    Trained folders lie in `artifacts` under the digest of all that decides them and are reused.
    Before anything is trained, ValueError where the probes could not be read afterwards.
    """
    material = Probes(*size)
    check_readable(base, plan, material.settings, material.items, material.texts)
    calls, folders = [], {}
    for seed in seeds:
        for model, k in (("commitment", plan.k), ("lora", 0)):
            training = plan.training.model_copy(update={"seed": seed})
            mine = plan.model_copy(update={"k": k, "training": training})
            name = f"qlora-{model}-{seed}-{training_key(base, mine, data)}"
            folders[seed, model] = artifacts / name
            calls.append((train_seed, (base, mine, data, folders[seed, model])))
    measured = [
        (measure, (name, base, {m: folders[seed, m] for m in ("commitment", "lora")},
                   plan, seed, size))
        for name, arm in ARMS.items() for seed in (seeds if arm.model != "base" else seeds[:1])
    ]
    # One thread each: several small models at a time are faster than one on several threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        _together(pool, "training", calls)
        rows = pd.DataFrame(_together(pool, "probes", measured))
    return rows, folders
