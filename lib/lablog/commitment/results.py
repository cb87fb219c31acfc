"""From sweep tables to metrics, and the mandated reports of notebooks 01 and 02."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lablog.commitment.calibration import Solution
from lablog.commitment.sweep import NAMED_ROWS, PROPORTIONS, RANGES, interval_of
from lablog.intervals import geometric_over_seeds, wilson
from lablog.models import training
from lablog.record import Run
from lablog.report import Section
from lablog.text.dialogues import load_settings
from lablog.text.tokenizer import Tokenizer

UNITS = {"recall": "fraction", "eviction": "fraction", "same_choice": "fraction",
         "answered": "fraction", "yes_sum": "", "answer_mass": "fraction", "perplexity": "",
         "kl_mean": "nat", "kl_p95": "nat", "own_kl_mean": "nat", "own_kl_p95": "nat",
         "same_top": "fraction", "repeated_4grams": "fraction", "distinct_1": "fraction",
         "distinct_2": "fraction", "dose": ""}
NAMED_KEYS = ("lambda1.all", "lambda0.1.all", "lambda0.01.all", "lambda0.01.last_quarter")


def record_group(run: Run, key: str, rows: pd.DataFrame) -> None:
    """Add ``<key>.<measure>`` for every measure of one configuration (rows: its seeds)."""
    seeds = tuple(int(seed) for seed in rows["seed"]) if len(rows) > 1 else None
    items = int(rows["items"].iloc[0])
    for name, unit in UNITS.items():
        counts = {}
        if name in PROPORTIONS:
            counts = {"numerator": float((rows[name] * items).round().sum()),
                      "denominator": float(items * len(rows))}
        run.metric(f"{key}.{name}", float(rows[name].mean()), unit, n=items * len(rows),
                   seeds=seeds, interval=interval_of(rows, name), **counts)
    words = rows["word"].value_counts()
    run.metric(f"{key}.word", str(words.index[0]), "class", seeds=seeds,
               numerator=float(words.iloc[0]), denominator=float(len(rows)))


def record_model_check(run: Run, folder: Path, count: int) -> None:
    """Does the offline model copy what is in its window, and only guess what is not?

    On `count` held-out dialogues, greedily and in PyTorch: recall of a stated value, the same
    with the statement evicted (chance: one in the number of values), and right answers in the
    guessing game when the choice stands in the window.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer, settings = Tokenizer(folder / "tokenizer.model"), load_settings()
    shares = {
        "recall": training.recall_accuracy(model, tokenizer, settings, count),
        "recall_evicted": training.recall_accuracy(model, tokenizer, settings, count, evicted=True),
    }
    for name, share in shares.items():
        hits = round(share * count)
        run.metric(f"offline.{name}", share, "fraction", numerator=float(hits), n=count,
                   denominator=float(count), interval=wilson(hits, count))
    compared = training.comparison_accuracy(model, tokenizer, settings, count)
    for name, share in compared.items():
        run.metric(f"offline.compare_{name}", share, "fraction", n=count)
    run.metric("offline.parameters", model.num_parameters(), "count")


def _configuration(rows: pd.DataFrame, control: str, layers: str, strength: float) -> pd.DataFrame:
    return rows[(rows["control"] == control) & (rows["layers"] == layers)
                & (rows["strength"] == strength)]


def record_named_rows(run: Run, rows: pd.DataFrame) -> None:
    """The log's four rows, each with its redrawn control, and the two baselines.

    Raises ValueError when the sweep does not hold one of them.
    """
    record_group(run, "unmodified", rows[rows["control"] == "none"])
    record_group(run, "text", rows[rows["control"] == "text"])
    for key, (label, strength, layers) in zip(NAMED_KEYS, NAMED_ROWS, strict=True):
        for control, prefix in (("commitment", ""), ("redrawn", "redrawn.")):
            part = _configuration(rows, control, layers, strength)
            if part.empty:
                raise ValueError(f"the sweep holds no row {label!r} ({control}): add {strength:g} "
                                 "to the strengths")
            record_group(run, prefix + key, part)


