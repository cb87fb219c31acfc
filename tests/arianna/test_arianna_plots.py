"""Figures of chapter 6 speak in words."""

import pandas as pd
import pytest

from lablog.arianna import plots


@pytest.mark.parametrize(("condition", "words"), [
    ("before.qa", "before fine-tuning, with the marks Q: and A:"),
    ("after.bare", "after fine-tuning, without marks"),
    ("after.other", "after fine-tuning, other"),
])
def test_conditions_are_called_by_words(condition: str, words: str):
    assert plots.called(condition) == words
    row = {"condition": condition, "bits/byte": 2.0, "low": 1.9, "high": 2.2}
    figure, data = plots.conditions(pd.DataFrame([row]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [words]
    assert list(data["condition"]) == [condition], "the data keeps the names of the metrics"
