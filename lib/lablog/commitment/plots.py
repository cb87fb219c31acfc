"""Figures of notebooks 01 and 02; each function returns the figure and the data drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lablog.commitment.log_experiments import NamedRow
from lablog.commitment.measures import LABELS
from lablog.figures import COLOURS, GREY, MARKERS, Drawn

WITHOUT = {"none": "unmodified", "text": "a line of text instead",
           "system": "told by the system", "instruction": "asked to keep to it"}
"""The controls that inject nothing, and what they are called."""
AIDED = ("system", "instruction")


def _columns(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    columns = ["control", "range", "span", "strength", "seeds", "word", "dose"]
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
    axes.set(yscale="log", xlabel="layer (0-based)", ylabel="Euclidean norm")
    axes.xaxis.set_major_locator(MaxNLocator(15, integer=True))
    figure.legend(loc="outside lower center", ncols=2)
    return figure, data


def distinct(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each configuration: names of ranges that mean the same layers are one."""
    return table.drop_duplicates(["control", "span", "strength"])


def named_rows(table: pd.DataFrame, named: Sequence[NamedRow]) -> Drawn:
    """The three probe families for named rows with their doses, controls and baselines."""
    rows = [(label, control, "all", 0.0) for control, label in WITHOUT.items()
            if control in set(table["control"])]
    steered = table[table["control"] == "steering"]
    rows += [("a steering vector toward one value", "steering", layers, strength)
             for layers, strength in zip(steered["layers"], steered["strength"], strict=True)]
    rows += [(row.label, "commitment", row.layers, row.strength) for row in named]
    rows += [(f"{row.label}: redrawn", "redrawn", row.layers, row.strength) for row in named]
    keyed = table.set_index(["control", "layers", "strength"])
    data = pd.DataFrame(
        [{"row": label, "strength": s, **keyed.loc[(c, layers, s), :].to_dict()}
         for label, c, layers, s in rows]
    )
    names = ("recall", "eviction", "same_choice", "yes_sum")
    figure, panels = plt.subplots(1, 4, figsize=(12.4, 1.2 + 0.3 * len(rows)), sharey=True)
    position = np.arange(len(data))[::-1]
    labels = [f"{row} (dose {dose:.2g})" if dose else row
              for row, dose in zip(data["row"], data["dose"], strict=True)]
    for axes, name in zip(panels, names, strict=True):
        for number, control in enumerate(
                ("none", "text", "commitment", "redrawn", *AIDED, "steering")):
            chosen = np.array([row[1] == control for row in rows])
            axes.errorbar(data[name][chosen], position[chosen],
                          xerr=_errors(data[chosen], name), fmt=MARKERS[number],
                          color=(*COLOURS, GREY)[number], capsize=2)
        axes.set(xlabel=LABELS[name], yticks=position, yticklabels=labels)
        if name == "yes_sum":
            axes.axvline(1, color=GREY, linestyle=":")
        else:
            axes.set_xlim(-0.03, 1.03)
    keep = ["row", "strength", "dose", "word", "seeds"]
    return figure, data[keep + [f"{n}{e}" for n in names for e in ("", "_low", "_high")]]


def _curves(axes: Axes, table: pd.DataFrame, name: str) -> None:
    """One measure against dose: solid the commitment, dotted the control, a colour a range."""
    ranges = table.loc[table["control"] == "commitment", "range"].unique()
    for number, layers in enumerate(ranges):
        for control, line, label in (("commitment", "-", layers),
                                     ("redrawn", ":", f"{layers}, redrawn")):
            part = table[(table["range"] == layers) & (table["control"] == control)]
            part = part.dropna(subset=name).sort_values("dose")
            if len(part):
                axes.errorbar(part["dose"], part[name], yerr=_errors(part, name), label=label,
                              color=COLOURS[number % 6], marker=MARKERS[number % 6], linestyle=line,
                              capsize=2, fillstyle="full" if line == "-" else "none")
    for value in table[table["control"] == "none"][name]:
        axes.axhline(value, color=GREY, linewidth=1, label="unmodified")
    axes.set(xscale="log", ylabel=LABELS[name])


