"""From measured arms to metrics and the table of notebook 03."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import LlamaForCausalLM

from lablog.commitment.arms import ARMS, Asked
from lablog.commitment.measures import COUNTED, LABELS, UNITS
from lablog.commitment.novelty import HEADLINE
from lablog.commitment.qlora import load_base
from lablog.intervals import hierarchical, perplexity, ratio_values
from lablog.models import evaluation
from lablog.record import Metric, Record
from lablog.report import format_metric
from lablog.text.dialogues import load_settings
from lablog.text.tokenizer import Tokenizer

MEASURES = ("recall", "eviction", "same_choice", "hangman", "yes_sum", "yes_named", "yes_largest",
            "kept", "answered", "reached", "kl")
SHOWN = ("recall", "eviction", "same_choice", "yes_named", "hangman", "yes_sum", "yes_largest",
         "perplexity")
"""Columns of the table."""
MAIN = ("base", "lora", "random", "prefix", "prior", "redrawn", "window", "note")
CONTRASTS = (("prior", "redrawn", "same_choice"), ("prior", "lora", "same_choice"),
             ("prefix", "lora", "eviction"), ("prior", "redrawn", "eviction"),
             ("prefix", "note", "same_choice"), ("prefix", "note", "eviction"),
             ("prefix", "lora", "recall"), ("prior", "lora", "recall"))
"""Arm, control and measure of the differences that are recorded."""


@dataclass(frozen=True)
class Measured:
    """One arm on one base with one seed, measured on what was `asked`; lists over items."""

    base: int
    seed: int
    arm: str
    asked: Asked
    values: Mapping[str, Sequence[float]]


def trained_on(runs: Mapping[Any, Path]) -> str:
    """The devices that the trainings in these folders ran on, for readers."""
    logs = [json.loads((folder / "training.json").read_text()) for folder in runs.values()]
    return ", ".join(sorted({log.get("device", "a machine that is not named") for log in logs}))


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


def over_items(name: str, values: np.ndarray, unit: str, seeds: Sequence[int],
               counted: bool = False) -> Metric:
    """A metric from values [bases, seeds, items], with its interval over all three."""
    _, many, items = values.shape
    counts: dict[str, Any] = {}
    if counted:
        counts = {"numerator": float(values.sum()), "denominator": float(values.size)}
    interval = None
    if values.size > 1:
        interval = hierarchical(values, share=unit == "fraction")
    return Metric.of(name, float(values.mean()), unit, interval=interval, n=items,
                     seeds=tuple(seeds) if many > 1 else None, **counts)


def _of_ratio(name: str, nll: np.ndarray, tokens: np.ndarray, unit: str,
              seeds: Sequence[int]) -> Metric:
    """exp of nats per token, where a text counts by its length."""
    value, interval = perplexity(nll, tokens)
    return Metric.of(name, value, unit, n=nll.shape[-1], interval=interval,
                     seeds=tuple(seeds) if nll.shape[1] > 1 else None)


def of_memory(base: Path, quantisation: str) -> list[Metric]:
    """Bytes of the base's parameters in f32, bf16 and, where it is used, in 4 bits."""
    kinds: list[tuple[str, Any, Any]] = [("f32", "none", "f32"), ("bf16", "none", "bf16")]
    if quantisation == "nf4":
        kinds.append(("nf4", "nf4", "f32"))
    return [Metric.of(name, int(load_base(base, how, precision).get_memory_footprint()), "byte")
            for name, how, precision in kinds]


