"""Is one configuration better than another on the same items, among many that are asked?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def p_greater(differences: ArrayLike) -> float:
    """One-sided p-value of "the mean difference is above 0" for new seeds and new items.

    differences: float [seeds, items], paired: the same items under every seed. Seeds and items
    are crossed random factors, so the variance of the mean is estimated from the mean squares of
    both, (MS_seeds + MS_items - MS_rest) / (seeds · items), and its degrees of freedom are
    Satterthwaite's (the quasi-F test: Clark, Journal of Verbal Learning and Verbal Behavior 12,
    1973). It is taken no smaller than either factor alone implies. A test over the seeds alone
    could never pass a correction for many comparisons: five signs have p = 1/32 at best. A
    bootstrap over five seeds could always: no resample of five positive means is negative.

    Differences that do not vary have no variance to divide by: p = 1 if they are not above 0;
    else one of them counts as 0, so that all improving is no weaker than all but one. With one
    seed the test is Student's over the items, and speaks of that seed only.
    Raises ValueError for fewer than two items or values that are not finite.
    """
    array = np.asarray(differences, dtype=float)
    if array.ndim != 2 or not len(array) or array.shape[1] < 2 or not np.isfinite(array).all():
        raise ValueError(f"differences of shape {array.shape}: expected finite values [seeds, "
                         "items] of at least two items")
    seeds, items = array.shape
    if np.ptp(array) == 0:
        if array[0, 0] <= 0:
            return 1.0
        array = array.copy()
        array[0, 0] = 0
    mean = float(array.mean())
    if seeds == 1:
        return float(stats.ttest_1samp(array[0], 0, alternative="greater").pvalue)
    rows, columns = array.mean(axis=1), array.mean(axis=0)
    rest = array - rows[:, None] - columns + mean
    by_seed, by_item = items * rows.var(ddof=1), seeds * columns.var(ddof=1)
    remainder = float((rest**2).sum() / ((seeds - 1) * (items - 1)))
    total = max(by_seed + by_item - remainder, by_seed, by_item)
    freedom = total**2 / (
        by_seed**2 / (seeds - 1) + by_item**2 / (items - 1)
        + remainder**2 / ((seeds - 1) * (items - 1))
    )
    return float(stats.t.sf(mean / np.sqrt(total / array.size), max(freedom, 1.0)))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979), in the order given.

    Calling those below α significant keeps the chance of a single false one below α, whatever
    the dependence between the tests.
    """
    values = np.asarray(p_values, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values {values[~((values >= 0) & (values <= 1))]}: expected [0, 1]")
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
