"""Many configurations of the commitment, evaluated in parallel, resumable, with controls."""

from __future__ import annotations

import json
import math
import queue
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from lablog.commitment import coherence, latent, probes
from lablog.commitment.window import Injection, Speech
from lablog.intervals import Interval, hierarchical, t_interval
from lablog.keys import key
from lablog.models.llama_cpp import Commitment, Context, Model
from lablog.progress import progress
from lablog.provenance import usable_threads
from lablog.text.dialogues import load_settings

Control = Literal["commitment", "redrawn", "none", "text"]
RANGES = ("all", "last quarter", "first quarter", "layer 0")


class NamedRow(NamedTuple):
    """A row that has a name in the records and in both languages: λ in a named range."""

    key: str
    english: str
    japanese: str
    strength: float
    layers: str


NAMED_ROWS = (
    NamedRow("lambda1.all", "λ = 1, all layers", "λ = 1, 全層", 1.0, "all"),
    NamedRow("lambda0.1.all", "λ = 0.1, all layers", "λ = 0.1, 全層", 0.1, "all"),
    NamedRow("lambda0.01.all", "λ = 0.01, all layers", "λ = 0.01, 全層", 0.01, "all"),
    NamedRow("lambda0.01.last_quarter", "λ = 0.01, last quarter", "λ = 0.01, 最後の四分の一",
             0.01, "last quarter"),
)
"""The log's four experiments; its "last 8 layers" of 32 are the last quarter."""
AT_LOG_DOSE = tuple(
    row._replace(key=f"log_dose.{row.key}", english=f"the log's dose of {row.english}",
                 japanese=f"ログの {row.japanese} と同じ用量")
    for row in NAMED_ROWS
)
"""The same four with the dose, not the λ, that they had in the log; λ depends on the model."""
LOG_WIDTH, LOG_LAYERS, LOG_K = 4096, 32, 64
"""The log's model, Llama-2-7B, and the dimension of its z*."""
LOG_RESIDUAL_NORM = 23.0
"""Mean ‖h‖ of ordinary tokens of Llama-2-7B, derived from published quantiles.

Sun, Chen, Kolter and Liu, Massive Activations in Large Language Models (COLM 2024,
arXiv:2402.17762), table 1: of the magnitudes |h_i| in a hidden state of LLaMA2-7B the median is
0.2, the upper 10 % begin at 0.6 and the upper 1 % at 1.1. For coordinates N(0, σ²) these are
0.674 σ, 1.645 σ and 2.576 σ, so that ‖h‖ = √4096 σ is 19, 23 or 27; the middle one is taken. One
hidden state stands for 32 layers here, and norms grow along the layers; the quantiles are quoted
from memory, the table was not at hand: trust it to a factor of two or three, no better.
"""
REDRAWN = 1024
"""Directions of the redrawn control. More than a fork has questions; no multiple of 13 is one."""
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


def expected_norm(width: int, k: int) -> float:
    """‖W_c z*‖ of a typical commitment, sqrt(2d/(d + k))."""
    return math.sqrt(2 * width / (width + k))


def log_dose(strength: float, layers: str) -> float:
    """The dose that λ in a named range was in the log's model."""
    first, last = layer_range(layers, LOG_LAYERS)
    return strength * (last - first + 1) * expected_norm(LOG_WIDTH, LOG_K) / LOG_RESIDUAL_NORM


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
    """One configuration: a control, λ, a named layer range and the commitment's seed.

    language: whether coherence is measured too, which costs half of the time.
    """

    control: Control
    strength: float = 0.0
    layers: str = "all"
    seed: int = 0
    language: bool = True


def grid(strengths: Iterable[float], ranges: Iterable[str], seeds: Iterable[int],
         controls: Sequence[Control] = ("commitment",), language: bool = True) -> list[Task]:
    """Every combination, preceded by the unmodified model and the text-only baseline."""
    seeds, strengths = list(seeds), [s for s in strengths if s != 0]
    tasks = [Task("none"), Task("text")]
    return tasks + [
        Task(control, strength, layers, seed, language)
        for control in controls for layers in ranges for strength in strengths for seed in seeds
    ]


