"""``make long``: one kernel that runs the chapters again and again, as one that stays open in
JupyterLab for a day. What it and its processes hold must not grow.

The record is build/long.json; it is written anew after every round, so that a run that is stopped
keeps what it saw.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Self

import nbformat
import psutil
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from scipy.stats import theilslopes

from lablog import layout, profiles
from lablog.files import repository
from lablog.record import Metric
from lablog.run import RUN_VARIABLE, Run
from lablog.runner import as_notebook
from torture import disk
from torture.results import LONG

ENOUGH = 9
"""Rounds without which nothing is said about growth."""
SLACK = 0.02
"""The part of a quantity that it may grow by; one process, file or thread is never growth."""
SHARED_MEMORY = Path("/dev/shm")
MB = 1e6


@dataclass(frozen=True)
class Held:
    """What a kernel and its processes hold after a round.

    hours: since the kernel's start; memory: of all together, in megabytes, what several share
    counted once; processes, files (open ones), threads: of all; temporary: files in the folder for
    temporary ones and in shared memory; disk: megabytes in the kernel's folder, results included.
    """

    hours: float
    memory: float
    processes: int
    files: int
    threads: int
    temporary: int
    disk: float


UNITS = {"hours": "h", "memory": "MB", "processes": "processes", "files": "open files",
         "threads": "threads", "temporary": "files", "disk": "MB"}
QUANTITIES = tuple(field.name for field in fields(Held) if field.name != "hours")


def growth(values: Sequence[float]) -> float:
    """By how much a quantity has grown over the last two thirds of the rounds, at least: the lower
    end of the 95 % interval of the Theil-Sen slope, times these rounds."""
    late = values[len(values) // 3:]
    return float(theilslopes(late).low_slope) * (len(late) - 1)


def grown(rounds: Sequence[Held]) -> list[str]:
    """Which quantities grow: by more than one, and by more than SLACK of what they are."""
    if len(rounds) < ENOUGH:
        return []
    held = {name: [float(getattr(one, name)) for one in rounds] for name in QUANTITIES}
    return [name for name, values in held.items()
            if growth(values) > max(1, SLACK * max(values))]


@contextmanager
def own_shared_memory() -> Iterator[None]:
    """Let nobody else's files be in the shared memory, where this process may mount; else what
    others put there meanwhile is counted too."""
    if SHARED_MEMORY.is_dir() and disk.may_mount():
        with disk.mounted(SHARED_MEMORY, shutil.disk_usage(SHARED_MEMORY).total):
            yield
    else:
        yield


class OpenKernel:
    """A kernel that has its results and its temporary files in `folder`."""

    def __init__(self, folder: Path, profile: str = "smoke") -> None:
        self.folder, self.temporary = folder, folder / "temporary"
        self.results = folder / "results"
        self.temporary.mkdir(parents=True)
        context = folder / "context.json"
        context.write_text(json.dumps({
            "profile": profile, "folder": str(self.results),
            "artifacts": str(layout.artifacts(self.results))}))
        self.profile = profiles.load(profile)
        self.shared = self._shared()
        self.manager = AsyncKernelManager(kernel_name="python3", transport="ipc",
                                          connection_file=str(folder / "kernel.json"))
        run_sync(self.manager.start_kernel)(cwd=str(repository()), env=os.environ | {
            RUN_VARIABLE: str(context), "TMPDIR": str(self.temporary), "MPLBACKEND": "agg"})
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        run_sync(self.manager.shutdown_kernel)(now=True)

    def run(self, notebook: str) -> str:
        """Run a chapter's cells in a namespace that is emptied before; the error, if any."""
        made = parameterize_notebook(
            load_notebook_node(as_notebook(profiles.notebook_path(notebook))),
            dict(self.profile.parameters[notebook]))
        made.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
        client = NotebookClient(made, km=self.manager, timeout=LONG)
        try:
            client.execute()
        except CellExecutionError as error:
            if error.ename == "KeyboardInterrupt":  # it is stopped, and keeps what it saw
                raise KeyboardInterrupt from None
            return f"{notebook}: {error.ename}: {error.evalue}"
        except (CellTimeoutError, DeadKernelError) as error:
            return f"{notebook}: {type(error).__name__}: {error}".splitlines()[0]
        finally:
            if client.kc is not None:
                client.kc.stop_channels()
        return ""

    def round(self, notebooks: Sequence[str]) -> str:
        """Run the chapters from nothing; the first error, if there is one."""
        shutil.rmtree(self.results, ignore_errors=True)
        return next(filter(None, map(self.run, notebooks)), "")

    def held(self) -> Held:
        """What the kernel and its processes hold."""
        kernel = psutil.Process(self.manager.provisioner.pid)  # type: ignore[union-attr]
        seen = []
        for process in (kernel, *kernel.children(recursive=True)):
            try:
                seen.append((process.memory_full_info().pss, process.num_fds(),
                             process.num_threads()))
            except psutil.Error:  # it has ended meanwhile
                continue
        memory, files, threads = map(sum, zip(*seen, strict=True))
        return Held(
            hours=(time.monotonic() - self.began) / 3600, memory=memory / MB,
            processes=len(seen), files=files, threads=threads,
            temporary=sum(len(names) for _, _, names in os.walk(self.temporary))
            + len(self._shared() - self.shared),
            disk=sum(_size(Path(folder, name)) for folder, _, names in os.walk(self.folder)
                     for name in names) / MB)

    @staticmethod
    def _shared() -> set[str]:
        return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # it has gone meanwhile
        return 0


def verdict(rounds: Sequence[Held], error: str) -> list[Metric]:
    """Which quantities have grown, after how many rounds, and what ended them."""
    growing = grown(rounds)
    few = f"{len(rounds)} rounds say nothing; it takes {ENOUGH}" if len(rounds) < ENOUGH else None
    return [Metric.of("long.rounds", len(rounds), "rounds"),
            Metric.of("long.error", error or "none", "error"),
            *(Metric.of(f"long.grows.{name}", None if few else name in growing, "yes or no",
                        undefined=few) for name in QUANTITIES)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chapters for as long as told; 1 if one failed or anything grew."""
    parser = argparse.ArgumentParser(prog="make long", description=__doc__)
    parser.add_argument("--hours", type=float, default=1, help="how long")
    parser.add_argument("chapters", nargs="*", default=[], help="their numbers; else all")
    options = parser.parse_args(arguments)
    notebooks = [name for name in profiles.notebooks()
                 if not options.chapters or name[:2] in options.chapters]
    run = Run("long", "smoke", layout.built(), layout.built("long"),
              {"hours": options.hours, "chapters": notebooks})
    rounds: list[Held] = []
    error = ""
    with (own_shared_memory(), tempfile.TemporaryDirectory() as folder,
          OpenKernel(Path(folder)) as kernel):
        while not error and (not rounds or rounds[-1].hours < options.hours):
            error = kernel.round(notebooks)
            if not error:
                rounds.append(kernel.held())
                seen = asdict(rounds[-1])
                for name, value in seen.items():
                    run.metric(f"long.{len(rounds)}.{name}", value, UNITS[name])
                print(f"round {len(rounds)}: " + ", ".join(
                    f"{name} {value:.4g}" for name, value in seen.items()), flush=True)
            record = run.record()
            record.model_copy(update={
                "metrics": (*record.metrics, *verdict(rounds, error))}).write(layout.long_run())
    fell = [*([error] if error else []), *(f"{name} grows" for name in grown(rounds))]
    print("\n".join([*fell, f"{len(rounds)} rounds; record: build/long.json"]))
    return 1 if fell else 0


if __name__ == "__main__":
    sys.exit(main())
