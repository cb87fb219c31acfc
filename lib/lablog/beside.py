"""One run beside another: which numbers differ by more than their intervals, and which verdict.

Two machines, or two versions of a library, seldom give the same last digit. What counts is whether
a number leaves the interval that it was published with, and whether a claim is judged otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lablog.claims import Judged, judged_otherwise, ledger
from lablog.markdown import plain
from lablog.record import Metric, Record
from lablog.report import format_metric

Kind = Literal["equal", "overlap", "apart", "no interval", "changed", "missing"]
KINDS: dict[Kind, str] = {
    "equal": "equal to the last digit",
    "overlap": "differ, and their intervals overlap",
    "apart": "differ by more than their intervals",
    "no interval": "differ, and have no interval",
    "changed": "are another word",
    "missing": "are in one run only",
}
SHOWN = 12  # numbers without an interval that are listed, those that differ most first


def overlapping(one: Metric, two: Metric) -> bool | None:
    """Whether the intervals of two metrics have a number in common; None where one has none."""
    if one.interval is None or two.interval is None:
        return None
    return one.interval[0] <= two.interval[1] and two.interval[0] <= one.interval[1]


@dataclass(frozen=True)
class Pair:
    """A metric of both runs, or of one."""

    name: str
    one: Metric | None
    two: Metric | None

    @property
    def kind(self) -> Kind:
        """How they differ."""
        if self.one is None or self.two is None:
            return "missing"
        if self.one.value == self.two.value:
            return "equal"
        if not all(isinstance(each.value, int | float) for each in (self.one, self.two)):
            return "changed"
        overlap = overlapping(self.one, self.two)
        if overlap is None:
            return "no interval"
        return "overlap" if overlap else "apart"

    @property
    def relative(self) -> float:
        """Difference over the larger of two numbers, 0 to 2; 0 for what are none."""
        values = [each.value for each in (self.one, self.two) if each is not None]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if len(numbers) < 2 or not any(numbers):
            return 0.0
        return abs(numbers[0] - numbers[1]) / max(map(abs, numbers))


def pairs(one: Record, two: Record) -> list[Pair]:
    """All metrics of both, in the order of the first."""
    left, right = ({metric.name: metric for metric in record.metrics} for record in (one, two))
    names = [*left, *(name for name in right if name not in left)]
    return [Pair(name, left.get(name), right.get(name)) for name in names]


def verdict_changes(one: Mapping[str, Record],
                    two: Mapping[str, Record]) -> list[tuple[Judged, Judged]]:
    """Claims that two runs of the same chapters, records by notebook, judge otherwise."""
    judged = [ledger({"run": dict(records)}, ["run"]) for records in (one, two)]
    return judged_otherwise(*judged)


def page(own: Sequence[Record], published: Mapping[str, Mapping[str, Record]]) -> str:
    """Markdown: the results of this clone beside those that the project publishes for the same
    profile."""
    parts = ["# Your run beside the published one\n"]
    known = [(record, published[record.profile][record.notebook]) for record in own
             if record.notebook in published.get(record.profile, {})]
    if not known:
        profiles = ", ".join(sorted({record.profile for record in own}))
        return "\n".join([*parts, f"No run of profile {profiles} is published, so there is nothing "
                          "to set the results of this clone beside.\n"])
    parts.append(
        "The numbers of this clone's own records against those of the published ones. A number "
        "that differs is no fault by itself: another processor adds in another order. One that "
        "leaves its interval is worth a look, and so is a claim that is judged otherwise.\n")
    parts += ["| chapter | " + " | ".join(KINDS.values()) + " |", "|---" * (len(KINDS) + 1) + "|"]
    compared = [(mine, theirs, pairs(mine, theirs)) for mine, theirs in known]
    for mine, _, found in compared:
        counts = Counter(pair.kind for pair in found)
        parts.append(f"| {mine.notebook} | " + " | ".join(str(counts[k]) for k in KINDS) + " |")
    parts.append(_verdicts(compared))
    parts += [_chapter(*each) for each in compared]
    return "\n".join(parts)


def _verdicts(compared: Sequence[tuple[Record, Record, list[Pair]]]) -> str:
    changed = verdict_changes({theirs.notebook: theirs for _, theirs, _ in compared},
                              {mine.notebook: mine for mine, _, _ in compared})
    if not changed:
        return "\nAll claims are judged alike, each by the records of the same chapters.\n"
    rows = "\n".join(f"| {a.claim.id} | {a.claim.quantity} | {_judged(a)} | {_judged(b)} |"
                     for a, b in changed)
    return f"\n| claim | | published | here |\n|---|---|---|---|\n{rows}\n"


def _judged(row: Judged) -> str:
    value = row.measured[0].shown if row.measured else "nothing"
    return plain(", ".join(filter(None, [row.verdict, row.side, value])))


def _chapter(mine: Record, theirs: Record, found: Sequence[Pair]) -> str:
    """The numbers of a chapter that differ by more than their intervals, and some of the others."""
    where = [f"{record.machine.processor} with {record.machine.threads} threads, commit "
             f"`{record.source.commit[:10]}`" for record in (mine, theirs)]
    parts = [f"## {mine.notebook}\n\nHere: {where[0]}. Published: {where[1]}.\n"]
    parameters = [name for name in {**mine.parameters, **theirs.parameters}
                  if mine.parameters.get(name) != theirs.parameters.get(name)]
    if parameters:
        parts.append(f"Parameters that differ: {', '.join(f'`{name}`' for name in parameters)}.\n")
    without = sorted((pair for pair in found if pair.kind == "no interval"),
                     key=lambda pair: -pair.relative)
    listed = [pair for pair in found if pair.kind in ("apart", "changed", "missing")]
    listed += without[:SHOWN]
    if not listed:
        return "\n".join([*parts, "Every number is equal, or has an interval that overlaps.\n"])
    rows = "\n".join(f"| `{pair.name}` | {_told(pair.two)} | {_told(pair.one)} | {pair.kind} |"
                     for pair in listed)
    parts.append(f"| metric | published | here | |\n|---|---|---|---|\n{rows}\n")
    if len(without) > SHOWN:
        parts.append(f"{len(without) - SHOWN} more have no interval and differ by less, relative "
                     "to their size.\n")
    return "\n".join(parts)


def _told(metric: Metric | None) -> str:
    return "missing" if metric is None else plain(format_metric(metric, "interval"))

