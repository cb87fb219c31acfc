"""Metrics, mandated report and figures of notebook 03."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import LlamaForCausalLM

from lablog.commitment.arms import ARMS, TRAININGS, Asked
from lablog.commitment.novelty import HEADLINE, whole_topics
from lablog.commitment.qlora import load_base
from lablog.figures import COLOURS, GREY, MARKERS
from lablog.intervals import Interval, hierarchical
from lablog.models import evaluation
from lablog.record import Record
from lablog.report import format_metric
from lablog.run import Run
from lablog.text.dialogues import load_settings
from lablog.text.tokenizer import Tokenizer

Drawn = tuple[Figure, pd.DataFrame]
UNITS = {"recall": "fraction", "eviction": "fraction", "same_choice": "fraction",
         "hangman": "fraction", "yes_sum": "", "yes_named": "fraction", "yes_largest": "fraction",
         "kept": "fraction", "answered": "fraction", "reached": "fraction", "kl": "nat"}
COUNTED = ("recall", "eviction", "same_choice", "hangman", "kept", "answered")
LABELS = {"recall": "recall in the window", "eviction": "recall after eviction",
          "same_choice": "same X in both forms", "yes_named": "P(yes) of X named",
          "hangman": "a game of one answer"}
MAIN = ("base", "lora", "random", "prefix", "prior", "redrawn", "window", "note")


@dataclass(frozen=True)
class Measured:
    """One arm on one base with one seed, measured on what was `asked`; lists over items."""

    base: int
    seed: int
    arm: str
    asked: Asked
    values: Mapping[str, Sequence[float]]


def stacked(rows: Sequence[Measured], arm: str, measure: str, kind: str = HEADLINE,
            gap: int | None = None, seeds: Sequence[int] = ()) -> np.ndarray | None:
    """A measure of an arm as float64 [bases, seeds, items], of all its seeds or the given ones;
    None where it was not measured."""
    found: dict[int, list[Sequence[float]]] = {}
    for row in rows:
        if ((row.arm, row.asked.kind, row.asked.gap) == (arm, kind, gap)
                and measure in row.values and (not seeds or row.seed in seeds)):
            found.setdefault(row.base, []).append(row.values[measure])
    return np.array(list(found.values()), float) if found else None


def seeds_of(rows: Sequence[Measured], arm: str, kind: str = HEADLINE,
             gap: int | None = None) -> list[int]:
    """The seeds with which an arm was measured on a kind of probe."""
    return sorted({row.seed for row in rows if row.arm == arm and row.asked.kind == kind
                   and row.asked.gap == gap})


def record_values(run: Run, name: str, values: np.ndarray, unit: str, seeds: Sequence[int],
                  counted: bool = False) -> None:
    """A metric from values [bases, seeds, items], with its interval over all three."""
    _, many, items = values.shape
    counts: dict[str, Any] = {}
    if counted:
        counts = {"numerator": float(values.sum()), "denominator": float(values.size)}
    interval = None
    if values.size > 1:
        interval = hierarchical(values, share=unit == "fraction")
    run.metric(name, float(values.mean()), unit, interval=interval, n=items,
               seeds=tuple(seeds) if many > 1 else None, **counts)


def record_memory(run: Run, base: Path, quantisation: str) -> None:
    """Bytes of the base's parameters in f32, bf16 and, where it is used, in 4 bits."""
    kinds: list[tuple[str, Any, Any]] = [("f32", "none", "f32"), ("bf16", "none", "bf16")]
    if quantisation == "nf4":
        kinds.append(("nf4", "nf4", "f32"))
    for name, how, precision in kinds:
        size = int(load_base(base, how, precision).get_memory_footprint())
        run.metric(f"memory.{name}", size, "byte")


