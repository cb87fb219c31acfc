"""The library against the slow per-token float64 reference."""

from dataclasses import replace

import cvfp_reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lablog.cvfp.model import CVFPBlock, ModelConfig
from lablog.cvfp.phase1 import (
    DiversityTracker,
    SequentialStep,
    make_optimizer,
    parallel_loss,
    parallel_step,
    sequential_iteration,
    token_loss,
    true_pass_step,
)
from lablog.cvfp.phase2 import FixedText, Phase2Model, phase2_loss
from lablog.cvfp.rollout import rollout

PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
both = pytest.mark.parametrize(("dtype", "limit"), PRECISIONS, ids=["float32", "float64"])


def close(actual, expected, limit):
    """Norm of the difference relative to the norm of the expected array."""
    actual = actual.detach().double().numpy() if isinstance(actual, torch.Tensor) else actual
    difference = np.linalg.norm(np.asarray(actual) - expected)
    assert difference <= limit * max(np.linalg.norm(expected), 1e-30)


def compare_weights(block, parameters, limit):
    for ours, theirs in zip(reference.parameters_of(block), parameters, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, limit)


@settings(max_examples=25)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 10**6),
)
def test_forward_for_any_width_depth_and_mix(context, embed, layers, mix, seed):
    context, embed = context + 1, embed + 1  # the LayerNorm of a single number has no gradient
    config = ModelConfig(context_dim=context, embed_dim=embed, num_layers=layers,
                         layernorm_mix=mix, weight_std=0.3, bias_std=0.05)
    block = CVFPBlock(config, seed).double()
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(3, context, generator=generator, dtype=torch.float64)
    t = torch.randn(3, embed, generator=generator, dtype=torch.float64)
    out_c, out_t = block(c, t)
    parameters = reference.parameters_of(block)
    for i in range(3):
        want_c, want_t, _ = reference.forward(parameters, mix, c[i].numpy(), t[i].numpy())
        close(out_c[i], want_c, 1e-10)
        close(out_t[i], want_t, 1e-10)


def test_forward_at_full_width_in_float32():
    config = ModelConfig(context_dim=768, embed_dim=768, num_layers=6, layernorm_mix=1.0,
                         weight_std=0.1, bias_std=0.01)
    block = CVFPBlock(config, 42)
    c, t = torch.randn(2, 2, 768, generator=torch.Generator().manual_seed(0))
    out_c, out_t = block(c, t)
    parameters = reference.parameters_of(block)
    for i in range(2):
        want_c, want_t, _ = reference.forward(
            parameters, 1.0, c[i].double().numpy(), t[i].double().numpy()
        )
        close(out_c[i], want_c, 1e-5)
        close(out_t[i], want_t, 1e-5)


@both
def test_losses(dtype, limit):
    a, b, m = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, gradient = reference.parallel_loss(a.double().numpy(), b.double().numpy(), 0.9)
    x = a.clone().requires_grad_()
    losses = parallel_loss(x, b, 0.9)
    close(torch.stack(losses), expected, limit)
    losses[0].backward()
    close(x.grad, gradient, limit)
    expected, gradient = reference.token_loss(*(v[0].double().numpy() for v in (a, b, m)), 0.5)
    x = a[0].clone().requires_grad_()
    losses = token_loss(x, b[0], m[0], 0.5)
    close(torch.stack(losses), expected, limit)
    losses[0].backward()
    close(x.grad, gradient, limit)


