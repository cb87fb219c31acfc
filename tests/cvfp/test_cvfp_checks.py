"""The three checks: known values, one planted fault that each detects and one that it misses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lablog.cvfp import checks
from lablog.cvfp.convergence import Trials
from lablog.cvfp.passes import iterate_passes
from lablog.cvfp.rollout import rollout


def test_effective_rank_of_known_spectra():
    q, _ = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double())
    for values in ([1.0] * 8, [1.0, 0.5, 0.25, 0, 0, 0, 0, 0], [3.0] + [0.0] * 7):
        matrix = q * torch.tensor(values)
        p = [v / sum(values) for v in values if v]
        expected = math.exp(-sum(x * math.log(x) for x in p))
        rank = checks.effective_rank(matrix)
        assert rank.value == pytest.approx(expected, rel=1e-9)
        squares = [v * v for v in values if v]
        p = [v / sum(squares) for v in squares]
        expected = math.exp(-sum(x * math.log(x) for x in p))
        assert rank.energy == pytest.approx(expected, rel=1e-9)
        assert (rank.dimensions, rank.tokens) == (8, 40)


@settings(max_examples=25)
@given(st.integers(2, 60), st.integers(2, 20), st.floats(-5, 5), st.integers(0, 1000))
def test_effective_rank_against_a_full_decomposition(n, d, mean, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + mean
    for centred in (False, True):
        values = torch.linalg.svdvals((x - x.mean(0) if centred else x).double())
        p = values[values > 1e-7 * values[0]] / values.sum()
        rank = checks.effective_rank(x)
        found = rank.centred if centred else rank.value
        assert found == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-4)
        assert 1 - 1e-9 <= found <= min(n, d) + 1e-6


def test_thresholds_of_check_1():
    def rank(value):
        return checks.EffectiveRank(value * 7.68, 0, 0, 0, 768, 1280)

    assert rank(82).verdict("validation") == "pass"
    assert rank(82).verdict("training") == "between"
    assert rank(55.9).verdict("validation") == "between", "the log's adopted baseline"
    assert rank(29.9).verdict("training") == "fail"


def test_check_1_detects_collapse_and_misses_that_nothing_was_learnt(network, embeddings):
    collapsed = torch.randn(1, 12).expand(200, 12)
    assert checks.effective_rank(collapsed).value == pytest.approx(1, abs=1e-3)
    assert checks.effective_rank(collapsed).verdict("training") == "fail"
    assert checks.mean_cosine(collapsed) > 0.99
    untrained = rollout(network(), embeddings(200)).contexts
    assert checks.effective_rank(untrained).fraction > 0.5
    assert checks.mean_cosine(untrained) < 0.99


def test_check_2_detects_pass_through_and_misses_a_constant(embeddings):
    tokens = embeddings(100, 12)
    assert checks.identity_mapping(tokens, tokens).verdict == "fail"
    assert checks.identity_mapping(torch.zeros(100, 12), tokens).verdict == "fail"
    constant = tokens[:1].expand(100, 12)
    assert checks.identity_mapping(constant, tokens).verdict == "pass"
    with pytest.raises(ValueError, match="equal shapes"):
        checks.identity_mapping(tokens, embeddings(100))


def test_check_3_detects_chaos_sequentially_and_misses_it_in_parallel(network, embeddings):
    chaos = {"context_dim": 48, "embed_dim": 46, "weight_std": 0.5}
    block, tokens = network(**chaos), embeddings(150, 46)
    modes = ("sequential", "parallel")
    passes = {mode: iterate_passes(block, tokens, 9, mode, 0.1) for mode in modes}
    sequential = checks.convergence(passes["sequential"].differences)
    assert sequential.verdict == "fail"
    assert sequential.final_diff > 0.1
    assert min(passes["parallel"].converged) >= 149, "one token a pass can change"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([0.5, 0.1, 0.0005], "pass"), ([0.5, 0.1, 0.02], "fail"), ([0.5, 0.1, 0.005], "between"),
     ([0.0001, 0.0002, 0.0005], "between"), ([0.1, 0.0, 0.0], "pass"),
     ([0.5, 2e-11, 3e-11], "pass"), ([0.5, 2e-9, 3e-9], "between")],
)
def test_thresholds_of_check_3(differences, verdict):
    assert checks.convergence(differences).verdict == verdict


def test_checks_refuse_what_they_cannot_measure():
    with pytest.raises(ValueError, match="at least two"):
        checks.convergence([0.1])
    with pytest.raises(FloatingPointError, match="NaN"):
        checks.effective_rank(torch.full((5, 3), float("nan")))
    assert checks.effective_rank(torch.zeros(5, 3)).value == 0


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [([0.5, 0.3, 0.1], "CONVERGING"), ([0.1, 0.1, 0.1], "CONVERGED"),
     ([0.1, 0.3, 0.5], "DIVERGING"), ([0.1, 0.5, 0.1], "UNSTABLE")],
)
def test_convergence_classes(losses, verdict):
    trials = Trials(tuple(losses))
    assert trials.verdict == verdict
    assert "trial 1: loss N/A" in str(trials)


def test_convergence_refuses_nan_and_too_few():
    with pytest.raises(FloatingPointError, match="not finite"):
        Trials((0.1, float("nan")))
    with pytest.raises(ValueError, match="at least 3 trials"):
        Trials((0.1,))
    assert Trials((0.0, 0.0)).reduction is None
