"""Runs notebooks headlessly: ``python -m lablog.runner --help``.

Make decides what is stale from the dependency file that ``plan`` writes; ``run`` executes one
notebook through jupytext and papermill in a folder of its own, and moves notebook, figures and
(last) the record into place. The record's time stamp is the start of the run, so that anything
touched meanwhile counts as newer. A run that ends in any other way leaves the last good result
as it is and its own remains in ``failed/``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pandas as pd
import papermill
from filelock import FileLock, Timeout
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import CellTimeoutError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from lablog import claims, layout, profiles
from lablog.files import repository, scratch_folder, sweep, write_if_changed
from lablog.provenance import machine, source_dependencies, source_state
from lablog.record import Failure, Record
from lablog.run import RUN_VARIABLE

EXIT_CODES = {"ok": 0, "failed": 1, "timeout": 124, "interrupted": 130}
PINS = "packages.txt"
"""The pinned packages as they were planned with, apart from the rest of pyproject.toml."""


@dataclass(frozen=True)
class RunSpec:
    """All that a run depends on besides the source tree; it writes only below `folder`.

    cluster, dashboard: where its tasks run and where that can be watched; results are the same.
    """

    notebook: str
    profile: str
    parameters: Mapping[str, Any]
    folder: Path
    timeout: float | None = None
    cluster: str = ""
    dashboard: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended: a status of :class:`lablog.record.Record` and the record's path."""

    status: str
    record: Path
    message: str = ""


def _result_paths(folder: Path, notebook: str) -> dict[str, Path]:
    return {
        "figures": folder / "figures" / notebook,
        "notebook": folder / "notebooks" / f"{notebook}.ipynb",
        "record": folder / "records" / f"{notebook}.json",  # last: it is Make's target
    }


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def as_notebook(path: Path) -> nbformat.NotebookNode:
    """The source as a notebook whose cell ids follow from its name and the cell's position."""
    notebook = jupytext.read(path)
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"{path.stem[:2]}-{index:03d}"
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python",
                                       "display_name": "Python 3"}
    return notebook


