"""Faults that are planted on purpose, and whether what must notice them does.

A fault is planted in a chapter or a test, with ``unittest.mock.patch``, for the time of one
measurement; nothing of the library knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import pandas as pd

from lablog.figures import COLOURS, MARKERS, Drawn
from lablog.intervals import t_interval
from lablog.record import Metric

COLUMNS = ("symptom", "planted", "right", "caught_by", "log_check")
"""What is recorded of a defect, each as ``<defect>.<column>``."""


class UnnoticedError(AssertionError):
    """A check that did not fire where a fault was planted, or fired where there was none."""


def refusal(attempt: Callable[[], object]) -> str:
    """The kind of error with which `attempt` is refused, such as ``ValueError``; empty if it is
    not."""
    try:
        attempt()
    except Exception as error:
        return type(error).__name__
    return ""


def caught(defect: str, by: str, *, planted: object, right: object) -> Metric:
    """``<defect>.caught_by``: the check `by` which noticed.

    planted, right: whether it fired (is true) with the fault and without it. UnnoticedError unless
    it fired with the fault alone.
    """
    if not planted or right:
        when = "fires without the fault" if planted else "does not fire where it is planted"
        raise UnnoticedError(f"{defect}: {by} {when}")
    return Metric.of(f"{defect}.caught_by", by, "class")


def symptom(defect: str, name: str, unit: str, *, planted: Sequence[float],
            right: Sequence[float], seeds: Sequence[int] = ()) -> list[Metric]:
    """``<defect>.planted`` and ``.right``: means with their t interval over seeds; ``.symptom``:
    what they are means of.

    All are quantities that cannot be negative, and an interval ends there, and a fraction's at 1;
    a value that does not depend on a seed has none.
    """
    within = (0.0, 1.0 if unit == "fraction" else math.inf)
    found = [Metric.of(f"{defect}.symptom", name, "class")]
    for side, values in (("planted", planted), ("right", right)):
        mean, many = sum(values) / len(values), len(values) > 1
        found.append(Metric.of(
            f"{defect}.{side}", mean, unit, n=len(values), seeds=tuple(seeds) if many else None,
            interval=t_interval(values, within=within) if many else None))
    return found


def silent(defect: str, check: str) -> Metric:
    """``<defect>.log_check``: what a check of the log says of the planted fault."""
    return Metric.of(f"{defect}.log_check", check, "class")


def lines(data: pd.DataFrame, x: str, ys: Sequence[str], log: bool = False) -> Drawn:
    """A panel for each of the columns `ys` against `x`, a line for each ``case``."""
    figure, axes = plt.subplots(1, len(ys), figsize=(4.2 * len(ys), 3.0), squeeze=False)
    for axis, y in zip(axes[0], ys, strict=True):
        for i, (case, rows) in enumerate(data.groupby("case", sort=False)):
            axis.plot(rows[x], rows[y], label=case, color=COLOURS[i], marker=MARKERS[i],
                      markersize=3)
        axis.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, data
