"""Confidence intervals for the quantities that the records hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy  # whose parts are loaded when they are used
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval and the method that gave it."""

    low: float
    high: float
    method: str
    level: float = 0.95


def wilson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (E. B. Wilson, JASA 22, 1927)."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"successes = {successes} of trials = {trials}: need 0 <= k <= n, n > 0")
    result = scipy.stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return Interval(float(result.low), float(result.high), "Wilson score", level)


def t_interval(values: Sequence[float], units: str = "seeds", level: float = 0.95,
               within: tuple[float, float] = (-math.inf, math.inf), log: bool = False) -> Interval:
    """Student's t interval of the mean over independent `units`; needs at least two.

    It is cut at the bounds `within` which the quantity lies by definition (0 and 1 for a share).
    log: of the mean logarithm, for positive quantities on a log scale (λ, perplexity).
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} value(s): an interval over {units} needs at least two "
                         f"{units}")
    array = np.asarray([math.log(value) for value in values] if log else values, dtype=float)
    half = float(scipy.stats.t.ppf((1 + level) / 2, len(array) - 1) * scipy.stats.sem(array))
    centre, method = float(array.mean()), f"t over {len(array)} {units}"
    low, high = centre - half, centre + half
    if log:
        low, high, method = math.exp(low), math.exp(high), f"log-{method}"
    return Interval(max(low, within[0]), min(high, within[1]), method, level)


def resamples(count: int, draws: int, seed: int | Sequence[int]) -> NDArray[np.int64]:
    """Indices of `count` units, drawn with replacement in each of `draws` samples [draws, count].
    """
    return np.random.default_rng(seed).integers(0, count, size=(draws, count))


def ratio_replicas(totals: ArrayLike, sizes: ArrayLike, draws: int = 2000,
                   seed: int = 0) -> NDArray[np.float64]:
    """sum(totals) / sum(sizes) of resampled units [draws]: of a quantity per byte, token, ...

    totals and sizes: of each unit [units], which is drawn with both.
    """
    totals, sizes = np.asarray(totals), np.asarray(sizes)
    picks = resamples(len(totals), draws, seed)
    ratios: NDArray[np.float64] = totals[picks].sum(1) / sizes[picks].sum(1)
    return ratios


def ratio_values(totals: ArrayLike, sizes: ArrayLike) -> NDArray[np.float64]:
    """Values [..., items] whose mean over items is sum(totals) / sum(sizes), and varies as that
    ratio does where items are resampled: its linearisation, for :func:`hierarchical`.

    totals and sizes: of each item [..., items]. Items of one rate and unequal sizes have equal
    values; totals divided by the mean size would not.
    """
    totals, sizes = np.asarray(totals, dtype=float), np.asarray(sizes, dtype=float)
    whole = sizes.sum(axis=-1, keepdims=True)
    ratio = totals.sum(axis=-1, keepdims=True) / whole
    values: NDArray[np.float64] = (
        ratio + (totals - ratio * sizes) * totals.shape[-1] / whole)
    return values


def percentiles(replicas: NDArray[np.float64], method: str, units: int = 0) -> Interval:
    """The 95 % interval between percentiles of a bootstrap's `replicas` [draws], expanded for few
    `units` if their number is given (Hesterberg, as in :func:`hierarchical`)."""
    tail = _tail(units, 0.95) if units else 0.025
    low, high = np.quantile(replicas, [tail, 1 - tail])
    return Interval(float(low), float(high), f"{method}, expanded" if units else method)


def _tail(units: int, level: float) -> float:
    """Which percentile of a bootstrap over so many units has the tail of Student's t."""
    quantile = scipy.stats.t.ppf((1 - level) / 2, units - 1)
    return float(scipy.stats.norm.cdf(math.sqrt(units / (units - 1)) * quantile))


def bootstrap_percentile(
    values: Sequence[float] | np.ndarray, percentile: float, seed: int = 0, draws: int = 1000
) -> Interval:
    """Percentile-bootstrap interval of a percentile of independent values."""
    array = np.asarray(values, dtype=float)
    if array.size < 2:
        raise ValueError(f"{array.size} value(s): a bootstrap needs at least two")
    replicas = np.percentile(array[resamples(array.size, draws, seed)], percentile, axis=1)
    return percentiles(replicas, f"percentile bootstrap, {draws} draws")


