"""From a sweep's rows to tables, comparisons and metrics (notebooks 01 and 02)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lablog.commitment.calibration import Solution
from lablog.commitment.log_experiments import NAMED_ROWS, NamedRow
from lablog.commitment.measures import COUNTED, UNITS
from lablog.comparisons import holm, p_greater
from lablog.intervals import Interval, hierarchical, t_interval, wilson
from lablog.models import evaluation
from lablog.record import Metric
from lablog.text.dialogues import load_settings
from lablog.text.tokenizer import Tokenizer

PROBES = ("recall", "eviction", "same_choice")
BY_ITEM = (*PROBES, "answered", "yes_sum", "answer_mass", "named_mass", "first_named")
LANGUAGE = ("perplexity", "kl_mean", "kl_p95", "own_kl_mean", "own_kl_p95", "same_top",
            "repeated_4grams", "distinct_1", "distinct_2")
MEASURES = (*BY_ITEM, *LANGUAGE, "dose")
ALPHA = 0.05


def by_item(rows: pd.DataFrame, name: str) -> np.ndarray:
    """One measure of the probes, float64 [rows, items]."""
    packed = rows[f"{name}_items"]
    return np.array([[float(x) for x in (text if name in COUNTED else text.split())]
                     for text in packed])


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
        return hierarchical(by_item(group, name), share=UNITS[name] == "fraction")
    values = group[name].to_numpy()
    if len(values) < 2 or np.isnan(values).any() or np.ptp(values) == 0:
        return None
    return t_interval(values.tolist(), within=(0.0, 1.0 if UNITS[name] == "fraction" else math.inf))


def of_configuration(rows: pd.DataFrame) -> list[Metric]:
    """Every measure of one configuration (rows: its seeds), and the log's word for it.

    n is the number of items, which all seeds share; a numerator counts answers over all seeds.
    Coherence that was not measured is left out.
    """
    seeds = tuple(int(seed) for seed in rows["seed"]) if len(rows) > 1 else None
    items, found = int(rows["items"].iloc[0]), []
    for name in MEASURES:
        if rows[name].isna().any():
            continue
        counts: dict[str, float] = {"n": items} if name in BY_ITEM else {}
        if name in COUNTED:
            counts |= {"numerator": by_item(rows, name).sum(),
                       "denominator": float(items * len(rows))}
        found.append(Metric.of(name, float(rows[name].mean()), UNITS[name], seeds=seeds,
                               interval=interval_of(rows, name), **counts))
    words = rows["word"].value_counts()
    return [*found, Metric.of("word", str(words.index[0]), "class", seeds=seeds,
                              numerator=float(words.iloc[0]), denominator=float(len(rows)))]


def model_check(folder: Path, count: int) -> list[Metric]:
    """Does the offline model copy what is in its window, and only guess what is not?

    On `count` held-out dialogues, greedily and in PyTorch: recall of a stated value, the same
    with the statement evicted (chance: one in the number of values), and right answers in the
    guessing game when the choice stands in the window.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer, settings = Tokenizer(folder / "tokenizer.model"), load_settings()
    found = []
    for name, evicted in (("recall", False), ("recall_evicted", True)):
        share = evaluation.recall_accuracy(model, tokenizer, settings, count, evicted=evicted)
        hits = round(share * count)
        found.append(Metric.of(name, share, "fraction", numerator=float(hits), n=count,
                               denominator=float(count), interval=wilson(hits, count)))
    compared = evaluation.comparison_accuracy(model, tokenizer, settings, count)
    found += [Metric.of(f"compare_{name}", share, "fraction", n=count)
              for name, share in compared.items()]
    return [*found, Metric.of("parameters", model.num_parameters(), "count")]


def _configuration(rows: pd.DataFrame, control: str, layers: str, strength: float) -> pd.DataFrame:
    return rows[(rows["control"] == control) & (rows["layers"] == layers)
                & (rows["strength"] == strength)]


def check_named(ranges: Sequence[str], strengths: Sequence[float]) -> None:
    """ValueError, before anything is swept, where a grid does not hold the log's four rows."""
    for row in NAMED_ROWS:
        if row.layers not in ranges:
            raise ValueError(f"ranges = {[*ranges]}: the log's experiment {row.label!r} needs "
                             f"{row.layers!r}: add it")
        if row.strength not in strengths:
            raise ValueError(f"strengths = {[*strengths]}: the log's experiment {row.label!r} "
                             f"needs {row.strength:g}: add it")


def of_named_rows(rows: pd.DataFrame, named: Sequence[NamedRow] = NAMED_ROWS) -> list[Metric]:
    """Named rows (the log's four), each with its redrawn control, and the two baselines.

    Raises ValueError when the sweep does not hold one of them.
    """
    groups = {"unmodified" if control == "none" else control: rows[rows["control"] == control]
              for control in rows["control"].unique() if control not in ("commitment", "redrawn")}
    for row in named:
        for control, prefix in (("commitment", ""), ("redrawn", "redrawn.")):
            part = _configuration(rows, control, row.layers, row.strength)
            if part.empty:
                raise ValueError(f"the sweep holds no row {row.label!r} ({control}): add "
                                 f"{row.strength:g} to the strengths")
            groups[prefix + row.key] = part
    return [metric.under(name) for name, part in groups.items()
            for metric in of_configuration(part)]


