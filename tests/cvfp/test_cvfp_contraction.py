"""What is measured behind every pass of a training: it is right, and it changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lablog.cvfp.contraction import ContractionObserver, contraction_of, spectral_norm
from lablog.cvfp.phase1 import train

VARIANTS = ("parallel", "sequential", "true_pass")


def weights(block):
    return torch.nn.utils.parameters_to_vector(block.parameters()).detach()


def watching(tokens):
    return ContractionObserver(tokens, distance=8, changed=4, seed=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_observing_changes_no_weight(network, embeddings, phase1, variant):
    tokens, config = embeddings(30), replace(phase1, variant=variant)
    alone, watched = network(), network()
    train(alone, tokens, config)
    result = train(watched, tokens, config, observe=watching(tokens))
    assert torch.equal(weights(alone), weights(watched))
    assert len(result.observed) == len(result.history)


def test_observations_survive_an_interruption(network, embeddings, phase1, tmp_path):
    tokens, watch = embeddings(30), watching(embeddings(30))
    whole = train(network(), tokens, phase1, observe=watch)
    seen = []

    class Stops:
        key = watch.key

        def __call__(self, block):
            seen.append(block)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return watch(block)

    path = tmp_path / "phase1.pt"
    with pytest.raises(KeyboardInterrupt):
        train(network(), tokens, phase1, path, observe=Stops())
    went_on = train(network(), tokens, phase1, path, observe=watch)
    assert went_on.observed == whole.observed
    assert went_on.history == whole.history
    assert train(network(), tokens, phase1, path).observed == whole.observed


def test_a_training_that_nobody_watched_is_done_again_when_asked(
    network, embeddings, phase1, tmp_path
):
    tokens, path = embeddings(30), tmp_path / "phase1.pt"
    first, again = network(), network()
    train(first, tokens, phase1, path)
    result = train(again, tokens, phase1, path, observe=watching(tokens))
    assert len(result.observed) == len(result.history)
    assert torch.equal(weights(first), weights(again))


def test_a_training_that_went_on_unwatched_counts_as_unwatched(
    network, embeddings, phase1, tmp_path
):
    tokens, path, watch = embeddings(30), tmp_path / "phase1.pt", watching(embeddings(30))
    calls = []

    class Stops:
        key = watch.key

        def __call__(self, block):
            calls.append(block)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return watch(block)

    with pytest.raises(KeyboardInterrupt):
        train(network(), tokens, phase1, path, observe=Stops())
    train(network(), tokens, phase1, path)
    found = train(network(), tokens, phase1, path, observe=watch)
    assert len(found.observed) == len(found.history)
    assert found.observed == train(network(), tokens, phase1, observe=watch).observed


def test_what_another_has_measured_is_not_taken_for_ones_own(
    network, embeddings, phase1, tmp_path
):
    tokens, path = embeddings(30), tmp_path / "phase1.pt"
    near, far = (ContractionObserver(tokens, distance, 4, 3) for distance in (2, 8))
    train(network(), tokens, phase1, path, observe=near)
    found = train(network(), tokens, phase1, path, observe=far)
    assert found.observed == train(network(), tokens, phase1, observe=far).observed
    assert near.key != far.key


def test_the_spectral_norm_is_what_a_layer_does_to_a_context_at_most(network):
    block = network()
    width = block.config.context_dim
    largest = 0.0
    for layer in block.stack:
        matrix = layer.linear.weight.detach().numpy()[:width, :width]
        largest = max(largest, np.sqrt(np.linalg.eigvalsh(matrix.T @ matrix).max()))
    assert spectral_norm(block) == pytest.approx(largest, rel=1e-10)
    with torch.no_grad():
        for layer in block.stack:
            layer.linear.weight[:width, :width] = 0
            layer.linear.weight[0, 1] = 7
    assert spectral_norm(block) == pytest.approx(7)


def test_true_passes_learn_to_contract(network, embeddings, phase1):
    """The exponent falls below zero and the changed token is forgotten sooner."""
    tokens = embeddings(60)
    config = replace(phase1, variant="true_pass", diversity_weight=0.01, iterations=30,
                     learning_rate=0.02, early_stop_from=30)
    block = network(weight_std=0.6)
    before = contraction_of(block, tokens, 10, 5, 3)
    observed = train(block, tokens, config, observe=ContractionObserver(tokens, 10, 5, 3)).observed
    assert before.exponent > observed[-1]["exponent"]
    assert observed[-1]["exponent"] < 0


def test_a_text_too_short_for_the_distance_is_refused(network, embeddings):
    with pytest.raises(ValueError, match="leave the text of 8 tokens"):
        contraction_of(network(), embeddings(8), 10, 3, 0)
