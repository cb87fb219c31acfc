"""Steering vectors are differences of means, as PyTorch takes them, and do what they are made for.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from in_order import InOrder

from lablog.commitment import coherence, probes, sweep
from lablog.commitment.llama_cpp_speaker import Engine, EngineSettings
from lablog.commitment.steering import STATEMENTS, statements, steering_vectors
from lablog.commitment.sweep import Task
from lablog.models.llama_cpp import Context, EngineError
from lablog.text.dialogues import load_settings, named_value, render, settings_for

SETTINGS = load_settings()
LAYER = 3
TASK = Task("steering", 1.0, "middle layer")


@pytest.fixture(scope="module")
def engine(gguf):
    with Engine(EngineSettings(gguf, 27, 256)) as opened:
        yield opened


@pytest.fixture(scope="module")
def vectors(engine):
    return steering_vectors(engine, SETTINGS, LAYER)


@pytest.fixture(scope="module")
def conditions(engine, vectors):
    material = coherence.make_material(SETTINGS, 0, 4, 2, 12)
    return sweep.Conditions(
        k=16, items=probes.make_items(SETTINGS, 0, 6), material=material,
        residual_norms=engine.residual_norms(material.texts),
        baseline=coherence.baseline(engine, material), steering=vectors)


def test_a_vector_is_the_difference_of_means_in_pytorch(engine, vectors, torch_model):
    topic, values = next(iter(SETTINGS.topics.items()))
    means = []
    for value in values:
        last = []
        for question, answer in statements(SETTINGS, topic, value):
            assert answer.endswith(value)
            ids = engine.model.tokenize(f"{render([question])}A: {answer}", bos=True)
            with torch.no_grad():
                seen = torch_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            last.append(seen[LAYER + 1][0, -1].numpy())
        means.append(np.mean(last, axis=0))
    expected = means[0] - np.mean(means[1:], axis=0)
    np.testing.assert_allclose(vectors[tuple(values)], expected, atol=2e-4)
    assert np.linalg.norm(expected) > 0.01
    assert vectors.keys() == {tuple(values) for values in SETTINGS.topics.values()}


def test_statements_name_their_value_in_several_ways():
    told = statements(SETTINGS, "color", "teal")
    assert len({question.text for question, _ in told}) == len(told) == STATEMENTS
    assert all(named_value(answer, SETTINGS.topics["color"]) == "teal" for _, answer in told)
    spoken = statements(settings_for("auto"), "city", "paris")
    assert all(answer.endswith("Paris") for _, answer in spoken)


def test_the_direction_of_a_value_s_own_unembedding_makes_it_likelier(
    engine, conditions, torch_model
):
    """No model could miss that one, whatever it has learnt."""
    rows = torch_model.get_output_embeddings().weight.detach().numpy()
    own = {values: rows[engine.model.tokenize(f"A: it is {values[0]}", bos=True)[-1]]
           for values in conditions.steering}
    steered = replace(conditions, steering=own)
    found = [sweep.evaluate(engine, Task("steering", strength, "last 1", language=False),
                            steered)["first_named"] for strength in (-9.0, 0.0, 9.0)]
    plain = sweep.evaluate(engine, Task("none", language=False), conditions)
    assert found[1] == pytest.approx(plain["first_named"])
    assert found[0] < found[1] < found[2]


def test_each_item_is_asked_under_the_direction_of_its_topic(engine, conditions):
    row = sweep.evaluate(engine, TASK, conditions)
    expected = np.zeros(len(conditions.items.fork))
    for number, item in enumerate(conditions.items.fork):
        under = sweep.injection(TASK, engine.model, 16, conditions.steering[item.values])
        assert under.commitments[0].layers == (LAYER, LAYER)
        expected[number] = probes.fork(engine.speaker, [item], under).yes_sum[0]
    np.testing.assert_allclose([float(x) for x in row["yes_sum_items"].split()], expected,
                               rtol=1e-4)
    lengths = [np.linalg.norm(vector) for vector in conditions.steering.values()]
    assert row["dose"] == pytest.approx(np.mean(lengths) / conditions.residual_norms.mean())


def test_only_what_is_steered_depends_on_the_directions(engine, conditions, tmp_path):
    """Another chapter asks for the same under other directions, or under none."""
    tasks, plain = InOrder(), Task("none", language=False)
    turned = replace(conditions, steering={
        values: -vector for values, vector in conditions.steering.items()})
    found = [sweep.sweep(tasks, engine, [TASK, plain], under, tmp_path)
             for under in (conditions, turned)]
    assert found[0].iloc[0]["yes_sum_items"] != found[1].iloc[0]["yes_sum_items"]
    assert found[0].iloc[1].equals(found[1].iloc[1])
    (journal,) = tmp_path.glob("sweep-*.jsonl")
    assert len(sweep.journalled(journal)) == 3, "the plain row only once"
    calls = tasks.calls["sweep"]
    sweep.sweep(tasks, engine, [plain], replace(conditions, steering={}), tmp_path)
    assert tasks.calls["sweep"] == calls


def test_a_layer_that_is_not_there_is_refused(engine):
    with pytest.raises(ValueError, match="layer = 6: the model has layers 0 to 5"):
        steering_vectors(engine, SETTINGS, 6)


def test_states_are_kept_only_where_asked_for(model):
    with Context(model, 1, 64) as context:
        context.prefill({0: [1, 5, 6]})
        with pytest.raises(EngineError, match="with keep_layer"):
            context.states()
    with Context(model, 1, 64, keep_layer=2) as context:
        context.prefill({0: [1, 5, 6]})
        assert context.states().shape == (3, 64)
        context.prefill({0: [1, 5, 6, 7]})
        assert context.states().shape == (1, 64)
        with pytest.raises(EngineError, match="watched 0 of 6 layers"):
            context.residual_norms()