def compare_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Every distinct cell (layers × λ) against λ = 0 and against the redrawn control.

    Names of ranges that mean the same layers are one cell. Both comparisons are paired: the same
    items, and for the control the same seeds. One row per cell and probe: the mean differences,
    their p-values, the larger of the two (both must hold), and all three adjusted by Holm over all
    cells and probes. ValueError when a cell has no redrawn control.
    """
    found = []
    unmodified = rows[rows["control"] == "none"]
    commitments = rows[rows["control"] == "commitment"]
    for (span, strength), cell in commitments.groupby(["span", "strength"], sort=False):
        mine = cell.drop_duplicates("seed").sort_values("seed")
        same = (rows["span"] == span) & (rows["strength"] == strength)
        control = rows[same & (rows["control"] == "redrawn")]
        control = control.drop_duplicates("seed").sort_values("seed")
        if list(control["seed"]) != list(mine["seed"]):
            raise ValueError(f"λ = {strength:g} in layers {span} has no redrawn control under the "
                             "same seeds: sweep both controls")
        names = " = ".join(cell["layers"].unique())
        for name in PROBES:
            over = {"unmodified": by_item(mine, name) - by_item(unmodified, name)[0],
                    "redrawn": by_item(mine, name) - by_item(control, name)}
            means = {f"over_{key}": float(values.mean()) for key, values in over.items()}
            tests = {f"p_{key}": p_greater(values) for key, values in over.items()}
            found.append({"range": names, "span": span, "strength": strength,
                          "dose": mine["dose"].mean(), "probe": name,
                          "coherent": (mine["word"] == "coherent").mean() > 0.5,
                          **means, **tests, "p": max(tests.values())})
    table = pd.DataFrame(found)
    for name in ("p_unmodified", "p_redrawn", "p"):
        table[f"{name}_holm"] = holm(table[name].to_numpy())
    return table


def improvements(rows: pd.DataFrame) -> pd.DataFrame:
    """Claim A08: in which cells (λ × distinct layers) does a commitment work, and on which probe?

    `compare_cells` with a column ``works``: most seeds of the cell are coherent, and it is better
    than both λ = 0 and the redrawn control, at 5 % after Holm's correction over all cells and
    probes.
    """
    table = compare_cells(rows)
    table["works"] = table["coherent"] & (table["p_holm"] < ALPHA)
    return table


def of_improvements(rows: pd.DataFrame, table: pd.DataFrame) -> list[Metric]:
    """How many cells work, and pass each of the two comparisons; `table`: the `improvements`."""
    cells = float(len(table) / len(PROBES))
    seeds = tuple(int(seed) for seed in rows.loc[rows["control"] == "commitment", "seed"].unique())

    def count(name: str, chosen: pd.Series) -> Metric:
        return Metric.of(name, int(chosen.sum()), "count", numerator=float(chosen.sum()),
                         denominator=cells, seeds=seeds, n=int(rows["items"].iloc[0]))

    found = [Metric.of("cells", int(cells), "count"),
             Metric.of("comparisons", len(table), "count")]
    for name in PROBES:
        part = table[table["probe"] == name]
        found.append(count(f"works.{name}", part["works"]))
        found += [count(f"above_{other}.{name}",
                        part["coherent"] & (part[f"p_{other}_holm"] < ALPHA))
                  for other in ("unmodified", "redrawn")]
    wide = table.pivot(index=["span", "strength"], columns="probe", values="works")
    return [*found,
            count("works.recall_and_same_choice", wide["recall"] & wide["same_choice"]),
            count("coherent_cells", table.groupby(["span", "strength"])["coherent"].first()),
            Metric.of("smallest_adjusted_p", float(table["p_holm"].min()), "")]


def budget_table(layers: str, solutions: Sequence[Solution | None], seeds: Sequence[int],
                 unit_doses: Sequence[float]) -> pd.DataFrame:
    """λ of the KL budget in one range and its dose, one row a seed; with the geometric mean of λ
    and its t interval, if two seeds reach the budget.

    unit_doses: dose of λ = 1 under each seed.
    """
    strengths = np.array([s.strength if s else np.nan for s in solutions])
    table = pd.DataFrame({
        "layers": layers, "seed": list(seeds), "strength": strengths,
        "dose": strengths * np.asarray(unit_doses),
        "kl_p95": [s.divergence if s else np.nan for s in solutions],
        "evaluations": [s.evaluations if s else 0 for s in solutions],
    })
    reached = table["strength"].dropna()
    if len(reached) < 2:
        return table.assign(mean=np.nan, low=np.nan, high=np.nan)
    interval = t_interval(reached.tolist(), log=True)
    return table.assign(mean=float(np.exp(np.log(reached).mean())), low=interval.low,
                        high=interval.high)


def of_budget(table: pd.DataFrame) -> list[Metric]:
    """Dose and λ of a `budget_table`, geometric means over the seeds that reach the budget."""
    reached, found = table.dropna(subset="strength"), []
    for column, name in (("dose", "dose"), ("strength", "lambda")):
        if len(reached) < 2:
            found.append(Metric.of(name, None, "", seeds=tuple(table["seed"]),
                                   undefined=f"{len(reached)} of {len(table)} seeds reach the "
                                             "budget"))
        else:
            found.append(Metric.of(name, float(np.exp(np.log(reached[column]).mean())), "",
                                   interval=t_interval(reached[column].tolist(), log=True),
                                   seeds=tuple(reached["seed"])))
    return found
