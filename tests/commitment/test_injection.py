"""The commitment in the engine: exactness, isolation, parity with PyTorch, refusals."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lablog.commitment import sampler
from lablog.commitment.torch_injection import injected
from lablog.models.llama_cpp import Commitment, Context

TOKENS = [1, *range(260, 290)]


def logits(context, tokens=TOKENS):
    context.clear()
    return context.prefill({0: tokens}, "all")[0]


def direction(model, seed=7):
    return sampler.sample(seed, 16, model.width).direction


def torch_logits(torch_model, commitment=None):
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        if commitment is None:
            return torch_model(ids).logits[0].numpy()
        addition = commitment.strength * torch.from_numpy(commitment.direction)
        with injected(torch_model, addition, commitment.layers):
            return torch_model(ids).logits[0].numpy()


@pytest.mark.parametrize("strength", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("layers", [(0, 5), (0, 0), (4, 5), (2, 2)])
def test_hooks_in_pytorch_inject_what_the_patch_injects(
    model, context, torch_model, strength, layers
):
    commitment = Commitment(direction(model), strength, layers)
    context.commit(commitment)
    ours, reference = logits(context), torch_logits(torch_model, commitment)
    assert np.abs(ours - reference).max() <= 2e-3
    assert np.abs(reference - torch_logits(torch_model)).max() > 2e-3  # it does something


def test_zero_and_cleared_are_bit_identical_to_never_set(model, context):
    untouched = logits(context)
    context.commit(Commitment(direction(model), 0.0, (0, 5)))
    np.testing.assert_array_equal(logits(context), untouched)
    context.commit(Commitment(direction(model), 0.5, (0, 5)))
    assert not np.array_equal(logits(context), untouched)
    context.commit(None)
    np.testing.assert_array_equal(logits(context), untouched)


def test_strength_range_and_direction_take_effect_on_the_next_decode(model, context):
    one, other = direction(model, 1), direction(model, 2)
    sequence = [Commitment(one, 0.5, (0, 5)), Commitment(one, 1.0, (0, 5)),
                Commitment(one, 1.0, (2, 3)), Commitment(one, 0.0, (2, 3)),
                Commitment(other, 1.0, (2, 3)), Commitment(one, 0.5, (0, 5))]
    seen = []
    for commitment in sequence:
        context.commit(commitment)
        seen.append(logits(context))
        with Context(model, 1, 256) as fresh:
            fresh.commit(commitment)
            np.testing.assert_array_equal(seen[-1], logits(fresh))
    np.testing.assert_array_equal(seen[0], seen[-1])
    assert len({array.tobytes() for array in seen}) == len(seen) - 1


def test_contexts_do_not_see_each_others_commitments_also_from_threads(model):
    commitments = [Commitment(direction(model, seed), 0.5, (0, 5)) for seed in (1, 2)] + [None]

    def alone(commitment):
        with Context(model, 1, 256) as context:
            context.commit(commitment)
            return [logits(context) for _ in range(5)]

    expected = [alone(commitment) for commitment in commitments]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            for mine, theirs in zip(pool.map(alone, commitments), expected, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_positions_before_the_commitment_keep_their_values(model, context, torch_model):
    """A commitment set in the middle colours only what is decoded from then on."""
    context.prefill({0: TOKENS[:10]})
    context.commit(Commitment(direction(model), 0.5, (0, 5)))
    late = context.prefill({0: TOKENS}, "all")[0]

    addition = torch.zeros(1, len(TOKENS), model.width)
    addition[:, 10:] = 0.5 * torch.from_numpy(direction(model))
    with torch.inference_mode(), injected(torch_model, addition, (0, 5)):
        reference = torch_model(torch.tensor([TOKENS])).logits[0, 10:].numpy()
    assert np.abs(late - reference).max() <= 2e-3


@pytest.mark.parametrize(
    ("strength", "layers", "width"),
    [(math.nan, (0, 5), 64), (math.inf, (0, 5), 64), (0.1, (3, 2), 64), (0.1, (0, 6), 64),
     (0.1, (-1, 2), 64), (0.1, (0, 5), 63), (0.1, (0, 5), 128)],
)
def test_a_refused_commitment_says_why_and_changes_nothing(
    model, context, strength, layers, width
):
    context.commit(Commitment(direction(model), 0.2, (1, 4)))
    before = logits(context)
    with pytest.raises(ValueError, match="commitment refused"):
        context.commit(Commitment(np.ones(width, np.float32), strength, layers))
    np.testing.assert_array_equal(logits(context), before)


def test_a_direction_that_is_not_finite_is_refused(context, model):
    broken = direction(model).copy()
    broken[3] = np.nan
    with pytest.raises(ValueError, match=r"NaN|finite"):
        context.commit(Commitment(broken, 0.1, (0, 5)))


def test_hooks_refuse_layers_that_the_model_lacks(torch_model):
    with pytest.raises(ValueError, match="layers 0 to 5"), injected(
        torch_model, torch.zeros(64), (0, 6)
    ):
        pass


@settings(max_examples=20)
@given(st.integers(0, 2**64 - 1), st.integers(1, 200), st.integers(1, 200))
def test_the_sampler_is_a_pure_function_and_multiplies_right(seed, k, d):
    one, two = sampler.sample(seed, k, d), sampler.sample(seed, k, d)
    np.testing.assert_array_equal(one.direction, two.direction)
    np.testing.assert_array_equal(one.z, sampler.sample(seed, k, d + 1).z)
    exact = one.projection.astype(np.float64) @ one.z.astype(np.float64)
    np.testing.assert_allclose(one.direction, exact, rtol=1e-6, atol=1e-7)


def test_sampled_moments_are_those_of_the_log():
    drawn = [sampler.sample(seed, 64, 512) for seed in range(40)]
    z = np.concatenate([sample.z for sample in drawn])
    weights = np.concatenate([sample.projection.ravel() for sample in drawn])
    assert abs(z.mean()) < 5 / np.sqrt(64 * z.size)
    assert z.var() * 64 == pytest.approx(1, abs=5 * np.sqrt(2 / z.size))
    assert weights.var() * (64 + 512) / 2 == pytest.approx(1, abs=5 * np.sqrt(2 / weights.size))
    squared = np.mean([sample.norm**2 for sample in drawn])
    assert squared == pytest.approx(2 * 512 / (512 + 64), rel=0.15)


@pytest.mark.parametrize(("seed", "k", "d"), [(1, 0, 64), (1, -3, 64), (1, 64, 0), (-1, 64, 64)])
def test_impossible_samples_are_refused(seed, k, d):
    with pytest.raises(ValueError, match=r"k|d|seed"):
        sampler.sample(seed, k, d)
