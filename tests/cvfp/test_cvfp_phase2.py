"""Phase 2: where gradients may flow, early stopping, baselines."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lablog.cvfp import phase2 as p2
from lablog.cvfp.rollout import rollout


@pytest.fixture
def text(network, embeddings):
    tokens = embeddings(10)
    contexts = rollout(network(1), tokens).contexts
    return p2.FixedText(torch.tensor([1, 4, 2, 2, 0, 6, 5, 3, 1, 1]), tokens, contexts)


def test_no_gradient_through_fixed_contexts_or_context_out(network, phase2, text):
    """v2.0: exactly zero into C* from the block, and into the last layer's context half."""
    model = p2.Phase2Model(network(), 7, phase2).double()
    contexts = text.contexts.clone().requires_grad_()
    batch = p2.FixedText(text.ids, text.tokens, contexts).inputs()
    loss, _, _ = p2.phase2_loss(model, batch, phase2.context_weight)
    assert not batch[0].requires_grad
    assert not batch[2].requires_grad
    loss.backward()
    assert contexts.grad is None, "C* is a constant whatever the caller passes"
    last = model.block.stack[-1]
    assert last.context_norm.weight.grad is None, "context_out has no reader"
    assert torch.count_nonzero(last.linear.weight.grad[:12]) == 0
    assert torch.count_nonzero(last.linear.weight.grad[12:]) > 0
    assert last.token_norm.weight.grad.abs().sum() > 0


def test_soft_variant_does_train_context_out(network, phase2, text):
    config = replace(phase2, version="v1.0")
    model = p2.Phase2Model(network(), 7, config).double()
    p2.phase2_loss(model, text.inputs(), config.context_weight)[0].backward()
    last = model.block.stack[-1]
    assert last.context_norm.weight.grad.abs().sum() > 0
    assert torch.count_nonzero(last.linear.weight.grad[:12]) > 0


def test_first_token_starts_from_zero(text):
    before, token, fixed, target = text.inputs()
    assert not before[0].any()
    assert torch.equal(before[1:], text.contexts[:-2])
    assert torch.equal(fixed, text.contexts[:-1])
    assert torch.equal(target, text.ids[1:])
    assert len(token) == 9


def test_training_lowers_loss_stops_early_and_keeps_the_best(network, phase2, text):
    single = p2.FixedText(text.ids, text.tokens.float(), text.contexts.float())
    other = p2.FixedText(single.ids.flip(0), single.tokens, single.contexts)
    config = replace(phase2, epochs=60, patience=2)
    block = network(dtype=torch.float32)
    start = {k: v.clone() for k, v in block.state_dict().items()}
    result = p2.train_phase2(block, 7, single, other, config)
    assert all(torch.equal(start[k], v) for k, v in block.state_dict().items()), "a copy trains"
    assert result.history[-1].train_perplexity < result.history[0].train_perplexity
    assert result.history[-1].epoch - result.best.epoch == 2 < 60
    best = p2.predict(result.model, other)
    assert best.perplexity == result.best.watched_perplexity
    assert result.best == min(result.history, key=lambda e: e.watched_perplexity)
    again = p2.train_phase2(network(dtype=torch.float32), 7, single, other, config)
    assert again.history == result.history


def test_ngram_baselines_are_distributions_and_known_values():
    training = [0, 1, 0, 1, 0, 2]
    for model in (p2.unigram, p2.bigram):
        total = sum(
            math.exp(-float(model(training, [first, second], 4).nll[0]))
            for second in range(4) for first in [0]
        )
        assert total == pytest.approx(1, abs=1e-6)
    uni = [4 / 10, 3 / 10, 2 / 10, 1 / 10]
    assert float(p2.unigram(training, [0, 3], 4).nll[0]) == pytest.approx(-math.log(uni[3]))
    # After 0: seen 3 times, 2 kinds; p(1|0) = (2 + 2 * 0.3) / (3 + 2).
    assert float(p2.bigram(training, [0, 1], 4).nll[0]) == pytest.approx(-math.log(2.6 / 5))
    # An unseen history falls back to the unigram.
    assert float(p2.bigram(training, [3, 0], 4).nll[0]) == pytest.approx(-math.log(uni[0]))
    assert p2.bigram(training, [0, 1, 0, 1], 4).accuracy == 1.0


@given(st.integers(2, 9).flatmap(lambda size: st.tuples(st.just(size), *(
    st.lists(st.integers(0, size - 1), min_size=2, max_size=40) for _ in range(2)))))