def record_improvements(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Claim A08: which (λ, range) keep coherence and beat λ = 0, and on which probe.

    A configuration counts as coherent if most seeds are, and as better on a probe if the whole
    interval over seeds lies above the value at λ = 0 on the same items.
    """
    baseline = rows[rows["control"] == "none"].iloc[0]
    probes = ("recall", "eviction", "same_choice")
    found = []
    commitments = rows[rows["control"] == "commitment"]
    for (layers, strength), group in commitments.groupby(["layers", "strength"], sort=False):
        entry = {"layers": layers, "strength": strength,
                 "coherent": group["word"].mode().iloc[0] == "coherent"}
        for name in probes:
            interval = interval_of(group, name)
            entry[name] = interval is not None and interval.low > baseline[name]
        found.append(entry)
    table = pd.DataFrame(found)
    cells, coherent = float(len(table)), table["coherent"]
    for name in probes:
        count = int((coherent & table[name]).sum())
        run.metric(f"coherent_and_better.{name}", count, "count", numerator=float(count),
                   denominator=cells)
    both = int((coherent & table["recall"] & table["same_choice"]).sum())
    run.metric("coherent_and_better.recall_and_same_choice", both, "count", numerator=float(both),
               denominator=cells)
    return table


def record_budget(
    run: Run, layers: str, solutions: Sequence[Solution | None], seeds: Sequence[int]
) -> pd.DataFrame:
    """λ of the KL budget in one range, geometric mean over seeds; returns the table drawn."""
    name = f"budget.{layers.replace(' ', '_')}.lambda"
    strengths = [solution.strength for solution in solutions if solution]
    table = pd.DataFrame({
        "layers": layers, "seed": list(seeds),
        "strength": [s.strength if s else float("nan") for s in solutions],
        "kl_p95": [s.divergence if s else float("nan") for s in solutions],
        "evaluations": [s.evaluations if s else 0 for s in solutions],
    })
    if len(strengths) < 2:
        run.metric(name, None, "", seeds=tuple(seeds),
                   undefined=f"{len(strengths)} of {len(solutions)} seeds reach the budget")
        return table.assign(mean=float("nan"), low=float("nan"), high=float("nan"))
    interval = geometric_over_seeds(strengths)
    mean = float(np.exp(np.mean(np.log(strengths))))
    run.metric(name, mean, "", interval=interval, seeds=tuple(seeds), n=len(strengths))
    return table.assign(mean=mean, low=interval.low, high=interval.high)


def _rows(keys: Sequence[str], english: Sequence[str], japanese: Sequence[str],
          template: tuple[str, str]) -> list[tuple[str, str]]:
    return [(f"{en}: {template[0]}".replace("KEY", key), f"{ja}: {template[1]}".replace("KEY", key))
            for key, en, ja in zip(keys, english, japanese, strict=True)]


_ROW_KEYS = ("unmodified", "text", *NAMED_KEYS)
_ROW_EN = ("unmodified (λ = 0)", "a line of text instead", *(row[0] for row in NAMED_ROWS))
_ROW_JA = ("無変更 (λ = 0)", "テキスト一行で代用", "λ = 1, 全層", "λ = 0.1, 全層", "λ = 0.01, 全層",
           "λ = 0.01, 最後の四分の一")
_REDRAWN = [f"redrawn.{key}" for key in NAMED_KEYS]
_PROBES = ("recall {KEY.recall}, after eviction {KEY.eviction:value}, forked choice "
           "{KEY.same_choice:value}, Σ P(yes) {KEY.yes_sum:value}",
           "想起 {KEY.recall}, 窓外 {KEY.eviction:value}, 分岐選択の一致 {KEY.same_choice:value}, "
           "Σ P(yes) {KEY.yes_sum:value}")
_LANGUAGE = ("{KEY.word:value} in {KEY.word:counts} runs - perplexity {KEY.perplexity:value}, "
             "KL p95 {KEY.kl_p95:value} nat, repeated 4-grams {KEY.repeated_4grams:value}",
             "{KEY.word:value} {KEY.word:counts}回 - パープレキシティ {KEY.perplexity:value}, "
             "KL p95 {KEY.kl_p95:value} nat, 4-gram反復率 {KEY.repeated_4grams:value}")

ZERO_SHOT = (
    Section(("Probes", "プローブ"), _rows(_ROW_KEYS, _ROW_EN, _ROW_JA, _PROBES)),
    Section(("Control: direction redrawn every turn", "対照: 毎ターン方向を引き直す"),
            _rows(_REDRAWN, _ROW_EN[2:], _ROW_JA[2:], _PROBES)),
    Section(("Language", "言語"), _rows(_ROW_KEYS, _ROW_EN, _ROW_JA, _LANGUAGE)),
    Section(("Mechanism", "機構"), [
        ("‖W_c z*‖ {direction_norm}, mean ‖h‖ {residual_norm}, initialisations per process "
         "{initialisations}", "‖W_c z*‖ {direction_norm}, 平均 ‖h‖ {residual_norm}, "
         "プロセス当たりの初期化 {initialisations}"),
    ]),
)

CALIBRATION = (
    Section(("λ that spends the KL budget", "KL予算を使い切る λ"), [
        (f"{layers}: {{budget.{layers.replace(' ', '_')}.lambda}}",) * 2 for layers in RANGES
    ]),
    Section(("Coherent and better than λ = 0 (of all λ and ranges)",
             "首尾一貫し、かつ λ = 0 を上回る組 (全ての λ と範囲のうち)"), [
        ("on recall {coherent_and_better.recall:counts}, after eviction "
         "{coherent_and_better.eviction:counts}, on forked choice "
         "{coherent_and_better.same_choice:counts}, on recall and forked choice "
         "{coherent_and_better.recall_and_same_choice:counts}",
         "想起 {coherent_and_better.recall:counts}, 窓外 {coherent_and_better.eviction:counts}, "
         "分岐選択 {coherent_and_better.same_choice:counts}, 想起と分岐選択の両方 "
         "{coherent_and_better.recall_and_same_choice:counts}"),
    ]),
)
