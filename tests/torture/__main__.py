"""``make torture``: tries by the thousand, for minutes or for HOURS, and says what fell.

The record is build/torture.json; each case that fell is named, and is a function of its number and
of the seed. A stopped run goes on with the part that it was in.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from clone import Clone

from lablog import layout, profiles
from lablog.files import sha256_of
from lablog.progress import progress
from lablog.provenance import source_state
from lablog.run import Run
from tools.stages import in_stages
from torture import corrupt, faults, kills, results
from torture.readers import READERS

Case = TypeVar("Case")
SEQUENCES = 100  # that one process tries
WAYS = tuple(corrupt.slug(way) for way in kills.WAYS)
FILES_AN_HOUR, CALLS_AN_HOUR, KILLS_AN_HOUR, CHAPTERS_AN_HOUR = 40_000, 60, 60, 2
SEQUENCES_AN_HOUR = 600
"""What two cores try in an hour, about; every reader is given as many files, and of every chapter
as many runs are ended."""


def damaged(reader: str, cases: int, seed: int, fell: Path) -> Callable[[Run], None]:
    """The stage that gives damaged files to a reader; what falls is appended to `fell`."""
    def measure(run: Run) -> None:
        print(f"damaged files: {reader}", flush=True)
        found = corrupt.tried(reader, cases, seed)
        falls = sum(map(len, found.fell.values()))
        for name, number in (("cases", found.cases), ("read", found.read),
                             ("refused", found.refused), ("fell", falls)):
            run.metric(f"corrupt.{corrupt.slug(reader)}.{name}", number, "files")
        _told(fell, [f"{reader}: {how}: cases {', '.join(map(str, which[:9]))}"
                     for how, which in sorted(found.fell.items())])

    return measure


def refused_calls(count: int, seed: int, fell: Path) -> Callable[[Run], None]:
    """The stage that lets `count` calls fail that change files, evenly over all of them."""
    def measure(run: Run) -> None:
        with tempfile.TemporaryDirectory() as folder:
            clone = faults.Faults(Path(folder))
            number = clone.calls()
            chosen = faults.chosen(number, count, seed)
            trials = [clone.trial(*one) for one in counted(chosen, "failing calls", "call")]
        wrong = [trial for trial in trials if trial.fault]
        run.metric("calls.whole", number, "calls")
        run.metric("calls.cases", len(trials), "calls")
        run.metric("calls.fell", len(wrong), "calls")
        _told(fell, [f"{trial.what}: {trial.fault} ({trial})" for trial in wrong])

    return measure


def ended_runs(notebook: str, count: int, seed: int, fell: Path) -> Callable[[Run], None]:
    """The stage that ends `count` runs by signals: of the small clone, or of a notebook."""
    def measure(run: Run) -> None:
        with tempfile.TemporaryDirectory() as folder:
            made = (results.Chapter(Path(folder), notebook) if notebook else
                    results.SmallClone(Path(folder)))
            runs = kills.Kills(made)
            what = notebook or "small clone"
            chosen = kills.chosen(made.seconds, count, seed)
            trials = [runs.trial(*one) for one in counted(chosen, f"ended: {what}", "run")]
        for way in kills.WAYS:
            mine = [trial for trial in trials if trial.way == way]
            wrong = [trial for trial in mine if trial.fault]
            if mine:
                run.metric(f"runs.{corrupt.slug(what)}.{corrupt.slug(way)}", len(mine), "runs")
            _told(fell, [f"{what}: {way}: {trial.fault} ({trial})" for trial in wrong])
        run.metric(f"runs.{corrupt.slug(what)}.fell", sum(bool(t.fault) for t in trials), "runs")

    return measure


def sequences(count: int, seed: int, fell: Path) -> Callable[[Run], None]:
    """The stage that does to a small clone what people do, in any order."""
    def measure(run: Run) -> None:
        wrong = []
        with tempfile.TemporaryDirectory() as folder:
            clone = Clone(Path(folder) / "clone")
            parts = [(min(SEQUENCES, count - done), seed * count + done)
                     for done in range(0, count, SEQUENCES)]
            for part in counted(parts, "sequences", "part"):
                if found := results.tried_sequences(clone, *part):
                    wrong.append(f"a sequence of seed {part[1]}: {found[-2000:]}")
        run.metric("sequences.cases", count, "sequences")
        run.metric("sequences.fell", len(wrong), "sequences")
        _told(fell, wrong)

    return measure


def counted(chosen: Sequence[Case], what: str, unit: str) -> Iterator[Case]:
    """The cases, with a bar."""
    bar = progress(len(chosen), what, unit)
    for one in chosen:
        yield one
        bar.update()
    bar.close()


def _told(fell: Path, lines: Sequence[str]) -> None:
    with fell.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try everything, write the record, print what fell; 1 if anything did."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--hours", type=float, default=0.1, help="how long it may take, about")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    fell = layout.built("torture", "fell.txt")
    fell.parent.mkdir(parents=True, exist_ok=True)
    cases = max(int(FILES_AN_HOUR * options.hours / len(READERS)), 1)
    calls, runs, done = (max(int(count * options.hours), 1) for count in
                         (CALLS_AN_HOUR, KILLS_AN_HOUR, SEQUENCES_AN_HOUR))
    chapters = int(CHAPTERS_AN_HOUR * options.hours)
    here = Path(__file__).parent
    record = in_stages(
        "torture",
        {"runs": ended_runs("", runs, options.seed, fell),
         "calls": refused_calls(calls, options.seed, fell)}
        | {"sequences": sequences(done, options.seed, fell)}
        | ({name: ended_runs(name, chapters, options.seed, fell) for name in profiles.notebooks()}
           if chapters else {})
        | {corrupt.slug(name): damaged(name, cases, options.seed, fell) for name in READERS},
        layout.torture(), seed=options.seed, hours=options.hours,
        library=source_state().library_sha256, torture=sha256_of(here.glob("*.[pc]*"), here))
    lines = fell.read_text().splitlines() if fell.is_file() else []
    fell.unlink(missing_ok=True)
    files, ended, failed, played = (
        sum(int(m.value or 0) for m in record.metrics
            if m.name.startswith(part) and m.name.endswith(ends))
        for part, ends in (("corrupt.", ".cases"), ("runs.", WAYS), ("calls.", ".cases"),
                           ("sequences.", ".cases")))
    print("\n".join([*lines, f"{files} damaged files for {len(READERS)} readers, {ended} ended "
                     f"runs, {failed} failing calls, {played} sequences; kinds of fall: "
                     f"{len(lines)}; record: build/torture.json"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
