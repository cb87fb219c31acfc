"""Metrics, mandated report and figures of notebook 03."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lablog.commitment.qlora import load_base
from lablog.commitment.trained import ARMS
from lablog.figures import COLOURS, GREY, MARKERS
from lablog.intervals import over_seeds, wilson
from lablog.record import Record, Run
from lablog.report import Section, format_metric
from lablog.text.dialogues import load_settings

Drawn = tuple[Figure, pd.DataFrame]
UNITS = {"recall": "fraction", "eviction": "fraction", "same_choice": "fraction", "yes_sum": "",
         "perplexity": "", "kl_base": "nat", "kl": "nat", "kept": "fraction",
         "reached": "fraction"}
COUNTED = ("recall", "eviction", "same_choice", "kept")
LABELS = {"recall": "recall in the window", "eviction": "recall after eviction",
          "same_choice": "same X in both forms", "yes_sum": "Σ P(yes)"}


def record_memory(run: Run, base: Path, quantisation: str) -> None:
    """Bytes of the base's parameters in f32, bf16 and, where it is used, in 4 bits."""
    kinds: list[tuple[str, Any, Any]] = [("f32", "none", "f32"), ("bf16", "none", "bf16")]
    if quantisation == "nf4":
        kinds.append(("nf4", "nf4", "f32"))
    for name, how, precision in kinds:
        size = int(load_base(base, how, precision).get_memory_footprint())
        run.metric(f"memory.{name}", size, "byte")


def budget(folders: Mapping[tuple[int, str], Path]) -> Drawn:
    """What each training cost: steps, tokens (prefixes included) and seconds, by seed and model."""
    rows = []
    for (seed, model), folder in folders.items():
        log = json.loads((folder / "training.json").read_text())
        rows.append({"seed": seed, "model": model, "steps": log["settings"]["steps"],
                     "tokens": sum(entry["tokens"] for entry in log["history"]),
                     "seconds": round(log["wall_seconds"], 1)})
    data = pd.DataFrame(rows)
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 0.3 * len(data) + 1), sharey=True)
    labels = [f"{row.model}, seed {row.seed}" for row in data.itertuples()]
    for axes, name, unit in zip(panels, ("tokens", "seconds"), (1e6, 60), strict=True):
        axes.barh(labels, data[name] / unit, color=COLOURS[name == "seconds"])
        axes.set(xlabel="million tokens" if name == "tokens" else "minutes")
    panels[0].invert_yaxis()
    return figure, data


def record_training(run: Run, folders: Mapping[int, Path]) -> pd.DataFrame:
    """Steps, tokens and KL of each seed's run; returns the history, one row per log entry."""
    rows = []
    for seed, folder in folders.items():
        log = json.loads((folder / "training.json").read_text())
        rows += [{"seed": seed, **entry} for entry in log["history"]]
        run.metric(f"training.tokens.seed{seed}", sum(e["tokens"] for e in log["history"]),
                   "count")
    history = pd.DataFrame(rows)
    last = history.groupby("seed").last()
    run.metric("training.steps", int(last["step"].max()), "count", n=len(folders))
    for name, unit in (("kl", "nat"), ("lm", "nat"), ("active_units", "")):
        _over_seeds(run, f"training.{name}", last[name], tuple(folders), unit)
    collapsed = float((last["active_units"] == 0).sum())
    run.metric("training.collapsed", int(collapsed), "count", numerator=collapsed,
               denominator=float(len(last)))
    return history


def _over_seeds(run: Run, name: str, values: Sequence[float] | pd.Series,
                seeds: tuple[int, ...], unit: str, **counts: Any) -> None:
    values = [float(value) for value in values]
    within = (0.0, 1.0) if unit == "fraction" else (-np.inf, np.inf)
    interval = over_seeds(values, within=within) if len(values) > 1 else None
    run.metric(name, float(np.mean(values)), unit, seeds=seeds, interval=interval, **counts)


