"""The tables on the book's page of what was tried: from the record of ``make torture``."""

from __future__ import annotations

from lablog.record import Record

COLUMNS = ("cases", "read", "refused", "fell")


def corrupt_files(record: Record) -> str:
    """Markdown: for every reader how many damaged files it was given, read, refused and fell at."""
    numbers: dict[str, dict[str, int]] = {}
    for metric in record.metrics:
        kind, *name = metric.name.split(".")
        if kind == "corrupt":
            reader, column = name
            numbers.setdefault(reader.replace("_", " "), {})[column] = int(metric.value or 0)
    numbers["all"] = {column: sum(row[column] for row in numbers.values()) for column in COLUMNS}
    rows = "\n".join(f"| {reader} | " + " | ".join(f"{row[name]:,}" for name in COLUMNS) + " |"
                     for reader, row in numbers.items())
    return ("| file | damaged files | read all the same | refused by name | fell |\n"
            f"|---|---:|---:|---:|---:|\n{rows}\n")


def failing_calls(record: Record) -> str:
    """Markdown: how many calls were refused by the system, and how many runs fell at that."""
    whole, cases, fell = (int(record.metric(f"calls.{name}").value or 0)
                          for name in ("whole", "cases", "fell"))
    return ("| calls that change files | refused, one at a time | fell |\n|---:|---:|---:|\n"
            f"| {whole:,} | {cases:,} | {fell:,} |\n")


def page(text: str, record: Record | None) -> str:
    """`text`, the page as it is written by hand, with the tables of what was tried in it."""
    tables = {"{failing calls}": failing_calls, "{damaged files}": corrupt_files}
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