def record_bases(run: Run, bases: Mapping[int, Path], count: int, model: str) -> None:
    """What each offline base can do before anything is trained on it: recall in the window, and
    compare a guess with a choice that stands there (chapter 1's check)."""
    run.metric("bases", len(bases), "count")
    if not model.startswith("offline:"):
        return
    settings = load_settings()
    for seed, folder in bases.items():
        network = LlamaForCausalLM.from_pretrained(folder)
        tokenizer = Tokenizer(folder / "tokenizer.model")
        recall = evaluation.recall_accuracy(network, tokenizer, settings, count)
        compared = evaluation.comparison_accuracy(network, tokenizer, settings, count)
        for name, share in {"recall": recall, **{f"compare_{k}": v for k, v in
                                                 compared.items()}}.items():
            run.metric(f"bases.seed{seed}.{name}", share, "fraction", n=count)


Runs = Mapping[tuple[int, int, str], Path]  # by base, seed and training


def budget(runs: Runs) -> Drawn:
    """What each kind of training cost: tokens (prefixes included) and time, mean and each run."""
    rows = []
    for (base, seed, name), folder in runs.items():
        log = json.loads((folder / "training.json").read_text())
        rows.append({"training": TRAININGS[name].label, "base": base, "seed": seed,
                     "steps": log["settings"]["steps"],
                     "tokens": sum(entry["tokens"] for entry in log["history"]),
                     "seconds": round(log["wall_seconds"], 1)})
    data = pd.DataFrame(rows)
    names = list(dict.fromkeys(data["training"]))
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 0.3 * len(names) + 1), sharey=True)
    for axes, column, unit in zip(panels, ("tokens", "seconds"), (1e6, 60), strict=True):
        for place, name in enumerate(reversed(names)):
            values = data[data["training"] == name][column] / unit
            axes.barh(place, values.mean(), color=COLOURS[column == "seconds"])
            axes.plot(values, [place] * len(values), "|", color=GREY, markersize=8)
        axes.set(xlabel="million tokens" if column == "tokens" else "minutes",
                 yticks=range(len(names)), yticklabels=names[::-1])
    return figure, data


def record_training(run: Run, runs: Runs) -> pd.DataFrame:
    """Steps, tokens and KL of each run with z*; returns the history, one row per log entry."""
    rows, steps, tokens = [], set(), []
    for (base, seed, name), folder in runs.items():
        if name == "commitment":
            log = json.loads((folder / "training.json").read_text())
            rows += [{"base": base, "seed": seed, **entry} for entry in log["history"]]
            steps.add(log["settings"]["steps"])
            tokens.append(sum(entry["tokens"] for entry in log["history"]))
    history = pd.DataFrame(rows)
    last = history.groupby(["base", "seed"]).last()
    run.metric("training.steps", max(steps), "count", n=len(last))
    run.metric("training.tokens", int(np.mean(tokens)), "count", n=len(last))
    seeds, bases = sorted(set(history["seed"])), history["base"].nunique()
    for name, unit in (("kl", "nat"), ("lm", "nat"), ("active_units", "")):
        values = last[name].to_numpy(float).reshape(bases, -1, 1)
        record_values(run, f"training.{name}", values, unit, seeds)
    collapsed = float((last["active_units"] == 0).sum())
    run.metric("training.collapsed", int(collapsed), "count", numerator=collapsed,
               denominator=float(len(last)))
    return history


def record_arms(run: Run, rows: Sequence[Measured], kind: str = HEADLINE,
                gap: int | None = None, prefix: str = "") -> None:
    """``<prefix><arm>.<measure>`` for every arm measured on a kind of probe.

    The intervals cover bases, seeds and items together; those of language cover texts.
    """
    for arm in dict.fromkeys(row.arm for row in rows):
        seeds = seeds_of(rows, arm, kind, gap)
        for name, unit in UNITS.items():
            values = stacked(rows, arm, name, kind, gap)
            if values is not None:
                record_values(run, f"{prefix}{arm}.{name}", values, unit, seeds, name in COUNTED)
        nll, tokens = (stacked(rows, arm, name, kind, gap) for name in ("nll", "own_tokens"))
        if nll is not None and tokens is not None:
            _record_ratio(run, f"{prefix}{arm}.perplexity", nll, tokens, "", seeds)
            drift = stacked(rows, arm, "kl_base", kind, gap)
            assert drift is not None
            per_token = drift * tokens.shape[-1] / tokens.sum(axis=-1, keepdims=True)
            record_values(run, f"{prefix}{arm}.kl_base", per_token, "nat", seeds)


