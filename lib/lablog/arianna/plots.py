"""Figures of notebook 06: each returns the figure and the data behind it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from lablog.arianna.finetuning import training_log
from lablog.figures import COLOURS, GREY, MARKERS, Drawn

FORMS = {"qa": "with the marks Q: and A:", "bare": "without marks"}


def loss_curves(folders: Mapping[str, Path]) -> Drawn:
    """Training loss and learning rate against tokens seen, a line for each training; that of the
    base run, if there is one, in a column of its own."""
    frames = []
    for run, folder in folders.items():
        history = pd.DataFrame(training_log(folder)["history"])
        columns = ["step", "num_input_tokens_seen", "loss", "learning_rate"]
        frames.append(history[columns].assign(run=run))
    data = pd.concat(frames).rename(columns={"num_input_tokens_seen": "tokens"})
    titles = ["base", "fine-tuning"] if "base" in folders else ["fine-tuning"]
    figure, axes = plt.subplots(2, len(titles), figsize=(8.4, 5.4), sharex="col", squeeze=False)
    for i, (name, rows) in enumerate(data.groupby("run", sort=False)):
        column = 0 if name == "base" else len(titles) - 1
        style = {"color": COLOURS[i % 6], "linestyle": "-" if i < 6 else "--", "label": name}
        axes[0, column].plot(rows["tokens"] / 1000, rows["loss"], **style)
        warm = rows[rows["learning_rate"] > 0]
        axes[1, column].plot(warm["tokens"] / 1000, warm["learning_rate"], **style)
    for column, title in enumerate(titles):
        axes[0, column].set(title=title, ylabel="loss / nat per token")
        axes[1, column].set(xlabel="thousand tokens seen", ylabel="learning rate", yscale="log")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure, data


def called(condition: str) -> str:
    """A condition, ``before`` or ``after`` fine-tuning and the form of the text, in words."""
    when, _, form = condition.partition(".")
    return f"{when} fine-tuning, {FORMS.get(form, form)}"


def conditions(table: pd.DataFrame) -> Drawn:
    """Bits per byte of each condition with its interval (columns condition, bits/byte, ...)."""
    figure, axis = plt.subplots(figsize=(6.4, 0.35 * len(table) + 1))
    error = [table["bits/byte"] - table["low"], table["high"] - table["bits/byte"]]
    names = [called(name) for name in table["condition"]]
    axis.errorbar(table["bits/byte"], names, xerr=error, fmt="o", capsize=3)
    axis.set(xlabel="bits per byte")
    axis.invert_yaxis()
    return figure, table


def comparisons(table: pd.DataFrame) -> Drawn:
    """Change of held-out bits per byte against the learning rate, a line for each batch."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for i, (name, rows) in enumerate(table.groupby("batch", sort=False)):
        rows = rows.sort_values("learning rate")
        error = [rows["bits/byte"] - rows["low"], rows["high"] - rows["bits/byte"]]
        shift = 1.06 ** (i - 1)  # so that intervals at the same rate can be told apart
        axis.errorbar(rows["learning rate"] * shift, rows["bits/byte"], yerr=error, label=name,
                      marker=MARKERS[i], color=COLOURS[i], capsize=3)
    axis.axhline(0, color=GREY, linestyle=":")
    axis.set(xscale="log", xlabel="learning rate", ylabel="change in bits per byte")
    axis.legend()
    return figure, table