@both
@pytest.mark.parametrize("mix", [0.4, 1.0])
@pytest.mark.parametrize("variant", ["parallel", "true_pass"])
def test_training_step(network, embeddings, phase1, dtype, limit, mix, variant):
    ours, theirs = {
        "parallel": (parallel_step, reference.parallel_step),
        "true_pass": (true_pass_step, reference.true_pass_step),
    }[variant]
    block, tokens = network(dtype=dtype, layernorm_mix=mix), embeddings(9, dtype=dtype)
    previous = rollout(block, tokens).contexts
    parameters = reference.parameters_of(block)
    adam = reference.Adam(parameters, phase1.learning_rate, phase1.clip_norm)
    optimizer, expected = make_optimizer(block, phase1), previous.double().numpy()
    for _ in range(2):
        previous, stats = ours(block, tokens, previous, optimizer, phase1)
        expected, losses = theirs(
            parameters, mix, tokens.double().numpy(), expected, phase1.diversity_weight, adam
        )
        close(previous, expected, limit)
        close(stats[:3], losses, limit)
    compare_weights(block, parameters, limit)


@both
@pytest.mark.parametrize("clip_norm", [0.01, 100.0])
def test_sequential_training_iteration(network, embeddings, phase1, dtype, limit, clip_norm):
    config = replace(phase1, variant="sequential", clip_norm=clip_norm)
    block, tokens = network(dtype=dtype), embeddings(6, dtype=dtype)
    previous = rollout(block, tokens).contexts
    parameters = reference.parameters_of(block)
    adam = reference.Adam(parameters, config.learning_rate, clip_norm)
    tracker = DiversityTracker(torch.zeros(12, dtype=dtype), torch.zeros(12, dtype=dtype), 0.9)
    step = SequentialStep(block, config, make_optimizer(block, config))
    contexts, stats = sequential_iteration(step, tokens, previous, tracker)
    want, losses, mean = reference.sequential_iteration(
        parameters, 1.0, tokens.double().numpy(), previous.double().numpy(),
        config.diversity_weight, adam, np.zeros(12), 0.9,
    )
    close(contexts, want, limit)
    close(stats[:3], losses, limit)
    close(tracker.mean, mean, limit)
    compare_weights(block, parameters, limit)


@both
@pytest.mark.parametrize("method", ["sequential", "jacobi", "quasi-newton"])
def test_rollouts(network, embeddings, dtype, limit, method):
    # Small weights contract, so that float32 rounding is not amplified along the tokens.
    block = network(dtype=dtype, weight_std=0.05)
    tokens, start = embeddings(40, dtype=dtype), torch.full((12,), 0.5, dtype=dtype)
    want = reference.rollout(
        reference.parameters_of(block), 1.0, tokens.double().numpy(), start.double().numpy()
    )
    result = rollout(block, tokens, start, method, tolerance=limit / 10)
    close(result.contexts, want, limit)


@both
@pytest.mark.parametrize("version", ["v2.0", "v1.0"])
def test_phase2_gradients(network, embeddings, phase2, dtype, limit, version):
    block, tokens = network(dtype=dtype), embeddings(8, dtype=dtype)
    fixed = torch.randn(8, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids = torch.tensor([1, 4, 2, 2, 0, 6, 5, 3])
    model = Phase2Model(block, 7, replace(phase2, version=version)).to(dtype)
    loss, entropy, _ = phase2_loss(model, FixedText(ids, tokens, fixed).inputs(), 0.7)
    assert (entropy == loss) == (version == "v2.0")
    loss.backward()
    total, grads, d_head, d_bias = reference.phase2_gradients(
        reference.parameters_of(block), 1.0, model.head.weight.detach().double().numpy(),
        model.head.bias.detach().double().numpy(), fixed.double().numpy(),
        tokens.double().numpy(), ids.tolist(), version, 0.7,
    )
    close(loss, total, limit)
    close(model.head.weight.grad, d_head, limit)
    close(model.head.bias.grad, d_bias, limit)
    for layer, expected in zip(block.stack, grads, strict=True):
        found = [layer.linear.weight, layer.linear.bias, *layer.context_norm.parameters(),
                 *layer.token_norm.parameters()]
        for parameter, gradient in zip(found, expected, strict=True):
            got = torch.zeros(gradient.shape) if parameter.grad is None else parameter.grad
            close(got, gradient, limit)