def named_tasks(rows: Sequence[NamedRow], seeds: Iterable[int]) -> list[Task]:
    """The two baselines, and every row with its redrawn control under every seed."""
    controls: tuple[Control, ...] = ("commitment", "redrawn")
    seeds = list(seeds)
    tasks = [Task("none"), Task("text"), *(
        Task(control, row.strength, row.layers, seed)
        for row in rows for control in controls for seed in seeds
    )]
    return list(dict.fromkeys(tasks))


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
        self.key = key(Laboratory.evaluate, settings, gguf)
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
        # Turn t of the control, or forked question t, gets a direction of its own.
        rng = np.random.default_rng([task.seed, 104])
        drawn = rng.standard_normal((REDRAWN, self.model.width))
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

    def rows_at_the_logs_dose(self) -> tuple[NamedRow, ...]:
        """The log's four experiments at the λ that has their dose in this model.

        The dose is that of a commitment of typical norm, so that one λ holds for all seeds.
        """
        norm, rows = expected_norm(self.model.width, self.settings.k), []
        for row in AT_LOG_DOSE:
            first, last = self.layers(row.layers)
            unit = (last - first + 1) * norm / float(self.residual.mean())
            rows.append(row._replace(strength=log_dose(row.strength, row.layers) / unit))
        return tuple(rows)

    def evaluate(self, task: Task) -> dict[str, Any]:
        """One row: the task, its dose, and all metrics; those of the probes item by item too."""
        injection = self.injection(task)
        note: probes.Note = "text" if task.control == "text" else "none"

        def work(speech: Speech) -> dict[str, Any]:
            recall = probes.run_recall(speech, self.items.recall, injection, note)
            fork = probes.run_fork(speech, self.items.fork, injection, note)
            by_item = {
                "answered": recall.answered, "recall": recall.recalled,
                "eviction": recall.recalled_after_eviction, "same_choice": fork.same,
                "yes_sum": fork.yes_sum, "answer_mass": fork.answer_mass,
            }
            row = asdict(task) | {"dose": self.dose(task), "items": len(self.items.recall)}
            for name, values in by_item.items():
                row |= {name: float(values.mean()), f"{name}_items": _packed(values)}
            if not task.language:
                return row | UNMEASURED
            language = coherence.measure(speech, self.material, injection)
            return row | asdict(language) | {
                "word": language.word(self.baseline, coherence.Thresholds())
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
        return pd.DataFrame([
            done[self._identity(task)] | asdict(task) | {"span": self.span(task.layers)}
            for task in tasks
        ])

    def span(self, name: str) -> str:
        """The layers of a named range as text; equal for names that mean the same here."""
        first, last = self.layers(name)
        return f"{first}" if first == last else f"{first}–{last}"

    def _identity(self, task: Task) -> tuple[Any, ...]:
        return (task.control, task.strength, self.layers(task.layers), task.seed, task.language)


UNMEASURED = {field.name: math.nan for field in fields(coherence.Coherence)} | {"word": "unread"}
"""What a row holds in place of coherence that was not asked for."""


def _packed(values: np.ndarray) -> str:
    """One value an item as text for the journal: 0110… for booleans."""
    if values.dtype == bool:
        return "".join("01"[value] for value in values.astype(int))
    return " ".join(f"{value:.6g}" for value in values)


def by_item(rows: pd.DataFrame, name: str) -> np.ndarray:
    """One measure of the probes, float64 [rows, items]."""
    packed = rows[f"{name}_items"]
    return np.array([[float(x) for x in (text if name in PROPORTIONS else text.split())]
                     for text in packed])


MEASURES = ("recall", "eviction", "same_choice", "yes_sum", "answered", "perplexity", "kl_mean",
            "kl_p95", "own_kl_mean", "own_kl_p95", "same_top", "repeated_4grams", "distinct_1",
            "distinct_2", "answer_mass", "dose")
PROPORTIONS = ("recall", "eviction", "same_choice", "answered")
BY_ITEM = (*PROPORTIONS, "yes_sum", "answer_mass")
SHARES = ("same_top", "repeated_4grams", "distinct_1", "distinct_2")


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds and 95 % interval (``_low``, ``_high``) of every measure.

    One row per (control, λ, range), with the layers' span and the names that share it.
    """
    names = rows.groupby("span", sort=False)["layers"].unique().map(" = ".join)
    table = []
    for which, group in rows.groupby(["control", "layers", "strength"], sort=False):
        entry: dict[str, Any] = dict(zip(("control", "layers", "strength"), which, strict=True))
        entry |= {"span": group["span"].iloc[0], "seeds": len(group),
                  "range": names[group["span"].iloc[0]]}
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
    """The interval of one measure over the rows (seeds) of one configuration.

    Probes: the hierarchical bootstrap over seeds and items. Language, which has no items:
    Student's t over seeds; None for one seed, or where the seeds do not differ at all.
    """
    if name in BY_ITEM:
        return hierarchical(by_item(group, name), share=name in (*PROPORTIONS, "answer_mass"))
    values = group[name].to_numpy()
    if len(values) < 2 or np.isnan(values).any() or np.ptp(values) == 0:
        return None
    return t_interval(values.tolist(), within=(0.0, 1.0 if name in SHARES else math.inf))