def test_bigrams_are_those_that_counting_one_by_one_gives(drawn):
    """Whichever tokens the text asks for, and whether training ever saw them."""
    size, training, text = drawn
    single = [(training.count(token) + 1) / (len(training) + size) for token in range(size)]
    pairs = list(pairwise(training))
    for (before, after), nll in zip(pairwise(text), p2.bigram(training, text, size).nll,
                                    strict=True):
        followers = [second for first, second in pairs if first == before]
        kinds = max(len(set(followers)), 1)
        p = (followers.count(after) + kinds * single[after]) / (len(followers) + kinds)
        assert float(nll) == pytest.approx(-math.log(p), rel=1e-6)


def test_window_holds_the_last_tokens_only():
    table = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 1, 4, 1, 5, 8, 2, 6])
    window = p2.window_contexts(table, ids, 12, 3, ids)
    assert window.shape == (8, 12)
    assert torch.equal(window[3, :4], window[1, :4]), "both are token 1"
    assert torch.equal(window[5, 4:8], window[4, :4])
    assert torch.equal(window[5, 8:], window[3, :4])
    assert not window[0, 4:].any()
    changed = ids.clone()
    changed[2] = 0
    same = (p2.window_contexts(table, changed, 12, 3, ids) == window).all(1)
    assert same.tolist() == [True, True, False, False, False, True, True, True]


def test_window_has_the_same_numbers_for_a_token_in_every_text():
    """Else what reads them on one text could not on another: a head, or a linear map."""
    table = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    known, other = torch.arange(20), torch.arange(39, 5, -1)
    of_known, of_other = (p2.window_contexts(table, ids, 12, 3, known) for ids in (known, other))
    for token in range(6, 20):
        assert torch.equal(of_known[token, :4], of_other[39 - token, :4])


def test_shapes_of_predictions(network, phase2, text):
    single = p2.FixedText(text.ids, text.tokens.float(), text.contexts.float())
    model = p2.Phase2Model(network(dtype=torch.float32), 7, phase2)
    whole, parts = p2.predict(model, single), p2.predict(model, single, rows=2)
    assert whole.nll.shape == (9,)
    assert torch.allclose(whole.nll, parts.nll, atol=1e-6)
    assert 0 <= whole.accuracy <= 1


def test_the_rate_is_the_one_that_the_watched_text_likes_best(network, phase2, text):
    single = p2.FixedText(text.ids, text.tokens.float(), text.contexts.float())
    other = p2.FixedText(single.ids.flip(0), single.tokens, single.contexts)
    block, rates = network(dtype=torch.float32), [1e-6, 1e-2, 1e3]
    alone = [p2.train_phase2(block, 7, single, other, replace(phase2, learning_rate=rate))
             for rate in rates]
    found = p2.train_at_best_rate(block, 7, single, other, phase2, rates)
    expected = min(alone, key=lambda result: result.best.watched_perplexity)
    assert found.config.learning_rate == expected.config.learning_rate
    assert found.history == expected.history


def test_no_rate_is_an_error(network, phase2, text):
    with pytest.raises(ValueError, match="rates is empty"):
        p2.train_at_best_rate(network(), 7, text, text, phase2, [])


def test_a_rate_that_explodes_is_passed_over_unless_it_is_the_only_one(
    network, phase2, text, monkeypatch
):
    train = p2.train_phase2

    def explodes(block, vocabulary, training, watched, config, label, progress):
        if config.learning_rate > 1:
            raise FloatingPointError("loss nan")
        return train(block, vocabulary, training, watched, config, label, progress)

    monkeypatch.setattr(p2, "train_phase2", explodes)
    single = p2.FixedText(text.ids, text.tokens.float(), text.contexts.float())
    block = network(dtype=torch.float32)
    found = p2.train_at_best_rate(block, 7, single, single, phase2, [5.0, 1e-3])
    assert found.config.learning_rate == 1e-3
    with pytest.raises(FloatingPointError, match="loss nan"):
        p2.train_at_best_rate(block, 7, single, single, phase2, [5.0])


def test_the_embeddings_norm_is_trained_only_when_asked(network, phase2, text):
    """It starts as the frozen one, to the last bit, and then moves."""
    single = p2.FixedText(text.ids, text.tokens.float(), text.contexts.float())
    block = network(dtype=torch.float32)
    config = replace(phase2, train_norm=True)
    frozen, free = p2.Phase2Model(block, 7, phase2), p2.Phase2Model(block, 7, config)
    assert torch.equal(p2.predict(frozen, single).nll, p2.predict(free, single).nll)
    assert not hasattr(frozen, "gain")
    trained = p2.train_phase2(block, 7, single, single, config).model
    assert (trained.gain - 1).abs().max() > 0
    assert trained.bias.abs().max() > 0
