"""What is true of the lab logs: every claim beside what was measured, with one verdict by rule.

``data/claims.csv`` holds the claims as the logs state them and, in columns of their own, what is
measured for each, the rule that compares, and the conditions under which that counts. This module
applies them to records. ``python -m lablog.claims`` prints the ledger.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lablog import layout
from lablog.files import data_file, parsing, repository
from lablog.record import Metric, Record
from lablog.report import format_metric
from lablog.strict import Strict, validated

Verdict = Literal["reproduced", "not reproduced", "indicative", "inconsistent", "not run"]
VERDICTS: tuple[Verdict, ...] = (
    "reproduced", "not reproduced", "indicative", "inconsistent", "not run")
Rule = Literal["within", "relative", "factor", "exact", "at least", "below", "above interval",
               "below interval", "equal", "report"]
PROFILES = ("full", "pretrained", "pretrained-gpu", "study", "laptop")
"""From the profile nearest to the logs' conditions to the farthest; smoke settles nothing."""
BENCH = "bench"
PINNED = re.compile(r"@[0-9a-f]{40}\b")
"""A commit in the name of a model, which is the claim's model at any of them."""


def _without_gpu(record: Record) -> Metric | None:
    """That what a record measures was trained on a CPU, in this run; a run on a GPU, one that took
    over its trainings and one that failed say nothing of that."""
    asked = record.parameters
    here = asked.get("device", "cpu") == "cpu" and not asked.get("trainings")
    if not here or record.status != "ok":
        return None
    return Metric.of("trained_without_gpu", "yes", "class")


def _failures(record: Record) -> Metric:
    return Metric.of("failures", int(record.status == "failed"), "count")


RECORDED: Mapping[str, Callable[[Record], Metric | None]] = {
    "@failures": _failures, "@without_gpu": _without_gpu}
"""Measures that are the record's own and no metric of it."""


class Claim(Strict):
    """A row of ``data/claims.csv``. The first seven columns are the logs' words.

    notebook: the chapter that measures it, or ``bench``. measure: names of metrics in its record,
    with a space between; the rule must hold for all; behind `` | `` other names for them in
    profiles of another size. rule: how a value compares with `number`: ``within`` `allowed` of it,
    ``relative`` (within the share `allowed`), by at most the ``factor`` `allowed`, ``exact``, ``at
    least``, ``below``, its whole interval above or below it (``above interval``, ``below
    interval``), the same word (``equal``), or not at all (``report``). requires: parameters that a
    record must have for the row to be judged, as ``name=value; name=value``. differs: what is
    always other than in the log, which lets the row be indicative at most. needs: what it takes to
    measure it, where no profile does. contradicts: other rows of the logs that this one excludes.
    """

    id: str = Field(pattern=r"^[A-Z]\d\d$")
    experiment: Literal["commitment", "cvfp", "arianna"]
    quantity: str = Field(min_length=1)
    claimed: str = Field(min_length=1)
    unit: str
    tolerance: str
    conditions: str
    notebook: str = Field(pattern=r"^(\d\d_\w+|bench)$")
    measure: str = Field(min_length=1)
    rule: Rule
    number: str
    allowed: str
    requires: str
    differs: str
    needs: str
    contradicts: str

    @model_validator(mode="after")
    def _check(self) -> Claim:
        if self.rule not in ("equal", "report"):
            float(self.number)
        if (self.rule in ("within", "relative", "factor")) != bool(self.allowed):
            raise ValueError(f"rule {self.rule!r} and allowed = {self.allowed!r} do not fit")
        for part in filter(None, self.requires.split("; ")):
            if "=" not in part:
                raise ValueError(f"requires holds {part!r}: expected name=value")
        return self

    @property
    def conditions_required(self) -> dict[str, str]:
        """What a record's parameters must be, by name."""
        return dict(part.split("=", 1) for part in self.requires.split("; ") if part)

    def holds(self, metric: Metric) -> bool | None:
        """Whether the rule holds for a measured value; None where nothing is compared."""
        if self.rule == "report":
            return None
        if self.rule == "equal":
            return str(metric.value) == self.number
        if not isinstance(metric.value, int | float):
            return None
        value, number, allowed = float(metric.value), float(self.number), float(self.allowed or 0)
        match self.rule:
            case "within":
                return abs(value - number) <= allowed
            case "relative":
                return abs(value - number) <= allowed * abs(number)
            case "factor":
                return value > 0 and max(value / number, number / value) <= allowed
            case "exact":
                return value == number
            case "at least":
                return value >= number
            case "below":
                return value < number
        if metric.interval is None:
            return None
        low, high = metric.interval
        return low > number if self.rule == "above interval" else high < number