def _explain(error: BaseException) -> tuple[str, str]:
    """Status and one message for whatever ended a run."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "interrupted by the user"
    if isinstance(error, CellTimeoutError):
        return "timeout", str(error).splitlines()[0]
    if isinstance(error, PapermillExecutionError):
        return "failed", f"{error.ename}: {error.evalue}"
    return "failed", f"{type(error).__name__}: {error}"


def execute(spec: RunSpec) -> Outcome:
    """Execute one notebook and move its results into place.

    One run of a notebook at a time in a folder: a second one is refused (OSError), and so is a
    parameter that the notebook does not declare (ProfileError; papermill would only log it).
    """
    profiles.check(spec.notebook, spec.parameters)
    spec.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(spec.folder / f".{spec.notebook}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(
            f"another run of {spec.notebook} is writing to {spec.folder}; wait until it ends, "
            "or use a profile of another name"
        ) from None
    with lock:
        sweep(spec.folder)  # what killed runs left
        with scratch_folder(spec.folder / f"run-{spec.notebook}") as scratch:
            return _execute_in(spec, scratch)


def _execute_in(spec: RunSpec, scratch: Path) -> Outcome:
    started, clock = datetime.now(UTC), time.perf_counter()
    produced, final = _result_paths(scratch, spec.notebook), _result_paths(
        spec.folder, spec.notebook
    )
    produced["notebook"].parent.mkdir()
    context = scratch / "context.json"
    context.write_text(json.dumps({
        "profile": spec.profile, "folder": str(scratch),
        "artifacts": str(layout.artifacts(spec.folder)), "cluster": spec.cluster,
        "dashboard": spec.dashboard,
    }))
    os.environ[RUN_VARIABLE] = str(context)
    print(f"[{spec.notebook}] running, profile {spec.profile}", flush=True)
    try:
        papermill.execute_notebook(
            as_notebook(profiles.notebook_path(spec.notebook)), produced["notebook"],
            parameters=dict(spec.parameters), kernel_name="python3", language="python",
            cwd=repository(), progress_bar=False, stdout_file=sys.stdout, stderr_file=sys.stderr,
            execution_timeout=spec.timeout, autosave_cell_every=10,
            # Sockets in the file system: no port that others can connect to, or be in the way of.
            config=Config(KernelManager={"transport": "ipc"}),
            # A kernel that ends while it answers would tell of its own closed sockets.
            extra_arguments=["--log-level=CRITICAL"],
        )
        if not produced["record"].is_file():
            raise RuntimeError("the notebook ended without `run.finish()`: it wrote no record")
        record = Record.read(produced["record"])
    except BaseException as error:
        # The cell that was interrupted ends by itself, and its error would be told at exit again.
        ensure_event_loop().set_exception_handler(lambda *_: None)
        status, message = _explain(error)
        record = Record(
            notebook=spec.notebook, profile=spec.profile, status=status,  # type: ignore[arg-type]
            parameters=dict(spec.parameters), seeds=(), started=started,
            seconds=time.perf_counter() - clock, source=source_state(), machine=machine(),
            failure=Failure(kind=type(error).__name__, message=message),
        )
        kept = spec.folder / "failed" / f"{spec.notebook}.json"
        if produced["notebook"].is_file():
            _move(produced["notebook"], kept.with_suffix(".ipynb"))
        record.write(kept)
        return Outcome(status, kept, message)
    # Dated before it is in place: what changes during the run is newer than its result.
    os.utime(produced["record"], (started.timestamp(), started.timestamp()))
    for kind in ("figures", "notebook", "record"):
        if produced[kind].exists():
            _move(produced[kind], final[kind])
    failed = spec.folder / "failed"
    for remains in failed.glob(f"{spec.notebook}.*"):
        remains.unlink()
    if failed.is_dir() and not any(failed.iterdir()):
        failed.rmdir()
    return Outcome("ok", final["record"])


def dependencies(notebook: str, folder: Path, parameters: Mapping[str, Any]) -> list[Path]:
    """Files whose change makes the notebook's record stale."""
    root = repository()
    files = source_dependencies(profiles.notebook_path(notebook))
    values = [one for value in parameters.values()
              for one in (value if isinstance(value, list) else [value])]
    for value in values:
        path = _named(value) if isinstance(value, str) and value else None
        if path and path.is_dir():  # a model, a corpus, trainings; but no .git of theirs
            files += sorted(inner for inner in path.rglob("*") if inner.is_file() and not any(
                part.startswith(".") for part in inner.relative_to(path).parts))
        elif path:
            files.append(path)
            if path.suffix == ".bin":  # llama2.c: the tokenizer lies beside the weights
                files += sorted(path.parent.glob("tok*.bin"))
    files += sorted((root / "notebooks" / "reports").glob(f"{notebook}.*.j2"))
    if root / "lib/lablog/models/llama_cpp.py" in files:
        files.append(layout.native_stamp())
    return [*files, folder / "parameters" / f"{notebook}.json", folder / "parameters" / PINS]


def _named(text: str) -> Path | None:
    """The file or folder that a parameter's text names; None for any other text."""
    try:
        path = repository() / Path(text).expanduser()
        return path if path.is_file() or path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown home, or with a zero byte
        return None


def _chosen(names: Sequence[str]) -> list[str]:
    available = profiles.notebooks()
    unknown = [name for name in names if not any(n.startswith(name) for n in available)]
    if unknown:
        profiles.notebook_path(unknown[0])
    return [n for n in available if not names or any(n.startswith(name) for name in names)]