def base_check(folder: Path, count: int) -> list[Metric]:
    """What an offline base can do before anything is trained on it: recall in the window, and
    compare a guess with a choice that stands there (chapter 1's check), in `count` dialogues."""
    settings, network = load_settings(), LlamaForCausalLM.from_pretrained(folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    recall = evaluation.recall_accuracy(network, tokenizer, settings, count)
    compared = evaluation.comparison_accuracy(network, tokenizer, settings, count)
    shares = {"recall": recall} | {f"compare_{name}": share for name, share in compared.items()}
    return [Metric.of(name, share, "fraction", n=count) for name, share in shares.items()]


def history(runs: Mapping[tuple[int, int], Path]) -> pd.DataFrame:
    """What the trainings in folders by base and seed logged, one row per entry."""
    return pd.DataFrame([
        {"base": base, "seed": seed, **entry} for (base, seed), folder in runs.items()
        for entry in json.loads((folder / "training.json").read_text())["history"]])


def of_training(history: pd.DataFrame) -> list[Metric]:
    """Steps, tokens, KL and active units of the runs in a `history`, and how many collapsed."""
    runs = history.groupby(["base", "seed"])
    last = runs.last()
    seeds, bases = sorted(set(history["seed"])), history["base"].nunique()
    found = [Metric.of("steps", int(history["step"].max()), "count", n=len(last)),
             Metric.of("tokens", int(runs["tokens"].sum().mean()), "count", n=len(last))]
    for name, unit in (("kl", "nat"), ("lm", "nat"), ("active_units", "")):
        values = last[name].to_numpy(float).reshape(bases, -1, 1)
        found.append(over_items(name, values, unit, seeds))
    collapsed = float((last["active_units"] == 0).sum())
    return [*found, Metric.of("collapsed", int(collapsed), "count", numerator=collapsed,
                              denominator=float(len(last)))]


def of_arms(rows: Sequence[Measured], kind: str = HEADLINE,
            gap: int | None = None) -> list[Metric]:
    """``<arm>.<measure>`` for every arm measured on a kind of probe.

    The intervals cover bases, seeds and items together; those of language cover texts.
    """
    found = []
    for arm in dict.fromkeys(row.arm for row in rows):
        seeds = seeds_of(rows, arm, kind, gap)
        for name in MEASURES:
            values = stacked(rows, arm, name, kind, gap)
            if values is not None:
                found.append(over_items(f"{arm}.{name}", values, UNITS[name], seeds,
                                        name in COUNTED))
        nll, tokens, drift = (stacked(rows, arm, name, kind, gap)
                              for name in ("nll", "own_tokens", "kl_base"))
        if nll is not None and tokens is not None and drift is not None:
            per_token = ratio_values(drift, tokens)
            found += [_of_ratio(f"{arm}.perplexity", nll, tokens, "", seeds),
                      over_items(f"{arm}.kl_base", per_token, "nat", seeds)]
    return found


def of_contrasts(rows: Sequence[Measured]) -> list[Metric]:
    """What the targets ask for: paired differences and ratios, item by item and seed by seed, over
    the seeds that both arms have."""
    def both(arm: str, control: str) -> list[int]:
        return sorted(set(seeds_of(rows, arm)) & set(seeds_of(rows, control)))

    found = []
    for arm, control, measure in CONTRASTS:
        seeds = both(arm, control)
        a, b = (stacked(rows, name, measure, seeds=seeds) for name in (arm, control))
        if seeds and a is not None and b is not None:
            found.append(over_items(f"{arm}_minus_{control}.{measure}", a - b, "", seeds))
    for arm in ("prefix", "prior"):
        seeds = both(arm, "lora")
        tokens, plain = (stacked(rows, "lora", name, seeds=seeds)
                         for name in ("own_tokens", "nll"))
        nll = stacked(rows, arm, "nll", seeds=seeds)
        if seeds and nll is not None and plain is not None and tokens is not None:
            found.append(_of_ratio(f"{arm}.perplexity_over_lora", nll - plain, tokens, "ratio",
                                   seeds))
    evicted = stacked(rows, "lora", "eviction")
    if evicted is not None:
        values = len(next(iter(load_settings().topics.values())))
        found.append(over_items("lora.eviction_over_chance", evicted * values, "ratio",
                                seeds_of(rows, "lora")))
    return found


def of_diagnostics(found: Mapping[tuple[int, int], Mapping[str, Any]]) -> list[Metric]:
    """Active units, KL, and the NLL gaps between true, shuffled and no z*, by base and seed."""
    bases, seeds = sorted({b for b, _ in found}), sorted({s for _, s in found})

    def metric(name: str, unit: str, values: Sequence[float]) -> Metric:
        return over_items(name, np.array(values).reshape(len(bases), len(seeds), 1), unit, seeds)

    return [
        metric("kl", "nat", [sum(d["kl_per_dimension"]) for d in found.values()]),
        metric("active_units", "", [d["active_units"] for d in found.values()]),
        *(metric(f"nll_gap_{other}", "nat",
                 [d[f"nll_{other}"] - d["nll_true"] for d in found.values()])
          for other in ("shuffled", "zero"))]


def table(record: Record, arms: Sequence[str], prefix: str = "") -> pd.DataFrame:
    """What the record holds of some arms under a `prefix`, for display: values with intervals, but
    no counts, which over seeds and items together say nothing to a reader."""
    names = {metric.name for metric in record.metrics}
    shown = [{"": ARMS[arm].label} | {
        LABELS[measure]: format_metric(record.metric(name), "interval") for measure in SHOWN
        if (name := f"{prefix}{arm}.{measure}") in names} for arm in arms]
    return pd.DataFrame(shown, columns=None if shown else [""]).fillna("–").set_index("")


def against_target(found: Metric, low: float, high: float) -> str:
    """Whether a value lies from `low` to `high`, in words, and whether its interval leaves that
    open."""
    def inside(value: float) -> bool:
        return low <= value <= high

    asked = f"at least {low:g}" if high == 1 else f"{low:g} to {high:g}"
    met = isinstance(found.value, int | float) and inside(found.value)
    ends = found.interval or ()
    open_still = any(map(inside, ends)) and not all(map(inside, ends))
    return (f"target {asked}: {'met' if met else 'missed'}"
            f"{', its interval lies on both sides' if open_still else ''}")


def slug(kind: str) -> str:
    """A kind of new as a part of a metric's name."""
    return kind.replace(" ", "_")
