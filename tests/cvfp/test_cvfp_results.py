"""Intervals and ratios of the CVFP results."""

import math

import pytest
import torch

from lablog.cvfp import results
from lablog.cvfp.passes import Passes
from lablog.cvfp.phase2 import Predictions
from lablog.cvfp.rollout import Rollout, relative_errors


class Recorder:
    """Keeps what would go into the record."""

    def __init__(self):
        self.metrics = {}

    def metric(self, name, value, unit, **details):
        self.metrics[name] = (value, details)


def predictions(*nll):
    values = torch.tensor(nll)
    return Predictions(values, values < 1)


def test_bootstrap_covers_the_perplexity_and_vanishes_for_equal_dialogues():
    equal = predictions(*[2.0, 1.0] * 50)
    spread = results.bootstrap_perplexity(equal, 10, 500, 0)
    assert spread.low == pytest.approx(spread.high) == pytest.approx(math.exp(1.5))
    mixed = Predictions(torch.arange(100.0) / 50, torch.ones(100, dtype=torch.bool))
    spread = results.bootstrap_perplexity(mixed, 10, 500, 0)
    assert spread.low < mixed.perplexity < spread.high
    assert spread.method == "bootstrap over 10 dialogues"


def test_ratio_is_paired_over_tokens():
    run, noise = Recorder(), torch.randn(100, generator=torch.Generator().manual_seed(0))
    ours = Predictions(5 + noise, noise > 0)
    other = Predictions(5 + noise + math.log(2), noise > 0)
    row = results.record_ratio(run, "other.over_ours.test", other, ours, 10)
    assert row["ratio"] == pytest.approx(2)
    assert row["high"] - row["low"] < 1e-6, "the noise is the same on both sides"


def test_means_over_seeds_and_batches():
    run = Recorder()
    results.record_mean(run, "a", [1.0, 4.0], "", [1, 2], log=True)
    results.record_mean(run, "b", [1.0, 3.0], "", [1, 2])
    results.record_mean(run, "c", [1.0], "", [1])
    assert run.metrics["a"][0] == pytest.approx(2)
    assert run.metrics["b"][0] == 2
    assert run.metrics["c"][1]["interval"] is None
    assert results.batch_means(torch.ones(15)) is None
    spread = results.batch_means(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert spread.low < 0.05
    assert spread.high > -0.05


def test_check_3_lets_a_constant_through():
    run, contexts = Recorder(), torch.ones(5, 3)
    row = results.record_passes(run, "constant", Passes.unchanged(contexts, 3))
    assert (row["final_diff"], row["converged"], row["check 3"]) == (0, 1, "pass")


def test_relative_errors_are_per_context():
    exact = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    errors = relative_errors(exact + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), exact)
    assert errors.tolist() == pytest.approx([0.1, 0.0])


def test_memory_beyond_the_curve_is_undefined_and_not_a_number():
    run, curve = Recorder(), torch.tensor([[1.0, 1.0], [0.5, 0.3], [0.001, 0.003]])
    results.record_memory(run, "forgets", curve, 0.01)
    results.record_memory(run, "keeps", curve[:2], 0.01)
    assert run.metrics["forgets.memory_length"] == (1, {"n": 2, "undefined": None})
    length, details = run.metrics["keeps.memory_length"]
    assert (length, details["undefined"]) == (None, "above 0.01 to the end, 1 tokens")
    assert run.metrics["keeps.memory_at_end"][0] == pytest.approx(0.3)


def test_exponent_trials_and_rollout_are_recorded_as_their_rows_say():
    run = Recorder()
    row = results.record_exponent(run, "a", torch.tensor([1.0, 3.0]).repeat(20))
    assert row["exponent"] == run.metrics["a.lyapunov"][0] == 2
    assert row["low"] == row["high"] == 2, "all batches have one mean"
    assert results.record_exponent(run, "b", torch.ones(5))["low"] is None
    trials = results.record_trials(run, "a", [0.5, 0.3, 0.1])
    assert run.metrics["a.trials.class"][0] == trials.verdict == "CONVERGING"
    exact = torch.ones(4, 3)
    found = Rollout(1.1 * exact, "jacobi", passes=2.5, sequential_tokens=0)
    row = results.record_rollout(run, "a.rollout", found, exact)
    assert row["largest error"] == run.metrics["a.rollout.error"][0] == pytest.approx(0.1)
    assert (row["passes"], row["fell back"]) == (2.5, False)