def record_table(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """``<arm>.<measure>`` for every arm, and what the targets ask for; returns the table shown.

    Over seeds the interval is Student's t; the two arms without training have Wilson's over items.
    """
    for arm, group in rows.groupby("arm", sort=False):
        seeds, items = tuple(int(s) for s in group["seed"]), int(group["items"].iloc[0])
        for name, unit in UNITS.items():
            if group[name].isna().any():
                continue
            counts: dict[str, Any] = {}
            if name in COUNTED:
                hits = float((group[name] * items).round().sum())
                counts = {"numerator": hits, "denominator": float(items * len(group))}
                if len(group) == 1:
                    run.metric(f"{arm}.{name}", float(group[name].iloc[0]), unit, **counts,
                               interval=wilson(int(hits), items), n=items)
                    continue
            _over_seeds(run, f"{arm}.{name}", group[name], seeds, unit, **counts)
    by = rows.set_index(["arm", "seed"])["perplexity"]
    for arm in ("prefix", "prior"):
        ratio = by[arm] / by["lora"]
        _over_seeds(run, f"{arm}.perplexity_over_lora", ratio, tuple(ratio.index), "ratio")
    chance = 1 / len(next(iter(load_settings().topics.values())))
    evicted = rows[rows["arm"] == "lora"]["eviction"] / chance
    _over_seeds(run, "lora.eviction_over_chance", evicted, tuple(rows["seed"].unique()), "ratio")
    table = rows.groupby("arm", sort=False)[list(UNITS)].mean()
    return table.rename(index={name: arm.label for name, arm in ARMS.items()}).round(3)


def record_diagnostics(run: Run, found: Mapping[int, Mapping[str, Any]]) -> None:
    """Active units, KL, and the NLL gaps between true, shuffled and no z*, over seeds."""
    seeds = tuple(found)
    _over_seeds(run, "latent.kl", [sum(d["kl_per_dimension"]) for d in found.values()], seeds,
                "nat")
    _over_seeds(run, "latent.active_units", [d["active_units"] for d in found.values()], seeds, "")
    for other in ("shuffled", "zero"):
        gaps = [d[f"nll_{other}"] - d["nll_true"] for d in found.values()]
        _over_seeds(run, f"latent.nll_gap_{other}", gaps, seeds, "nat")


_COLUMNS = ("recall {KEY.recall}, after eviction {KEY.eviction}, forked choice {KEY.same_choice}, "
            "Σ P(yes) {KEY.yes_sum}, held-out perplexity {KEY.perplexity}, KL to the base "
            "{KEY.kl_base}",
            "想起 {KEY.recall}, 窓外 {KEY.eviction}, 分岐選択の一致 {KEY.same_choice}, "
            "Σ P(yes) {KEY.yes_sum}, パープレキシティ {KEY.perplexity}, 元へのKL {KEY.kl_base}")
_JAPANESE = ("元のモデル", "z*なしのLoRA", "未学習の乱数z*", "接頭部からの学習済みz*",
             "事前分布からの学習済みz*", "毎ターン引き直すz*", "すべて窓内")

TRAINED = (
    Section(("Training", "訓練"), [
        ("steps {training.steps}, KL {training.kl}, active units {training.active_units}, "
         "collapsed runs {training.collapsed}",
         "ステップ {training.steps}, KL {training.kl}, 有効ユニット {training.active_units}, "
         "崩壊した実行 {training.collapsed}"),
        ("held-out: KL {latent.kl}, NLL gap to a shuffled z* {latent.nll_gap_shuffled}, to none "
         "{latent.nll_gap_zero}",
         "保留データ: KL {latent.kl}, NLL差 (入替え) {latent.nll_gap_shuffled}, (なし) "
         "{latent.nll_gap_zero}"),
    ]),
    Section(("Probes and language", "プローブと言語"), [
        (f"{arm.label}: {_COLUMNS[0]}".replace("KEY", name),
         f"{japanese}: {_COLUMNS[1]}".replace("KEY", name))
        for (name, arm), japanese in zip(ARMS.items(), _JAPANESE, strict=True)
    ]),
    Section(("Targets", "目標"), [
        ("from the prior: same X in both forms {prior.same_choice} (target 90%), Σ P(yes) "
         "{prior.yes_sum} (0.8 to 1.25), choices reached {prior.reached} (80%)",
         "事前分布: 両形式で同じX {prior.same_choice} (目標 90%), Σ P(yes) {prior.yes_sum} "
         "(0.8〜1.25), 到達した選択肢 {prior.reached} (80%)"),
        ("recall after eviction {prefix.eviction} (target 90%), without z* "
         "{lora.eviction_over_chance:value} × chance (at most 2)",
         "窓外の想起 {prefix.eviction} (目標 90%), z*なし 偶然の "
         "{lora.eviction_over_chance:value} 倍 (2以下)"),
        ("held-out perplexity over LoRA without z*: {prefix.perplexity_over_lora} from the "
         "prefix, {prior.perplexity_over_lora} from the prior (target 0.95 to 1.05)",
         "z*なしのLoRAに対するパープレキシティ比: 接頭部 {prefix.perplexity_over_lora}, 事前分布 "
         "{prior.perplexity_over_lora} (目標 0.95〜1.05)"),
    ]),
)


def training_curves(history: pd.DataFrame) -> Drawn:
    """LM loss, KL and β against steps, one line per seed."""
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.8))
    for axes, name, label in zip(panels, ("lm", "kl", "beta"),
                                 ("LM / nat per conversation", "KL / nat", "β"), strict=True):
        for number, (seed, part) in enumerate(history.groupby("seed")):
            axes.plot(part["step"], part[name], color=COLOURS[number % 6], label=f"seed {seed}")
        axes.set(xlabel="optimiser step", ylabel=label)
    panels[1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure, history[["seed", "step", "lm", "kl", "beta", "active_units"]]


def arms(rows: pd.DataFrame) -> Drawn:
    """The probes for every arm: each seed, and the mean."""
    names = list(dict.fromkeys(rows["arm"]))
    figure, panels = plt.subplots(1, 4, figsize=(9.6, 3.2), sharey=True)
    for axes, measure in zip(panels, LABELS, strict=True):
        for place, name in enumerate(reversed(names)):
            values = rows[rows["arm"] == name][measure]
            axes.plot(values, [place] * len(values), "|", color=GREY, markersize=10)
            axes.plot(values.mean(), place, MARKERS[0], color=COLOURS[0])
        axes.set(xlabel=LABELS[measure], yticks=range(len(names)),
                 yticklabels=[ARMS[name].label for name in reversed(names)])
        if measure == "yes_sum":
            axes.axvspan(0.8, 1.25, color=GREY, alpha=0.2)
        else:
            axes.set(xlim=(-0.03, 1.03), xticks=(0, 0.5, 1), xticklabels=("0", "0.5", "1"))
    return figure, rows[["arm", "seed", *LABELS]]


def latent_space(z: np.ndarray, named: np.ndarray, topic: str) -> Drawn:
    """Draws from the prior in their two directions that tell the choices of one topic apart.

    z [draws, k] and the value that each draw names [draws]. The plane is that of the two leading
    principal components of the choices' mean z*.
    """
    values = load_settings().topics[topic]
    found = sorted(set(named.tolist()))
    means = np.stack([z[named == value].mean(axis=0) for value in found])
    centred = means - means.mean(axis=0)
    plane = np.linalg.svd(centred, full_matrices=False)[2][:2]
    if len(plane) < 2:  # a single choice spans no plane
        plane = np.eye(2, z.shape[1])
    x, y = (z - means.mean(axis=0)) @ plane.T[:, 0], (z - means.mean(axis=0)) @ plane.T[:, 1]
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for value in found:
        at = named == value
        axes.plot(x[at], y[at], linestyle="", marker=MARKERS[value % 6], markersize=5, alpha=0.8,
                  color=COLOURS[value // 2 % 6], label=values[value])
    axes.set(xlabel="first component of z*", ylabel="second component of z*", title=topic)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    data = pd.DataFrame({"x": x, "y": y, "choice": [values[value] for value in named]})
    return figure, data


def latent_use(kl: Sequence[float], named: np.ndarray) -> Drawn:
    """KL of each latent dimension in falling order, and how often the prior reaches each choice.

    named: the value that each draw names, int [topics, draws].
    """
    topics = load_settings().topics
    counts = np.stack([np.bincount(row, minlength=len(next(iter(topics.values()))))
                       for row in named]) / named.shape[1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.2))
    left.bar(np.arange(len(kl)), sorted(kl, reverse=True), color=COLOURS[0])
    left.set(xlabel="latent dimension, sorted", ylabel="KL / nat")
    image = right.imshow(counts, cmap="cividis", vmin=0, aspect="auto")
    right.set(yticks=range(len(topics)), yticklabels=list(topics), xlabel="choice (index)")
    right.grid(visible=False)
    figure.colorbar(image, ax=right, label="share of draws from the prior")
    data = pd.DataFrame([
        {"topic": topic, "choice": value, "share": share}
        for (topic, values), row in zip(topics.items(), counts, strict=True)
        for value, share in zip(values, row, strict=True)
    ])
    return figure, data


def findings(record: Record) -> str:
    """The chapter's findings in words; every number and every comparison is the record's."""
    def value(name: str) -> float:
        return float(record.metric(name).value or 0)

    def shown(name: str) -> str:
        return format_metric(record.metric(name))

    def beside(name: str, low: float, high: float) -> str:
        inside = low <= value(name) <= high
        return f"{shown(name)} ({'inside' if inside else 'outside'} {low:g} to {high:g})"

    active = value("training.active_units")
    lines = [
        "The log believed that this training needs an NVIDIA GPU. It ran on "
        f"{record.machine.device} ({record.machine.cpu}), "
        f"{value('training.steps'):.0f} steps a run.",
        f"Collapse: {format_metric(record.metric('training.collapsed'), 'counts')} runs; the "
        f"posterior carries {shown('latent.kl')} in {active:.0f} active units, and the wrong z* "
        f"costs {shown('latent.nll_gap_shuffled')} per conversation.",
        "Forked choice, z* from the prior, same X in both forms: "
        f"{beside('prior.same_choice', 0.9, 1)}; without z* {shown('lora.same_choice')}; redrawn "
        f"every turn {shown('redrawn.same_choice')}.",
        f"Σ P(yes) from the prior: {beside('prior.yes_sum', 0.8, 1.25)}; the base has "
        f"{shown('base.yes_sum')}. Choices reached: {beside('prior.reached', 0.8, 1)}.",
        f"Recall after eviction, z* from the evicted prefix: {beside('prefix.eviction', 0.9, 1)}; "
        f"without z* {beside('lora.eviction_over_chance', 0, 2)} times chance; with everything in "
        f"the window {shown('window.eviction')}.",
        "Held-out perplexity over the control without z*: "
        f"{beside('prefix.perplexity_over_lora', 0, 1.05)} with z* from the prefix, "
        f"{beside('prior.perplexity_over_lora', 0, 1.05)} from the prior.",
    ]
    return "\n".join(f"- {line}" for line in lines)
