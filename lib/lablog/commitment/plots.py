"""Figures of notebooks 01 and 02; each function returns the figure and the data drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lablog.commitment.sweep import NAMED_ROWS, RANGES
from lablog.figures import COLOURS, GREY, MARKERS

Drawn = tuple[Figure, pd.DataFrame]
LABELS = {
    "recall": "recall in the window", "eviction": "recall after eviction",
    "same_choice": "same X in both forms", "yes_sum": "Σ P(yes)", "kl_p95": "95th percentile of KL",
    "perplexity": "held-out perplexity", "own_kl_p95": "KL on own text, 95th percentile",
    "repeated_4grams": "repeated 4-grams", "distinct_2": "distinct-2",
}


def _columns(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    columns = ["control", "layers", "strength", "seeds", "word", "dose"]
    return table[columns + [f"{n}{end}" for n in names for end in ("", "_low", "_high")]]


def _errors(table: pd.DataFrame, name: str) -> np.ndarray:
    """Distances to the interval's ends [2, rows]; 0 where there is no interval."""
    ends = np.stack([table[name] - table[f"{name}_low"], table[f"{name}_high"] - table[name]])
    return np.nan_to_num(np.clip(ends, 0, None))


def training_curve(folder: Path) -> Drawn:
    """Training loss of the offline model against optimiser steps."""
    log = json.loads((folder / "training.json").read_text())
    data = pd.DataFrame(log["history"])[["step", "loss", "learning_rate"]]
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    axes.plot(data["step"], data["loss"], color=COLOURS[0])
    axes.set(yscale="log", xlabel="optimiser step", ylabel="weighted loss / nat per token")
    return figure, data


def residual(norms: np.ndarray, direction_norm: float, strengths: Sequence[float]) -> Drawn:
    """Mean ‖h‖ after each layer beside the length that the commitment has added by then."""
    layers = np.arange(len(norms))
    data = pd.DataFrame({"layer": layers, "residual_norm": norms})
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    axes.plot(layers, norms, "o-", color=COLOURS[0], label="mean ‖h‖ of the model")
    for number, strength in enumerate(strengths):
        added = strength * direction_norm * (layers + 1)
        data[f"added_at_{strength:g}"] = added
        axes.plot(layers, added, linestyle="--", marker=MARKERS[1 + number],
                  color=COLOURS[1 + number], label=f"added so far at λ = {strength:g}")
    axes.set(yscale="log", xlabel="layer (0-based)", ylabel="Euclidean norm", xticks=layers)
    figure.legend(loc="outside lower center", ncols=2)
    return figure, data


def named_rows(table: pd.DataFrame) -> Drawn:
    """The three probe families for the log's four rows, their controls and the baselines."""
    rows = [("unmodified", "none", "all", 0.0), ("a line of text instead", "text", "all", 0.0)]
    rows += [(label, "commitment", layers, strength) for label, strength, layers in NAMED_ROWS]
    rows += [(f"{label}: redrawn", "redrawn", layers, s) for label, s, layers in NAMED_ROWS]
    keyed = table.set_index(["control", "layers", "strength"])
    data = pd.DataFrame(
        [{"row": label, **keyed.loc[(c, layers, s), :].to_dict()} for label, c, layers, s in rows]
    )
    names = ("recall", "eviction", "same_choice", "yes_sum")
    figure, panels = plt.subplots(1, 4, figsize=(9.6, 3.8), sharey=True)
    position = np.arange(len(data))[::-1]
    for axes, name in zip(panels, names, strict=True):
        for control, colour, marker in zip(("none", "text", "commitment", "redrawn"),
                                           COLOURS[:4], MARKERS, strict=False):
            chosen = np.array([row[1] == control for row in rows])
            axes.errorbar(data[name][chosen], position[chosen],
                          xerr=_errors(data[chosen], name), fmt=marker, color=colour, capsize=2)
        axes.set(xlabel=LABELS[name], yticks=position, yticklabels=data["row"])
        if name == "yes_sum":
            axes.axvline(1, color=GREY, linestyle=":")
        else:
            axes.set_xlim(-0.03, 1.03)
    keep = ["row", "word", "seeds"] + [f"{n}{e}" for n in names for e in ("", "_low", "_high")]
    return figure, data[keep]


