"""The open run of a notebook, which writes its record.

A notebook opens its run with :func:`begin`, adds metrics, figures, files and stages, and ends
with :meth:`Run.finish`, which writes one JSON file, a :class:`lablog.record.Record`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lablog import layout
from lablog.intervals import Interval
from lablog.profiles import declared_parameters, notebook_path
from lablog.provenance import FileHash, machine, peak_memory_bytes, source_state
from lablog.record import FigureFile, Metric, Record, ReportText, Stage, TaskPlace
from lablog.report import Report, fill, format_metric, mandated, reject_judgements

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Markdown
    from matplotlib.figure import Figure

    from lablog.figures import ShownFigure

RUN_VARIABLE = "LABLOG_RUN"
"""Environment variable with the path of the run context that the runner writes.

It says where results go, never what is computed; without it results go to build/interactive.
"""


class Run:
    """The open run of one notebook; collects what its record will hold.

    cluster: where its tasks are to run, as :class:`lablog.cluster.client.Cluster` is told; tasks:
    where they did. dashboard: a port for the engine's own pages.
    """

    def __init__(self, notebook: str, profile: str, folder: Path, artifacts: Path,
                 parameters: Mapping[str, Any], cluster: str = "",
                 dashboard: int | None = None) -> None:
        self.notebook, self.profile = notebook, profile
        self.cluster, self.dashboard = cluster, dashboard
        self.folder, self.artifacts = folder, artifacts
        self.parameters = dict(parameters)
        self.started, self._clock = datetime.now(UTC), time.perf_counter()
        self.source, self.machine = source_state(), machine()
        self._metrics: list[Metric] = []
        self._figures: list[FigureFile] = []
        self._stages: list[Stage] = []
        self.tasks: list[TaskPlace] = []
        self._files: dict[str, FileHash] = {}

    def metric(self, name: str, value: float | int | bool | str | None, unit: str, *,
               interval: Interval | None = None, **details: Any) -> None:
        """Add a metric; `details` are further fields of :class:`lablog.record.Metric`."""
        self._metrics.append(Metric.of(name, value, unit, interval=interval, **details))

    def metrics(self, found: Iterable[Metric], under: str = "") -> None:
        """Add what a function of the library has measured, as it is named there or, with `under`,
        as ``<under>.<name>``."""
        self._metrics += [metric.under(under) if under else metric for metric in found]

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
            f"{self.machine.processor}, {self.machine.threads} threads"
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

    def table(self, rows: Sequence[str], columns: Sequence[str],
              style: str | None = None) -> pd.DataFrame:
        """Metrics ``<row>.<column>`` as text, for display; empty where none has been recorded.

        `style` as in a report: without it each has its counts and its interval.
        """
        import pandas as pd

        found = {metric.name: metric for metric in self._metrics}
        cells = [[format_metric(found[name], style) if (name := f"{row}.{column}") in found else ""
                  for column in columns] for row in rows]
        return pd.DataFrame(cells, index=list(rows), columns=list(columns))

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
            tasks=tuple(self.tasks),
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


def begin(notebook: str, namespace: Mapping[str, Any]) -> Run:
    """Open the run of a notebook; `namespace` is its ``globals()``.

    The values of the names in the cell tagged ``parameters`` are recorded, as they are now.
    """
    declared = declared_parameters(notebook_path(notebook))
    context = os.environ.get(RUN_VARIABLE)
    if context:
        settings = json.loads(Path(context).read_text())
    else:
        folder = layout.interactive()
        settings = {"profile": "interactive", "folder": str(folder),
                    "artifacts": str(layout.artifacts(folder))}
    return Run(
        notebook, settings["profile"], Path(settings["folder"]), Path(settings["artifacts"]),
        {name: namespace[name] for name in declared},
        settings.get("cluster", ""), settings.get("dashboard"),
    )
