"""A measurement in stages, each kept when it has ended, so that a stopped run goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lablog import layout
from lablog.keys import key
from lablog.record import Record
from lablog.run import Run


def in_stages(name: str, stages: Mapping[str, Callable[[Run], None]], target: Path,
              **settings: Any) -> Record:
    """Run all `stages`, or those that `name` has not finished before, and write one record.

    A stage records metrics in the run that it is given. One that was kept is taken if the code
    behind it and the `settings` are the same.
    """
    folder = layout.built()
    finished = folder / name / "finished"
    parts = []
    for stage, measure in stages.items():
        path = finished / f"{stage}-{key(measure, settings)}.json"
        if not path.is_file():
            run = Run(name, name, folder, folder / name, settings)
            with run.stage(stage):
                measure(run)
            run.record().write(path)
        parts.append(Record.read(path))
    record = parts[-1].model_copy(update={
        "seconds": sum(part.seconds for part in parts),
        "peak_memory_bytes": max(part.peak_memory_bytes or 0 for part in parts),
        "stages": tuple(stage for part in parts for stage in part.stages),
        "metrics": tuple(metric for part in parts for metric in part.metrics)})
    record.write(target)
    shutil.rmtree(finished)
    return record
