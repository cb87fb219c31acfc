"""Properties of the parallel map, of training and of the rollouts that hold for any input."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lablog.cvfp.lyapunov import lyapunov_exponent
from lablog.cvfp.memory import memory_curve, memory_length
from lablog.cvfp.model import CVFPBlock, shifted
from lablog.cvfp.passes import iterate_passes
from lablog.cvfp.phase1 import (
    DiversityTracker,
    SequentialStep,
    contexts_of,
    make_optimizer,
    parallel_step,
    sequential_iteration,
    train,
    trained,
    true_pass_step,
)
from lablog.cvfp.rollout import Recurrence, Shooting, correct, exact_shares, rollout

fast = settings(
    max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fast
@given(k=st.integers(1, 15), seed=st.integers(0, 1000), std=st.floats(0.05, 2.0))
def test_k_jacobi_passes_make_exactly_k_tokens_exact(network, embeddings, k, seed, std):
    block, tokens = network(seed, weight_std=std), embeddings(16, seed=seed)
    exact = rollout(block, tokens).contexts
    start = exact.new_zeros(12)
    guess = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed)).double()
    for _ in range(k):
        with torch.no_grad():
            guess = block.chunked(shifted(guess, start), tokens)
    error = (guess - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error[:k] < 1e-10).all(), "rounding, which a chaotic network amplifies"
    assert (error[k:] > 1e-10).all()


@fast
@given(st.integers(0, 1000), st.floats(0.05, 1.0))
def test_iteration_1_repeats_iteration_0_apart_from_the_start_token(network, embeddings, seed, std):
    """Fact (a): a sequential rollout is already the fixed point of the parallel map."""
    block, tokens = network(seed, weight_std=std), embeddings(20, seed=seed)
    first = rollout(block, tokens).contexts
    passes = iterate_passes(block, tokens, 3, "parallel", threshold=1e-20)
    for k, changes in enumerate(passes.changes):
        changed = (changes > 1e-20).nonzero().flatten().tolist()
        assert changed == [k], "pass k + 1 changes token k alone"
    assert torch.allclose(passes.contexts[3:], first[3:], rtol=1e-9, atol=1e-12)


def test_jacobi_spreads_exactness_a_token_a_pass_and_faster_where_the_network_forgets(
    network, embeddings
):
    tokens = embeddings(50)
    forgets, slow = forgetful(network), network(weight_std=0.001, layernorm_mix=0.0)
    for block in (forgets, slow):
        shares = exact_shares(block, tokens, rollout(block, tokens).contexts, 50)
        assert len(shares) == 50
        assert all(50 * share > k - 0.5 for k, share in enumerate(shares, 1))
        assert shares[-1] == 1.0
        assert (shares[15] == 1.0) == (block is forgets)


def test_training_reports_convergence_before_anything_is_learnt(network, embeddings, phase1):
    history = train(network(), embeddings(50), phase1).history
    assert history[0].converged >= 49
    assert history[0].iteration == 1


@pytest.mark.parametrize("fraction", [0.0, 0.95])
def test_early_stop_waits_for_its_first_iteration(network, embeddings, phase1, fraction):
    for first, expected in ((1, 2), (3, 4)):
        config = replace(phase1, early_stop_fraction=fraction, early_stop_from=first,
                         convergence_threshold=1e9)
        assert train(network(), embeddings(50), config).iterations_done == expected


def test_start_token_and_target_carry_over(network, embeddings, phase1):
    """Iteration t starts from, and is compared with, iteration t - 1; not zero, not iteration 0."""
    block, tokens = network(), embeddings(12)
    previous = rollout(block, tokens).contexts
    optimizer = make_optimizer(block, phase1)
    for _ in range(3):
        with torch.no_grad():
            expected = block.chunked(shifted(previous, previous[-1]), tokens)
        contexts, stats = parallel_step(block, tokens, previous, optimizer, phase1)
        assert torch.equal(contexts, expected)
        assert not contexts.requires_grad
        assert float(stats[1]) == pytest.approx(float((expected - previous).square().mean()))
        previous = contexts


def test_a_true_pass_reads_what_the_loop_reads_and_is_compared_with_the_pass_before(
    network, embeddings, phase1
):
    block, tokens = network(), embeddings(12)
    config = replace(phase1, variant="true_pass")
    previous = rollout(block, tokens).contexts
    optimizer = make_optimizer(block, config)
    for _ in range(3):
        expected = rollout(block, tokens, previous[-1]).contexts
        contexts, stats = true_pass_step(block, tokens, previous, optimizer, config)
        assert torch.equal(contexts, expected)
        assert float(stats[1]) == pytest.approx(float((expected - previous).square().mean()))
        previous = contexts


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_true_passes_learn_to_return_where_parallel_passes_do_not(small, embeddings, phase1, seed):
    """What the variant is for: read again, a text gives the contexts that it gave before."""
    shape, tokens = replace(small, **CHAOS | {"weight_std": 0.25}), embeddings(200, 46)
    settings = replace(phase1, diversity_weight=0.5, iterations=15, convergence_threshold=1e-12)

    def returned(variant):
        block = CVFPBlock(shape, seed).double()
        if variant is not None:
            train(block, tokens, replace(settings, variant=variant))
        return iterate_passes(block, tokens, 4, "sequential", 0.1).differences[-1]

    untrained, parallel, true_pass = map(returned, (None, "parallel", "true_pass"))
    assert untrained > 0.05
    assert true_pass < 1e-3 < parallel, "check 3's limit"


def test_shooting_reads_a_true_pass_within_the_tolerance(network, embeddings, phase1):
    """Reading many segments at once from the pass before: the loop's contexts and step."""
    tokens, states = embeddings(300), []
    for reading in ("sequential", "shooting"):
        block = forgetful(network)
        config = replace(phase1, variant="true_pass", reading=reading)
        contexts, optimizer = rollout(block, tokens).contexts, make_optimizer(block, config)
        for _ in range(3):
            contexts, _ = true_pass_step(block, tokens, contexts, optimizer, config)
        states.append((contexts, block.state_dict()))
    (loop, weights), (shot, others) = states
    error = (loop - shot).norm(dim=1) / loop.norm(dim=1)
    assert 0 < float(error.max()) < 1e-4
    assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in weights)


