"""The engine: caches give what fresh evaluation gives; bad files and inputs are refused."""

import gguf as gguf_format
import numpy as np
import pytest
import torch

from lablog.commitment import sampler
from lablog.models import llama_cpp
from lablog.models.gguf_file import check_gguf
from lablog.models.llama_cpp import (
    Commitment,
    Context,
    EngineError,
    Model,
    generate_tokens,
)

LINES = [[1, *range(270, 285)], [1, *range(300, 330)], [1, 280, 281]]


def test_logits_are_those_of_pytorch(context, torch_model):
    together = context.prefill(dict(enumerate(LINES)), "all")
    with torch.inference_mode():
        for number, tokens in enumerate(LINES):
            reference = torch_model(torch.tensor([tokens])).logits[0].numpy()
            assert np.abs(together[number] - reference).max() <= 2e-3


def test_prefill_reuses_only_what_is_common(context):
    context.prefill({0: [1, 270, 271, 272, 273]})
    again = context.prefill({0: [1, 270, 271, 299, 298]})[0]
    context.clear()
    np.testing.assert_allclose(again, context.prefill({0: [1, 270, 271, 299, 298]})[0], atol=1e-4)
    assert context.tokens[0] == [1, 270, 271, 299, 298]


def test_a_fork_continues_like_its_source(context):
    context.prefill({0: LINES[0]})
    context.prefill({2: LINES[1]})  # a fork replaces what its target held
    context.fork(0, [1, 2])
    forks = context.decode({1: [290, 291], 2: [290, 295]})
    context.clear()
    alone = context.prefill({0: [*LINES[0], 290, 291], 1: [*LINES[0], 290, 295]})
    np.testing.assert_allclose(forks[1], alone[0], atol=1e-4)
    np.testing.assert_allclose(forks[2], alone[1], atol=1e-4)


def test_generation_inverts_the_cumulative_distribution(context, torch_model):
    uniforms = np.random.default_rng(0).random((3, 6))
    rows = context.prefill(dict(enumerate(LINES)))
    written = generate_tokens(context, rows, 6, uniforms=dict(enumerate(uniforms)))
    for number, tokens in enumerate(LINES):
        text = list(tokens)
        for u in uniforms[number]:
            with torch.inference_mode():
                p = torch_model(torch.tensor([text])).logits[0, -1].double().softmax(0).numpy()
            text.append(int(np.searchsorted(p.cumsum(), u, side="right")))
        assert written[number] == text[len(tokens):]


def test_generation_stops_before_a_stop_token(context):
    rows = context.prefill({0: LINES[0]})
    greedy = generate_tokens(context, rows, 8)[0]
    rows = context.prefill({0: LINES[0]})
    assert generate_tokens(context, rows, 8, stops=frozenset({greedy[3]}))[0] == greedy[:3]


def commitments(model):
    """Directions, strengths and layers that differ, and one that adds nothing."""
    one, two = (sampler.sample(seed, 16, model.width).direction for seed in (1, 2))
    return [Commitment(one, 0.5, (0, 5)), Commitment(two, -0.7, (2, 3)),
            Commitment(one, 0.0, (0, 5)), Commitment(two, 0.5, (5, 5))]


def test_each_sequence_is_decoded_under_its_own_commitment(context, model):
    contents = {number: LINES[number % 3] for number in range(5)}  # the last has none of its own
    everywhere = Commitment(sampler.sample(3, 16, model.width).direction, 0.4, (1, 4))
    own = commitments(model)
    expected = []
    for number, commitment in enumerate([*own, everywhere]):
        context.clear()
        context.commit(commitment)
        expected.append(context.prefill(contents, "all")[number])
    context.clear()
    context.commit(everywhere)
    for number, commitment in enumerate(own):
        context.commit(commitment, sequence=number)
    together = context.prefill(contents, "all")
    for number, rows in enumerate(expected):
        np.testing.assert_array_equal(together[number], rows)

    context.commit(None)  # the sequences keep theirs
    for number in range(3):
        context.commit(None, sequence=number)  # of those that had one, only 3 keeps it
    context.clear()
    later = context.prefill(contents, "all")
    np.testing.assert_array_equal(later[3], expected[3])
    np.testing.assert_array_equal(later[2], expected[2])  # strength 0 was none
    for number in (0, 1, 4):
        assert not np.array_equal(later[number], expected[number])