def plan(profile: profiles.Profile, names: Sequence[str]) -> str:
    """Write parameter files and return the rules that Make includes (paths from the root), behind a
    line that names the folder of results."""
    root, folder = repository(), layout.results(profile.name)
    sweep(folder)
    lines = [f"FOLDER := {profile.name}"]
    pins = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    write_if_changed(folder / "parameters" / PINS, "\n".join(pins) + "\n")
    for notebook in _chosen(names):
        parameters = profile.parameters[notebook]
        content = json.dumps(dict(parameters), indent=1, sort_keys=True) + "\n"
        write_if_changed(folder / "parameters" / f"{notebook}.json", content)
        record = _result_paths(folder, notebook)["record"].relative_to(root)
        files = " ".join(
            os.path.relpath(path, root).replace(" ", "\\ ")
            for path in dependencies(notebook, folder, parameters)
        )
        lines += [f"RECORDS += {record}", f"{record}: {files}",
                  f"\t$(RUN) {folder.relative_to(root)} {notebook}"]
        if _in_the_future(root / record):  # Make would take it for newer than any change
            lines.append(f".PHONY: {record}")
    return "\n".join(lines)


def _in_the_future(record: Path) -> bool:
    """Whether a record is dated later than now, because the clock was set back since."""
    return record.is_file() and record.stat().st_mtime > time.time()


def why(profile: profiles.Profile, names: Sequence[str]) -> str:
    """For each notebook, whether Make would run it and because of which files."""
    lines = []
    for notebook in _chosen(names):
        record = _result_paths(layout.results(profile.name), notebook)["record"]
        inputs = dependencies(notebook, layout.results(profile.name), profile.parameters[notebook])
        if not record.is_file():
            reason = "runs: it has no result yet"
        elif _in_the_future(record):
            reason = "runs: its result is dated in the future, since the clock was set back"
        else:
            newer = [
                os.path.relpath(path, repository())
                for path in inputs
                if not path.exists() or path.stat().st_mtime > record.stat().st_mtime
            ]
            reason = f"runs: newer than its result: {', '.join(newer)}" if newer else "up to date"
        lines.append(f"{notebook}: {reason}")
    return "\n".join(lines)


def difference(first: Record, second: Record) -> list[str]:
    """Names of everything but times in which two records differ."""
    one, two = first.results(), second.results()
    differing = [key for key in one if key != "metrics" and one[key] != two[key]]
    left, right = ({m["name"]: m for m in r["metrics"]} for r in (one, two))
    return differing + sorted(n for n in left | right if left.get(n) != right.get(n))


def figure_differences(one: Path, two: Path) -> list[str]:
    """Names of figures and data in which two folders differ, but for columns named ``seconds``."""
    here, there = ({path.name for path in folder.glob("*.csv")} for folder in (one, two))
    differing = sorted(here ^ there)
    for csv in sorted(one / name for name in here & there):
        tables = [pd.read_csv(folder / csv.name) for folder in (one, two)]
        timed = "seconds" in tables[0]
        first, second = (table.drop(columns="seconds", errors="ignore") for table in tables)
        if not first.equals(second):
            differing.append(csv.name)
        svg = csv.with_suffix(".svg").name
        if not timed and (one / svg).read_bytes() != (two / svg).read_bytes():
            differing.append(svg)
    return differing


def verify(profile: profiles.Profile, names: Sequence[str]) -> int:
    """Run every notebook twice from nothing and compare records and figure data; 0 if equal."""
    wrong = 0
    folders = [layout.verified(profile.name, run) for run in "ab"]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for notebook in _chosen(names):
        outcomes = [
            execute(RunSpec(notebook, profile.name, profile.parameters[notebook], folder))
            for folder in folders
        ]
        failed = [outcome for outcome in outcomes if outcome.status != "ok"]
        if failed:
            print(f"{notebook}: {failed[0].status}: {failed[0].message}", file=sys.stderr)
            return 1
        differing = difference(*(Record.read(outcome.record) for outcome in outcomes))
        one, two = (_result_paths(folder, notebook)["figures"] for folder in folders)
        differing += figure_differences(one, two)
        wrong += bool(differing)
        print(f"{notebook}: {'identical' if not differing else 'differs in ' + str(differing)}")
    return 1 if wrong else 0


