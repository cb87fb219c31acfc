"""Many configurations of the commitment, evaluated in parallel, resumable, with controls."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd

from lablog.commitment import coherence, probes, sampler
from lablog.commitment.llama_cpp_speaker import (
    Engine,
    EngineSettings,
    Injection,
    LlamaCppSpeaker,
)
from lablog.commitment.log_experiments import PROMPT, layer_range, span
from lablog.keys import key
from lablog.models.llama_cpp import Commitment, Model
from lablog.tasks import Tasks
from lablog.text.dialogues import Turn

R = TypeVar("R", probes.RecallResult, probes.ForkResult)
Control = Literal["commitment", "redrawn", "none", "text", "system", "instruction", "steering"]
AIDS: dict[str, probes.Aid] = {"text": "note", "system": "system", "instruction": "instruction"}
"""Controls that inject nothing and help by text instead."""
LOG_TOKENS = 32  # of an answer to the log's own prompt
BLOCK = 4
"""Configurations of a small model that one process evaluates, so that starting it costs little."""
REDRAWN = 1024
"""Directions of the redrawn control. More than a fork has questions; no multiple of 13 is one."""


@dataclass(frozen=True)
class Task:
    """One configuration: a control, λ, a named layer range and the commitment's seed.

    language: whether coherence is measured too, which costs half of the time.
    """

    control: Control
    strength: float = 0.0
    layers: str = "all"
    seed: int = 0
    language: bool = True


@dataclass(frozen=True)
class Conditions:
    """What all configurations of a sweep share.

    k: latent dimension; items, material: what is asked, read and continued; residual_norms,
    baseline: of the unmodified model (`Engine.residual_norms` on the texts of the material,
    `coherence.baseline`), so that they follow from the material and the model. steering: the
    direction for each topic, by its values, that the control ``steering`` injects.
    """

    k: int
    items: probes.Items
    material: coherence.Material
    residual_norms: np.ndarray
    baseline: coherence.Baseline
    steering: Mapping[tuple[str, ...], np.ndarray] = field(default_factory=dict)


def injection(task: Task, model: Model, k: int,
              steering: np.ndarray | None = None) -> Injection:
    """What a task injects; a redrawn direction has the norm of the commitment's."""
    if task.control == "steering":
        assert steering is not None
        return Injection((Commitment(steering, task.strength,
                                     layer_range(task.layers, model.layers)),))
    if task.control not in ("commitment", "redrawn"):
        return Injection()
    layers = layer_range(task.layers, model.layers)
    first = sampler.sample(task.seed, k, model.width)
    if task.control == "commitment":
        return Injection((Commitment(first.direction, task.strength, layers),))
    # Turn t of the control, or forked question t, gets a direction of its own.
    rng = np.random.default_rng([task.seed, 104])
    drawn = rng.standard_normal((REDRAWN, model.width))
    drawn *= first.norm / np.linalg.norm(drawn, axis=1, keepdims=True)
    return Injection(tuple(
        Commitment(direction.astype(np.float32), task.strength, layers) for direction in drawn
    ))


def dose(task: Task, model: Model, k: int, residual_norms: np.ndarray,
         steering: Mapping[tuple[str, ...], np.ndarray] | None = None) -> float:
    """λ · number of layers · ‖W_c z*‖ / mean ‖h‖ (lab log A1), of steering with its mean length; 0
    where nothing is injected."""
    if task.control == "steering" and steering:
        norm = float(np.mean([np.linalg.norm(row) for row in steering.values()]))
    elif task.control in ("commitment", "redrawn"):
        norm = sampler.sample(task.seed, k, model.width).norm
    else:
        return 0.0
    first, last = layer_range(task.layers, model.layers)
    return task.strength * (last - first + 1) * norm / float(residual_norms.mean())


def evaluate(engine: Engine, task: Task, conditions: Conditions) -> dict[str, Any]:
    """One row: the task, its dose, and all metrics; those of the probes item by item too."""
    items, aid = conditions.items, AIDS.get(task.control)
    speaker = engine.speaker
    recall = _by_topic(task, engine.model, conditions, items.recall, probes.RecallResult,
                       lambda part, under: _recall(speaker, part, under, aid))
    fork = _by_topic(task, engine.model, conditions, items.fork, probes.ForkResult,
                     lambda part, under: probes.fork(speaker, part, under, aid))
    language = coherence.coherence(
        speaker, conditions.material, _injected(task, engine.model, conditions),
        conditions.baseline) if task.language else None
    by_item = {
        "answered": recall.answered, "recall": recall.recalled,
        "eviction": recall.recalled_after_eviction, "same_choice": fork.same,
        "yes_sum": fork.yes_sum, "answer_mass": fork.answer_mass, "named_mass": fork.named_mass,
        "first_named": fork.named[:, 0],
    }
    row = asdict(task) | {
        "dose": dose(task, engine.model, conditions.k, conditions.residual_norms,
                     conditions.steering),
        "items": len(items.recall)}
    for name, values in by_item.items():
        row |= {name: float(values.mean()), f"{name}_items": _packed(values)}
    if language is None:
        return row | UNMEASURED
    return row | asdict(language) | {
        "word": language.word(conditions.baseline.coherence, coherence.Thresholds())}


def _injected(task: Task, model: Model, conditions: Conditions,
              topic: tuple[str, ...] | None = None) -> Injection:
    """What a task injects where a topic is asked for; steering has a direction for each topic, of
    which texts about many get the first."""
    steering = None
    if task.control == "steering":
        steering = conditions.steering[topic or next(iter(conditions.steering))]
    return injection(task, model, conditions.k, steering)


