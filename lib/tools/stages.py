"""A measurement in stages, each kept when it has ended, so that a stopped run goes on."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lablog import layout
from lablog.cluster.child import end_with_parent
from lablog.keys import key
from lablog.record import Record
from lablog.run import Run


def in_stages(name: str, stages: Mapping[str, Callable[[Run], None]], target: Path,
              processes: int = 1, **settings: Any) -> Record:
    """Run all `stages`, or those that `name` has not finished before, and write one record.

    A stage records metrics in the run that it is given. One that was kept is taken if the code
    behind it and the `settings` are the same. With several `processes` as many stages run at once,
    each begun when another has ended; the record is the same.

    Raises what a stage raises, and RuntimeError where one in a process of its own failed; those
    that have ended by then are kept.
    """
    folder = layout.built()
    finished = folder / name / "finished"
    paths = {stage: finished / f"{stage}-{key(measure, settings)}.json"
             for stage, measure in stages.items()}

    def keep(stage: str) -> None:
        run = Run(name, name, folder, folder / name, settings)
        with run.stage(stage):
            stages[stage](run)
        run.record().write(paths[stage])

    missing = [stage for stage, path in paths.items() if not path.is_file()]
    if processes > 1:
        _side_by_side(keep, missing, processes)
    else:
        for stage in missing:
            keep(stage)
    parts = [Record.read(path) for path in paths.values()]
    record = parts[-1].model_copy(update={
        "seconds": sum(part.seconds for part in parts),
        "peak_memory_bytes": max(part.peak_memory_bytes or 0 for part in parts),
        "stages": tuple(stage for part in parts for stage in part.stages),
        "metrics": tuple(metric for part in parts for metric in part.metrics)})
    record.write(target)
    shutil.rmtree(finished)
    return record


def _side_by_side(keep: Callable[[str], None], stages: Sequence[str], processes: int) -> None:
    """Call `keep` for each of `stages` in forked processes, of which each takes the next one."""
    context = multiprocessing.get_context("fork")  # stages are closures
    begun = context.Value("i", 0)

    def work() -> None:
        end_with_parent()
        try:
            while True:
                with begun:
                    place = begun.value
                    begun.value += 1
                if place >= len(stages):
                    return
                keep(stages[place])
        except KeyboardInterrupt:  # the parent says so
            sys.exit(130)

    children = [context.Process(target=work) for _ in range(min(processes, len(stages)))]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join()
    finally:
        for child in children:
            child.terminate()
    if any(child.exitcode for child in children):
        raise RuntimeError("a stage failed, as said above; the others are kept: run it again")
