"""Many configurations of the commitment, evaluated in parallel, resumable, with controls."""

from __future__ import annotations

import hashlib
import json
import math
import queue
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from lablog.commitment import coherence, latent, probes
from lablog.commitment.window import Injection, Speech
from lablog.files import sha256, sha256_of
from lablog.intervals import Interval, over_seeds, wilson
from lablog.models.llama_cpp import Commitment, Context, Model
from lablog.progress import progress
from lablog.provenance import usable_threads
from lablog.text.dialogues import load_settings

Control = Literal["commitment", "redrawn", "none", "text"]
RANGES = ("all", "last quarter", "first quarter", "layer 0")
NAMED_ROWS = (("λ = 1, all layers", 1.0, "all"), ("λ = 0.1, all layers", 0.1, "all"),
              ("λ = 0.01, all layers", 0.01, "all"),
              ("λ = 0.01, last quarter", 0.01, "last quarter"))
"""The log's four experiments; its "last 8 layers" of 32 are the last quarter."""
SMALL = 50_000_000
"""Parameters up to which one thread a context is faster than many threads in one."""


def layer_range(name: str, layers: int) -> tuple[int, int]:
    """A named range of a model's layers, 0-based and inclusive; a quarter is rounded up."""
    quarter = math.ceil(layers / 4)
    ranges = {"all": (0, layers - 1), "last quarter": (layers - quarter, layers - 1),
              "first quarter": (0, quarter - 1), "layer 0": (0, 0)}
    if name not in ranges:
        raise ValueError(f"layer range {name!r}: expected one of {', '.join(RANGES)}")
    return ranges[name]


@dataclass(frozen=True)
class Settings:
    """What a sweep measures with.

    k: latent dimension; items: probes of each family; texts, continuations, tokens: material of
    the coherence metrics; item_seed: seed of both; sequences, window: size of a context;
    chat: how the model is spoken to.
    """

    k: int
    items: int
    texts: int
    continuations: int
    tokens: int
    item_seed: int
    sequences: int
    window: int
    chat: str


@dataclass(frozen=True)
class Task:
    """One configuration: a control, λ, a named layer range and the commitment's seed."""

    control: Control
    strength: float = 0.0
    layers: str = "all"
    seed: int = 0


def grid(strengths: Iterable[float], ranges: Iterable[str], seeds: Iterable[int],
         controls: Sequence[Control] = ("commitment",)) -> list[Task]:
    """Every combination, preceded by the unmodified model and the text-only baseline."""
    seeds, strengths = list(seeds), [s for s in strengths if s != 0]
    tasks = [Task("none"), Task("text")]
    return tasks + [
        Task(control, strength, layers, seed)
        for control in controls for layers in ranges for strength in strengths for seed in seeds
    ]


