"""The README says no number that no published record holds."""

import re
from collections.abc import Iterator

import pytest

from lablog.files import repository
from lablog.record import Record

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
INTERVALS = re.compile(rf"({NUMBER})( %)? \[({NUMBER}), ({NUMBER})\]")
README = re.sub(r"\s+", " ", (repository() / "README.md").read_text())


def published() -> Iterator[tuple[float, float, float]]:
    """Value and ends of every metric with an interval."""
    for path in (repository() / "book/records").glob("*/*.json"):
        for metric in Record.read(path).metrics:
            if metric.interval is not None and metric.value is not None:
                yield float(metric.value), *metric.interval


def test_every_interval_is_a_published_one():
    """To the digits that are shown; what "saves" so much may have changed by less than nothing."""
    known, found = list(published()), INTERVALS.findall(README)
    assert len(found) > 9
    for value, percent, *ends in found:
        shown = [one.replace(",", "") for one in (value, *ends)]
        exact = [float(one) / (100 if percent else 1) for one in shown]
        halves = [0.5000001 * 10.0 ** -len(one.partition(".")[2]) / (100 if percent else 1)
                  for one in shown]
        assert any(
            all(abs(sign * a - b) <= half for a, b, half in zip(triple, exact, halves, strict=True))
            for metric in known
            for sign, triple in ((1, metric), (-1, (metric[0], metric[2], metric[1])))
        ), f"no record holds {value}{percent} [{', '.join(ends)}]"


@pytest.mark.parametrize(("words", "record", "metric"), [
    (r"at (\d+) settings of strength and layers in a small model", "laptop/02_lambda_calibration",
     "cells"),
    (r"and at (\d+) in SmolLM2", "pretrained/02_lambda_calibration", "cells"),
    (r"\(Holm over (\d+) comparisons\)", "laptop/02_lambda_calibration", "comparisons"),
])
def test_what_is_counted_is_what_was_counted(words: str, record: str, metric: str):
    (found,) = re.findall(words, README)
    held = Record.read(repository() / f"book/records/{record}.json").metric(metric)
    assert float(found) == held.value
