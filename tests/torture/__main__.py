"""``make torture``: tries by the thousand, for minutes or for HOURS, and says what fell.

The record is build/torture.json; build/torture/fell.txt names the cases that fell, each of which is
a function of its number and of the seed. A stopped run goes on with the part that it was in.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lablog import layout
from lablog.files import sha256_of
from lablog.progress import progress
from lablog.provenance import source_state
from lablog.run import Run
from tools.stages import in_stages
from torture import corrupt
from torture.readers import READERS

CASES_AN_HOUR = 100_000
"""Damaged files that two cores try in an hour, about; every reader is given as many."""


def damaged(reader: str, cases: int, seed: int, fell: Path) -> Callable[[Run], None]:
    """The stage that gives damaged files to a reader; what falls is appended to `fell`."""
    def measure(run: Run) -> None:
        found = corrupt.tried(reader, cases, seed)
        falls = sum(map(len, found.fell.values()))
        for name, number in (("cases", found.cases), ("read", found.read),
                             ("refused", found.refused), ("fell", falls)):
            run.metric(f"corrupt.{slug(reader)}.{name}", number, "files")
        with fell.open("a") as file:
            for how, which in sorted(found.fell.items()):
                cases_of = ", ".join(map(str, which[:9]))
                file.write(f"{reader}, seed {seed}: {how}: cases {cases_of}\n")
        bar.update()

    return measure


def slug(name: str) -> str:
    """A reader's name as a part of a metric's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


bar = progress(len(READERS), "damaged files", "reader")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try everything, write the record, print what fell; 1 if anything did."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--hours", type=float, default=0.1, help="how long it may take, about")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    fell = layout.built("torture", "fell.txt")
    fell.parent.mkdir(parents=True, exist_ok=True)
    cases = max(int(CASES_AN_HOUR * options.hours / len(READERS)), 1)
    here = Path(__file__).parent
    record = in_stages(
        "torture", {slug(name): damaged(name, cases, options.seed, fell) for name in READERS},
        layout.torture(), seed=options.seed, cases=cases,
        library=source_state().library_sha256, torture=sha256_of(here.glob("*.py"), here))
    bar.close()
    lines = fell.read_text().splitlines() if fell.is_file() else []
    fell.unlink(missing_ok=True)
    tried = sum(int(m.value or 0) for m in record.metrics if m.name.endswith(".cases"))
    print("\n".join([*lines, f"{tried} damaged files for {len(READERS)} readers, kinds of fall: "
                     f"{len(lines)}; record: build/torture.json"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
