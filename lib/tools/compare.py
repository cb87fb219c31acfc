"""What changed between two runs: ``python -m tools.compare A B``.

A and B are records, folders of records (with the figures' data beside them, as in build/<profile>/,
or without, as in book/records/<profile>/), names of profiles, "published" for what is published of
the other one's profile, or COMMIT:PROFILE for what that commit had published. Compared are metrics,
by name, with unit, value to the last digit, interval and counts, and their order; the data of
figures, but for columns of seconds; the texts of reports; the verdicts on the logs' claims.
Parameters are told where they differ, since they may say why, and are no difference of their own: a
name can change where no result does.
Exit code: 0 everything is equal, 1 something differs, 2 there is nothing to compare.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lablog import layout
from lablog.beside import KINDS, overlapping, pairs, verdict_changes
from lablog.files import repository
from lablog.record import Metric, Record, ReportText

APART = ("value", "unit", "interval", "name")
"""Fields of a metric that have a column of their own."""


@dataclass(frozen=True)
class Kept:
    """A record and the folder from which it names its figures."""

    record: Record
    folder: Path


@dataclass
class Changes:
    """What differs between two records of one notebook; empty when nothing does."""

    metrics: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Name, what A holds, what B holds, remarks."""
    others: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.metrics or self.others)


def published_by(commit: str, folder: str) -> dict[str, Record]:
    """The records in a folder of a commit, by notebook; ValueError if git knows no such commit."""
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=repository(), capture_output=True,
                              text=True, check=False)
        if done.returncode:
            raise ValueError(f"git has no commit {commit!r}: {done.stderr.strip()}")
        return done.stdout

    paths = git("ls-tree", "--name-only", commit, f"{folder}/").splitlines()
    texts = [git("show", f"{commit}:{path}") for path in paths if path.endswith(".json")]
    return {record.notebook: record for record in map(Record.model_validate_json, texts)}


def committed(commit: str, profile: str) -> dict[str, Kept]:
    """The records of a profile that a commit had published, by notebook, without figures' data."""
    found = published_by(commit, f"book/records/{profile}")
    if not found:
        raise ValueError(f"commit {commit} has published nothing of profile {profile!r}")
    return {name: Kept(record, repository() / "no figures") for name, record in found.items()}


def find(place: str, other: str = "") -> dict[str, Kept]:
    """The records at a place, by notebook; ValueError says why there is none. `other` is what they
    are to be compared with."""
    root = repository()
    if place == "published":
        folder = Path(other.split(":")[-1])
        name = folder.parent.name if folder.name == "records" else folder.name
        place = str(root / "book" / "records" / name)
    if re.fullmatch(r"[\w./~^-]+:[\w-]+", place):
        return committed(*place.split(":"))
    tried = [Path(place), layout.results(place), root / "book" / "records" / place]
    path = next((path for path in tried if place and path.exists()), None)
    if path is None:
        raise ValueError(f"there is no record, folder or profile with results {place!r}")
    inner = path / "records" if (path / "records").is_dir() else path
    files = [inner] if inner.is_file() else sorted(inner.glob("*.json"))
    if not files:
        raise ValueError(f"{path} holds no record (*.json): run `make reproduce` for it first")
    folder = files[0].parent
    beside = folder.parent if folder.name == "records" else folder
    return {record.notebook: Kept(record, beside) for record in map(Record.read, files)}


def shown(metric: Metric | None) -> str:
    """Value, unit and interval, every digit of them."""
    if metric is None:
        return "missing"
    value = f"undefined ({metric.undefined})" if metric.value is None else repr(metric.value)
    interval = f" [{metric.interval[0]!r}, {metric.interval[1]!r}]" if metric.interval else ""
    return f"{value}{f' {metric.unit}' if metric.unit else ''}{interval}"


def remarks(one: Metric, two: Metric) -> str:
    """How far two metrics of one name lie apart, and what else they do not share."""
    told = []
    if all(isinstance(m.value, float | int) for m in (one, two)) and one.value != two.value:
        told.append(f"{two.value - one.value:+.3g}")  # type: ignore[operator]
    if one.interval != two.interval and (overlap := overlapping(one, two)) is not None:
        told.append("intervals overlap" if overlap else "intervals apart")
    left, right = (metric.model_dump(mode="json") for metric in (one, two))
    told += [f"{name} {left[name]} → {right[name]}" for name in left
             if name not in APART and left[name] != right[name]]
    return ", ".join(told)


def metric_changes(one: Record, two: Record) -> list[tuple[str, str, str, str]]:
    """A row for every metric that is not the same in both, A's first."""
    left, right = ({m.name: m for m in record.metrics} for record in (one, two))
    rows = []
    for name in [*left, *(name for name in right if name not in left)]:
        a, b = left.get(name), right.get(name)
        if a is None or b is None:
            rows.append((name, shown(a), shown(b), "added" if a is None else "removed"))
        elif json.dumps(a.model_dump(mode="json")) != json.dumps(b.model_dump(mode="json")):
            rows.append((name, shown(a), shown(b), remarks(a, b)))
    return rows