def _by_topic(task: Task, model: Model, conditions: Conditions, items: Sequence[Any],
              kind: type[R], probe: Callable[[Sequence[Any], Injection], R]) -> R:
    """The probes of all items together, or those of each topic under its own direction."""
    if task.control != "steering":
        return probe(items, _injected(task, model, conditions))
    parts: dict[tuple[str, ...], list[int]] = {}
    for index, item in enumerate(items):
        parts.setdefault(item.values, []).append(index)
    found = [probe([items[i] for i in part], _injected(task, model, conditions, topic))
             for topic, part in parts.items()]
    order = np.argsort(np.concatenate(list(parts.values())))
    return kind(*(np.concatenate([getattr(part, one.name) for part in found])[order]
                  for one in fields(kind)))


def _recall(speaker: LlamaCppSpeaker, items: Sequence[probes.RecallItem], injected: Injection,
            aid: probes.Aid | None) -> probes.RecallResult:
    """Recall of as many items at a time as the context holds, so that the first exchange of each
    is still in its cache when it is asked again."""
    size = speaker.context.sequences
    parts = [probes.recall(speaker, items[begin : begin + size], injected, aid=aid)
             for begin in range(0, len(items), size)]
    return probes.RecallResult(*(np.concatenate([getattr(part, name) for part in parts])
                                 for name in ("first", "again", "evicted")))


def continuation(engine: Engine, task: Task, conditions: Conditions) -> str:
    """What the model writes under a task behind the first opening."""
    material, injected = conditions.material, _injected(task, engine.model, conditions)
    (tokens,) = engine.speaker.write(material.openings[:1], injected, material.uniforms[:1])
    return engine.model.detokenize(tokens)


def log_prompt(engine: Engine, task: Task, conditions: Conditions) -> tuple[str, str, str]:
    """What the model answers greedily to the log's own prompt under a task: first, again, and again
    when the first exchange has left the window. In lower case where turns are plain lines."""
    injected = _injected(task, engine.model, conditions)
    question, again = (Turn("U", text.lower() if engine.settings.chat == "plain" else text, "log")
                       for text in PROMPT)
    speaker = engine.speaker
    (first,) = speaker.say([[question]], injected, LOG_TOKENS)
    told = [question, Turn("A", first, "answer"), again]
    (second,) = speaker.say([told], injected, LOG_TOKENS)
    (evicted,) = speaker.say([[again]], injected, LOG_TOKENS, first=1)
    return first, second, evicted


def evaluate_block(settings: EngineSettings, conditions: Conditions,
                   *configurations: Task) -> list[dict[str, Any]]:
    """`evaluate` of several configurations in turn, by an engine of their own."""
    with Engine(settings) as engine:
        return [evaluate(engine, task, conditions) for task in configurations]


def sweep(tasks: Tasks, engine: Engine, configurations: Sequence[Task], conditions: Conditions,
          artifacts: Path) -> pd.DataFrame:
    """Evaluate all configurations by `tasks`, one row each, in their order.

    Finished rows are kept in `artifacts`, under the key of all that decides them, and not computed
    again after an interruption, nor for another notebook that asks for the same. Ranges that name
    the same layers of this model are computed once.
    """
    asked = engine.settings
    made_of = key(evaluate, conditions.k, conditions.items, conditions.material, *astuple(asked))
    steering = key(evaluate, list(conditions.steering.values()))
    artifacts.mkdir(parents=True, exist_ok=True)
    journal = artifacts / f"sweep-{made_of}.jsonl"
    layers = engine.model.layers

    def directions(task: Task) -> str:
        return steering if task.control == "steering" else ""

    def identity(task: Task) -> tuple[Any, ...]:
        return (task.control, task.strength, layer_range(task.layers, layers), task.seed,
                task.language)

    def as_task(row: Mapping[str, Any]) -> Task:
        return Task(*(row[one.name] for one in fields(Task)))

    done = {identity(as_task(row)): row for row in journalled(journal)
            if row["directions"] == directions(as_task(row))}
    missing = list({identity(task): task for task in configurations
                    if identity(task) not in done}.values())
    size = BLOCK if engine.small else 1
    blocks = [tuple(missing[i : i + size]) for i in range(0, len(missing), size)]
    engine.make_room()
    with journal.open("ab", buffering=0) as file:  # a block is one write, whoever else writes
        if blocks and file.tell():  # what a kill may have cut off takes no row with it
            file.write(b"\n")
        def keep(_: int, rows: list[dict[str, Any]]) -> None:
            lines = []
            for row in rows:
                task = as_task(row)
                done[identity(task)] = kept = row | {"directions": directions(task)}
                lines.append(json.dumps(kept) + "\n")
            file.write("".join(lines).encode())

        tasks.map("sweep", evaluate_block, blocks, common=(asked, conditions), reads=[asked.gguf],
                  threads=asked.threads, gpus=float(asked.gpu_layers > 0), done=keep)
    return pd.DataFrame([
        done[identity(task)] | asdict(task) | {"span": span(task.layers, layers)}
        for task in configurations
    ]).drop(columns="directions", errors="ignore")


def journalled(journal: Path) -> list[dict[str, Any]]:
    """The whole rows that a sweep has kept: a kill may have cut one off."""
    rows, names = [], {"directions", *(one.name for one in fields(Task))}
    for line in journal.read_bytes().splitlines() if journal.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the line that a kill cut off
            continue
        if isinstance(row, dict) and names <= row.keys():
            rows.append(row)
    return rows


UNMEASURED = {one.name: math.nan for one in fields(coherence.Coherence)} | {"word": "unread"}
"""What a row holds in place of coherence that was not asked for."""


def _packed(values: np.ndarray) -> str:
    """One value an item as text for the journal: 0110… for booleans."""
    if values.dtype == bool:
        return "".join("01"[value] for value in values.astype(int))
    return " ".join(f"{value:.6g}" for value in values)