def test_the_moving_mean_starts_where_it_is_told_to(network, embeddings, phase1):
    """With a decay of 1 the mean stays where it starts, so that the loss tells where that is."""
    tokens, contexts = embeddings(20), rollout(network(), embeddings(20)).contexts
    for start, mean in (("zero", torch.zeros(12)), ("first_pass", contexts.mean(0))):
        config = replace(phase1, variant="sequential", ema_decay=1.0, ema_start=start, iterations=2)
        block = network()
        optimizer = make_optimizer(block, config)
        step = SequentialStep(block, config, optimizer)
        tracker = DiversityTracker(mean.double(), torch.zeros(12).double(), 1.0)
        _, expected = sequential_iteration(step, tokens, contexts, tracker)
        history = train(network(), tokens, config).history
        assert history[0].diversity_loss == pytest.approx(float(expected[2]), rel=1e-12)


def test_loss_is_raw_not_normalised(network, embeddings, phase1):
    """Doubling all contexts must quadruple the CVFP loss (the defect kept the direction only)."""
    from lablog.cvfp.phase1 import parallel_loss, token_loss

    a, b = torch.randn(2, 30, 12)
    once, twice = parallel_loss(a, b, 0.5), parallel_loss(2 * a, 2 * b, 0.5)
    assert float(twice[1]) == pytest.approx(4 * float(once[1]))
    assert float(twice[2]) == pytest.approx(2 * float(once[2]))
    assert float(token_loss(2 * a[0], 2 * b[0], a[1], 0.5)[1]) == pytest.approx(
        4 * float(token_loss(a[0], b[0], a[1], 0.5)[1])
    )