def _record_ratio(run: Run, name: str, nll: np.ndarray, tokens: np.ndarray, unit: str,
                  seeds: Sequence[int]) -> None:
    """exp of nats per token, where a text counts by its length."""
    per_token = nll * tokens.shape[-1] / tokens.sum(axis=-1, keepdims=True)
    interval = hierarchical(per_token)
    run.metric(name, math.exp(per_token.mean()), unit, n=nll.shape[-1],
               seeds=tuple(seeds) if nll.shape[1] > 1 else None,
               interval=Interval(math.exp(interval.low), math.exp(interval.high), interval.method))


def record_contrasts(run: Run, rows: Sequence[Measured]) -> None:
    """What the targets ask for: paired differences and ratios, item by item and seed by seed, over
    the seeds that both arms have."""
    def both(arm: str, control: str) -> list[int]:
        return sorted(set(seeds_of(rows, arm)) & set(seeds_of(rows, control)))

    for arm, control, measure in (("prior", "redrawn", "same_choice"),
                                  ("prior", "lora", "same_choice"),
                                  ("prefix", "lora", "eviction"), ("prior", "redrawn", "eviction"),
                                  ("prefix", "note", "same_choice"),
                                  ("prefix", "note", "eviction"), ("prefix", "lora", "recall"),
                                  ("prior", "lora", "recall")):
        seeds = both(arm, control)
        a, b = (stacked(rows, name, measure, seeds=seeds) for name in (arm, control))
        if seeds and a is not None and b is not None:
            record_values(run, f"{arm}_minus_{control}.{measure}", a - b, "", seeds)
    for arm in ("prefix", "prior"):
        seeds = both(arm, "lora")
        tokens, control_nll = (stacked(rows, "lora", name, seeds=seeds)
                               for name in ("own_tokens", "nll"))
        nll = stacked(rows, arm, "nll", seeds=seeds)
        if seeds and nll is not None and control_nll is not None and tokens is not None:
            _record_ratio(run, f"{arm}.perplexity_over_lora", nll - control_nll, tokens, "ratio",
                          seeds)
    evicted = stacked(rows, "lora", "eviction")
    if evicted is not None:
        values = len(next(iter(load_settings().topics.values())))
        record_values(run, "lora.eviction_over_chance", evicted * values, "ratio",
                      seeds_of(rows, "lora"))


def table(run: Run, arms: Sequence[str], prefix: str = "") -> pd.DataFrame:
    """The rows of the record as a table with intervals, for display."""
    record, columns = run.record(), {**LABELS, "yes_sum": "Σ P(yes)",
                                     "yes_largest": "largest P(yes)", "perplexity": "perplexity"}
    names = {metric.name for metric in record.metrics}
    shown: list[dict[str, str]] = []
    for arm in arms:
        entry = {"": ARMS[arm].label}
        for measure, label in columns.items():
            name = f"{prefix}{arm}.{measure}"
            if name in names:
                entry[label] = _without_counts(record, name)
        shown.append(entry)
    return pd.DataFrame(shown, columns=None if shown else [""]).fillna("–").set_index("")


def _without_counts(record: Record, name: str) -> str:
    """A metric with its interval alone: shares of seeds and items together have no counts that a
    reader could use."""
    return format_metric(record.metric(name).model_copy(
        update={"numerator": None, "denominator": None}))


def record_diagnostics(run: Run, found: Mapping[tuple[int, int], Mapping[str, Any]]) -> None:
    """Active units, KL, and the NLL gaps between true, shuffled and no z*, by base and seed."""
    bases, seeds = sorted({b for b, _ in found}), sorted({s for _, s in found})

    def record(name: str, unit: str, values: Sequence[float]) -> None:
        record_values(run, name, np.array(values).reshape(len(bases), len(seeds), 1), unit, seeds)

    record("latent.kl", "nat", [sum(d["kl_per_dimension"]) for d in found.values()])
    record("latent.active_units", "", [d["active_units"] for d in found.values()])
    for other in ("shuffled", "zero"):
        record(f"latent.nll_gap_{other}", "nat",
               [d[f"nll_{other}"] - d["nll_true"] for d in found.values()])