@dataclass(frozen=True)
class Measured:
    """What one profile's record says of a claim: its metrics, whether the rule holds for all of
    them (None: nothing is compared), and how its conditions differ from the claim's."""

    profile: str
    record: Record
    metrics: tuple[Metric, ...]
    holds: bool | None
    differences: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The values, with their intervals."""
        return ", ".join(format_metric(metric, "interval") for metric in self.metrics)


@dataclass(frozen=True)
class Judged:
    """A claim and its verdict, which rests on the first of what was `measured`."""

    claim: Claim
    verdict: Verdict
    measured: tuple[Measured, ...]

    @property
    def side(self) -> str:
        """On which side of the row's tolerance the value falls."""
        holds = self.measured[0].holds if self.measured else None
        return {True: "within", False: "outside", None: ""}[holds]

    @property
    def why(self) -> str:
        """What the verdict rests on beside the value: differences, contradictions, needs."""
        if self.verdict == "not run":
            return f"needs {self.claim.needs or self._command()}"
        if self.verdict == "inconsistent":
            return f"excludes {' and '.join(self.claim.contradicts.split())} of the same log"
        return "; ".join(self.measured[0].differences)

    def _command(self) -> str:
        if self.claim.notebook == BENCH:
            return "make bench"
        return f"make reproduce NOTEBOOKS={self.claim.notebook[:2]}"


def load_claims(path: Path | None = None) -> list[Claim]:
    """All claims, in order. ValueError names the row and the column that is wrong."""
    path = path or data_file("claims.csv")
    with (parsing(path, "a table of claims", csv.Error),
          path.open(newline="", encoding="utf-8") as file):
        rows = [validated(Claim, row, f"{path.name}, row {number}")
                for number, row in enumerate(csv.DictReader(file), 2)]
    known = [row.id for row in rows]
    twice = [name for name, count in Counter(known).items() if count > 1]
    if twice:
        raise ValueError(f"{path.name}: {', '.join(twice)} stands there twice")
    for row in rows:
        if unknown := set(row.contradicts.split()) - set(known):
            raise ValueError(f"{path.name}: {row.id} contradicts {', '.join(sorted(unknown))}, "
                             "which is no row")
    return rows


def read_records(root: Path) -> dict[str, dict[str, Record]]:
    """Records by profile and notebook below a folder that holds one folder a profile, with the
    records in it or in its ``records``; of a chapter that has never ended well, in ``failed``."""
    found: dict[str, dict[str, Record]] = {}
    for profile in PROFILES:
        for folder in (root / profile, root / profile / "records", root / profile / "failed"):
            for path in sorted(folder.glob("*.json")):
                record = Record.read(path)
                found.setdefault(profile, {}).setdefault(record.notebook, record)
    bench = root / f"{BENCH}.json"
    if bench.is_file():
        found[BENCH] = {BENCH: Record.read(bench)}
    return found


def judge(claim: Claim, records: Mapping[str, Mapping[str, Record]],
          order: Sequence[str] = (BENCH, *PROFILES)) -> Judged:
    """The verdict on one claim, by the records of profiles (`read_records`): by that one whose
    conditions differ least from the claim's, and among equals by the first in `order`."""
    measured = tuple(sorted(
        (found for profile in order
         if (record := records.get(profile, {}).get(claim.notebook))
         and (found := _measured(claim, profile, record))),
        key=lambda each: len(each.differences)))
    if not measured:
        return Judged(claim, "not run", ())
    if claim.contradicts:
        return Judged(claim, "inconsistent", measured)
    best = measured[0]
    if best.differences or best.holds is None:
        return Judged(claim, "indicative", measured)
    return Judged(claim, "reproduced" if best.holds else "not reproduced", measured)


