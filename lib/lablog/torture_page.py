"""The tables on the book's page of what was tried: from the records of ``make torture`` and
``make long``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lablog import figures
from lablog.record import Record

FILES = ("cases", "read", "refused", "fell")
HELD = {
    "memory": "memory of all together, MB", "processes": "processes", "files": "open files",
    "threads": "threads", "temporary": "temporary files", "disk": "files on the disk, MB"}
"""What a long run's processes held after a round: the name in the record, and in words."""
RUNS = {"killed": "killed", "terminated": "TERM", "hung_up": "HUP", "interrupted": "Ctrl-C",
        "interrupted_twice": "Ctrl-C twice", "stopped_for_a_while": "stopped", "fell": "fell"}
"""How runs were ended: the name in the record, and the head of the column."""


def _rows(record: Record, part: str, columns: Sequence[str]) -> str:
    """Rows of a table: of each name in a `part` of the record its numbers, and of all together."""
    numbers: dict[str, dict[str, int]] = {}
    for metric in record.metrics:
        kind, _, rest = metric.name.partition(".")
        if kind == part:
            row, _, column = rest.rpartition(".")  # a row's name may hold dots
            row = re.sub(r"^0(\d)_\w+$", r"chapter \1", row).replace("_", " ")
            numbers.setdefault(row, {})[column] = int(metric.value or 0)
    numbers["all"] = {column: sum(row.get(column, 0) for row in numbers.values())
                      for column in columns}
    return "\n".join(f"| {name} | " + " | ".join(f"{row.get(one, 0):,}" for one in columns) + " |"
                     for name, row in numbers.items())


def corrupt_files(record: Record) -> str:
    """Markdown: for every reader how many damaged files it was given, read, refused and fell at."""
    return ("| file | damaged files | read all the same | refused by name | fell |\n"
            f"|---|---:|---:|---:|---:|\n{_rows(record, 'corrupt', FILES)}\n")


def ended_runs(record: Record) -> str:
    """Markdown: how many runs of what were ended in which way, and how many fell at that."""
    head = " | ".join(("runs of", *RUNS.values()))
    return f"| {head} |\n|---|{'---:|' * len(RUNS)}\n{_rows(record, 'runs', [*RUNS])}\n"


def sequences(record: Record) -> str:
    """Markdown: how many sequences were tried, and how many went wrong."""
    tried, fell = (int(record.metric(f"sequences.{name}").value or 0) for name in ("cases", "fell"))
    return f"| sequences | fell |\n|---:|---:|\n| {tried:,} | {fell:,} |\n"


def failing_calls(record: Record) -> str:
    """Markdown: how many calls were refused by the system, and how many runs fell at that."""
    whole, cases, fell = (int(record.metric(f"calls.{name}").value or 0)
                          for name in ("whole", "cases", "fell"))
    return ("| calls that change files | refused, one at a time | fell |\n|---:|---:|---:|\n"
            f"| {whole:,} | {cases:,} | {fell:,} |\n")


def races(record: Record) -> str:
    """Markdown: how often several commands were started at once, and how often one fell at that."""
    if not any(metric.name == "races.cases" for metric in record.metrics):
        return "Not tried in this run.\n"
    cases, commands, fell = (int(record.metric(f"races.{name}").value or 0)
                             for name in ("cases", "commands", "fell"))
    return ("| times | commands | fell |\n|---:|---:|---:|\n"
            f"| {cases:,} | {commands:,} | {fell:,} |\n")


def small_disks(record: Record) -> str:
    """Markdown: how many runs of what met a disk that was too small, and how many fell at that."""
    if not any(metric.name.startswith("disks.") and metric.value for metric in record.metrics):
        return "Not tried in this run: it takes the right to mount file systems.\n"
    return ("| runs of | with too little room | fell |\n|---|---:|---:|\n"
            f"{_rows(record, 'disks', ('cases', 'fell'))}\n")


def held(record: Record) -> pd.DataFrame:
    """What a long run's processes held: a row a round, `hours` and the names of HELD as columns."""
    values: dict[int, dict[str, float]] = {}
    for metric in record.metrics:
        _, number, *name = metric.name.split(".")
        if name and number.isdigit():
            values.setdefault(int(number), {})[name[0]] = float(metric.value or 0)
    return pd.DataFrame([values[number] for number in sorted(values)], columns=["hours", *HELD])


def drawn(rounds: pd.DataFrame) -> Figure:
    """Each quantity of a long run over the hours, from zero."""
    whole, panels = plt.subplots(2, 3, figsize=(8.4, 4.2), sharex=True)
    for axes, (name, words), colour in zip(panels.flat, HELD.items(), figures.COLOURS,
                                           strict=True):
        axes.plot(rounds["hours"], rounds[name], marker=".", color=colour)
        axes.set(title=words)
        axes.set_ylim(0, max(1.2 * rounds[name].max(), 1))
    for axes in panels[-1]:
        axes.set_xlabel("hours")
    return whole


def long_run(record: Record, folder: Path) -> str:
    """Markdown: what a kernel held that ran the chapters again and again; its picture and the
    numbers behind it are written into `folder`."""
    rounds = held(record)
    error = record.metric("long.error").value
    if rounds.empty:
        return f"The first round ended in an error: `{error}`\n"
    figures.use_style()
    svg, csv = figures.save(drawn(rounds), rounds, folder, "long_run")
    rows = []
    for name, words in HELD.items():
        grows = record.metric(f"long.grows.{name}")
        said = grows.undefined or ("**grew**" if grows.value else "no")
        ends = " | ".join(f"{rounds[name].iloc[at]:,.0f}" for at in (0, len(rounds) // 2, -1))
        rows.append(f"| {words} | {ends} | {said} |")
    caption = (f"What the kernel and its processes held after each of {len(rounds)} rounds, in "
               f"{rounds['hours'].iloc[-1]:.1f} hours.")
    return ("| after the round | first | middle | last | grew |\n|---|---:|---:|---:|---|\n"
            + "\n".join(rows)
            + (f"\n\nAn error ended it: `{error}`" if error != "none" else "")
            + f"\n\n![{caption}]({svg.name})\n\n{caption} Chapters "
            f"{', '.join(name[:2] for name in record.parameters['chapters'])}. "
            f"{{download}}`data (CSV) <{csv.name}>`\n\n{_origin(record)}\n")


def _origin(record: Record) -> str:
    machine = record.machine
    return (f"Commit `{record.source.commit[:10]}`"
            f"{' with uncommitted changes' if record.source.dirty else ''}, "
            f"{record.seconds / 60:.0f} minutes on {machine.processor} with {machine.threads} "
            f"threads, Python {machine.python}.")


def page(text: str, record: Record | None, long: Record | None, folder: Path) -> str:
    """`text`, the page as it is written by hand, with what was tried in it, from the records of
    ``make torture`` and ``make long``; pictures are written into `folder`."""
    tables = {"{sequences}": sequences, "{ended runs}": ended_runs, "{small disks}": small_disks,
              "{races}": races, "{failing calls}": failing_calls, "{damaged files}": corrupt_files}
    for place, table in tables.items():
        text = text.replace(place, table(record) if record else
                            "Nothing has been tried yet: `make torture`.")
    text = text.replace("{long run}", long_run(long, folder) if long else
                        "It has not been run yet: `make long`.")
    if record is None:
        return text
    return (f"{text}\nAll but the kernel that stays open: seed {record.parameters['seed']}; the "
            f"minutes of what ran at once are added up. {_origin(record)}\n")
