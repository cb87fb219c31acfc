"""Speed, as ratios within one process: ``make bench`` writes build/bench.json.

The file is a record like those of the notebooks. A run that was stopped goes on with the stage that
it was in. Ratios are medians over pairs of rounds that follow each other (A B A B), with the
bootstrap interval of the median. The targets stand in ``lablog.speed_page``, which draws the book's
page from the record.
"""

from __future__ import annotations

import sys

from lablog import layout
from lablog.record import Metric
from lablog.report import format_metric
from lablog.speed_page import TARGETS
from tools import (
    bench_arianna,
    bench_cvfp,
    bench_live,
    bench_native,
    bench_pretrained,
    bench_qlora,
    bench_scale,
)
from tools.stages import in_stages

STAGES = {
    "native_build": bench_native.build, "native_decode": bench_native.decode,
    "pretrained_speed": bench_pretrained.record,
    "qlora_speed": bench_qlora.record, "cvfp_speed": bench_cvfp.record,
    "arianna_speed": bench_arianna.record, "scale": bench_scale.record,
    "live": bench_live.record,
}


def told(metric: Metric) -> str:
    """One line: the measure, its value with interval and, where there is one, its target."""
    target = TARGETS.get(metric.name)
    return f"{metric.name}: {format_metric(metric)}" + (f" (target: {target})" if target else "")


def main() -> int:
    """Measure everything, write the record and print it."""
    record = in_stages("bench", STAGES, layout.benchmark())
    for metric in record.metrics:
        print(told(metric))
    return 0


if __name__ == "__main__":
    sys.exit(main())