def _measured(claim: Claim, profile: str, record: Record) -> Measured | None:
    """What a record says of a claim; None if it lacks one of the metrics, or its value."""
    known = {metric.name: metric for metric in record.metrics if metric.value is not None}
    for names in claim.measure.split(" | "):
        metrics = [RECORDED[name](record) if name in RECORDED else known.get(name)
                   for name in names.split()]
        present = tuple(metric for metric in metrics if metric is not None)
        if len(present) == len(metrics):
            break
    else:
        return None
    found = [claim.holds(metric) for metric in present]
    holds = None if None in found else all(found)
    return Measured(profile, record, present, holds, _differences(claim, record))


def _differences(claim: Claim, record: Record) -> tuple[str, ...]:
    """How the conditions of a record differ from those of the claim."""
    told = [f"{name} = {record.parameters.get(name, 'not recorded')} where the log has "
            f"{value or 'none'}" for name, value in claim.conditions_required.items()
            if PINNED.sub("", str(record.parameters.get(name, ""))) != value]
    return (*told, *filter(None, [claim.differs]))


def ledger(records: Mapping[str, Mapping[str, Record]],
           order: Sequence[str] = (BENCH, *PROFILES)) -> list[Judged]:
    """All claims with their verdicts, as `judge` gives them."""
    return [judge(claim, records, order) for claim in load_claims()]


def counts(rows: Sequence[Judged]) -> dict[Verdict, int]:
    """How many claims have each verdict."""
    found = Counter(row.verdict for row in rows)
    return {verdict: found[verdict] for verdict in VERDICTS}


def judged_otherwise(one: Sequence[Judged],
                     two: Sequence[Judged]) -> list[tuple[Judged, Judged]]:
    """The claims that two ledgers judge otherwise, or whose value falls on another side."""
    return [(a, b) for a, b in zip(one, two, strict=True)
            if (a.verdict, a.side) != (b.verdict, b.side)]


COLUMNS = ("id", "experiment", "quantity", "claimed", "verdict", "measured", "side", "profile",
           "commit", "why", "conditions")


def as_table(rows: Sequence[Judged]) -> list[dict[str, Any]]:
    """One flat row a claim, for CSV and pages."""
    table = []
    for row in rows:
        best = row.measured[0] if row.measured else None
        values = (row.claim.id, row.claim.experiment, row.claim.quantity,
                  f"{row.claim.claimed} {row.claim.unit}".strip(), row.verdict,
                  best.shown if best else "", row.side, best.profile if best else "",
                  best.record.source.commit[:10] if best else "", row.why, row.claim.conditions)
        table.append(dict(zip(COLUMNS, values, strict=True)))
    return table


def as_csv(rows: Sequence[Judged]) -> str:
    """The ledger as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_table(rows))
    return text.getvalue()


def as_text(rows: Sequence[Judged]) -> str:
    """The ledger for a terminal: a line a claim, and below it what it rests on."""
    lines = []
    for row in as_table(rows):
        lines.append(f"{row['id']}  {row['verdict']:15} {row['quantity']}: "
                     f"claimed {row['claimed']}, measured {row['measured'] or 'nothing'}"
                     + (f" ({row['side']})" if row["side"] else ""))
        if row["why"]:
            lines.append(f"     {row['why']}")
    told = ", ".join(f"{number} {verdict}" for verdict, number in counts(rows).items())
    return "\n".join([*lines, f"{len(rows)} claims: {told}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 with the error where the table or a record is not valid."""
    parser = argparse.ArgumentParser(prog="python -m lablog.claims", description=__doc__)
    parser.add_argument("--of", choices=("published", "own"), default="published",
                        help="the records that the project publishes, or those of this clone")
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text")
    options = parser.parse_args(arguments)
    root = repository() / "book" / "records" if options.of == "published" else layout.built()
    try:
        rows = ledger(read_records(root))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    written = {"text": as_text, "csv": as_csv,
               "json": lambda rows: json.dumps(as_table(rows), ensure_ascii=False, indent=1)}
    print(written[options.format](rows).rstrip("\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
