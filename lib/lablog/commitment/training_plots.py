"""Figures of notebook 03; each function returns the figure and the data drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lablog.commitment.arms import ARMS, TRAININGS
from lablog.commitment.measures import LABELS
from lablog.commitment.novelty import HEADLINE, whole_topics
from lablog.commitment.training_metrics import Measured, stacked
from lablog.figures import COLOURS, GREY, MARKERS, Drawn
from lablog.intervals import hierarchical
from lablog.text.dialogues import load_settings

PROBED = ("recall", "eviction", "same_choice", "yes_named", "hangman")


def budget(runs: Mapping[tuple[int, int, str], Path]) -> Drawn:
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
    figure, panels = plt.subplots(1, len(PROBED), figsize=(11.5, 0.34 * len(arms) + 1),
                                  sharey=True)
    data = []
    for axes, measure in zip(panels, PROBED, strict=True):
        data += _points(axes, rows, arms, measure)
        axes.set(xlabel=LABELS[measure], xlim=(-0.03, 1.03), xticks=(0, 0.5, 1),
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