def dose(table: pd.DataFrame) -> Drawn:
    """Coherence against dose, with intervals over seeds."""
    table, names = distinct(table), ("perplexity", "kl_p95", "own_kl_p95", "repeated_4grams")
    figure, panels = plt.subplots(2, 2, figsize=(9.0, 5.8), sharex=True)
    for axes, name in zip(panels.flat, names, strict=True):
        _curves(axes, table, name)
        if name != "repeated_4grams":
            axes.set_yscale("log")
        if name.endswith("kl_p95"):
            axes.set(ylabel=LABELS[name] + " / nats", ylim=(1e-8, None))  # below: rounding
    for axes in panels[1]:
        axes.set_xlabel("dose: λ · layers · ‖W_c z*‖ / mean ‖h‖")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, _columns(table, names)


def by_range(table: pd.DataFrame) -> Drawn:
    """The probes against dose, one pair of curves per distinct layer range."""
    table, names = distinct(table), ("recall", "eviction", "same_choice", "yes_sum")
    figure, panels = plt.subplots(2, 2, figsize=(9.0, 5.8), sharex=True)
    for axes, name in zip(panels.flat, names, strict=True):
        _curves(axes, table, name)
    for axes in panels[1]:
        axes.set_xlabel("dose: λ · layers · ‖W_c z*‖ / mean ‖h‖")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, _columns(table, names)


def heat(table: pd.DataFrame) -> Drawn:
    """Three probes over λ and distinct layer range: left their value, right what it is above the
    redrawn control; in each cell the dose and the log's word."""
    table = distinct(table)
    names, part = ("recall", "eviction", "same_choice"), table[table["control"] == "commitment"]
    ranges = list(part["range"].unique())

    def over(control: str, name: str) -> pd.DataFrame:
        rows = table[table["control"] == control]
        return rows.pivot(index="range", columns="strength", values=name).reindex(ranges)

    words, doses = over("commitment", "word"), over("commitment", "dose").to_numpy(dtype=float)
    strengths = [f"{strength:g}" for strength in sorted(part["strength"].unique())]
    figure, panels = plt.subplots(3, 2, figsize=(12.0, 1.6 + 1.6 * len(ranges)), sharex=True,
                                  sharey=True)
    for (left, right), name in zip(panels, names, strict=True):
        value = over("commitment", name)
        gain = value - over("redrawn", name)
        for axes, grid, colours, lowest in ((left, value, "cividis", 0), (right, gain, "PuOr", -1)):
            image = axes.imshow(grid, cmap=colours, vmin=lowest, vmax=1, aspect="auto")
            for (row, column), number in np.ndenumerate(grid.to_numpy()):
                mark = {"incoherent": "†", "coherent but repetitive": "*"}.get(
                    str(words.iloc[row, column]), "")
                text = f"{number:z.2f}{mark}\n({doses[row, column]:.1g})"
                dark = lowest == 0 and number < 0.55
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5,
                          color="white" if dark else "black")
            title = LABELS[name] if lowest == 0 else f"{LABELS[name]}, less redrawn"
            axes.set(yticks=range(len(ranges)), yticklabels=ranges, title=title)
            axes.grid(visible=False)
            figure.colorbar(image, ax=axes, label="share" if lowest == 0 else "difference")
    for axes in panels[-1]:
        axes.set(xticks=range(len(strengths)), xticklabels=strengths,
                 xlabel="λ († incoherent, * coherent but repetitive; in brackets: dose)")
    return figure, _columns(table[table["control"].isin(["commitment", "redrawn"])], names)


def budget(table: pd.DataFrame, nats: float) -> Drawn:
    """λ that spends the KL budget, per layer range: each seed, and mean with interval."""
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    ranges = list(table["layers"].unique())
    for number, layers in enumerate(ranges):
        part = table[table["layers"] == layers]
        seeds = part.dropna(subset="strength")
        axes.plot(seeds["strength"], [number] * len(seeds), "|", color=GREY, markersize=10)
        if len(part) and np.isfinite(part["low"].iloc[0]):
            mean, low, high = (part[name].iloc[0] for name in ("mean", "low", "high"))
            axes.errorbar(mean, number, color=COLOURS[number % 6], marker=MARKERS[number % 6],
                          capsize=3, xerr=[[mean - low], [high - mean]])
    axes.set(xscale="log", yticks=range(len(ranges)), yticklabels=ranges,
             xlabel=f"λ at which the 95th percentile of KL is {nats:g} nat")
    axes.invert_yaxis()
    return figure, table
