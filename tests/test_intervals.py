"""Intervals against independent computations and against what they promise: coverage."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lablog.intervals import bootstrap_percentile, geometric_over_seeds, over_seeds, wilson

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
    interval = over_seeds(values)
    half = T_975[count] * statistics.stdev(values) / math.sqrt(count)
    assert interval.low == pytest.approx(statistics.fmean(values) - half, rel=1e-6, abs=1e-6)
    assert interval.high == pytest.approx(statistics.fmean(values) + half, rel=1e-6, abs=1e-6)
    assert interval.method == f"t over {count} seeds"


def test_an_interval_of_a_share_stays_a_share():
    free, cut = over_seeds([0.0, 0.1]), over_seeds([0.0, 0.1], within=(0.0, 1.0))
    assert free.low < 0
    assert (cut.low, cut.high) == (0.0, free.high)
    assert over_seeds([0.9, 1.0], within=(0.0, 1.0)).high == 1.0


@pytest.mark.parametrize("function", [over_seeds, geometric_over_seeds])
def test_one_seed_has_no_interval(function):
    for values in ([], [1.0]):
        with pytest.raises(ValueError, match="needs at least two seeds"):
            function(values)


def test_geometric_interval_is_that_of_the_logarithms():
    values = [0.01, 0.02, 0.05, 0.3, 1.0]
    logs, interval = [math.log(v) for v in values], geometric_over_seeds(values)
    middle = math.sqrt(interval.low * interval.high)
    assert middle == pytest.approx(statistics.geometric_mean(values))
    assert interval.high / interval.low == pytest.approx(
        math.exp(2 * T_975[5] * statistics.stdev(logs) / math.sqrt(5))
    )
    scaled = geometric_over_seeds([10 * v for v in values])
    assert (scaled.low, scaled.high) == pytest.approx((10 * interval.low, 10 * interval.high))
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"math domain|positive"):
            geometric_over_seeds([*values, bad])


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
        return over_seeds(rng.normal(2.0, 3.0, size=5))

    def lognormal(rng: np.random.Generator):
        return geometric_over_seeds(rng.lognormal(1.0, 0.7, size=4))

    def median(rng: np.random.Generator):
        return bootstrap_percentile(rng.normal(size=80), 50, seed=int(rng.integers(1 << 30)),
                                    draws=400)

    assert abs(coverage(binomial, 0.3, 1000) - 0.95) < 0.035
    assert abs(coverage(gaussian, 2.0, 1500) - 0.95) < 0.025
    assert abs(coverage(lognormal, math.e, 1500) - 0.95) < 0.025
    assert abs(coverage(median, 0.0, 500) - 0.95) < 0.045