def test_a_changed_commitment_of_a_sequence_takes_effect_on_the_next_decode(context, model):
    other = sampler.sample(9, 16, model.width).direction
    own = commitments(model)
    seen = []
    for commitment in (own[0], Commitment(own[0].direction, 0.6, (0, 5)),
                       Commitment(own[0].direction, 0.6, (1, 5)), Commitment(other, 0.6, (1, 5)),
                       None, own[0]):
        context.commit(commitment, sequence=1)
        context.clear()
        seen.append(context.prefill({0: LINES[0], 1: LINES[0]}))
    for rows in seen:
        np.testing.assert_array_equal(rows[0], seen[0][0])
    np.testing.assert_array_equal(seen[5][1], seen[0][1])
    assert len({rows[1].tobytes() for rows in seen}) == 5


def test_a_fork_takes_the_cache_but_not_the_commitment(context, model):
    own = commitments(model)
    context.commit(own[0], sequence=0)
    context.commit(own[1], sequence=1)
    context.prefill({0: LINES[0]})
    context.fork(0, [1, 2])
    forks = context.decode({0: [290], 1: [290], 2: [290]})
    assert len({rows.tobytes() for rows in forks.values()}) == 3
    context.clear()
    context.commit(None, sequence=0)
    context.commit(None, sequence=1)
    for sequence, commitment in ((0, own[0]), (1, own[1]), (2, None)):
        context.clear()
        context.commit(own[0])
        context.prefill({0: LINES[0]})
        context.fork(0, [1, 2])
        context.commit(commitment)
        again = context.decode({0: [290], 1: [290], 2: [290]})
        np.testing.assert_array_equal(again[sequence], forks[sequence])


@pytest.mark.parametrize("sequence", [-1, 27, 1000])
def test_a_commitment_of_a_sequence_that_is_not_there_is_refused(context, model, sequence):
    for commitment in (commitments(model)[0], None):
        with pytest.raises(ValueError, match="there is no such sequence"):
            context.commit(commitment, sequence=sequence)


def test_a_refused_commitment_leaves_the_sequence_its_own(context, model):
    context.commit(commitments(model)[0], sequence=1)
    before = context.prefill({1: LINES[0]})[1]
    with pytest.raises(ValueError, match="layer range"):
        context.commit(Commitment(commitments(model)[1].direction, 0.5, (3, 6)), sequence=1)
    context.clear()
    np.testing.assert_array_equal(context.prefill({1: LINES[0]})[1], before)


def test_residual_norms_are_those_of_pytorch(model, torch_model):
    with Context(model, 1, 256, watch_residual=True) as context:
        context.prefill({0: LINES[1]}, "all")
        ours = context.residual_norms()
    seen = []
    handles = [layer.register_forward_hook(
        lambda _m, _i, out: seen.append((out[0] if isinstance(out, tuple) else out)[0]))
        for layer in torch_model.model.layers]
    with torch.inference_mode():
        torch_model(torch.tensor([LINES[1]]))
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(ours, [h.norm(dim=1).mean().item() for h in seen], rtol=1e-4)


def test_residual_norms_need_a_watching_context(context):
    with pytest.raises(EngineError, match="watch_residual=True"):
        context.residual_norms()


def test_what_does_not_fit_is_refused(context, model):
    with pytest.raises(ValueError, match="window holds 256"):
        context.decode({0: [1] * 257})
    with pytest.raises(ValueError, match="vocabulary"):
        context.decode({0: [model.vocabulary]})
    with pytest.raises(ValueError, match="sequences = 0"):
        Context(model, sequences=0)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf"):
        Model(tmp_path / "nowhere.gguf")


def test_what_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("a model, honestly")
    with pytest.raises(ValueError, match="not a GGUF file"):
        check_gguf(path)


def test_an_adapter_that_is_none_is_refused_before_a_model_is_loaded(gguf, tmp_path, monkeypatch):
    path = tmp_path / "adapter.gguf"
    path.write_text("an adapter, honestly")
    monkeypatch.setattr(llama_cpp, "bindings", lambda: pytest.fail("weights that nobody frees"))
    with pytest.raises(ValueError, match="not a GGUF file"):
        Model(gguf, lora=path)


@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_a_truncated_gguf_is_refused(gguf, tmp_path, share):
    data = gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"cut\.gguf is not a whole GGUF file: \S"):
        Model(path)


@pytest.mark.parametrize("architecture", ["mystery", "controlvector"])
def test_another_architecture_is_refused_by_name(tmp_path, architecture):
    path = tmp_path / "other.gguf"
    writer = gguf_format.GGUFWriter(path, architecture)
    writer.add_tensor("direction.1", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EngineError, match=architecture):
        Model(path)
