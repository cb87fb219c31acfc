"""Intervals and ratios of the CVFP metrics."""

import math

import numpy as np
import pytest
import torch

from lablog.cvfp import metrics, plots
from lablog.cvfp.convergence import Trials
from lablog.cvfp.lyapunov import batch_means
from lablog.cvfp.passes import Passes
from lablog.cvfp.phase2 import Predictions
from lablog.cvfp.rollout import Rollout, relative_errors


def by_name(found):
    return {metric.name: metric for metric in found}


def predictions(*nll):
    values = torch.tensor(nll)
    return Predictions(values, values < 1)


def test_bootstrap_covers_the_perplexity_and_vanishes_for_equal_dialogues():
    equal = predictions(*[2.0, 1.0] * 50)
    spread = metrics.bootstrap_perplexity(equal, 10, 500, 0)
    assert spread.low == pytest.approx(spread.high) == pytest.approx(math.exp(1.5))
    mixed = Predictions(torch.arange(100.0) / 50, torch.ones(100, dtype=torch.bool))
    spread = metrics.bootstrap_perplexity(mixed, 10, 500, 0)
    assert spread.low < mixed.perplexity < spread.high
    assert spread.method == "bootstrap over 10 dialogues, expanded"


def test_the_perplexity_of_few_dialogues_is_covered():
    """A plain percentile interval over six dialogues holds the truth in 85 to 88 %."""
    rng, hits = np.random.default_rng(5), 0
    for _ in range(400):
        nll = torch.tensor(rng.normal(2, 0.3, 6)).repeat_interleave(4)
        spread = metrics.bootstrap_perplexity(Predictions(nll, nll < 1), 4, 400)
        hits += spread.low <= math.exp(2) <= spread.high
    assert hits > 0.92 * 400


def test_ratio_is_paired_over_tokens():
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0))
    ours = Predictions(5 + noise, noise > 0)
    other = Predictions(5 + noise + math.log(2), noise > 0)
    metric = metrics.perplexity_ratio("other.over_ours.test", other, ours, 10)
    assert metric.value == pytest.approx(2)
    low, high = metric.interval
    assert high - low < 1e-6, "the noise is the same on both sides"


def test_ratio_over_seeds_is_the_geometric_mean_and_as_wide_as_seeds_differ():
    noise = torch.randn(95, generator=torch.Generator().manual_seed(0))
    ours = [Predictions(5 + noise, noise > 0)] * 3
    factors = (2.0, 2.2, 1.8)
    others = [Predictions(5 + noise + math.log(factor), noise > 0) for factor in factors]
    metric = metrics.perplexity_ratio_over_seeds("a.seeds.over_b.test", others, ours, 10, (1, 2, 3))
    assert metric.value == pytest.approx(math.prod(factors) ** (1 / 3))
    low, high = metric.interval
    assert low == pytest.approx(1.8)
    assert high == pytest.approx(2.2)
    assert metric.seeds == (1, 2, 3)
    assert metric.interval_method == (
        "hierarchical bootstrap over 3 seeds and 10 dialogues, expanded percentiles")
    alone = metrics.perplexity_ratio_over_seeds("x", others[:1], ours[:1], 10, (1,))
    assert alone.value == pytest.approx(2)


def test_memory_over_seeds_is_undefined_where_one_never_forgets():
    soon, late, never = (torch.where(torch.arange(9)[:, None] <= last, 1.0, 0.0).repeat(1, 3)
                         for last in (2, 4, 9))
    metric = metrics.memory_over_seeds("true_pass", [soon, late], 0.01, (1, 2))
    assert (metric.name, metric.value, metric.seeds) == ("true_pass.memory_length", 3, (1, 2))
    assert metric.interval is not None
    metric = metrics.memory_over_seeds("parallel", [soon, never], 0.01, (1, 2))
    assert metric.value is None
    assert metric.undefined == "above 0.01 to the end, 8 tokens, in 1 of 2 seeds"


def test_batch_means_need_two_values_a_batch():
    assert batch_means(torch.ones(15)) is None
    spread = batch_means(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert spread.low < 0.05
    assert spread.high > -0.05
    assert spread.method == "t over 10 batch means"


def test_check_3_lets_a_constant_through():
    found = by_name(metrics.check_3(Passes.unchanged(torch.ones(5, 3), 3)))
    assert {name: metric.value for name, metric in found.items()} == {
        "convergence": 1, "final_diff": 0, "check3": "pass"}


def test_checks_1_and_2_say_the_same_in_the_record_and_in_the_table():
    contexts = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    spread = metrics.Spread.of(contexts, contexts, "training")
    found, row = by_name(spread.metrics), spread.row
    assert row["share"] == found["effective_rank"].value == row["effective rank"] / 4
    assert found["effective_rank_centred"].numerator == row["centred"]
    assert (row["check 1"], row["check 2"]) == ("pass", "fail"), "embeddings, handed through"
    assert (found["check1"].value, found["check2"].value) == ("pass", "fail")
    assert {metric.n for metric in found.values()} == {row["tokens"]} == {50}


def test_relative_errors_are_per_context():
    exact = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    errors = relative_errors(exact + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), exact)
    assert errors.tolist() == pytest.approx([0.1, 0.0])


def test_memory_beyond_the_curve_is_undefined_and_not_a_number():
    curve = torch.tensor([[1.0, 1.0], [0.5, 0.3], [0.001, 0.003]])
    forgets, keeps = (by_name(metrics.memory(part, 0.01)) for part in (curve, curve[:2]))
    length = forgets["memory_length"]
    assert (length.value, length.n, length.undefined) == (1, 2, None)
    length = keeps["memory_length"]
    assert (length.value, length.undefined) == (None, "above 0.01 to the end, 1 tokens")
    assert keeps["memory_at_end"].value == pytest.approx(0.3)


def test_exponent_trials_and_rollout_are_what_was_measured():
    (exponent,) = metrics.exponent(torch.tensor([1.0, 3.0]).repeat(20))
    assert (exponent.value, exponent.interval) == (2, (2, 2)), "all batches have one mean"
    assert metrics.exponent(torch.ones(5))[0].interval is None
    trials = Trials((0.5, 0.3, 0.1))
    assert by_name(metrics.trials(trials))["trials.class"].value == trials.verdict == "CONVERGING"
    exact = torch.ones(4, 3)
    found = Rollout(1.1 * exact, "jacobi", passes=2.5, sequential_tokens=0)
    found.contexts[0] *= 2
    told = by_name(metrics.accuracy_of(found, exact))
    assert told["error"].value == pytest.approx(1.2)
    assert told["error_median"].value == pytest.approx(0.1)
    assert (told["passes"].value, told["loop_tokens"].value) == (2.5, 0)


@pytest.mark.parametrize(("network", "words"), [
    ("w0.9.seed42", "parallel passes, w = 0.9, seed 42"),
    ("true.w0.01.seed7", "true passes, w = 0.01, seed 7"),
    ("untrained.seed42, validation, frozen", "untrained, seed 42, validation, frozen"),
    ("w0.9.seed42, validation, frozen", "parallel passes, w = 0.9, seed 42, validation, frozen"),
    ("v2.0", "v2.0"), ("zeros.seed43", "zeros.seed43"),
])
def test_figures_call_networks_by_words(network: str, words: str):
    assert plots.called(network) == words
