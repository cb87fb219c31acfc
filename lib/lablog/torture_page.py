"""The tables on the book's page of what was tried: from the record of ``make torture``."""

from __future__ import annotations

from collections.abc import Sequence

from lablog.record import Record

FILES = ("cases", "read", "refused", "fell")
RUNS = ("killed", "terminated", "hung_up", "interrupted", "interrupted_twice",
        "stopped_for_a_while", "fell")


def _rows(record: Record, part: str, columns: Sequence[str]) -> str:
    """Rows of a table: of each name in a `part` of the record its numbers, and of all together."""
    numbers: dict[str, dict[str, int]] = {}
    for metric in record.metrics:
        kind, *name = metric.name.split(".")
        if kind == part:
            row, column = name
            numbers.setdefault(row.replace("_", " "), {})[column] = int(metric.value or 0)
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
    head = " | ".join(("runs of", *(name.replace("_", " ") for name in RUNS)))
    return f"| {head} |\n|---|{'---:|' * len(RUNS)}\n{_rows(record, 'runs', RUNS)}\n"


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


def page(text: str, record: Record | None) -> str:
    """`text`, the page as it is written by hand, with the tables of what was tried in it."""
    tables = {"{sequences}": sequences, "{ended runs}": ended_runs,
              "{failing calls}": failing_calls, "{damaged files}": corrupt_files}
    for place, table in tables.items():
        text = text.replace(place, table(record) if record else
                            "Nothing has been tried yet: `make torture`.")
    if record is None:
        return text
    machine = record.machine
    return (f"{text}\nCommit `{record.source.commit[:10]}`"
            f"{' with uncommitted changes' if record.source.dirty else ''}, seed "
            f"{record.parameters['seed']}, {record.seconds / 60:.0f} minutes on "
            f"{machine.processor} with {machine.threads} threads, Python {machine.python}.\n")
