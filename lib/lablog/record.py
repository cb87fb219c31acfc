"""The run record: the only source of numbers for book, reports and ledger.

A notebook opens its run with :func:`begin`, adds metrics, figures, files and stages, and ends
with :meth:`Run.finish`, which writes one JSON file. :class:`Record` is its schema.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from lablog.files import atomic_write, repository
from lablog.intervals import Interval
from lablog.profiles import declared_parameters, notebook_path
from lablog.provenance import FileHash, Machine, Source, Strict, machine, source_state
from lablog.report import fill, format_metric, mandated, reject_judgements

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Markdown
    from matplotlib.figure import Figure

    from lablog.figures import ShownFigure
    from lablog.report import Report

SCHEMA_VERSION: Literal[1] = 1
RUN_VARIABLE = "LABLOG_RUN"
"""Environment variable with the path of the run context that the runner writes.

It says where results go, never what is computed; without it results go to build/interactive.
"""


class Metric(Strict):
    """One number (or named class) with its unit and, where they exist, counts and interval."""

    name: str = Field(pattern=r"^[a-z0-9][a-zA-Z0-9_.+\-]*$")
    value: float | int | bool | str | None
    unit: str
    numerator: float | None = None
    denominator: float | None = None
    n: int | None = Field(default=None, ge=0, description="number of samples")
    seeds: tuple[int, ...] | None = None
    interval: tuple[float, float] | None = None
    interval_method: str | None = None
    interval_level: float = 0.95
    undefined: str | None = Field(default=None, description="why there is no value")

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

    name: str
    svg: str
    csv: str
    caption: str


class Stage(Strict):
    """A timed part of the run."""

    name: str
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
    notebook: str
    profile: str
    status: Literal["ok", "failed", "interrupted", "timeout"]
    parameters: dict[str, Any]
    seeds: tuple[int, ...]
    started: datetime
    seconds: float
    stages: tuple[Stage, ...] = ()
    peak_memory_bytes: int | None = None
    source: Source
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
        """The part that two runs on one machine must share: everything but times and memory."""
        return self.model_dump(
            mode="json", exclude={"started", "seconds", "stages", "peak_memory_bytes", "profile"}
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


class Run:
    """The open run of one notebook; collects what its record will hold."""

    def __init__(self, notebook: str, profile: str, folder: Path, artifacts: Path,
                 parameters: Mapping[str, Any]) -> None:
        self.notebook, self.profile = notebook, profile
        self.folder, self.artifacts = folder, artifacts
        self.parameters = dict(parameters)
        self.started, self._clock = datetime.now(UTC), time.perf_counter()
        self.source, self.machine = source_state(), machine()
        self._metrics: list[Metric] = []
        self._figures: list[FigureFile] = []
        self._stages: list[Stage] = []
        self._files: dict[str, FileHash] = {}

    def metric(self, name: str, value: float | int | bool | str | None, unit: str, *,
               interval: Interval | None = None, **details: Any) -> None:
        """Add a metric; `details` are further fields of :class:`Metric`."""
        if interval is not None:
            details |= {"interval": (interval.low, interval.high), "interval_level": interval.level,
                        "interval_method": interval.method}
        self._metrics.append(Metric(name=name, value=value, unit=unit, **details))

    def figure(self, name: str, figure: Figure, data: pd.DataFrame, caption: str) -> ShownFigure:
        """Save a figure as SVG with its data as CSV; returns what the notebook displays."""
        from lablog import figures

        svg, csv = figures.save(figure, data, self.folder / "figures" / self.notebook, name)
        entry = FigureFile(name=name, svg=f"figures/{self.notebook}/{svg.name}",
                           csv=f"figures/{self.notebook}/{csv.name}", caption=caption)
        self._figures.append(entry)
        origin = (
            f"notebook {self.notebook} · profile {self.profile} · commit {self.source.commit[:10]}"
            f"{' + uncommitted changes' if self.source.dirty else ''} · "
            f"{self.machine.cpu}, {self.machine.threads} threads"
        )
        return figures.ShownFigure(svg.read_text(), caption, origin, f"../{entry.csv}")

    def file(self, path: Path) -> Path:
        """Note a data or model file that the run reads; returns the path."""
        self._files[str(path)] = FileHash.of(path, self.artifacts)
        return path

    def metrics_table(self, prefix: str) -> pd.DataFrame:
        """The metrics so far whose name begins with `prefix`, for display."""
        import pandas as pd

        shown = [m for m in self._metrics if m.name.startswith(f"{prefix}.")]
        return pd.DataFrame(
            [{"metric": m.name, "value": format_metric(m)} for m in shown],
            columns=["metric", "value"],
        ).set_index("metric")

    def say(self, text: str, **names: str) -> Markdown:
        """Prose in which ``{metric:style}`` stands for a number of the record so far.

        A keyword gives a short name: with ``bare="untrained.seed42"`` the field ``{bare.rank}``
        reads ``untrained.seed42.rank``. Raises ReportError as the report does.
        """
        from IPython.display import Markdown

        for short, full in names.items():
            text = text.replace(f"{{{short}.", f"{{{full}.")
        return Markdown(fill(self.record(), reject_judgements(text)))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a part of the run."""
        start = time.perf_counter()
        yield
        self._stages.append(Stage(name=name, seconds=time.perf_counter() - start))

    def record(self) -> Record:
        """The record as it stands now."""
        seeds = [self.parameters["seed"]] if "seed" in self.parameters else []
        return Record(
            notebook=self.notebook, profile=self.profile, status="ok", parameters=self.parameters,
            seeds=(*seeds, *self.parameters.get("seeds", ())), started=self.started,
            seconds=time.perf_counter() - self._clock, stages=tuple(self._stages),
            peak_memory_bytes=peak_memory_bytes(), source=self.source, machine=self.machine,
            files=tuple(self._files.values()), figures=tuple(self._figures),
            metrics=tuple(self._metrics),
        )

    def finish(self, **names: Any) -> Report:
        """Write the record into the run's folder and return its mandated report.

        The notebook's last act. `names` are what its report's templates speak of besides metrics.
        Raises :class:`lablog.report.ReportError` when a mandatory number is missing, and then no
        record is written.
        """
        record = self.record()
        report = mandated(record, **names)
        text = ReportText(en=report.english, ja=report.japanese)
        record = record.model_copy(update={"report": text})
        record.write(self.folder / "records" / f"{self.notebook}.json")
        return report


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def begin(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Open the run of a notebook; `namespace` is its ``globals()``.

    The values of the names in the cell tagged ``parameters`` are recorded, as they are now.
    """
    declared = declared_parameters(notebook_path(notebook))
    context = os.environ.get(RUN_VARIABLE)
    if context:
        settings = json.loads(Path(context).read_text())
    else:
        folder = str(repository() / "build" / "interactive")
        settings = {"profile": "interactive", "folder": folder, "artifacts": f"{folder}/artifacts"}
    return Run(
        notebook, settings["profile"], Path(settings["folder"]), Path(settings["artifacts"]),
        {name: namespace[name] for name in declared},
    )