def summary(profile: profiles.Profile, names: Sequence[str]) -> str:
    """One screen: each notebook's time and memory, which of the logs' claims its values are within
    the tolerance of, and what it says of the others; the whole report of one that no claim is
    about."""
    folder = layout.results(profile.name)
    records = {name: Record.read(path) for name in _chosen(names)
               if (path := _result_paths(folder, name)["record"]).is_file()}
    rows = claims.ledger({profile.name: records}, (profile.name,))
    lines = []
    for name in _chosen(names):
        if name not in records:
            lines.append(f"{name}: no result; see `make why`")
            continue
        record = records[name]
        memory = (record.peak_memory_bytes or 0) / 2**20
        lines.append(f"{name}: {record.seconds:.0f} s, {memory:.0f} MiB")
        mine = [row for row in rows if row.measured and row.claim.notebook == name]
        within = [row.claim.id for row in mine if row.side == "within"]
        told = [f"  as the log says, within its tolerance: {', '.join(within)}"] if within else []
        told += [f"  {row.claim.id} {row.claim.quantity}: {row.measured[0].shown}, the log: "
                 f"{row.claim.claimed} {row.claim.unit}".rstrip()
                 for row in mine if row.side != "within"]
        report = record.report.en.splitlines() if record.report else []
        lines += told or [f"  {line}" for line in report]
    shown = os.path.relpath(folder)
    return "\n".join([*lines, f"records, figures, notebooks: {shown}/; all numbers are in the "
                      "book's page of results, claims in `make claims OF=own`"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lablog.runner", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("plan", "write parameters and print Make's rules"),
                       ("why", "say what would run and because of what"),
                       ("results", "build the book, and say what the results say of the claims"),
                       ("verify", "run twice and compare the records"),
                       ("book", "build the book from the results at hand")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--profile", default="laptop", help="name, or path of a YAML file")
        command.add_argument("--set", nargs="*", default=[], metavar="[NN.]NAME=VALUE",
                             help="override single parameters")
        command.add_argument("notebooks", nargs="*", help="numbers or names; all if left out")
    run = commands.add_parser("run", help="execute one notebook with the planned parameters")
    run.add_argument("folder", type=Path, help="build/<profile>")
    run.add_argument("notebook")
    run.add_argument("--timeout", type=float, help="seconds that one cell may take")
    run.add_argument("--cluster", default="", help="where tasks run: an address, or a file of jobs")
    run.add_argument("--dashboard", type=int, help="port, on this machine alone, to watch them at")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 ok, 1 failed, 2 usage, 124 timeout, 130 Ctrl-C)."""
    options = _parser().parse_args(arguments)
    # A terminated run ends like an interrupted one: remains kept aside, record written.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if options.command == "run":
            return _run(options)
        profile = profiles.load(options.profile, options.set)
        match options.command:
            case "verify":
                return verify(profile, options.notebooks)
            case "book":
                return _book(layout.results(profile.name))
            case "results":
                if failed := _book(layout.results(profile.name)):
                    return failed
                print(summary(profile, options.notebooks))
            case command:
                print({"plan": plan, "why": why}[command](profile, options.notebooks))
    except KeyboardInterrupt:
        return EXIT_CODES["interrupted"]
    except (ValueError, OSError) as error:  # each names the file and the remedy
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _book(folder: Path) -> int:
    """Build the book of a folder of results; what draws and renders is imported here alone."""
    from lablog import book

    try:
        print(f"book: {book.build(folder, layout.book())}/index.html")
    except book.BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _interrupt(*_: object) -> None:
    """End as Ctrl-C does, also where that is ignored: in the background of a shell's script."""
    raise KeyboardInterrupt


def _run(options: argparse.Namespace) -> int:
    folder = options.folder.resolve()
    planned = folder / "parameters" / f"{options.notebook}.json"
    parameters = json.loads(planned.read_text())
    outcome = execute(RunSpec(options.notebook, folder.name, parameters, folder, options.timeout,
                              options.cluster, options.dashboard))
    if outcome.status != "ok":
        print(f"[{options.notebook}] {outcome.status}: {outcome.message}\n"
              f"[{options.notebook}] partial output: {outcome.record.parent}", file=sys.stderr)
    return EXIT_CODES[outcome.status]


if __name__ == "__main__":
    sys.exit(main())
