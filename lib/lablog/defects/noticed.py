"""What a planted fault does to a number, and whether the check that must notice it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def noticed(
    defect: str, symptom: str, unit: str, seeds: Sequence[int], *, planted: Sequence[float],
    right: Sequence[float], check: str, fires: object, fires_without: object, log_check: str = "",
) -> list[Metric]:
    """The `COLUMNS` of a defect.

    planted, right: the values of the symptom with the fault and without, one for each of the
    seeds, of which mean and t interval are recorded, or one that depends on no seed. None can be
    negative, so an interval ends at zero, and a fraction's at 1. check: what must notice;
    UnnoticedError unless it `fires` with the fault, and not `fires_without`. log_check: what a
    check of the log says of the planted fault.
    """
    if not fires or fires_without:
        when = "fires without the fault" if fires else "does not fire where it is planted"
        raise UnnoticedError(f"{defect}: {check} {when}")
    told = [("symptom", symptom), ("caught_by", check), ("log_check", log_check)]
    found = [Metric.of(f"{defect}.{name}", text, "class") for name, text in told if text]
    within = (0.0, 1.0 if unit == "fraction" else math.inf)
    for side, values in (("planted", planted), ("right", right)):
        mean, many = sum(values) / len(values), len(values) > 1
        found.append(Metric.of(
            f"{defect}.{side}", mean, unit, n=len(values), seeds=tuple(seeds) if many else None,
            interval=t_interval(values, within=within) if many else None))
    return found


def lines(cases: Mapping[str, Any], x: str, ys: Sequence[str], log: bool = False) -> Drawn:
    """A panel for each of the columns `ys` against `x`, a line for each of the cases, which are
    rows of numbers by name, or tables."""
    data = pd.concat([pd.DataFrame(rows)[[x, *ys]].assign(case=name)
                      for name, rows in cases.items()])
    figure, axes = plt.subplots(1, len(ys), figsize=(4.2 * len(ys), 3.0), squeeze=False)
    for axis, y in zip(axes[0], ys, strict=True):
        for i, (case, rows) in enumerate(data.groupby("case", sort=False)):
            axis.plot(rows[x], rows[y], label=case, color=COLOURS[i], marker=MARKERS[i],
                      markersize=3)
        axis.set(xlabel=x, ylabel=y.replace("_", " "), yscale="log" if log else "linear")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, data