def _curves(axes: Axes, table: pd.DataFrame, name: str, horizontal: str) -> None:
    for number, layers in enumerate(RANGES):
        part = table[(table["layers"] == layers) & (table["control"] == "commitment")]
        part = part.sort_values(horizontal)
        axes.errorbar(part[horizontal], part[name], yerr=_errors(part, name), label=layers,
                      color=COLOURS[number], marker=MARKERS[number], capsize=2)
    redrawn = table[(table["layers"] == "all") & (table["control"] == "redrawn")]
    redrawn = redrawn.sort_values(horizontal)
    axes.errorbar(redrawn[horizontal], redrawn[name], yerr=_errors(redrawn, name), color=GREY,
                  marker="x", linestyle=":", label="all, redrawn every turn", capsize=2)
    for value in table[table["control"] == "none"][name]:
        axes.axhline(value, color=GREY, linewidth=1, label="unmodified")
    axes.set(xscale="log", ylabel=LABELS[name])


def dose(table: pd.DataFrame) -> Drawn:
    """Coherence against dose, with intervals over seeds."""
    names = ("perplexity", "kl_p95", "own_kl_p95", "repeated_4grams")
    figure, panels = plt.subplots(2, 2, figsize=(9.0, 5.8), sharex=True)
    for axes, name in zip(panels.flat, names, strict=True):
        _curves(axes, table, name, "dose")
        if name != "repeated_4grams":
            axes.set_yscale("log")
        if name.endswith("kl_p95"):
            axes.set(ylabel=LABELS[name] + " / nats", ylim=(1e-8, None))  # below: rounding
    for axes in panels[1]:
        axes.set_xlabel("dose: λ · layers · ‖W_c z*‖ / mean ‖h‖")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, _columns(table, names)


def by_range(table: pd.DataFrame) -> Drawn:
    """The probes against λ, one curve per layer range."""
    names = ("recall", "eviction", "same_choice", "yes_sum")
    figure, panels = plt.subplots(2, 2, figsize=(9.0, 5.8), sharex=True)
    for axes, name in zip(panels.flat, names, strict=True):
        _curves(axes, table, name, "strength")
    for axes in panels[1]:
        axes.set_xlabel("λ")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, _columns(table, names)


def heat(table: pd.DataFrame) -> Drawn:
    """Recall and forked choice over (λ, layer range), the log's word in each cell."""
    part = table[table["control"] == "commitment"]
    figure, panels = plt.subplots(3, 1, figsize=(8.4, 6.6), sharex=True)
    names = ("recall", "eviction", "same_choice")
    words = part.pivot(index="layers", columns="strength", values="word").reindex(list(RANGES))
    for axes, name in zip(panels, names, strict=True):
        grid = part.pivot(index="layers", columns="strength", values=name).reindex(list(RANGES))
        image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(grid.to_numpy()):
            mark = {"incoherent": "†", "coherent but repetitive": "*"}.get(
                str(words.iloc[row, column]), "")
            axes.text(column, row, f"{value:.2f}{mark}", ha="center", va="center", fontsize=9,
                      color="white" if value < 0.55 else "black")
        axes.set(yticks=range(len(RANGES)), yticklabels=RANGES, title=LABELS[name])
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label="share")
    panels[-1].set(xticks=range(len(grid.columns)), xticklabels=[f"{s:g}" for s in grid.columns],
                   xlabel="λ († incoherent, * coherent but repetitive)")
    return figure, _columns(part, names)


def budget(table: pd.DataFrame, nats: float) -> Drawn:
    """λ that spends the KL budget, per layer range: each seed, and mean with interval."""
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    for number, layers in enumerate(RANGES):
        part = table[table["layers"] == layers]
        seeds = part.dropna(subset="strength")
        axes.plot(seeds["strength"], [number] * len(seeds), "|", color=GREY, markersize=10)
        if len(part) and np.isfinite(part["low"].iloc[0]):
            mean = part["mean"].iloc[0]
            axes.errorbar(mean, number, color=COLOURS[number], marker=MARKERS[number], capsize=3,
                          xerr=[[mean - part["low"].iloc[0]], [part["high"].iloc[0] - mean]])
    axes.set(xscale="log", yticks=range(len(RANGES)), yticklabels=RANGES,
             xlabel=f"λ at which the 95th percentile of KL is {nats:g} nat")
    axes.invert_yaxis()
    return figure, table
