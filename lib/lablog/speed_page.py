"""The book's page of speed: what ``make bench`` measured, beside the targets, and a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lablog import figures
from lablog.markdown import plain
from lablog.record import Record
from lablog.report import format_metric

TARGETS = {
    "native.decode.committed_over_stock.offline": "at least 0.97",
    "native.decode.committed_over_stock.offline.per_sequence": "at least 0.97",
    "native.decode.committed_over_stock.50m": "at least 0.97",
    "native.decode.committed_over_stock.50m.per_sequence": "at least 0.97",
    "qlora.step.commitment_over_lora": "at most 1.10",
    "cvfp.parallel_step.fraction_of_gemm": "at least 0.70",
    "cvfp.train.parallel_over_sequential": "at least 23",
    "cvfp.rollout.fraction_of_gemv": "at least 0.85",
    "cvfp.rollout.best_over_sequential.true_pass": "at least 1",
    "arianna.train.f32_compiled.mfu": "at least 0.60",
    "arianna.packing.mb_per_s": "at least 5",
    "scale.efficiency.two_workers": "at least 0.9",
    "scale.trainings.tasks_over_pool": "at least 1.0",
    "scale.efficiency.simulated": "at least 0.95",
    "live.over_native_without_avx": "at least 0.3",
}
TITLES = {"native": "llama.cpp with a commitment", "qlora": "Training the commitment",
          "cvfp": "CVFP", "arianna": "Arianna", "scale": "Many workers",
          "live": "In a browser's engine"}


def rates(record: Record) -> tuple[Figure, pd.DataFrame]:
    """Tokens a second for each way in which Arianna is trained and speaks."""
    rows = []
    for metric in record.metrics:
        parts = metric.name.split(".")
        if parts[0] == "arianna" and parts[-1] == "tokens_per_s":
            rows.append({"work": parts[1], "mode": parts[2].replace("_", " "),
                         "tokens_per_s": metric.value})
    data = pd.DataFrame(rows, columns=["work", "mode", "tokens_per_s"])
    drawn, panels = plt.subplots(1, 2, figsize=(8.4, 2.6))
    for axes, work, title, colour in zip(panels, ("train", "generate"), ("training", "generation"),
                                         figures.COLOURS, strict=False):
        part = data[data["work"] == work]
        bars = axes.barh(part["mode"], part["tokens_per_s"], color=colour)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, color=figures.GREY)
        axes.set(title=title, xlabel="tokens / s")
        axes.margins(x=0.2)
        axes.invert_yaxis()
    return drawn, data


def page(record: Record | None, folder: Path) -> str:
    """Markdown of the page; its picture and the numbers behind it are written into `folder`."""
    parts = [
        "# Speed\n",
        "Measured by `make bench`, as ratios within one process wherever there is something to "
        "compare with: a median over pairs that run in turns. A clone that has run it shows its "
        "own numbers here, others the published ones.\n",
    ]
    if record is None:
        return "\n".join([*parts, "Nothing has been measured yet.\n"])
    machine = record.machine
    parts.append(
        f"Commit `{record.source.commit[:10]}`"
        f"{' with uncommitted changes' if record.source.dirty else ''}, on {machine.processor} "
        f"with {machine.threads} threads ({machine.device}), PyTorch "
        f"{machine.packages.get('torch', 'none')}.\n"
    )
    for room, title in TITLES.items():
        here = [metric for metric in record.metrics if metric.name.startswith(f"{room}.")]
        if not here:
            continue
        parts.append(f"## {title}\n\n| value | target | measure |\n|---|---|---|")
        parts += [f"| {plain(format_metric(m))} | {TARGETS.get(m.name, '')} | `{m.name}` |"
                  for m in here]
        if room == "arianna":
            figures.use_style()
            svg, csv = figures.save(*rates(record), folder, "tokens_per_s")
            caption = "Tokens a second for each way in which Arianna is trained and speaks."
            parts.append(f"\n![{caption}]({svg.name})\n\n{caption} "
                         f"{{download}}`data (CSV) <{csv.name}>`")
        parts.append("")
    return "\n".join(parts)