def order_changes(one: Record, two: Record) -> list[str]:
    """The first metric, of those in both, that stands elsewhere."""
    names = [[m.name for m in record.metrics] for record in (one, two)]
    left, right = ([n for n in own if n in set(other)] for own, other in (names, names[::-1]))
    return [f"order of metrics: A has {a}, where B has {b}"
            for a, b in zip(left, right, strict=True) if a != b][:1]


def data_changes(one: Path, two: Path) -> str:
    """How two tables differ, columns of seconds aside; empty when they do not."""
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False).drop(
        columns="seconds", errors="ignore") for path in (one, two)]
    first, second = tables
    if list(first) != list(second):
        return f"columns {list(first)} → {list(second)}"
    if len(first) != len(second):
        return f"{len(first)} → {len(second)} rows"
    differing = (first != second).to_numpy()
    if not differing.any():
        return ""
    row, column = map(int, next(zip(*differing.nonzero(), strict=True)))
    a, b = (str(table.iat[row, column]) for table in tables)
    return (f"{differing.sum()} of {differing.size} values differ, first {first.columns[column]} "
            f"in row {row + 1}: {a} → {b}")


def figure_changes(one: Kept, two: Kept) -> list[str]:
    """Figures that are in one record only, and those whose data differ, where both are there."""
    left, right = ({f.name: f.csv for f in kept.record.figures} for kept in (one, two))
    told = [f"figure {name}: only in {'A' if name in left else 'B'}"
            for name in [*left, *right] if (name in left) != (name in right)]
    for name in (name for name in left if name in right):
        paths = one.folder / left[name], two.folder / right[name]
        if all(path.is_file() for path in paths):
            change = data_changes(*paths)
            told += [f"figure {name}: {change}"] if change else []
    return told


def report_changes(one: ReportText | None, two: ReportText | None) -> list[str]:
    """Lines of the reports that are not in both, A's with a minus, B's with a plus."""
    told = []
    for language in ("en", "ja"):
        a, b = (str(getattr(text, language, "")).splitlines() for text in (one, two))
        told += [f"report {language}: {line}" for line in difflib.ndiff(a, b)
                 if line[:2] in ("- ", "+ ")]
    return told


def changes(one: Kept, two: Kept) -> Changes:
    """All that differs between two records of one notebook."""
    a, b = one.record, two.record
    status = [f"status: {a.status} → {b.status}"] if a.status != b.status else []
    return Changes(metric_changes(a, b), [*status, *order_changes(a, b), *figure_changes(one, two),
                                          *report_changes(a.report, b.report)])


def parameters(one: Record, two: Record) -> list[str]:
    """The parameters that differ, as remarks."""
    left, right = one.parameters, two.parameters
    return [f"parameter {name}: {left.get(name, 'missing')!r} → {right.get(name, 'missing')!r}"
            for name in [*left, *(name for name in right if name not in left)]
            if name not in left or name not in right or left[name] != right[name]]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows]


def told_of_intervals(one: Record, two: Record) -> str:
    """How many numbers differ, and how."""
    counts = Counter(pair.kind for pair in pairs(one, two))
    return "; ".join(f"{counts[kind]} {text}" for kind, text in KINDS.items() if counts[kind])


def told_of_verdicts(one: dict[str, Kept], two: dict[str, Kept]) -> list[str]:
    """A line for every claim that the chapters of both judge otherwise."""
    both = sorted(one.keys() & two.keys())
    left, right = ({name: kept[name].record for name in both} for kept in (one, two))
    return [f"claim {a.claim.id} ({a.claim.quantity}): {a.verdict} {a.side} → {b.verdict} {b.side}"
            for a, b in verdict_changes(left, right)]


def compare(one: dict[str, Kept], two: dict[str, Kept]) -> tuple[list[str], bool]:
    """The lines to print, and whether everything is equal."""
    lines, same = [], True
    for notebook in sorted(one.keys() | two.keys()):
        if notebook not in one or notebook not in two:
            lines.append(f"== {notebook}: only in {'A' if notebook in one else 'B'}")
            same = False
            continue
        a, b = one[notebook].record, two[notebook].record
        found = changes(one[notebook], two[notebook])
        same = same and not found
        lines.append(f"== {notebook}: {'differs' if found else f'{len(a.metrics)} metrics equal'}")
        lines += parameters(a, b)
        if found:
            lines.append(told_of_intervals(a, b))
        if found.metrics:
            lines += table([("metric", "A", "B", ""), *found.metrics])
        lines += found.others
    verdicts = told_of_verdicts(one, two)
    if not same:
        lines += verdicts or ["claims: all judged alike"]
    return lines, same


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("A", help="record, folder, profile, published, or COMMIT:PROFILE")
    parser.add_argument("B", help="the same, to compare with")
    options = parser.parse_args(arguments)
    try:
        one, two = find(options.A, options.B), find(options.B, options.A)
        if not one.keys() & two.keys():
            raise ValueError(f"{options.A} has {', '.join(one)}, {options.B} has "
                             f"{', '.join(two)}: no notebook is in both")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines, same = compare(one, two)
    print("\n".join(lines))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
