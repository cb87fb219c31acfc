"""The run record: the only source of numbers for book, reports and ledger.

:class:`Record` is its schema. A notebook fills one through :class:`lablog.run.Run`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from lablog.files import atomic_write
from lablog.intervals import Interval, t_interval
from lablog.provenance import CloneState, FileHash, Machine
from lablog.strict import Name, Strict

SCHEMA_VERSION: Literal[1] = 1


class Metric(Strict):
    """One number (or named class) with its unit and, where they exist, counts and interval."""

    name: str = Field(pattern=r"^[a-z0-9][a-zA-Z0-9_.+\-]*$")
    value: float | int | bool | str | None
    unit: Name
    numerator: float | None = None
    denominator: float | None = None
    n: int | None = Field(default=None, ge=0, description="number of samples")
    seeds: tuple[int, ...] | None = None
    interval: tuple[float, float] | None = None
    interval_method: str | None = None
    interval_level: float = 0.95
    undefined: str | None = Field(default=None, description="why there is no value")

    @classmethod
    def of(cls, name: str, value: float | int | bool | str | None, unit: str, *,
           interval: Interval | None = None, **details: Any) -> Metric:
        """A metric with the ends, level and method of its `interval`; `details` are fields."""
        if interval is not None:
            details |= {"interval": (interval.low, interval.high), "interval_level": interval.level,
                        "interval_method": interval.method}
        return cls(name=name, value=value, unit=unit, **details)

    @classmethod
    def over_seeds(cls, name: str, values: Sequence[float], unit: str, seeds: Sequence[int],
                   log: bool = False) -> Metric:
        """The mean of a value for each seed (of logarithms if `log`) with its t interval, which a
        single seed does not have."""
        mean = math.exp(float(np.mean(np.log(values)))) if log else float(np.mean(values))
        return cls.of(name, mean, unit, seeds=tuple(seeds), n=len(values),
                      interval=t_interval(values, log=log) if len(values) > 1 else None)

    def under(self, prefix: str) -> Metric:
        """The same as ``<prefix>.<name>``."""
        return Metric(**(self.model_dump() | {"name": f"{prefix}.{self.name}"}))

    @model_validator(mode="after")
    def _finite(self) -> Metric:
        numbers = [self.value, self.numerator, self.denominator, *(self.interval or ())]
        if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
            raise ValueError(
                f"metric {self.name} is not finite ({numbers}): give undefined=<reason>, value=None"
            )
        if (self.value is None) != (self.undefined is not None):
            raise ValueError(f"metric {self.name}: exactly one of value and undefined is needed")
        if (self.interval is None) != (self.interval_method is None):
            raise ValueError(f"metric {self.name}: an interval needs its method, and only then")
        return self


class FigureFile(Strict):
    """A figure, the data behind it, and its caption (paths relative to the run's folder)."""

    name: Name
    svg: Name
    csv: Name
    caption: str


class Stage(Strict):
    """A timed part of the run."""

    name: Name
    seconds: float


class TaskPlace(Strict):
    """Where one task ran: host, vector instructions and address of its worker, and how long."""

    kind: Name
    name: str
    worker: Name
    seconds: float


class ReportText(Strict):
    """The mandated report of the run as rendered from its metrics."""

    en: str
    ja: str


class Failure(Strict):
    """What ended a run that did not finish."""

    kind: str
    message: str


class Record(Strict):
    """Everything that one notebook run leaves for readers, reports and the ledger."""

    schema_version: Literal[1] = SCHEMA_VERSION
    notebook: Name
    profile: Name
    status: Literal["ok", "failed", "interrupted", "timeout"]
    parameters: dict[Name, Any]
    seeds: tuple[int, ...]
    started: datetime
    seconds: float
    stages: tuple[Stage, ...] = ()
    tasks: tuple[TaskPlace, ...] = ()
    peak_memory_bytes: int | None = None
    source: CloneState
    machine: Machine
    files: tuple[FileHash, ...] = ()
    figures: tuple[FigureFile, ...] = ()
    metrics: tuple[Metric, ...] = ()
    report: ReportText | None = None
    failure: Failure | None = None

    @model_validator(mode="after")
    def _unique_names(self) -> Record:
        for kind, items in (("metric", self.metrics), ("figure", self.figures)):
            names = [item.name for item in items]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{kind} recorded twice: {', '.join(twice)}")
        return self

    def metric(self, name: str) -> Metric:
        """The metric of that name; KeyError names it and the notebook when it is missing."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(f"record of {self.notebook} ({self.profile}) holds no metric {name!r}")

    def results(self) -> dict[str, Any]:
        """The part that two runs on one machine must share: everything but times, memory, and where
        tasks ran."""
        return self.model_dump(
            mode="json",
            exclude={"started", "seconds", "stages", "tasks", "peak_memory_bytes", "profile"},
        )

    def write(self, path: Path) -> Path:
        """Write the record atomically as indented JSON."""
        return atomic_write(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read and validate a record; ValueError names the file."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path} is not a record of schema {SCHEMA_VERSION}: {error}"
            ) from error