def slug(kind: str) -> str:
    """A kind of new as a part of a metric's name."""
    return kind.replace(" ", "_")


def training_curves(history: pd.DataFrame) -> Drawn:
    """Trained loss, KL and β against steps, one line per run."""
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.8))
    for axes, name, label in zip(panels, ("lm", "kl", "beta"),
                                 ("LM / nat per conversation", "KL / nat", "β"), strict=True):
        for number, (base, runs) in enumerate(history.groupby("base")):
            for place, (_, part) in enumerate(runs.groupby("seed")):
                axes.plot(part["step"], part[name], color=COLOURS[number % 6], alpha=0.7,
                          linewidth=1, label=None if place else f"base {base}")
        axes.set(xlabel="optimiser step", ylabel=label)
    panels[1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure, history[["base", "seed", "step", "lm", "kl", "beta", "active_units"]]


def _points(axes: Axes, rows: Sequence[Measured], arms: Sequence[str], measure: str,
            kind: str = HEADLINE) -> list[dict[str, Any]]:
    """Mean and interval of a measure for each arm, one place an arm, and each run as a tick."""
    data = []
    for place, arm in enumerate(reversed(arms)):
        values = stacked(rows, arm, measure, kind)
        if values is None:
            continue
        interval, mean = hierarchical(values, share=measure != "yes_sum"), float(values.mean())
        axes.plot(values.mean(axis=2).ravel(), [place] * values[..., 0].size, "|", color=GREY,
                  markersize=9)
        axes.errorbar(mean, place, xerr=[[mean - interval.low], [interval.high - mean]],
                      fmt=MARKERS[0], color=COLOURS[0], capsize=2)
        data.append({"arm": arm, "kind": kind, "measure": measure, "mean": mean,
                     "low": interval.low, "high": interval.high})
    axes.set(yticks=range(len(arms)), yticklabels=[ARMS[arm].label for arm in reversed(arms)])
    return data


def arms_figure(rows: Sequence[Measured], arms: Sequence[str]) -> Drawn:
    """The probes for every arm: mean with interval, and each run."""
    figure, panels = plt.subplots(1, len(LABELS), figsize=(11.5, 0.34 * len(arms) + 1),
                                  sharey=True)
    data = []
    for axes, (measure, label) in zip(panels, LABELS.items(), strict=True):
        data += _points(axes, rows, arms, measure)
        axes.set(xlabel=label, xlim=(-0.03, 1.03), xticks=(0, 0.5, 1),
                 xticklabels=("0", "0.5", "1"))
    return figure, pd.DataFrame(data)


def kinds_figure(rows: Sequence[Measured], arms: Sequence[str], kinds: Sequence[str]) -> Drawn:
    """Agreement of the two question forms by how new the probe is."""
    figure, panels = plt.subplots(1, len(kinds), figsize=(11.5, 0.36 * len(arms) + 1), sharey=True)
    data = []
    for axes, kind in zip(np.atleast_1d(panels), kinds, strict=True):
        data += _points(axes, rows, arms, "same_choice", kind)
        axes.set(title=kind, xlabel=LABELS["same_choice"], xlim=(-0.03, 1.03),
                 xticks=(0, 0.5, 1), xticklabels=("0", "0.5", "1"))
    return figure, pd.DataFrame(data)


def persistence(rows: Sequence[Measured], arms: Sequence[str], gaps: Sequence[int]) -> Drawn:
    """Same choice and recall after so many exchanges of other talk."""
    figure, panels = plt.subplots(1, 2, figsize=(9.0, 3.2), sharey=True)
    data = []
    for axes, measure in zip(panels, ("same_choice", "eviction"), strict=True):
        for number, arm in enumerate(arms):
            points = []
            for gap in gaps:
                values = stacked(rows, arm, measure, "seen form", gap)
                if values is not None:
                    interval = hierarchical(values, share=True)
                    points.append((gap, float(values.mean()), interval.low, interval.high))
            if points:
                x, mean, low, high = np.array(points).T
                axes.errorbar(x + 0.15 * (number - len(arms) / 2), mean,
                              yerr=[mean - low, high - mean], capsize=2, label=ARMS[arm].label,
                              color=COLOURS[number % 6], marker=MARKERS[number % 6])
                data += [{"arm": arm, "measure": measure, "gap": g, "mean": m, "low": lo,
                          "high": hi} for g, m, lo, hi in points]
        axes.set(xlabel="exchanges of other talk", ylabel=LABELS[measure], ylim=(-0.03, 1.03),
                 xticks=gaps)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, pd.DataFrame(data)


def capacity(rows: Sequence[Measured], names: Sequence[str]) -> Drawn:
    """KL of the posterior and share of choices kept against what there is to tell apart.

    names: the trainings ``values_N`` and ``independent_M``, measured from the prefix.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9.0, 3.2))
    each = len(next(iter(load_settings().topics.values())))
    data: list[dict[str, Any]] = []
    for number, (family, label) in enumerate((("values", "one of N"),
                                              ("independent", "topics at once"))):
        points = []
        for name in names:
            kind, _, size = name.partition("_")
            kept = stacked(rows, f"{name}.prefix", "kept", "seen form")
            nats = stacked(rows, f"{name}.prefix", "kl", "seen form")
            if kind == family and kept is not None and nats is not None:
                bits = math.log(int(size)) if kind == "values" else int(size) * math.log(each)
                low, high = (interval := hierarchical(kept, share=True)).low, interval.high
                points.append((bits, float(nats.mean()), float(kept.mean()), low, high))
                data.append({"training": name, "needed": bits, "kl": points[-1][1],
                             "kept": points[-1][2], "low": low, "high": high})
        if points:
            x, nats_, mean, lows, highs = np.array(sorted(points)).T
            panels[0].plot(x, nats_, marker=MARKERS[number], color=COLOURS[number], label=label)
            panels[1].errorbar(x, mean, yerr=[mean - lows, highs - mean], capsize=2,
                               marker=MARKERS[number], color=COLOURS[number], label=label)
    if data:
        top = max(entry["needed"] for entry in data)
        panels[0].plot([0, top], [0, top], color=GREY, linestyle=":", label="what is needed")
    panels[0].set(xlabel="needed to tell the commitments apart / nat", ylabel="KL / nat")
    panels[1].set(xlabel="needed to tell the commitments apart / nat",
                  ylabel="choices kept from the prefix", ylim=(-0.03, 1.03))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, pd.DataFrame(data)


def _plane(z: np.ndarray, named: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws in the two leading principal components of the choices' mean z*."""
    found = sorted(set(named.tolist()))
    means = np.stack([z[named == value].mean(axis=0) for value in found])
    plane = np.linalg.svd(means - means.mean(axis=0), full_matrices=False)[2][:2]
    if len(plane) < 2:  # a single choice spans no plane
        plane = np.eye(2, z.shape[1])
    x, y = ((z - means.mean(axis=0)) @ plane.T).T
    return x, y


def latent_space(draws: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]],
                 topic: str) -> Drawn:
    """Draws from the prior, coloured by the choice that each leads to in one topic; every run.

    draws: z [draws, k] and the value that each names (int [draws]), by base and seed.
    """
    values = load_settings().topics[topic]
    columns = min(len(draws), 5)
    lines = math.ceil(len(draws) / columns)
    figure, panels = plt.subplots(lines, columns, figsize=(11, 2.4 * lines + 0.8),
                                  squeeze=False, sharex=True, sharey=True)
    data = []
    for axes in panels.flat[len(draws) :]:
        axes.set_axis_off()
    for axes, ((base, seed), (z, named)) in zip(panels.flat, draws.items(), strict=False):
        x, y = _plane(z, named)
        for value in range(len(values)):
            at = named == value
            axes.plot(x[at], y[at], linestyle="", marker=MARKERS[value % 6], markersize=4,
                      alpha=0.8, color=COLOURS[value // 2 % 6], label=values[value])
        axes.set(title=f"base {base}, seed {seed}")
        data += [{"base": base, "seed": seed, "x": a, "y": b, "choice": values[v]}
                 for a, b, v in zip(x, y, named, strict=True)]
    for axes in panels[-1]:
        axes.set(xlabel="first component of z*")
    for axes in panels[:, 0]:
        axes.set(ylabel="second component")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure, pd.DataFrame(data)


def latent_use(kl: Sequence[Sequence[float]], named: Sequence[np.ndarray]) -> Drawn:
    """KL of each latent dimension in falling order, and how often the prior reaches each choice;
    all runs.

    kl: one row a run; named: the value that each draw names, int [topics, draws], one a run.
    """
    settings = load_settings()
    topics = whole_topics(settings)
    size = len(settings.topics[topics[0]])
    counts = np.mean([[np.bincount(row, minlength=size) / len(row) for row in one]
                      for one in named], axis=0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.2))
    ordered = np.sort(np.array(kl), axis=1)[:, ::-1]
    left.plot(ordered.T, color=GREY, alpha=0.5, linewidth=1)
    left.plot(ordered.mean(axis=0), "o-", color=COLOURS[0])
    left.set(xlabel="latent dimension, sorted", ylabel="KL / nat")
    image = right.imshow(counts, cmap="cividis", vmin=0, aspect="auto")
    right.set(yticks=range(len(topics)), yticklabels=list(topics), xlabel="choice (index)")
    right.grid(visible=False)
    figure.colorbar(image, ax=right, label="share of draws from the prior")
    data = pd.DataFrame([
        {"topic": topic, "choice": value, "share": share}
        for topic, row in zip(topics, counts, strict=True)
        for value, share in zip(settings.topics[topic], row, strict=True)
    ])
    return figure, data


def findings(record: Record) -> str:
    """The chapter's findings in words; every number and every comparison is the record's."""
    def value(name: str) -> float:
        found = record.metric(name).value
        return math.nan if found is None else float(found)

    def shown(name: str) -> str:
        return _without_counts(record, name)

    def beside(name: str, low: float, high: float) -> str:
        missed = "met" if low <= value(name) <= high else "missed"
        asked = f"at least {low:g}" if high == 1 else f"{low:g} to {high:g}"
        return f"{shown(name)} (target {asked}: {missed})"

    lines = [
        "The log believed that this training needs an NVIDIA GPU. It ran on "
        f"{record.machine.device} ({record.machine.cpu}), {value('training.steps'):.0f} steps a "
        "run.",
        "Forked choice in phrasings that the training never met, z* sampled once from the prior, "
        f"same X in both forms: {beside('prior.same_choice', 0.9, 1)}; share of the choices "
        f"reached: {beside('prior.reached', 0.8, 1)}. Same X without z* "
        f"{shown('lora.same_choice')}; z* redrawn for every question "
        f"{shown('redrawn.same_choice')}; the choice as a line of text "
        f"{shown('note.same_choice')}.",
        "The X that it names is confirmed with probability "
        f"{shown('prior.yes_named')}, without z* {shown('lora.yes_named')}. Σ P(yes) is "
        f"{beside('prior.yes_sum', 0.8, 1.25)}; without z* it is {shown('lora.yes_sum')}. The "
        "weights of the loss aim it at 1 in both, so it is no evidence of a commitment.",
        "Recall after eviction. z* re-encoded from the turns that were evicted: "
        f"{beside('prefix.eviction', 0.9, 1)}; z* sampled once and never told: "
        f"{beside('prior.eviction', 0.8, 1)}; without z* "
        f"{beside('lora.eviction_over_chance', 0, 2)} times chance; as a line of text "
        f"{shown('note.eviction')}.",
        "What it costs: recall in the window is "
        f"{shown('prefix.recall')} (prefix) and {shown('prior.recall')} (prior), without z* "
        f"{shown('lora.recall')}; held-out perplexity over LoRA without z* "
        f"{beside('prefix.perplexity_over_lora', 0, 1.05)} and "
        f"{beside('prior.perplexity_over_lora', 0, 1.05)}.",
        f"A whole game of guesses has one answer in {shown('prior.hangman')} of draws from the "
        f"prior, in {shown('note.hangman')} with the choice as text, in "
        f"{shown('lora.hangman')} without z*.",
    ]
    return "\n".join(f"- {line}" for line in lines)
