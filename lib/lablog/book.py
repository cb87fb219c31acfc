"""Builds the book from executed notebooks, records and figures.

The book executes nothing. Chapters are the notebooks that have a result in the profile's folder;
the page of results is rendered from their records.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lablog.files import repository
from lablog.record import Record
from lablog.report import IN_PROSE, reject_judgements


class BookError(RuntimeError):
    """A book that was not built; the message says why and the remedy."""


def results_page(records: Sequence[Record]) -> str:
    """All mandated reports, each with where and how long it ran (Markdown)."""
    parts = ["# Results at a glance\n"]
    for record in records:
        machine, memory = record.machine, (record.peak_memory_bytes or 0) / 2**20
        link = f"notebooks/{record.notebook}.ipynb"
        seeds = ", ".join(map(str, record.seeds)) or "none"
        parts.append(
            f"## [{record.notebook}]({link})\n\n"
            f"Profile {record.profile}, commit `{record.source.commit[:10]}`"
            f"{' with uncommitted changes' if record.source.dirty else ''}, seeds {seeds}; "
            f"{record.seconds:.0f} s and {memory:.0f} MiB on {machine.cpu} with {machine.threads} "
            f"threads ({machine.device}), Python {machine.python}, "
            f"PyTorch {machine.packages.get('torch', 'none')}.\n"
        )
        if record.report:
            parts.append(f"```text\n{record.report.en}\n\n{record.report.ja}\n```\n")
    return "\n".join(parts)


def build(folder: Path, target: Path) -> Path:
    """Build the book of the results in `folder` (build/<profile>) into `target`; returns it.

    Raises BookError when there is no result, and with Sphinx's output when it warns or fails; the
    book that was there before then stays.
    """
    records = [Record.read(path) for path in sorted((folder / "records").glob("*.json"))]
    if not records:
        raise BookError(f"{folder} holds no results: run `make reproduce` first")
    source = target.parent / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(repository() / "book", source)
    (source / "notebooks").mkdir()
    for record in records:
        name = f"{record.notebook}.ipynb"
        shutil.copyfile(folder / "notebooks" / name, source / "notebooks" / name)
    (source / "results.md").write_text(results_page(records))
    for page in source.glob("*.md"):
        reject_judgements(page.read_text(), IN_PROSE)
    work = target.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(source), "--path-output", str(work)]
    run = subprocess.run(
        [*command, "-W", "-n", "--keep-going"],  # warnings are errors, broken links are warnings
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )
    made = work / "_build" / "html"
    if run.returncode or not (made / "index.html").is_file():
        raise BookError(f"the book was not built:\n{run.stdout[-4000:]}")
    # Sphinx copies only what its pages name; figures link their data in HTML of their own.
    for record in records:
        shutil.copytree(folder / "figures" / record.notebook, made / "figures" / record.notebook)
    shutil.rmtree(target, ignore_errors=True)
    made.replace(target)
    shutil.rmtree(work)
    return target
