"""The book's page of claims: the ledger as a table that can be sorted, filtered and searched."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from lablog.claims import VERDICTS, Judged, Measured, as_csv, counts
from lablog.files import atomic_write

COLUMNS = ("id", "claim", "claimed", "measured", "verdict")
TITLES = {"commitment": "A: commitment", "cvfp": "B: CVFP", "arianna": "C: Arianna"}
MEANING = {
    "reproduced": "measured under the claim's conditions, and within the tolerance of its row",
    "not reproduced": "measured under the claim's conditions, and outside",
    "indicative": "measured under other conditions, which are named; the value is given with the "
                  "side that it falls on",
    "inconsistent": "the log contradicts itself, unless what the row says holds; the rows are "
                    "named",
    "not run": "no record holds what it needs, which is named",
}


def page(rows: Sequence[Judged], folder: Path, chapters: Collection[str]) -> str:
    """Markdown of the page; the table as CSV is written into `folder`.

    chapters: names of the notebooks that the book has; values link to those, to their record, and
    to the figures that are published with it.
    """
    atomic_write(folder / "claims.csv", as_csv(rows))
    found = counts(rows)
    lacking = sum(row.claim.claimed == "not stated" for row in rows)
    parts = [
        "# Claims\n",
        f"The three lab logs state {len(rows) - lacking} things that can be measured; {lacking} "
        "more row is a control that they lack. None is left out. Each stands beside the value of "
        "the published record whose conditions are nearest to the log's, and a rule in the table "
        "of claims, not a reader, decides the verdict.\n",
        "| verdict | claims | meaning |\n|---|---|---|",
        *(f"| {verdict} | {found[verdict]} | {MEANING[verdict]} |" for verdict in VERDICTS),
        "\nIn brackets: 95 % intervals, where the record has one. *Within* and *outside* say on "
        "which side of the row's tolerance a value falls. {download}`The table as CSV "
        "<claims.csv>`; in a terminal, `make claims`.\n",
    ]
    for experiment, group in groupby(rows, key=lambda row: row.claim.experiment):
        table = _table(list(group), folder, chapters)
        parts.append(f"## {TITLES[experiment]}\n\n{table}\n")
    return "\n".join(parts)


def _table(rows: Sequence[Judged], folder: Path, chapters: Collection[str]) -> str:
    """HTML of some rows; without empty lines, which would end it in Markdown."""
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    body = "\n".join(_row(row, folder, chapters) for row in rows)
    return (f'<table class="lablog-claims">\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table>")


def _row(row: Judged, folder: Path, chapters: Collection[str]) -> str:
    claim = row.claim
    told = [escape(claim.quantity)]
    if claim.conditions:
        told.append(f"<small>{escape(claim.conditions)}</small>")
    measured = "<br>".join(_measured(each, folder, chapters) for each in row.measured)
    measured = measured or "nothing yet"
    why = f"<br><small>{escape(row.why)}</small>" if row.why else ""
    cells = (claim.id, "<br>".join(told), escape(f"{claim.claimed} {claim.unit}".strip()), measured,
             f"<strong>{row.verdict}</strong>{why}")
    inside = "".join(f'<td data-label="{name}">{cell}</td>'
                     for name, cell in zip(COLUMNS, cells, strict=True))
    return f'<tr id="{claim.id}" data-verdict="{row.verdict}">{inside}</tr>'


def _measured(measured: Measured, folder: Path, chapters: Collection[str]) -> str:
    """A value with its side, its profile, and the way to its record, chapter and figures."""
    record, side = measured.record, {True: "within", False: "outside", None: ""}[measured.holds]
    place = "" if measured.profile == "bench" else f"{measured.profile}/"
    links = [f'<a href="records/{place}{escape(record.notebook)}.json">record</a>']
    if record.notebook in chapters:
        links.append(f'<a href="notebooks/{escape(record.notebook)}.html">chapter</a>')
    for figure in record.figures:
        picture = f"records/{place}{record.notebook}.{figure.name}.svg"
        if (folder / picture).is_file():
            links.append(f'<a href="{escape(picture)}">figure {escape(figure.name)}</a>')
    told = [measured.profile, side, *links]
    return f"{escape(measured.shown)} <small>({', '.join(filter(None, told))})</small>"
