"""Intervals against independent computations and against what they promise: coverage."""

import math
import statistics
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lablog.intervals import (
    bootstrap_percentile,
    hierarchical,
    ratio_replicas,
    ratio_values,
    t_interval,
    wilson,
)

T_975 = {2: 12.7062047362, 3: 4.3026527297, 5: 2.7764451052, 10: 2.2621571628}
"""Quantiles of Student's t for n values (n - 1 degrees of freedom), from printed tables."""
Z_975 = 1.959963984540054


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_quadratic(counts: tuple[int, int]):
    """Both ends are the p with |k/n - p| = z sqrt(p (1 - p) / n)."""
    successes, trials = counts
    interval = wilson(successes, trials)
    share = successes / trials
    assert 0 <= interval.low <= share <= interval.high <= 1
    for end in (interval.low, interval.high):
        assert (share - end) ** 2 == pytest.approx(
            Z_975**2 * end * (1 - end) / trials, rel=1e-6, abs=1e-12
        )


def test_wilson_agrees_with_published_values():
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ):
        interval = wilson(successes, trials)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_narrows():
    one, other = wilson(3, 20), wilson(17, 20)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low))
    widths = [wilson(n // 4, n).high - wilson(n // 4, n).low for n in (20, 200, 2000)]
    assert widths == sorted(widths, reverse=True)
    assert wilson(5, 20, level=0.99).low < wilson(5, 20).low


@pytest.mark.parametrize("counts", [(0, 0), (-1, 5), (6, 5), (1, -1)])
def test_wilson_refuses_impossible_counts(counts: tuple[int, int]):
    with pytest.raises(ValueError, match=rf"successes = {counts[0]} of trials = {counts[1]}"):
        wilson(*counts)


@given(st.sampled_from(sorted(T_975)), st.data())
def test_t_interval_is_mean_plus_minus_t_standard_errors(count: int, data: st.DataObject):
    values = data.draw(st.lists(st.floats(-1e3, 1e3), min_size=count, max_size=count))
    interval = t_interval(values)
    half = T_975[count] * statistics.stdev(values) / math.sqrt(count)
    assert interval.low == pytest.approx(statistics.fmean(values) - half, rel=1e-6, abs=1e-6)
    assert interval.high == pytest.approx(statistics.fmean(values) + half, rel=1e-6, abs=1e-6)
    assert interval.method == f"t over {count} seeds"


def test_an_interval_of_a_share_stays_a_share():
    free, cut = t_interval([0.0, 0.1]), t_interval([0.0, 0.1], within=(0.0, 1.0))
    assert free.low < 0
    assert (cut.low, cut.high) == (0.0, free.high)
    assert t_interval([0.9, 1.0], within=(0.0, 1.0)).high == 1.0


@pytest.mark.parametrize("function", [t_interval, partial(t_interval, log=True)])
def test_one_seed_has_no_interval(function):
    for values in ([], [1.0]):
        with pytest.raises(ValueError, match="needs at least two seeds"):
            function(values)


def test_geometric_interval_is_that_of_the_logarithms():
    values = [0.01, 0.02, 0.05, 0.3, 1.0]
    logs, interval = [math.log(v) for v in values], t_interval(values, log=True)
    middle = math.sqrt(interval.low * interval.high)
    assert middle == pytest.approx(statistics.geometric_mean(values))
    assert interval.high / interval.low == pytest.approx(
        math.exp(2 * T_975[5] * statistics.stdev(logs) / math.sqrt(5))
    )
    scaled = t_interval([10 * v for v in values], log=True)
    assert (scaled.low, scaled.high) == pytest.approx((10 * interval.low, 10 * interval.high))
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"math domain|positive"):
            t_interval([*values, bad], log=True)


def test_bootstrap_is_repeatable_and_refuses_one_value():
    values = np.random.default_rng(0).exponential(size=50)
    one, two = bootstrap_percentile(values, 95), bootstrap_percentile(values.tolist(), 95)
    assert one == two
    assert bootstrap_percentile(values, 50, seed=1) != bootstrap_percentile(values, 50)
    assert values.min() <= one.low <= np.percentile(values, 95) <= one.high <= values.max()
    assert bootstrap_percentile([2.0, 2.0, 2.0], 95).low == 2.0
    with pytest.raises(ValueError, match="a bootstrap needs at least two"):
        bootstrap_percentile([1.0], 95)


def test_bootstrap_of_a_median_has_the_exact_order_statistics():
    """The median of a resample is below k iff more than half the draws are: a binomial count."""
    count = 801
    interval = bootstrap_percentile(np.random.default_rng(3).permutation(count), 50, draws=4000)
    below = stats.binom.sf(count // 2, count, np.arange(1, count + 1) / count)
    exact = np.searchsorted(below, [0.025, 0.975])
    assert np.abs(exact - 400).min() > 25
    assert (interval.low, interval.high) == pytest.approx(tuple(exact), abs=2.5)


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_values_of_a_ratio_have_it_as_their_mean_and_its_variation(seed: int):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 40, (2, 60)).astype(float)
    totals = sizes * rng.normal(2, 0.2, (2, 60))
    values = ratio_values(totals, sizes)
    assert values.mean(axis=1) == pytest.approx(totals.sum(axis=1) / sizes.sum(axis=1))
    replicas = ratio_replicas(totals[0], sizes[0], 4000)
    assert values[0].std() / math.sqrt(60) == pytest.approx(replicas.std(), rel=0.15)
    assert np.ptp(ratio_values(3 * sizes, sizes)) == pytest.approx(0, abs=1e-12)


def coverage(draw, truth: float, runs: int) -> float:
    """Share of simulated data sets whose interval holds the truth."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(runs):
        interval = draw(rng)
        hits += interval.low <= truth <= interval.high
    return hits / runs


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95 % ± 4 standard deviations of the simulation, and the small-sample error of the method."""
    def binomial(rng: np.random.Generator):
        return wilson(int(rng.binomial(60, 0.3)), 60)

    def gaussian(rng: np.random.Generator):
        return t_interval(rng.normal(2.0, 3.0, size=5))

    def lognormal(rng: np.random.Generator):
        return t_interval(rng.lognormal(1.0, 0.7, size=4), log=True)

    def median(rng: np.random.Generator):
        return bootstrap_percentile(rng.normal(size=80), 50, seed=int(rng.integers(1 << 30)),
                                    draws=400)

    assert abs(coverage(binomial, 0.3, 1000) - 0.95) < 0.035
    assert abs(coverage(gaussian, 2.0, 1500) - 0.95) < 0.025
    assert abs(coverage(lognormal, math.e, 1500) - 0.95) < 0.025
    assert abs(coverage(median, 0.0, 500) - 0.95) < 0.045


# --- the hierarchical bootstrap -----------------------------------------------------------------

shares = st.tuples(st.integers(1, 5), st.integers(2, 30), st.integers(0, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, 2, size=drawn[:2]).astype(float))


@given(shares)
@settings(max_examples=50)
def test_an_interval_of_shares_holds_the_share_and_is_never_a_point(values: np.ndarray):
    interval = hierarchical(values, share=True, draws=500)
    assert 0 <= interval.low <= values.mean() <= interval.high <= 1
    if np.ptp(values):
        assert interval.low < interval.high
    else:
        assert interval.high - interval.low > 1 / (values.shape[1] + 4)


def test_equal_shares_count_the_items_and_not_the_seeds():
    expected = wilson(0, 200)
    assert stats.binomtest(0, 200).proportion_ci(method="wilson").high == expected.high
    for values in (np.zeros((5, 200)), np.zeros((1, 200)), np.zeros(200), np.zeros((3, 2, 200))):
        interval = hierarchical(values, share=True)
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
        assert interval.method == "Wilson score over 200 items"
    one = hierarchical(np.arange(20) < 3, share=True)
    assert (one.low, one.high) == pytest.approx((wilson(3, 20).low, wilson(3, 20).high))


def test_the_method_names_what_was_resampled():
    values = np.random.default_rng(0).random((3, 2, 40))
    assert hierarchical(values).method == (
        "hierarchical bootstrap over 2 seeds of 3 bases and 40 items, expanded percentiles")
    assert "over 2 seeds and 40 items" in hierarchical(values[0]).method
    assert "over 2 seeds of 3 bases, expanded" in hierarchical(values[:, :, :1]).method
    assert "over 3 bases and 40 items" in hierarchical(values[:, :1]).method
    assert "over 40 items" in hierarchical(values[0, 0]).method
    assert "all values equal" in hierarchical(np.ones((2, 3))).method


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(ValueError, match="1 of 4 values are not finite: leave out"):
        hierarchical([[0.0, math.nan], [1.0, 1.0]])
    with pytest.raises(ValueError, match="0 of 0 values"):
        hierarchical([])
    with pytest.raises(ValueError, match=r"shares span \[0, 1.5\]"):
        hierarchical([0.0, 1.5], share=True)
    with pytest.raises(ValueError, match="at least two"):
        hierarchical([[3.0]])


@given(shares.filter(lambda values: len(values) > 1), st.integers(0, 100))
@settings(max_examples=30)
def test_names_of_seeds_and_items_do_not_matter(values: np.ndarray, seed: int):
    """A permutation changes the draws and so the ends a little, by less than the draws do."""
    rng = np.random.default_rng(seed)
    one = hierarchical(values, draws=4000)
    moved = hierarchical(
        values[rng.permutation(len(values))][:, rng.permutation(values.shape[1])], draws=4000)
    width = max(one.high - one.low, 1e-12)
    assert abs(one.low - moved.low) <= 0.25 * width
    assert abs(one.high - moved.high) <= 0.25 * width


def test_the_interval_narrows_with_items_only_as_far_as_the_seeds_agree():
    rng = np.random.default_rng(4)

    def width(items: int, spread: float) -> float:
        values = rng.normal(size=items) + spread * np.array([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
        interval = hierarchical(values)
        return interval.high - interval.low

    assert width(900, 0.0) < 0.5 * width(100, 0.0)
    assert width(900, 1.0) > 2.0  # the seeds' own spread stays, however many items


def test_bootstrap_variance_is_that_of_crossed_factors():
    """Owen (2007): V* = var_seeds / S + var_items / I + 1/(SI) of the residual, plus none other."""
    values = np.random.default_rng(5).normal(size=(6, 1)) + np.random.default_rng(6).normal(size=30)
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    expected = rows.var() / 6 + columns.var() / 30  # additive: no residual
    level = 2 * stats.norm.cdf(1) - 1  # ends one standard deviation out, expanded for six seeds
    interval = hierarchical(values, draws=40_000, level=level)
    factor = math.sqrt(6 / 5) * stats.t.ppf((1 + level) / 2, 5)
    assert (interval.high - interval.low) / 2 == pytest.approx(
        factor * math.sqrt(expected), rel=0.03)


@pytest.mark.parametrize(("seeds", "items"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_hierarchical_interval_covers_new_seeds_and_new_items(seeds: float, items: float):
    """Five seeds of a two-level model with noise: 95 % or more, less 2.5 points of simulation and
    of so few seeds; more where the items vary, which the percentiles for five seeds overstate."""
    def two_level(rng: np.random.Generator):
        values = (2.0 + seeds * rng.normal(size=(5, 1)) + items * rng.normal(size=40)
                  + rng.normal(size=(5, 40)))
        return hierarchical(values, draws=2000, seed=int(rng.integers(1 << 30)))

    assert coverage(two_level, 2.0, 600) >= 0.925


def test_the_naive_interval_over_all_answers_does_not():
    """The fault that the bootstrap replaces: 5 × 40 answers taken for 200 independent ones."""
    def naive(rng: np.random.Generator):
        chance = np.clip(0.5 + 0.15 * rng.normal(size=(5, 1)), 0, 1)
        return wilson(int((rng.random((5, 40)) < chance).sum()), 200)

    def ours(rng: np.random.Generator):
        chance = np.clip(0.5 + 0.15 * rng.normal(size=(5, 1)), 0, 1)
        return hierarchical(rng.random((5, 40)) < chance, share=True, draws=2000)

    assert coverage(naive, 0.5, 600) < 0.75
    assert coverage(ours, 0.5, 600) >= 0.925
