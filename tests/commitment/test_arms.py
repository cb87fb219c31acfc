"""What is trained and compared: ablations, keys, the cache of measures, runs side by side."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from in_order import InOrder
from safetensors.torch import load_file

from lablog.cluster.client import Cluster
from lablog.commitment import arms, diagnostics, qlora
from lablog.commitment.arms import (
    ARMS,
    TRAININGS,
    Asked,
    Experiment,
    Training,
    planned,
)
from lablog.commitment.conversations import Conversations, collate
from lablog.commitment.novelty import KINDS
from lablog.commitment.posterior import CommitmentSettings, VariationalCommitment
from lablog.commitment.qlora import Plan, committed_model, load_base
from lablog.determinism import seed_everything
from lablog.text.tokenizer import Tokenizer


def steps(experiment: Experiment, count: int, **schedule) -> Plan:
    """Its plan with so many steps, and another schedule."""
    plan = experiment.plan
    return plan.model_copy(update={
        "training": plan.training.model_copy(update={"steps": count}),
        "schedule": plan.schedule.model_copy(update=schedule)})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return (load_file(folder / "adapter" / "adapter_model.safetensors")
            | load_file(folder / "commitment.safetensors"))


def inputs(experiment: Experiment) -> dict[str, torch.Tensor]:
    data = experiment.dataset(1, 1, "commitment", count=12)
    return collate([data[i] for i in range(12)])


# --- ablations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_z_at_the_first_position_is_added_to_the_first_real_token_alone(side):
    settings = CommitmentSettings(k=3, width=8, layers=(0, 1), strength=2, positions="first")
    commitment = VariationalCommitment(settings)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    mask = mask.flip(1) if side == "left" else mask
    z = commitment.prior(3)
    added = commitment.addition(z, mask)
    begin = [0, 2, 3] if side == "left" else [0, 0, 0]
    expected = torch.zeros(3, 4, 8)
    expected[range(3), begin] = 2 * z @ commitment.projection.T
    torch.testing.assert_close(added, expected)


def test_one_virtual_token_reaches_the_others_and_both_paddings_read_the_same(experiment):
    """Also in forks: the first token of a row is the stem's."""
    plan = experiment.plan.model_copy(update={"positions": "first"})
    torch.manual_seed(0)
    model = committed_model(load_base(experiment.bases[1], "none", "f32"), plan).eval()
    data, z = experiment.dataset(1, 1, "commitment", count=12), model.commitment.prior(12)
    chosen = [data[i] for i in range(12)]
    losses = [model(**collate(chosen, side), z=used)["lm"].item()
              for side, used in (("right", z), ("left", z), ("right", 0 * z))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


def test_a_label_is_the_one_hot_vector_of_the_commitment_without_a_kl(experiment):
    plan = planned(TRAININGS["steering"], experiment.plan, 2, 12)
    assert (plan.k, plan.code, plan.schedule.cells) == (12, "label", 0)
    torch.manual_seed(0)
    model = committed_model(load_base(experiment.bases[1], "none", "f32"), plan, 12)
    assert not any("head" in name for name in model.trainable())
    batch = inputs(experiment)
    assert batch["commitment"].tolist() == list(range(12))
    parts = model(**batch, beta=1.0)
    assert parts.keys() == {"loss", "lm"}
    assert parts["loss"] == parts["lm"]
    assert parts["lm"].item() == pytest.approx(model(**batch, z=torch.eye(12))["lm"].item())
    assert parts["lm"].item() != pytest.approx(
        model(**batch, z=torch.eye(12).roll(1, 0))["lm"].item(), rel=1e-4)
    drawn = model.commitment.prior(6000, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0, 1}
    assert (drawn.sum(dim=1) == 1).all()
    counts = drawn.sum(dim=0)
    assert ((counts - 500) ** 2 / 500).sum() < 31  # χ² of 11 degrees of freedom, p = 0.001


def test_a_frozen_projection_stays_as_it_began_while_the_rest_learns(experiment):
    made = replace(experiment, plan=steps(experiment, 2))
    found = VariationalCommitment.load(made.train(1, 1, "frozen"))
    plan = made.plan_of(1, 1, "frozen")
    seed_everything(1, 1)
    fresh = committed_model(load_base(made.bases[1], "none", "f32"), plan, 12).commitment
    assert torch.equal(found.projection, fresh.projection)
    assert not torch.equal(found.head.weight[:6], fresh.head.weight[:6])
    changed = VariationalCommitment.load(made.train(1, 1, "commitment"))
    assert not torch.equal(changed.projection, fresh.projection)


def test_a_steering_table_learns_in_rows_and_is_read_without_a_prefix(experiment):
    made = replace(experiment, plan=steps(experiment, 2))
    found = made.train(1, 1, "steering")
    log = json.loads((found / "training.json").read_text())
    assert [entry["step"] for entry in log["history"]] == [1, 2]
    assert all("kl" not in entry for entry in log["history"])
    (measured,) = made.measure(1, 1, "steering.prefix", Asked(3, 3))
    assert "kl" not in measured
    assert len(measured["kept"]) == 3


@pytest.mark.parametrize(("layers", "middle", "first", "last"), [
    (3, (1, 1), (0, 1), (1, 2)), (6, (3, 3), (0, 2), (3, 5)), (32, (16, 16), (0, 15), (16, 31))])
def test_parts_of_the_layers_are_those_of_any_model(experiment, layers, middle, first, last):
    """Halves of an even number do not overlap; of an odd one both have the middle."""
    found = [planned(TRAININGS[name], experiment.plan, layers, 12).layers
             for name in ("one_layer", "first_half", "last_half")]
    assert found == [middle, first, last]
    whole = Training("", layers=(0.0, 1.0))
    assert planned(whole, experiment.plan, layers, 12).layers == (0, layers - 1)
    assert planned(TRAININGS["commitment"], experiment.plan, layers, 12) == experiment.plan


def test_every_training_and_arm_is_described_and_its_plan_is_valid(experiment):
    for name, training in TRAININGS.items():
        plan = experiment.plan_of(1, 5, name)
        assert plan.training.seed == 5
        Plan.model_validate(plan.model_dump())
        assert experiment.dataset(1, 5, name, count=12)[11].fork.max() >= 2
        assert plan.schedule == experiment.plan.schedule.model_copy(update=training.schedule)
    assert {arm.training for arm in ARMS.values()} == {"base", "random", *TRAININGS}
    assert len({arm.label for arm in ARMS.values()}) == len(ARMS)


def test_one_training_has_the_configuration_of_the_log(experiment):
    plan = experiment.plan_of(1, 1, "log")
    assert (plan.k, plan.schedule.beta, plan.schedule.cells) == (64, 0.1, 0)
    assert (plan.lora.r, plan.lora.alpha, plan.lora.targets) == (8, 16, ["q_proj", "v_proj"])
    assert plan.training.learning_rate == experiment.plan.training.learning_rate


# --- keys -----------------------------------------------------------------------------------------


def test_a_training_lies_under_all_that_decides_it(experiment, folder, monkeypatch, tmp_path):
    """Else a finished run of something else would pass for the one asked for."""
    chats = tmp_path / "chats"
    chats.mkdir()
    (chats / "train.jsonl").write_text('{"text": "### Human: Yes?### Assistant: Yes."}\n')

    def other(**changes) -> Experiment:
        return replace(experiment, settings=replace(experiment.settings, **changes))

    phrases = experiment.settings.dialogues
    stronger = experiment.plan.model_copy(update={"strength": 7.0})
    tried = {
        "same": experiment, "plan": replace(experiment, plan=stronger), "gap": other(gap=(0, 2)),
        "guesses": other(guesses=4), "weight": other(word_weight=0.5),
        "phrases": other(dialogues=phrases.model_copy(update={"yes": phrases.yes[::-1]})),
        "topics": other(dialogues=phrases.model_copy(update={
            "topics": dict(list(phrases.topics.items())[1:])})),
        "base": replace(experiment, bases={1: folder}),
        "data": replace(experiment, data=f"hub:{chats}"),
    }
    keys = {name: made.folder(1, 1, "commitment").name.rsplit("-", 1)[-1]
            for name, made in tried.items()}
    keys |= {name: experiment.folder(1, 1, name).name.rsplit("-", 1)[-1]
             for name in TRAININGS if name not in ("commitment", "one_layer")}  # of two: the last
    keys["seed"] = experiment.folder(1, 2, "commitment").name.rsplit("-", 1)[-1]
    with monkeypatch.context() as changed:
        changed.setattr("lablog.keys._made_by", lambda source: f"other code in {source}")
        keys["code"] = experiment.folder(1, 1, "commitment").name.rsplit("-", 1)[-1]
    assert len(set(keys.values())) == len(keys)
    assert experiment.folder(1, 1, "commitment").is_dir()


MEASURED = Asked(9, 3, families=("fork",))


def test_a_kept_measure_is_read_only_for_the_same_question(experiment, monkeypatch):
    (first,) = experiment.measure(1, 1, "prefix", MEASURED)
    kept = experiment.artifacts / "measured"
    before = {path.name: path.read_text() for path in kept.glob("*.json")}
    with monkeypatch.context() as changed:
        changed.setattr(arms, "TorchSpeaker", lambda *_: pytest.fail("measured again"))
        assert experiment.measure(1, 1, "prefix", MEASURED) == [first]
    assert set(kept.glob("*.json")) == {kept / name for name in before}
    (mine,) = (path for path in kept.glob("*.json") if json.loads(path.read_text()) == first)
    mine.unlink()
    assert experiment.measure(1, 1, "prefix", MEASURED) == [first]  # measured anew, the same
    assert mine.is_file()

    names = set()

    def named(made: Experiment, *question) -> None:
        """Add the name of the file in which the answer would be kept."""
        names.add(made._kept(*question).name)

    questions = [(1, 1, arm, replace(MEASURED, items=4)) for arm in ARMS]
    questions += [(1, 2, "prefix", replace(MEASURED, items=4))]
    questions += [(1, 1, "prefix", replace(MEASURED, **change)) for change in (
        {"seed": 10}, {"items": 5}, {"texts": 1}, {"kind": "seen form"}, {"gap": 2},
        {"families": ("recall",)}, {"guesses": 3})]
    for question in questions:
        named(experiment, *question)
    assert len(names) == len(questions)
    with monkeypatch.context() as changed:
        changed.setattr("lablog.keys._made_by", lambda source: f"other code in {source}")
        changed.setattr(Experiment, "folder", lambda *_: experiment.bases[1])
        named(experiment, *questions[0])
    other = experiment.plan.model_copy(update={"strength": 7.0})
    named(replace(experiment, plan=other), *questions[0])
    assert len(names) == len(questions) + 2


def test_questions_asked_together_have_the_answers_of_each_alone(experiment):
    questions = [replace(MEASURED, families=("fork", "recall", "hangman"), kind=kind)
                 for kind in KINDS]
    in_order = InOrder()
    calls = [(1, 1, arm, asked) for asked in questions for arm in ("prefix", "redrawn")]
    together = experiment.measured(in_order, "kinds", calls)
    assert in_order.calls == {"kinds": 2}  # one for each arm
    shutil.rmtree(experiment.artifacts / "measured")
    for call, found in zip(calls, together, strict=True):
        assert experiment.measure(*call) == [found]
    assert experiment.measured(in_order, "kinds", calls) == together
    assert in_order.calls == {"kinds": 2}


def test_the_untrained_arm_has_the_length_of_the_trained_one(experiment):
    trained_model, random = (experiment.model(1, 1, ARMS[arm]) for arm in ("prior", "random"))
    one, other = (model.commitment.settings.strength * model.commitment.projection
                  for model in (trained_model, random))
    assert other.norm().item() == pytest.approx(one.norm().item(), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
    assert abs(cosine.item()) < 0.4
    assert random.base.get_decoder().layers[0].mlp.up_proj.__class__ is torch.nn.Linear  # no LoRA


# --- training -------------------------------------------------------------------------------------


def test_the_metric_of_collapse_tells_a_collapsed_run_from_another(experiment):
    found = {}
    for name, beta in (("collapsed", 300.0), ("not", 0.0)):
        made = replace(experiment, plan=steps(experiment, 60, beta=beta, cells=0.0))
        folder = made.train(1, 1, "commitment")
        last = json.loads((folder / "training.json").read_text())["history"][-1]
        data = made.dataset(1, 1, "commitment", True, 24)
        seen = diagnostics.diagnose(qlora.load_committed(made.bases[1], folder), data, 12)
        found[name] = (last["active_units"], seen["active_units"], last["kl"])
    assert found["collapsed"][:2] == (0, 0)
    assert found["collapsed"][2] < 0.1
    assert found["not"][0] >= 2
    assert found["not"][1] > 0  # fewer where the prefixes are in new words
    assert found["not"][2] > 1


def test_trainings_side_by_side_have_the_bits_of_one_after_the_other(experiment, tmp_path):
    apart = replace(experiment, artifacts=tmp_path)
    with Cluster("", tmp_path, 2) as cluster:
        folders = cluster.map("training", Experiment.train,
                              [(1, seed, "commitment") for seed in (1, 2)], common=(apart,))
    alone = [experiment.train(1, seed, "commitment") for seed in (1, 2)]
    assert [f.name for f in folders] == [f.name for f in alone]
    for one, other in zip(folders, alone, strict=True):
        expected, found = weights(one), weights(other)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(a, b) for a, b in zip(
        weights(folders[0]).values(), weights(folders[1]).values(), strict=True))


def test_conversations_of_one_topic_name_each_thing(experiment):
    data = experiment.dataset(1, 1, "values_24", count=48)
    assert isinstance(data, Conversations)
    tokenizer = Tokenizer(experiment.bases[1] / "tokenizer.model")
    values = data.dialogues.topics["thing"]
    for i in range(48):
        prefix = tokenizer.decode(data[i].prefix.ids.tolist())
        assert data[i].commitment == i % 24
        assert f" {values[i % 24]}" in prefix.replace("\n", " ").replace(".", " ")
