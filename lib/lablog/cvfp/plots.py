"""Figures of notebooks 04 and 05: each returns the figure and the data behind it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from lablog.cvfp.checks import effective_rank, effective_rank_of, singular_values
from lablog.cvfp.metrics import bootstrap_perplexity
from lablog.cvfp.passes import Passes
from lablog.cvfp.phase2 import Phase2History, Predictions
from lablog.cvfp.rollout import TOLERANCE, Rollout
from lablog.figures import GREY, MARKERS, Drawn


def called(network: object) -> str:
    """A network's name in words: ``true.w0.5.seed42`` is "true passes, w = 0.5, seed 42"."""
    def words(name: re.Match[str]) -> str:
        return f"{'true' if name[1] else 'parallel'} passes, w = {name[2]}, seed {name[3]}"

    told = re.sub(r"^(true\.)?w([\d.]+)\.seed(\d+)", words, str(network))
    return re.sub(r"^untrained\.seed(\d+)", r"untrained, seed \1", told)


def _axes(columns: int, height: float = 3.0) -> tuple[Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(1, columns, figsize=(4.2 * columns, height), squeeze=False)
    return figure, list(axes[0])


def _legend_below(figure: Figure, axis: plt.Axes) -> None:
    """One legend under all panels, for lines that leave no corner free."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=8)


def convergence(histories: Sequence[pd.DataFrame], frozen: Mapping[str, Passes]) -> Drawn:
    """Share of converged tokens and MSE against iteration of training, and against frozen pass.

    `histories`: rows of iterations (network, iteration, share, cvfp_loss), a line each.
    """
    passes = [
        pd.DataFrame({"network": name, "iteration": range(1, 1 + len(found.differences)),
                      "cvfp_loss": found.differences,
                      "share": [c / len(found.contexts) for c in found.converged]})
        for name, found in frozen.items()
    ]
    frame = pd.concat([*histories, *passes])
    figure, (left, right) = _axes(2, 3.6)
    for i, (name, rows) in enumerate(frame.groupby("network", sort=False)):
        style: dict[str, Any] = {"label": called(name), "marker": MARKERS[i % 6],
                                 "linestyle": "-" if i < 6 else "--"}
        left.plot(rows["iteration"], 100 * rows["share"], **style)
        right.plot(rows["iteration"], rows["cvfp_loss"], **style)
    left.set(xlabel="iteration or pass", ylabel="tokens converged / %")
    right.set(xlabel="iteration or pass", ylabel="MSE to the pass before", yscale="log")
    _legend_below(figure, right)
    return figure, frame


def spectra(matrices: Mapping[str, Tensor]) -> Drawn:
    """Singular values relative to the largest, with the effective rank of each matrix.

    The axis ends below the last two per cent, which LayerNorm takes away (the mean).
    """
    figure, (axis,) = _axes(1)
    frames, floor = [], 1.0
    for name, matrix in matrices.items():
        values = singular_values(matrix)
        share = (values / values[0]).clamp_min(1e-7).numpy()
        floor = min(floor, share[int(0.98 * len(share)) - 1] / 2)
        axis.plot(np.arange(1, len(share) + 1), share,
                  label=f"{called(name)}: {effective_rank_of(values):.0f}")
        frames.append(pd.DataFrame({"matrix": name, "index": range(1, len(share) + 1),
                                    "relative singular value": share}))
    axis.set(xlabel="index", ylabel="singular value / largest", yscale="log",
             ylim=(floor, 1.3))
    axis.legend(title="effective rank / dimensions", fontsize=8)
    return figure, pd.concat(frames)


def rank_growth(matrices: Mapping[str, Tensor], weights: pd.DataFrame) -> Drawn:
    """Effective rank against the number of tokens (64, 128, ..., all), and against the weight w.

    `weights`: rows of networks (network, split, share, w).
    """
    figure, (left, right) = _axes(2)
    longest = max(map(len, matrices.values()))
    counts = sorted({2**k for k in range(6, longest.bit_length())} | {longest})
    rows = [
        {"matrix": name, "tokens": n, "effective rank": effective_rank(matrix[:n]).value}
        for name, matrix in matrices.items() for n in counts if n <= len(matrix)
    ]
    frame = pd.DataFrame(rows)
    for i, (name, part) in enumerate(frame.groupby("matrix", sort=False)):
        left.plot(part["tokens"], part["effective rank"], label=called(name), marker=MARKERS[i % 6])
    left.set(xlabel="tokens", ylabel="effective rank / dimensions")
    left.set_xscale("log", base=2)
    left.legend(fontsize=7)
    for i, (split, part) in enumerate(weights.groupby("split", sort=False)):
        right.plot(part["w"], 100 * part["share"], "-", marker=MARKERS[i], label=split)
    right.set(xlabel="diversity weight w", ylabel="effective rank / % of dimensions")
    right.legend()
    return figure, pd.concat([frame, weights.rename(columns={"network": "matrix"})])


def change_map(passes: Mapping[str, Passes], tokens: int) -> Drawn:
    """log10 of the context's mean squared change over the first `tokens` tokens and all passes."""
    figure, axes = _axes(len(passes), 2.6)
    frames = []
    for axis, (name, found) in zip(axes, passes.items(), strict=True):
        shown = found.changes[:, :tokens].clamp_min(1e-14).log10().cpu().numpy()
        image = axis.imshow(shown, aspect="auto", vmin=-10, vmax=0.5, cmap="cividis",
                            extent=(0, shown.shape[1], len(shown) + 0.5, 0.5))
        axis.set(title=called(name), xlabel="token", ylabel="pass")
        axis.grid(False)
        frame = pd.DataFrame(shown).assign(network=name)
        frame["pass"] = frame.index + 1
        frames.append(frame.melt(["network", "pass"], var_name="token"))
    figure.colorbar(image, ax=axes, label="log10 of the mean squared change")
    return figure, pd.concat(frames)


def residuals(rollouts: Mapping[str, Rollout]) -> Drawn:
    """Residuals of the last window that each rollout tried, and the time for the whole text."""
    frames = []
    for label, found in rollouts.items():
        last = found.residuals[-1] if found.residuals else [float("nan")]
        frames.append(pd.DataFrame({"run": label, "pass": range(1, len(last) + 1),
                                    "residual": last, "seconds": found.seconds}))
    frame = pd.concat(frames)
    figure, (left, right) = _axes(2, 3.6)
    for i, (name, rows) in enumerate(frame.groupby("run", sort=False)):
        curve = rows.dropna(subset=["residual"])
        if len(curve):  # the loop has no passes
            left.plot(curve["pass"], curve["residual"], label=called(name), marker=MARKERS[i % 6],
                      color=f"C{i % 6}", linestyle="-" if i < 4 else "--")
        right.barh(str(name), rows["seconds"].iloc[0], color=f"C{i % 6}")
    left.axhline(TOLERANCE, color=GREY, linestyle=":")
    left.set(xlabel="pass over a window", ylabel="largest relative change", yscale="log")
    _legend_below(figure, left)
    right.set(xlabel="time for the whole text / s")
    right.tick_params(axis="y", labelsize=7)
    return figure, frame


def exactness(shares: Mapping[str, Sequence[float]], tokens: int) -> Drawn:
    """Share of tokens that are exact after each pass; dotted: one token a pass."""
    figure, (axis,) = _axes(1)
    frame = pd.DataFrame(dict(shares))
    frame["pass"] = frame.index + 1
    for i, name in enumerate(shares):
        axis.plot(frame["pass"], 100 * frame[name], label=called(name), marker=MARKERS[i], ms=2)
    axis.plot(frame["pass"], 100 * frame["pass"] / tokens, ":", color=GREY, label="one a pass")
    axis.set(xlabel="passes", ylabel="tokens within the tolerance / %")
    axis.legend()
    return figure, frame


def memory(curves: Mapping[str, Tensor]) -> Drawn:
    """Median relative difference that a changed token leaves after so many tokens."""
    figure, (axis,) = _axes(1)
    frames = []
    for i, (name, curve) in enumerate(curves.items()):
        quartiles = np.quantile(curve.cpu().numpy(), [0.25, 0.5, 0.75], axis=1)
        x = np.arange(len(curve))
        axis.plot(x, quartiles[1], label=called(name), color=f"C{i}")
        axis.fill_between(x, quartiles[0], quartiles[2], color=f"C{i}", alpha=0.2, linewidth=0)
        frames.append(pd.DataFrame({"network": name, "distance": x, "lower": quartiles[0],
                                    "median": quartiles[1], "upper": quartiles[2]}))
    axis.set(xlabel="tokens after the changed one", ylabel="relative difference", yscale="log")
    _legend_below(figure, axis)
    return figure, pd.concat(frames)


def contraction(observed: pd.DataFrame) -> Drawn:
    """Exponent, spectral norm and memory behind every iteration of training (0: before it).

    observed: rows of network, iteration, exponent, spectral_norm, memory (none: beyond what was
    looked at).
    """
    figure, axes = _axes(3, 3.4)
    for i, (name, rows) in enumerate(observed.groupby("network", sort=False)):
        for axis, column in zip(axes, ("exponent", "spectral_norm", "memory"), strict=True):
            axis.plot(rows["iteration"], rows[column], label=called(name), marker=MARKERS[i % 6])
    axes[0].axhline(0, color=GREY, linestyle=":")
    for axis, label in zip(axes, ("Lyapunov exponent per token", "largest spectral norm",
                                  "memory / tokens"), strict=True):
        axis.set(xlabel="iteration of training", ylabel=label)
    _legend_below(figure, axes[0])
    return figure, observed


def perplexity(trainings: Mapping[str, Phase2History], levels: Mapping[str, float]) -> Drawn:
    """Training and dev perplexity per epoch for each arm; n-grams as dotted lines."""
    curves = pd.DataFrame([
        {"arm": name, "epoch": e.epoch, "training": e.train_perplexity,
         "dev": e.watched_perplexity}
        for name, found in trainings.items() for e in found.history
    ])
    figure, axes = _axes(2, 3.4)
    for axis, split in zip(axes, ("training", "dev"), strict=True):
        for i, (name, rows) in enumerate(curves.groupby("arm", sort=False)):
            axis.plot(rows["epoch"], rows[split], label=called(name), marker=MARKERS[i % 6],
                      linestyle="-" if i < 6 else "--")
        axis.set(xlabel="epoch", ylabel=f"{split} perplexity", yscale="log")
    for name, level in levels.items():
        axes[1].axhline(level, color=GREY, linestyle=":")
        axes[1].annotate(name, (1, level), fontsize=8, color=GREY, va="bottom")
    axes[0].legend(fontsize=7)
    return figure, curves


def intervals(predictions: Mapping[str, Predictions], block: int) -> Drawn:
    """Test perplexity of each arm with its bootstrap interval over dialogues of `block` tokens."""
    spreads = {name: bootstrap_perplexity(found, block) for name, found in predictions.items()}
    table = pd.DataFrame([
        {"arm": name, "value": found.perplexity, "low": spreads[name].low,
         "high": spreads[name].high}
        for name, found in predictions.items()
    ])
    figure, (axis,) = _axes(1, 0.35 * len(table) + 1)
    error = [table["value"] - table["low"], table["high"] - table["value"]]
    axis.errorbar(table["value"], table["arm"], xerr=error, fmt="o", capsize=3)
    axis.set(xlabel="perplexity on disjoint test text", xscale="log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.invert_yaxis()
    return figure, table