def hierarchical(values: ArrayLike, *, share: bool = False, draws: int = 10_000, seed: int = 0,
                 level: float = 0.95) -> Interval:
    """Bootstrap interval of the mean over items and over what they were measured under.

    values: float [..., items]. The last axis holds the items, the same under every unit of the
    axes before it, which are nested units, outermost first: [seeds, items], [bases, seeds, items].
    Outer units are resampled with replacement, inner ones within each, and items independently of
    both (the pigeonhole bootstrap of crossed factors: Owen, Annals of Applied Statistics 1, 2007).
    A bootstrap over few units is too narrow, so the percentiles are expanded (Hesterberg, The
    American Statistician 69, 2015) for the number of innermost units, or of items if there is one
    unit. With few seeds that errs on the wide side where the items cause most of the variation.

    share: the values lie in [0, 1]. Then one unit of binary items has Wilson's interval, and
    equal values, which resampling cannot vary, have it over the number of items.
    Raises ValueError for values that are not finite, shares out of range, or nothing to resample.
    """
    array = np.atleast_1d(np.asarray(values, dtype=float))
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are not "
                         "finite: leave out the units or items that were not measured")
    if share and not 0 <= array.min() <= array.max() <= 1:
        raise ValueError(f"shares span [{array.min():g}, {array.max():g}]: expected [0, 1]")
    *sizes, items = array.shape
    names = ([f"level {i}" for i in range(len(sizes) - 2)] + ["bases", "seeds"])[-len(sizes):]
    outer = {name: size for name, size in zip(names, sizes, strict=False) if size > 1}
    mean, units = float(array.mean()), math.prod(sizes)
    equal = bool(np.ptp(array) == 0)
    if share and (equal or (units == 1 and set(np.unique(array)) <= {0.0, 1.0})):
        return _score(mean, items, level)
    if array.size < 2:
        raise ValueError("1 value: a bootstrap needs at least two seeds or items")
    by_item = array.reshape(units, items) @ _item_counts(items, draws, seed).T / items
    means = np.einsum("du,ud->d", _unit_weights(tuple(outer.values()), draws, seed), by_item)
    tail = _tail(units if outer else items, level)
    low, high = (float(end) for end in np.quantile(means, [tail, 1 - tail]))
    within = [f"{size} {name}" for name, size in outer.items()]
    over = " of ".join(within[::-1]), f"{items} items" if items > 1 else ""
    method = (f"hierarchical bootstrap over {' and '.join(filter(None, over))}, expanded "
              "percentiles" + (" (all values equal)" if equal else ""))
    low, high = min(low, mean), max(high, mean)
    if share:
        low, high = max(low, 0.0), min(high, 1.0)
    return Interval(low, high, method, level)


def _score(share: float, trials: int, level: float) -> Interval:
    """Wilson's interval of a share, which need not be a whole number of `trials`."""
    z = float(scipy.stats.norm.ppf((1 + level) / 2))
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials
                                               + z**2 / (4 * trials**2))
    low, high = max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)
    return Interval(low, high, f"Wilson score over {trials} items", level)


def perplexity(nll: ArrayLike, tokens: ArrayLike) -> tuple[float, Interval]:
    """exp of nats per token, where an item counts by its length, and its interval.

    nll and tokens: of each item [..., items], as :func:`hierarchical` resamples them; differences
    of nll give the ratio of two perplexities.
    """
    per_token = ratio_values(nll, tokens)
    found = hierarchical(per_token)
    return math.exp(per_token.mean()), Interval(
        math.exp(found.low), math.exp(found.high), found.method)


@lru_cache(maxsize=8)
def _item_counts(items: int, draws: int, seed: int) -> np.ndarray:
    """How often each item is drawn [draws, items]."""
    picks = resamples(items, draws, [seed, 0]) + items * np.arange(draws)[:, None]
    counts = np.bincount(picks.ravel(), minlength=draws * items)
    return counts.reshape(draws, items).astype(float)


@lru_cache(maxsize=8)
def _unit_weights(sizes: tuple[int, ...], draws: int, seed: int) -> np.ndarray:
    """The weight of each innermost unit [draws, units]; `sizes` of the levels, outermost first."""
    rng, counts = np.random.default_rng([seed, 1]), np.ones((draws, 1), dtype=np.int64)
    for size in sizes:
        counts = rng.multinomial(counts * size, [1 / size] * size).reshape(draws, -1)
    return counts / math.prod(sizes)
