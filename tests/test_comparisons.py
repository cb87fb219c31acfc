"""The paired test over crossed seeds and items, and Holm's correction."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lablog.comparisons import holm, p_greater


def slow_p(differences) -> float:
    """The same by the textbook: sums of squares with loops, for tables that vary everywhere."""
    seeds, items = len(differences), len(differences[0])
    grand = sum(sum(row) for row in differences) / (seeds * items)
    rows = [sum(row) / items for row in differences]
    columns = [sum(row[i] for row in differences) / seeds for i in range(items)]
    ms_rows = items * sum((r - grand) ** 2 for r in rows) / (seeds - 1)
    ms_columns = seeds * sum((c - grand) ** 2 for c in columns) / (items - 1)
    rest = sum((differences[s][i] - rows[s] - columns[i] + grand) ** 2
               for s in range(seeds) for i in range(items))
    ms_rest = rest / ((seeds - 1) * (items - 1))
    total = max(ms_rows + ms_columns - ms_rest, ms_rows, ms_columns)
    freedom = total**2 / (ms_rows**2 / (seeds - 1) + ms_columns**2 / (items - 1)
                          + ms_rest**2 / ((seeds - 1) * (items - 1)))
    return stats.t.sf(grand / (total / (seeds * items)) ** 0.5, max(freedom, 1))


@given(st.integers(2, 5), st.integers(2, 12), st.integers(0, 2**31), st.floats(-1, 1))
@settings(max_examples=40)
def test_the_p_value_is_that_of_the_analysis_of_variance(seeds, items, seed, shift):
    table = np.random.default_rng(seed).normal(size=(seeds, items)) + shift
    p = p_greater(table)
    assert p == pytest.approx(slow_p(table.tolist()), rel=1e-6)
    assert p_greater(-table) == pytest.approx(1 - p, abs=1e-9)
    assert p_greater(table[::-1, ::-1]) == pytest.approx(p)
    assert p_greater(table + 0.1) < p


def rejections(seeds: float, items: float, shift: float, runs: int = 1500) -> float:
    rng = np.random.default_rng(3)
    return np.mean([
        p_greater(shift + seeds * rng.normal(size=(5, 1)) + items * rng.normal(size=100)
                  + rng.normal(size=(5, 100))) < 0.05 for _ in range(runs)])


@pytest.mark.parametrize(("seeds", "items"), [(0, 0), (0.1, 0), (1, 0), (0, 1), (1, 1)])
def test_it_calls_no_more_false_than_it_says(seeds, items):
    """5 % and the error of 1,500 runs: whether seeds differ, items, both or neither."""
    assert rejections(seeds, items, 0.0) <= 0.05 + 3 * (0.05 * 0.95 / 1500) ** 0.5


def test_it_finds_what_is_there_and_more_when_the_seeds_agree():
    assert rejections(0.0, 0.3, 0.3, 300) > 0.99
    assert rejections(0.5, 0.3, 0.3, 300) < 0.6


def test_differences_that_do_not_vary_and_one_seed():
    assert p_greater(np.zeros((5, 200))) == 1
    assert p_greater(-np.ones((5, 200))) == 1
    one = np.random.default_rng(0).normal(0.1, size=(1, 50))
    assert p_greater(one) == pytest.approx(stats.ttest_1samp(one[0], 0).pvalue / 2)
    for bad in (np.zeros(5), np.zeros((5, 1)), np.zeros((0, 5)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="at least two items"):
            p_greater(bad)


@given(st.integers(1, 5), st.integers(2, 30), st.data())
def test_all_improving_is_no_weaker_than_all_but_one(seeds, items, data):
    table = np.ones((seeds, items))
    table[data.draw(st.integers(0, seeds - 1)), data.draw(st.integers(0, items - 1))] = 0
    assert p_greater(np.ones((seeds, items))) == pytest.approx(p_greater(table))
    assert p_greater(np.ones((seeds, items))) < 0.5


def test_holm_agrees_with_a_worked_example():
    """By hand: 4 · 0.005, 3 · 0.01, 2 · 0.03, and 0.04, which may not fall below that."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_closed_testing_with_bonferroni_rejects(values, alpha):
    """Independent definition: a hypothesis falls if every set that holds it has a p ≤ α / size."""
    adjusted = holm(values)
    numbers = range(len(values))
    for i in numbers:
        sets = [s for size in range(1, len(values) + 1)
                for s in itertools.combinations(numbers, size) if i in s]
        smallest = max(len(s) * min(values[j] for j in s) for s in sets)  # adjusted p by closure
        assert adjusted[i] == pytest.approx(min(smallest, 1.0))
        if abs(smallest - alpha) > 1e-12:
            assert (adjusted[i] < alpha) == (smallest < alpha)


def test_holm_refuses_what_is_no_p_value():
    for bad in ([0.5, 1.1], [-0.1], [np.nan]):
        with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
            holm(bad)
