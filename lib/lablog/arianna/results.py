"""From bits to metrics with intervals over dialogues, and Arianna's mandated report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lablog.intervals import Interval
from lablog.record import Run

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