class Laboratory:
    """A model with the probes and the material to evaluate it on (a context manager)."""

    def __init__(self, gguf: Path, settings: Settings, gpu_layers: int = 0) -> None:
        self.settings = settings
        dialogues = load_settings()
        self.items = probes.make_items(dialogues, settings.item_seed, settings.items)
        self.material = coherence.make_material(
            dialogues, settings.item_seed, settings.texts, settings.continuations, settings.tokens
        )
        self._stack = ExitStack()
        self.model = self._stack.enter_context(Model(gguf, gpu_layers))
        small = self.model.parameters <= SMALL
        self.workers = usable_threads() if small else 1
        self._idle: queue.SimpleQueue[Speech] = queue.SimpleQueue()
        for _ in range(self.workers):
            context = Context(
                self.model, settings.sequences, settings.window,
                threads=1 if small else usable_threads(), cache_type="f16",
            )
            self._idle.put(Speech(self._stack.enter_context(context), settings.chat))
        here = Path(__file__).parents[1]
        code = sha256_of([*here.glob("commitment/*.py"), here / "models/llama_cpp.py",
                          here / "text/dialogues.py"], here)
        parts = [asdict(settings), sha256(gguf), code, dialogues.model_dump(exclude={"recipes"})]
        self.key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        self.residual = self._residual_norms()
        self.baseline = self.with_speech(
            lambda speech: coherence.measure(speech, self.material, Injection())
        )

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the contexts and the model."""
        self._stack.close()

    def with_speech(self, function: Any) -> Any:
        speech = self._idle.get()
        try:
            return function(speech)
        finally:
            self._idle.put(speech)

    def _residual_norms(self) -> np.ndarray:
        """Mean ‖h‖ after each layer of the unmodified model on the held-out texts [layers]."""
        with Context(self.model, min(16, self.settings.sequences), self.settings.window,
                     usable_threads(), watch_residual=True) as context:
            coherence.read(Speech(context, self.settings.chat), self.material.texts, Injection())
            return context.residual_norms()

    def layers(self, name: str) -> tuple[int, int]:
        """A named range in this model."""
        return layer_range(name, self.model.layers)

    def injection(self, task: Task) -> Injection:
        """What a task injects; a redrawn direction has the norm of the commitment's."""
        if task.control in ("none", "text"):
            return Injection()
        layers = self.layers(task.layers)
        first = latent.sample(task.seed, self.settings.k, self.model.width)
        if task.control == "commitment":
            return Injection((Commitment(first.direction, task.strength, layers),))
        # Turn t of the control gets a direction of its own; 16 are more than a dialogue's turns.
        rng = np.random.default_rng([task.seed, 104])
        drawn = rng.standard_normal((16, self.model.width))
        drawn *= first.norm / np.linalg.norm(drawn, axis=1, keepdims=True)
        return Injection(tuple(
            Commitment(direction.astype(np.float32), task.strength, layers) for direction in drawn
        ))

    def dose(self, task: Task) -> float:
        """λ · number of layers · ‖W_c z*‖ / mean ‖h‖ (lab log A1); 0 without a commitment."""
        if task.control in ("none", "text"):
            return 0.0
        first, last = self.layers(task.layers)
        norm = latent.sample(task.seed, self.settings.k, self.model.width).norm
        return task.strength * (last - first + 1) * norm / float(self.residual.mean())

    def evaluate(self, task: Task) -> dict[str, Any]:
        """One row: the task, its dose, and all metrics."""
        injection = self.injection(task)
        note: probes.Note = "text" if task.control == "text" else "none"

        def work(speech: Speech) -> dict[str, Any]:
            recall = probes.run_recall(speech, self.items.recall, injection, note)
            fork = probes.run_fork(speech, self.items.fork, injection, note)
            language = coherence.measure(speech, self.material, injection)
            word = language.word(self.baseline, coherence.Thresholds())
            return {
                **asdict(task), "dose": self.dose(task), "items": len(self.items.recall),
                "answered": float(recall.answered.mean()),
                "recall": float(recall.recalled.mean()),
                "eviction": float(recall.recalled_after_eviction.mean()),
                "yes_sum": float(fork.yes_sum.mean()), "same_choice": float(fork.same.mean()),
                "answer_mass": float(fork.answer_mass.mean()), **asdict(language), "word": word,
            }

        return self.with_speech(work)

    def continuation(self, task: Task) -> str:
        """What the model writes under a task behind the first opening."""
        one = replace(self.material, uniforms=self.material.uniforms[:1])
        texts, _ = self.with_speech(
            lambda speech: coherence.continuations(speech, one, self.injection(task))
        )
        return self.model.detokenize(texts[0])

    def run(self, tasks: Sequence[Task], artifacts: Path) -> pd.DataFrame:
        """Evaluate all tasks, one row each, in their order.

        Finished rows are kept in `artifacts` and not computed again after an interruption.
        Ranges that name the same layers of this model are computed once.
        """
        artifacts.mkdir(parents=True, exist_ok=True)
        journal = artifacts / f"sweep-{self.key}.jsonl"
        done: dict[tuple[Any, ...], dict[str, Any]] = {}
        if journal.is_file():
            for line in journal.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line that a kill cut off
                    continue
                done[self._identity(Task(*(row[f] for f in Task.__dataclass_fields__)))] = row
        missing = {self._identity(task): task for task in tasks}
        missing = {identity: task for identity, task in missing.items() if identity not in done}
        bar = progress(len(missing), "sweep", "run")
        with ThreadPoolExecutor(self.workers) as pool, journal.open("a") as file, bar:
            futures = {pool.submit(self.evaluate, t): identity for identity, t in missing.items()}
            try:
                for future in as_completed(futures):
                    done[futures[future]] = row = future.result()
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return pd.DataFrame([done[self._identity(task)] | asdict(task) for task in tasks])

    def _identity(self, task: Task) -> tuple[Any, ...]:
        return (task.control, task.strength, self.layers(task.layers), task.seed)


MEASURES = ("recall", "eviction", "same_choice", "yes_sum", "answered", "perplexity", "kl_mean",
            "kl_p95", "own_kl_mean", "own_kl_p95", "same_top", "repeated_4grams", "distinct_1",
            "distinct_2", "answer_mass", "dose")
PROPORTIONS = ("recall", "eviction", "same_choice", "answered")


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds and 95 % interval (``_low``, ``_high``) of every measure.

    One row per (control, λ, range). Over seeds the interval is Student's t; without seeds
    (unmodified model, text baseline) proportions have Wilson's interval over items, others none.
    """
    table = []
    for key, group in rows.groupby(["control", "layers", "strength"], sort=False):
        entry: dict[str, Any] = dict(zip(("control", "layers", "strength"), key, strict=True))
        entry["seeds"] = len(group)
        entry["word"] = group["word"].mode().iloc[0]
        entry["words"] = ", ".join(f"{w} {n}" for w, n in group["word"].value_counts().items())
        for name in MEASURES:
            interval = interval_of(group, name)
            entry[name] = float(group[name].mean())
            entry[f"{name}_low"] = interval.low if interval else math.nan
            entry[f"{name}_high"] = interval.high if interval else math.nan
        table.append(entry)
    return pd.DataFrame(table)


def interval_of(group: pd.DataFrame, name: str) -> Interval | None:
    """The interval of one measure over the rows (seeds) of one configuration."""
    if len(group) > 1:
        return over_seeds(group[name].tolist())
    if name in PROPORTIONS:
        items = int(group["items"].iloc[0])
        return wilson(round(float(group[name].iloc[0]) * items), items)
    return None
