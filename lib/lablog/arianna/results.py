"""From bits to metrics with intervals over dialogues, and Arianna's mandated report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lablog.intervals import Interval
from lablog.record import Run
from lablog.report import Section

Bits = NDArray[np.float64]


def _replicas(bits: Bits, sizes: Bits, seed: int, draws: int) -> Bits:
    """sum(bits) / sum(sizes) of `draws` samples of the texts, with replacement."""
    picks = np.random.default_rng(seed).integers(0, len(bits), (draws, len(bits)))
    ratios: Bits = bits[picks].sum(1) / sizes[picks].sum(1)
    return ratios


def interval(bits: Bits, sizes: Bits, draws: int = 2000) -> Interval | None:
    """Percentile bootstrap of sum(bits) / sum(sizes) over dialogues; none for a single one.

    For the difference of two conditions pass the difference of their bits: the same dialogues
    are drawn for both.
    """
    if len(bits) < 2:
        return None
    low, high = np.percentile(_replicas(bits, sizes, 0, draws), [2.5, 97.5])
    return Interval(float(low), float(high), f"bootstrap over {len(bits)} texts, {draws} draws")


def record_gap(run: Run, name: str, one: tuple[Bits, Bits], other: tuple[Bits, Bits]) -> None:
    """Difference of two bits per byte, each (bits, sizes), of texts that are not the same."""
    value = one[0].sum() / one[1].sum() - other[0].sum() / other[1].sum()
    replicas = _replicas(*one, 0, 2000) - _replicas(*other, 1, 2000)
    low, high = np.percentile(replicas, [2.5, 97.5])
    run.metric(name, float(value), "bits/byte", n=len(one[0]) + len(other[0]),
               interval=Interval(float(low), float(high), "bootstrap over texts of both sides"))


def record_bits(run: Run, name: str, bits: Bits, sizes: Bits) -> dict[str, float]:
    """Bits per byte with its interval (or a paired difference of it), as a table's row."""
    found, value = interval(bits, sizes), float(bits.sum() / sizes.sum())
    run.metric(name, value, "bits/byte", interval=found, n=len(bits))
    return {"bits/byte": value, "low": found.low if found else value,
            "high": found.high if found else value}


def record_sizes(run: Run, exported: Mapping[str, Path]) -> None:
    """Bytes of each export; of the Hugging Face folder, of its weights."""
    for kind, path in exported.items():
        file = path if path.is_file() else path / "model.safetensors"
        run.metric(f"export.{kind}.bytes", file.stat().st_size, "count")


def report(arms: Sequence[str]) -> list[Section]:
    """Base run, fine-tuning against the base model, and each comparison."""
    return [
        Section(("Base training", "ベース訓練"), [
            ("Parameters: {base.parameters}; tokens seen: {base.tokens}; steps: {base.steps}",
             "パラメータ数: {base.parameters}; 学習トークン数: {base.tokens}; "
             "ステップ数: {base.steps}"),
            ("Held-out documents: {base.documents.bits_per_byte}",
             "未学習文書: {base.documents.bits_per_byte}"),
        ]),
        Section(("Fine-tuning, held-out answers", "ファインチューニング (未学習の回答)"), [
            ("Dialogues: {dialogues.count} in {dialogues.folds} folds; before {before.qa}; "
             "after {after.qa}; difference {after_minus_before.qa}",
             "対話数: {dialogues.count} ({dialogues.folds}分割); 前 {before.qa}; "
             "後 {after.qa}; 差 {after_minus_before.qa}"),
            ("Relative update of the weights: {after.relative_update}; tokens seen: {after.tokens}",
             "重みの相対変化: {after.relative_update}; 学習トークン数: {after.tokens}"),
            ("Bare question minus Q/A form: before {bare_minus_qa.before}; after "
             "{bare_minus_qa.after}",
             "質問のみとQ/A形式の差: 前 {bare_minus_qa.before}; 後 {bare_minus_qa.after}"),
        ]),
        Section(("Comparisons, difference to the base model",
                 "比較 (ベースモデルとの差)"),
                [(f"{arm}: {{{arm}.minus_before}}", f"{arm}: {{{arm}.minus_before}}")
                 for arm in arms]),
        Section(("Memorised and forgotten", "記憶と忘却"), [
            ("Trained minus held-out answers: {memory.gap}; 5-word runs of samples found in "
             "training dialogues: {memory.runs}",
             "学習済みと未学習の回答の差: {memory.gap}; 訓練対話にある5語連: {memory.runs}"),
            ("Held-out documents: before {base.documents.bits_per_byte}; after "
             "{after.documents.bits_per_byte}",
             "未学習文書: 前 {base.documents.bits_per_byte}; 後 {after.documents.bits_per_byte}"),
        ]),
    ]