@pytest.mark.parametrize("variant", ["parallel", "sequential", "true_pass"])
def test_training_twice_gives_identical_results(network, embeddings, phase1, variant):
    runs = []
    for _ in range(2):
        block = network(3)
        result = train(block, embeddings(30), replace(phase1, variant=variant))
        runs.append((result.history, result.contexts, block.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(runs[0][2][k], runs[1][2][k]) for k in runs[0][2])


def test_a_trained_network_and_its_contexts_are_found_again(
    small, phase1, embeddings, tmp_path
):
    """What one notebook has trained or read is what another asks for, whatever it asked before."""
    tokens = embeddings(30).float()
    block, result = trained(tmp_path, small, tokens, phase1)
    read = contexts_of(tmp_path, block, tokens)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 2
    fresh, again = trained(tmp_path, small, tokens, phase1)
    assert again.history == result.history
    assert torch.equal(again.contexts, result.contexts)
    assert torch.equal(contexts_of(tmp_path, fresh, tokens), read)
    assert torch.equal(rollout(block, tokens).contexts, read)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    contexts_of(tmp_path, CVFPBlock(small, phase1.seed), tokens)
    contexts_of(tmp_path, block, tokens[:20])
    trained(tmp_path, small, tokens, replace(phase1, seed=1))
    trained(tmp_path, replace(small, weight_std=0.2), tokens, phase1)
    assert len(list(tmp_path.iterdir())) == 6, "another network, text, seed or shape is not it"


CHAOS = {"context_dim": 48, "embed_dim": 46, "weight_std": 0.5}


def forgetful(network, context_dim=12):
    """A network in which the new token overwrites most of the context."""
    block = network(weight_std=1.5)
    for layer in block.stack:
        layer.linear.weight.data[:, :context_dim] *= 0.02
    return block


@fast
@given(
    seed=st.integers(0, 1000), std=st.floats(0.02, 1.5), forgets=st.booleans(),
    tokens=st.integers(1, 300),
    method=st.sampled_from(["jacobi", "quasi-newton", "shooting"]), mix=st.sampled_from([0.9, 1.0]),
    tolerance=st.sampled_from([1e-2, 1e-4, 1e-8]),
    near=st.sampled_from([None, 0.0, 1e-6, 0.1, 10.0]),
)
def test_a_rollout_is_never_silently_wrong(
    network, embeddings, seed, std, forgets, tokens, method, mix, tolerance, near
):
    block = forgetful(network) if forgets else network(seed, weight_std=std, layernorm_mix=mix)
    text = embeddings(tokens, seed=seed)
    exact = rollout(block, text).contexts
    guess = None
    if near is not None:
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
        guess = exact + near * noise.double()
    result = rollout(block, text, method=method, tolerance=tolerance, guess=guess)
    error = ((result.contexts - exact).norm(dim=1) / exact.norm(dim=1)).max()
    assert float(error) <= 2 * tolerance  # the error left is an extrapolation
    assert result.sequential_tokens in (0, tokens)
    assert not result.sequential_tokens or torch.equal(result.contexts, exact)


@pytest.mark.parametrize("method", ["jacobi", "quasi-newton"])
def test_contraction_is_used_and_chaos_falls_back(network, embeddings, method):
    calm = rollout(forgetful(network), embeddings(700), method=method)
    assert not calm.sequential_tokens
    assert calm.passes < 12
    wild = rollout(network(**CHAOS), embeddings(700, 46), method=method)
    assert wild.sequential_tokens == 700
    assert wild.passes < 2, "one window was tried, briefly"


def test_shooting_reaches_where_single_tokens_do_not(network, embeddings):
    """A network that forgets in a hundred tokens: too slowly for Jacobi, soon enough for
    segments; a text of a few segments and one that does not divide."""
    block = network(weight_std=0.3)
    for tokens in (embeddings(6000), embeddings(4777, seed=3)):
        exact = rollout(block, tokens).contexts
        assert rollout(block, tokens, method="jacobi").sequential_tokens
        shooting = rollout(block, tokens, method="shooting")
        assert not shooting.sequential_tokens
        assert shooting.passes < 2.5
        assert float(((shooting.contexts - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 1e-4


@pytest.mark.parametrize("forgets", [30, 45, 60])
def test_segments_that_have_not_joined_at_their_end_pass_it_on(
    network, embeddings, monkeypatch, forgets
):
    """A network that is thought to forget sooner than it does."""
    block, tokens = network(weight_std=0.3), embeddings(800)
    exact = rollout(block, tokens).contexts
    monkeypatch.setattr(Shooting, "_forgets", lambda *_: forgets)
    found = rollout(block, tokens, method="shooting")
    assert not found.sequential_tokens
    assert 2 < found.passes < 4, "more than two rounds"
    assert float(((found.contexts - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 1e-4


def test_segments_that_do_not_join_are_given_up(network, embeddings, monkeypatch):
    """After three contexts for each token the loop reads, where a network is thought to forget and
    does not."""
    monkeypatch.setattr(Shooting, "_forgets", lambda *_: 8)
    wild, text = network(**CHAOS), embeddings(700, 46)
    given_up = rollout(wild, text, method="shooting")
    assert given_up.sequential_tokens == 700
    assert 3 < given_up.passes < 5
    assert torch.equal(given_up.contexts, rollout(wild, text).contexts)


def test_shooting_begins_where_the_guess_says(network, embeddings):
    """A guess that is right saves the second reading; shifted by a token it is worth nothing."""
    block, tokens = network(weight_std=0.3), embeddings(6000)
    exact = rollout(block, tokens).contexts
    right, wrong, none = (
        rollout(block, tokens, method="shooting", guess=guess).passes
        for guess in (exact, exact.roll(1, 0), None))
    assert right < 1.3
    assert wrong > 1.3
    assert none > 1.3


@pytest.mark.parametrize("method", ["jacobi", "quasi-newton", "shooting"])
def test_a_guess_that_is_not_a_number_changes_nothing(network, embeddings, method):
    block, tokens = network(weight_std=0.3), embeddings(3000)
    exact = rollout(block, tokens).contexts
    found = rollout(block, tokens, method=method, guess=torch.full_like(exact, float("nan")))
    assert float(((found.contexts - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 1e-4


def test_a_near_guess_saves_passes(network, embeddings):
    block, tokens = forgetful(network), embeddings(2000)
    exact = rollout(block, tokens).contexts
    passes = [rollout(block, tokens, method="jacobi", guess=guess).passes
              for guess in (None, exact + 1e-5)]
    assert passes[1] < passes[0]


def test_quasi_newton_solves_in_one_pass_what_is_diagonal():
    """x[i] = d x[i-1] + u[i]: the scan with the true diagonal is exact at once."""
    d, u = torch.rand(6).double(), torch.randn(50, 6).double()
    exact, x = [], torch.zeros(6).double()
    for row in u:
        x = d * x + row
        exact.append(x)
    guess = torch.randn(50, 6).double()
    new = d * shifted(guess, torch.zeros(6).double()) + u
    assert torch.allclose(correct(new, guess, d), torch.stack(exact), rtol=1e-12)


def test_quasi_newton_needs_fewer_passes_where_the_jacobian_is_diagonal(network, embeddings):
    """Without LayerNorm and with small weights the residual path alone gives J close to 1."""
    block, tokens = network(weight_std=0.001, layernorm_mix=0.0), embeddings(60)
    passes = {
        m: rollout(block, tokens, method=m, max_passes=60)
        for m in ("jacobi", "quasi-newton")
    }
    newton = passes["quasi-newton"]
    assert not newton.sequential_tokens
    assert newton.passes < 10
    assert passes["jacobi"].passes > newton.passes or passes["jacobi"].sequential_tokens


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_the_tangent_moves_as_automatic_differentiation_says(network, embeddings, mix):
    block, tokens = network(weight_std=0.4, layernorm_mix=mix), embeddings(30)
    start = rollout(block, tokens[:5]).contexts[-1]
    growth = lyapunov_exponent(block, tokens, start, 3, 0)
    generator = torch.Generator().manual_seed(3)
    tangent = torch.nn.functional.normalize(torch.randn(1, 12, generator=generator)).double()
    context, expected = start[None], []
    for i in range(len(tokens)):
        context, tangent = torch.func.jvp(
            lambda c, i=i: block(c, tokens[i : i + 1])[0], (context,), (tangent,))
        expected.append(tangent.norm().log())
        tangent = tangent / tangent.norm()
    assert torch.allclose(growth, torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_lyapunov_exponent_is_the_growth_of_a_difference(network, embeddings):
    wild = network(**CHAOS)
    text = embeddings(300, 46)
    growth = lyapunov_exponent(wild, text, rollout(wild, text[:5]).contexts[-1], 0, 50)
    assert float(growth.mean()) > 0.05
    block, tokens = network(weight_std=0.3), embeddings(40)
    start = rollout(block, tokens[:5]).contexts[-1]
    exponent = float(lyapunov_exponent(block, tokens, start, 0, 0).mean())
    assert exponent < -0.05
    generator = torch.Generator().manual_seed(0)  # the same first tangent
    tangent = torch.nn.functional.normalize(torch.randn(1, 12, generator=generator)).double()[0]
    a, b = (rollout(block, tokens, s).contexts[-1] for s in (start, start + 1e-6 * tangent))
    assert float(((a - b).norm() / 1e-6).log() / 40) == pytest.approx(exponent, rel=1e-2)


def test_memory_curve_is_the_difference_of_two_rollouts(network, embeddings):
    block, tokens = network(weight_std=0.2), embeddings(60)
    contexts = rollout(block, tokens).contexts
    positions = torch.tensor([7, 20])
    curve = memory_curve(block, tokens, contexts, positions, 12, seed=5)
    generator = torch.Generator().manual_seed(5)
    other = torch.randint(0, 60, (2,), generator=generator)
    for column, (position, token) in enumerate(zip(positions, other, strict=True)):
        changed = tokens.clone()
        changed[position] = tokens[token]
        again = rollout(block, changed).contexts[position : position + 13]
        true = contexts[position : position + 13]
        expected = (again - true).norm(dim=1) / true.norm(dim=1)
        assert torch.allclose(curve[:, column], expected, rtol=1e-9, atol=1e-14)
    assert memory_length(torch.tensor([[1.0], [0.5], [0.2], [0.001]]), 0.01) == 2
    assert memory_length(torch.tensor([[1.0], [0.5]]), 0.01) is None
    with pytest.raises(ValueError, match="leave the text"):
        memory_curve(block, tokens, contexts, torch.tensor([50]), 12, seed=5)


def test_layernorm_mix_limits(network, embeddings):
    context, token = embeddings(5, 12), embeddings(5)
    for mix in (0.0, 1.0):
        layer = network(layernorm_mix=mix).stack[0]
        layer.context_norm.weight.data.fill_(1)
        layer.context_norm.bias.data.fill_(0)
        c, _ = layer(context, token)
        x = layer.linear(torch.cat([context, token], 1)).relu()[:, :12] + context
        want = torch.nn.functional.layer_norm(x, (12,)) if mix else x
        assert torch.allclose(c, want, rtol=1e-12)


def test_bfloat16_loop_and_autocast_are_near_and_different(network, embeddings, phase1):
    block, tokens = network(dtype=torch.float32, weight_std=0.05), embeddings(40).float()
    exact = rollout(block, tokens).contexts
    rough = torch.empty_like(exact)
    Recurrence(block, torch.bfloat16).read(tokens, exact.new_zeros(12), rough)
    error = float((rough - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.05
    plain = train(network(dtype=torch.float32), tokens, phase1).contexts
    cast = train(network(dtype=torch.float32), tokens, replace(phase1, autocast=True)).contexts
    assert cast.dtype == torch.float32
    assert 1e-6 < float((cast - plain).norm() / plain.norm()) < 0.3
