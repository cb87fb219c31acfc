"""``make torture``: tries what goes wrong, for minutes or for HOURS, and says what fell.

The record is build/torture.json; each case that fell is named, and is a function of its number and
of the seed. A stopped run goes on with the part that it was in.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from clone import Clone

from lablog import layout, profiles
from lablog.files import atomic_write, sha256_of
from lablog.progress import progress
from lablog.provenance import source_state
from lablog.run import Run
from tools.stages import in_stages
from torture import corrupt, disk, faults, kills, races, results
from torture.readers import READERS

Case = TypeVar("Case")
SEQUENCES = 100  # that one process tries
Stage = Callable[[Run], list[str]]
"""Records numbers, and returns what fell, a line each."""
FILES_AN_HOUR, SEQUENCES_AN_HOUR, CALLS_AN_HOUR, RUNS_AN_HOUR = 25_200, 525, 50, 15
DISKS_AN_HOUR, RACES_AN_HOUR, CHAPTERS_AN_HOUR, DISKS_OF_CHAPTERS_AN_HOUR = 5, 8, 5, 1
"""What two cores try in an hour, about, so that four hours try all that fails: every call, 100,000
files, 2,000 sequences, 20 ends of each chapter. Every reader is given as many files, and of every
chapter as many runs are ended, and as many meet a small disk."""


def damaged(reader: str, cases: int, seed: int) -> Stage:
    """Give damaged files to a reader."""
    def measure(run: Run) -> list[str]:
        print(f"damaged files: {reader}", flush=True)
        found = corrupt.tried(reader, cases, seed)
        for name, number in (("cases", found.cases), ("read", found.read),
                             ("refused", found.refused),
                             ("fell", sum(map(len, found.fell.values())))):
            run.metric(f"corrupt.{slug(reader)}.{name}", number, "files")
        return [f"{reader}: {how}: cases {', '.join(map(str, which[:9]))}"
                for how, which in sorted(found.fell.items())]

    return measure


def refused_calls(count: int, seed: int) -> Stage:
    """Let `count` calls fail that change files, evenly over all of them."""
    def measure(run: Run) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            clone = faults.Faults(Path(folder))
            number = clone.calls()
            chosen = faults.chosen(number, count, seed)
            trials = [clone.trial(*one) for one in counted(chosen, "failing calls", "call")]
        wrong = [trial for trial in trials if trial.fault]
        for name, of in (("whole", number), ("cases", len(trials)), ("fell", len(wrong))):
            run.metric(f"calls.{name}", of, "calls")
        return [f"{trial.what}: {trial.fault} ({trial})" for trial in wrong]

    return measure


def ended_runs(notebook: str, count: int, seed: int) -> Stage:
    """End `count` runs by signals: of the small clone, or of a notebook."""
    def measure(run: Run) -> list[str]:
        what = notebook or "small clone"
        with tempfile.TemporaryDirectory() as folder:
            made = made_in(Path(folder), notebook)
            ending, chosen = kills.Kills(made), kills.chosen(made.seconds, count, seed)
            trials = [ending.trial(*one) for one in counted(chosen, f"ended: {what}", "run")]
        wrong = [trial for trial in trials if trial.fault]
        for way, number in collections.Counter(trial.way for trial in trials).items():
            run.metric(f"runs.{slug(what)}.{slug(way)}", number, "runs")
        run.metric(f"runs.{slug(what)}.fell", len(wrong), "runs")
        return [f"{what}, {trial.way}: {trial.fault} ({trial})" for trial in wrong]

    return measure


def small_disks(notebook: str, count: int, seed: int | list[int]) -> Stage:
    """Make the small clone's results, or a notebook's, `count` times with too little room."""
    def measure(run: Run) -> list[str]:
        what, trials = notebook or "small clone", []
        if disk.may_mount():
            with (tempfile.TemporaryDirectory() as folder,
                  disk.on_a_small_disk(made_in(Path(folder), notebook)) as small):
                trials = [small.trial(share) for share in counted(
                    disk.chosen(count, seed), f"small disk: {what}", "run")]
        else:
            print(f"small disk: {what}: not tried, since this process may not mount", flush=True)
        wrong = [trial for trial in trials if trial.fault]
        for name, number in (("cases", len(trials)), ("fell", len(wrong))):
            run.metric(f"disks.{slug(what)}.{name}", number, "runs")
        return [f"{what}, small disk: {trial.fault} ({trial})" for trial in wrong]

    return measure


def several_at_once(count: int, seed: int) -> Stage:
    """Start several commands in the small clone at random moments, `count` times."""
    def measure(run: Run) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            clone = races.Races(Path(folder))
            trials = [clone.trial(one) for one in counted(
                races.chosen(clone.seconds, count, seed), "commands at once", "time")]
        wrong = [trial for trial in trials if trial.fault]
        for name, number in (("cases", len(trials)), ("fell", len(wrong)),
                             ("commands", sum(len(trial.started) for trial in trials))):
            run.metric(f"races.{name}", number, "times")
        return [f"commands at once: {trial.fault} ({trial})" for trial in wrong]

    return measure


def made_in(folder: Path, notebook: str) -> results.Results:
    """What is disturbed: a notebook's results, or those of the small clone if none is named."""
    return results.Chapter(folder, notebook) if notebook else results.SmallClone(folder)


