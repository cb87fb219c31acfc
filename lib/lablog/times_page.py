"""The book's page of times: how long every chapter took, where, and what took longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lablog.claims import PROFILES
from lablog.record import Record

LONGEST = 3  # stages that are named


def page(own: Sequence[Record], published: Mapping[str, Mapping[str, Record]]) -> str:
    """Markdown: a table of this clone's records, and one for each profile that is published."""
    parts = ["# How long everything took\n\nWall-clock times as the records have them, on machines "
             "that may have done other work beside. What is trained once is kept and found again, "
             "so that a chapter that runs a second time takes less. *Tasks* says how many there "
             "were and on how many workers they ran, *memory* what the chapter's own process took, "
             "without theirs.\n"]
    if own:
        parts.append(f"## This clone, profile {own[0].profile}\n\n{_table(own)}\n")
    for profile in (name for name in PROFILES if name in published):
        chapters = [record for _, record in sorted(published[profile].items())]
        parts.append(f"## Published, profile {profile}\n\n{_table(chapters)}\n")
    return "\n".join(parts)


def _table(records: Sequence[Record]) -> str:
    """A row a chapter; the machine and the commit below its name only where they differ."""
    where = [f"{record.machine.processor}, {record.machine.threads} threads, commit "
             f"`{record.source.commit[:10]}`" for record in records]
    same = len(set(where)) == 1
    rows = [[record.notebook + ("" if same else f"<br>{place}"), _clock(record.seconds),
             _longest(record), _tasks(record),
             f"{(record.peak_memory_bytes or 0) / 2**20:,.0f} MiB"]
            for record, place in zip(records, where, strict=True)]
    names = ["chapter", "time", "longest stages", "tasks", "memory"]
    rows.append(["**all**", f"**{_clock(sum(record.seconds for record in records))}**",
                 *[""] * (len(names) - 2)])
    lines = [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]
    return (f"{where[0]}.\n\n" if same else "") + "\n".join(lines)


def _clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def _tasks(record: Record) -> str:
    """How many there were, and on how many workers."""
    workers = len({task.worker for task in record.tasks})
    return f"{len(record.tasks)} on {workers}" if workers else ""


def _longest(record: Record) -> str:
    stages = sorted(record.stages, key=lambda stage: -stage.seconds)[:LONGEST]
    return ", ".join(f"{stage.name} {_clock(stage.seconds)}" for stage in stages)