def sequences(count: int, seed: int) -> Stage:
    """Do to a small clone what people do, in any order."""
    def measure(run: Run) -> list[str]:
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
        return wrong

    return measure


def counted(chosen: Sequence[Case], what: str, unit: str) -> Iterator[Case]:
    """The cases, with a bar."""
    bar = progress(len(chosen), what, unit)
    for one in chosen:
        yield one
        bar.update()
    bar.close()


def slug(name: str) -> str:
    """A name as a part of a metric's; the page gives the spaces back."""
    return name.replace(" ", "_")


def stages(hours: float, seed: int) -> dict[str, Stage]:
    """All that is tried in so many `hours`, by name; what takes longest first, so that at the end
    no core waits long for another."""
    def share(an_hour: int) -> int:
        return max(int(an_hour * hours), 1)

    chapters, disks = int(CHAPTERS_AN_HOUR * hours), int(DISKS_OF_CHAPTERS_AN_HOUR * hours)
    files = share(FILES_AN_HOUR // len(READERS))
    return {
        "runs": ended_runs("", share(RUNS_AN_HOUR), seed),
        **{name: ended_runs(name, chapters, seed) for name in profiles.notebooks() if chapters},
        "calls": refused_calls(share(CALLS_AN_HOUR), seed),
        "sequences": sequences(share(SEQUENCES_AN_HOUR), seed),
        "races": several_at_once(share(RACES_AN_HOUR), seed),
        "disks": small_disks("", share(DISKS_AN_HOUR), seed),
        **{f"disk-{name}": small_disks(name, disks, [seed, number])
           for number, name in enumerate(profiles.notebooks(), 1) if disks},
        **{slug(name): damaged(name, files, seed) for name in READERS},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Try everything, write the record, print what fell; 1 if anything did."""
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--hours", type=float, default=0.1, help="how long it may take, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 4),
                        help="how much is tried at once (default: as many as there are cores, at "
                             "most four)")
    options = parser.parse_args(arguments)
    tried, here = stages(options.hours, options.seed), Path(__file__).parent
    fell = layout.built("torture", "fell")

    def noted(name: str, stage: Stage) -> Callable[[Run], None]:
        def measure(run: Run) -> None:
            atomic_write(fell / f"{name}.txt", "".join(f"{line}\n" for line in stage(run)))

        return measure

    record = in_stages(
        "torture", {name: noted(name, stage) for name, stage in tried.items()}, layout.torture(),
        options.processes, seed=options.seed, hours=options.hours,
        library=source_state().library_sha256, torture=sha256_of(here.glob("*.[pc]*"), here))
    lines = [line for name in tried for line in (fell / f"{name}.txt").read_text().splitlines()]
    number = collections.Counter[str]()
    for metric in record.metrics:
        kind, *_, last = metric.name.split(".")
        if last not in ("whole", "read", "refused", "fell", "commands"):
            number[kind] += int(metric.value or 0)
    print("\n".join([*lines, f"{number['corrupt']} damaged files for {len(READERS)} readers, "
                     f"{number['runs']} ended runs, {number['calls']} failing calls, "
                     f"{number['disks']} small disks, {number['races']} times several commands at "
                     f"once, {number['sequences']} sequences; kinds of fall: "
                     f"{len(lines)}; record: build/torture.json"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
