"""Sweep and calibration: resume, controls, intervals, the solver."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from in_order import InOrder
from scipy import stats

from lablog.cluster.client import Cluster
from lablog.commitment import (
    calibration,
    coherence,
    llama_cpp_speaker,
    log_experiments,
    probes,
    sweep,
    sweep_metrics,
)
from lablog.commitment.log_experiments import NAMED_ROWS
from lablog.commitment.sweep import Task
from lablog.intervals import hierarchical
from lablog.text.dialogues import load_settings


@dataclass
class Laboratory:
    """A model, and what its configurations share."""

    engine: llama_cpp_speaker.Engine
    conditions: sweep.Conditions

    def run(self, configurations, artifacts, tasks=None):
        return sweep.sweep(tasks or InOrder(), self.engine, configurations, self.conditions,
                           artifacts)

    def evaluate(self, task):
        return sweep.evaluate(self.engine, task, self.conditions)

    def injection(self, task):
        return sweep.injection(task, self.engine.model, 16)

    def dose(self, task):
        return sweep.dose(task, self.engine.model, 16, self.conditions.residual_norms)


@pytest.fixture(scope="module")
def laboratory(gguf):
    items = probes.make_items(load_settings(), 0, 4)
    material = coherence.make_material(load_settings(), 0, 4, 2, 12)
    with llama_cpp_speaker.Engine(llama_cpp_speaker.EngineSettings(gguf, 27, 256)) as engine:
        yield Laboratory(engine, sweep.Conditions(
            k=16, items=items, material=material,
            residual_norms=engine.residual_norms(material.texts),
            baseline=coherence.baseline(engine, material)))


TASKS = [Task("none"), Task("text"), *(
    Task(control, 0.5, layers, seed) for control in ("commitment", "redrawn")
    for layers in ("all", "layer 0") for seed in (1, 2))]


def test_a_sweep_that_was_cut_off_resumes_to_the_same_table(laboratory, tmp_path):
    whole = laboratory.run(TASKS, tmp_path / "whole")
    journal = next((tmp_path / "whole").glob("sweep-*.jsonl"))
    cut = tmp_path / "cut" / journal.name
    cut.parent.mkdir()
    lines = journal.read_text().splitlines()
    cut.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])  # killed while writing a line
    tasks = InOrder()
    resumed = laboratory.run(TASKS, cut.parent, tasks)
    assert resumed.equals(whole)
    assert tasks.calls["sweep"] == math.ceil((len(TASKS) - 3) / sweep.BLOCK)
    assert len(sweep.journalled(cut)) == len(sweep.journalled(journal)) == len(lines)
    assert laboratory.run(TASKS, cut.parent, tasks).equals(whole)
    assert tasks.calls["sweep"] == math.ceil((len(TASKS) - 3) / sweep.BLOCK)  # none again


def test_one_slot_two_and_none_give_the_same_digits(laboratory, tmp_path):
    expected = laboratory.run(TASKS, tmp_path / "here")
    for slots in (1, 2):
        artifacts = tmp_path / str(slots)
        with Cluster("", artifacts, slots) as cluster:
            assert laboratory.run(TASKS, artifacts, cluster).equals(expected)
            assert len(cluster.ran) == math.ceil(len(TASKS) / sweep.BLOCK)


def test_rows_of_another_number_of_threads_or_another_device_are_not_taken(
    laboratory, tmp_path, monkeypatch
):
    """Sums may be taken in another order there."""
    for name, value in (("threads", 7), ("gpu_layers", 3)):
        whole = laboratory.run(TASKS[:1], tmp_path).drop(columns="span")
        with monkeypatch.context() as changed:
            changed.setattr(sweep, "evaluate_block", lambda *_, rows=whole: rows.to_dict("records"))
            changed.setattr(laboratory.engine, "settings",
                            replace(laboratory.engine.settings, **{name: value}))
            laboratory.run(TASKS[:1], tmp_path)
    assert len(list(tmp_path.glob("sweep-*.jsonl"))) == 3


def test_strength_zero_is_the_unmodified_model(laboratory):
    none = laboratory.evaluate(Task("none"))
    zero = laboratory.evaluate(Task("commitment", 0.0, "all", 1))
    for measure in sweep_metrics.MEASURES:
        assert none[measure] == zero[measure], measure


def test_ranges_of_the_same_layers_are_computed_once(laboratory, tmp_path):
    tasks = [Task("commitment", 0.5, name, 1) for name in ("layer 0", "layer 0", "all")]
    laboratory.run(tasks, tmp_path)
    assert len(next(tmp_path.glob("*.jsonl")).read_text().splitlines()) == 2


def test_a_redrawn_direction_has_the_norm_of_the_commitment(laboratory):
    (one,) = laboratory.injection(Task("commitment", 0.5, "all", 3)).commitments
    redrawn = laboratory.injection(Task("redrawn", 0.5, "all", 3)).commitments
    norms = [np.linalg.norm(c.direction) for c in redrawn]
    np.testing.assert_allclose(norms, np.linalg.norm(one.direction), rtol=1e-5)
    cosines = [abs(redrawn[0].direction @ c.direction) / norms[0] ** 2 for c in redrawn[1:]]
    assert len(redrawn) > 13  # more than a fork has questions
    # In 64 dimensions |cos| has mean 0.1 and standard deviation 0.075.
    assert np.mean(cosines) == pytest.approx(math.sqrt(2 / (math.pi * 64)), abs=0.01)


def test_the_dose_is_what_the_log_defines(laboratory):
    task = Task("commitment", 0.25, "last quarter", 3)
    (one,) = laboratory.injection(task).commitments
    norm = laboratory.conditions.residual_norms.mean()
    expected = 0.25 * 2 * np.linalg.norm(one.direction) / norm
    assert laboratory.dose(task) == pytest.approx(expected)
    assert laboratory.dose(Task("none")) == 0


def test_the_logs_doses_are_those_of_its_model():
    """By hand: 32 layers of ‖W_c z*‖ = sqrt(8192 / 4160) against ‖h‖ = sqrt(4096) · 0.6 / 1.645."""
    assert stats.norm.ppf(0.95) == pytest.approx(1.645, abs=1e-3)  # the upper tenth of |h_i|
    assert pytest.approx(64 * 0.6 / 1.645, abs=0.5) == log_experiments.LOG_RESIDUAL_NORM
    one = 32 * math.sqrt(8192 / 4160) / log_experiments.LOG_RESIDUAL_NORM
    doses = [log_experiments.log_dose(row.strength, row.layers) for row in NAMED_ROWS]
    assert doses == pytest.approx([one, one / 10, one / 100, one / 400])


def test_rows_at_the_logs_dose_have_it_in_this_model(laboratory):
    rows = log_experiments.rows_at_the_logs_dose(
        64, 6, 16, laboratory.conditions.residual_norms.mean())
    assert [row.key for row in rows] == [f"log_dose.{row.key}" for row in NAMED_ROWS]
    typical = math.sqrt(2 * 64 / (64 + 16))
    for row, named in zip(rows, NAMED_ROWS, strict=True):
        assert row.layers == named.layers
        task = Task("commitment", row.strength, row.layers, 3)
        (one,) = laboratory.injection(task).commitments
        dose = laboratory.dose(task) * typical / np.linalg.norm(one.direction)
        assert dose == pytest.approx(log_experiments.log_dose(named.strength, named.layers))
        assert row.label == f"the log's dose of {named.label}"


def test_ranges_of_the_same_layers_have_the_same_span():
    ranges = log_experiments.RANGES
    assert [log_experiments.span(name, 3) for name in ranges] == ["0–2", "2", "0", "0"]
    assert len({log_experiments.span(name, 32) for name in ranges}) == 4


@given(st.integers(1, 200))
def test_named_ranges_lie_in_the_model(layers):
    quarter = -(-layers // 4)
    assert log_experiments.layer_range("all", layers) == (0, layers - 1)
    assert log_experiments.layer_range("first quarter", layers) == (0, quarter - 1)
    assert log_experiments.layer_range("last quarter", layers) == (layers - quarter, layers - 1)
    assert log_experiments.layer_range("layer 0", layers) == (0, 0)
    assert log_experiments.layer_range("middle layer", layers) == (layers // 2, layers // 2)
    assert log_experiments.layer_range("last quarter", 32) == (24, 31)  # the log's last 8 layers


def test_an_unknown_range_is_refused():
    with pytest.raises(ValueError, match="last quarter"):
        log_experiments.layer_range("last qarter", 8)


def test_rows_hold_their_items(laboratory):
    """What the journal keeps is what the probes said, item by item."""
    task = Task("redrawn", 0.5, "all", 1)
    row, injection = laboratory.evaluate(task), laboratory.injection(task)
    speaker = laboratory.engine.speaker
    recall = probes.recall(speaker, laboratory.conditions.items.recall, injection)
    fork = probes.fork(speaker, laboratory.conditions.items.fork, injection)
    expected = {"answered": recall.answered, "recall": recall.recalled,
                "eviction": recall.recalled_after_eviction, "same_choice": fork.same,
                "yes_sum": fork.yes_sum, "answer_mass": fork.answer_mass,
                "named_mass": fork.named_mass, "first_named": fork.named[:, 0]}
    rows = pd.DataFrame([row, row])
    assert set(sweep_metrics.BY_ITEM) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(sweep_metrics.by_item(rows, name), [values, values], rtol=1e-5)
        assert row[name] == pytest.approx(values.mean())
    assert row["same_choice_items"] == "".join(str(int(x)) for x in fork.same)


def test_language_is_measured_where_it_is_asked_for(laboratory, tmp_path):
    tasks = [Task("redrawn", 0.5, "all", 1, language=language) for language in (False, True)]
    rows = laboratory.run(tasks, tmp_path)
    assert rows["perplexity"].isna().tolist() == [True, False]
    assert rows["word"].tolist()[0] == "unread"
    assert rows["yes_sum_items"].nunique() == 1
    assert sweep_metrics.interval_of(rows, "perplexity") is None
    assert laboratory.run(tasks, tmp_path).equals(rows)


def test_summaries_are_means_with_intervals_over_what_varied(laboratory, tmp_path):
    rows = laboratory.run(TASKS, tmp_path)
    table = sweep_metrics.summarise(rows)
    part = rows[(rows["control"] == "commitment") & (rows["layers"] == "all")]
    entry = table[(table["control"] == "commitment") & (table["layers"] == "all")].iloc[0]
    low, high = stats.t.interval(0.95, 1, part["kl_mean"].mean(), stats.sem(part["kl_mean"]))
    assert entry["kl_mean"] == pytest.approx(part["kl_mean"].mean())
    assert (entry["kl_mean_low"], entry["kl_mean_high"]) == pytest.approx((max(low, 0), high))
    for name in sweep_metrics.BY_ITEM:
        expected = hierarchical(sweep_metrics.by_item(part, name), share=name != "yes_sum")
        assert (entry[f"{name}_low"], entry[f"{name}_high"]) == (expected.low, expected.high)
    assert entry["span"] == "0–5"
    assert entry["range"] == "all"


def test_a_measure_of_language_stays_in_its_range_and_has_no_interval_of_no_width():
    rows = pd.DataFrame({"same_top": [0.99, 1.0, 1.0], "kl_p95": [0.0, 0.1, 3.0],
                         "distinct_1": [0.5, 0.5, 0.5]})
    assert sweep_metrics.interval_of(rows, "same_top").high == 1.0
    assert sweep_metrics.interval_of(rows, "kl_p95").low == 0.0
    assert sweep_metrics.interval_of(rows, "kl_p95").high > 3
    assert sweep_metrics.interval_of(rows, "distinct_1") is None


@given(st.floats(1e-3, 10), st.floats(0.3, 4), st.floats(1e-3, 20))
def test_the_solver_inverts_power_laws(scale, power, budget):
    answer = (budget / scale) ** (1 / power)
    assume(2 * calibration.BRACKET[0] < answer < calibration.BRACKET[1] / 2)
    found = calibration.solve_budget(lambda strength: scale * strength**power, budget)
    assert found is not None
    assert found.strength == pytest.approx(answer, rel=2e-3)
    assert found.divergence == pytest.approx(budget, rel=1e-2)


def test_the_solver_takes_the_first_of_several_crossings():
    def bump(strength):  # rises through 1 at 0.05, falls through 1 at 2, rises for good at 100
        return 2.0 if 0.05 <= strength < 2 or strength >= 100 else 0.5

    found = calibration.solve_budget(bump, 1.0)
    assert found is not None
    assert found.strength == pytest.approx(0.05, rel=2e-3)


def test_the_solver_says_when_the_budget_is_never_spent():
    assert calibration.solve_budget(lambda _: 0.5, 1.0) is None
    found = calibration.solve_budget(lambda _: 5.0, 1.0)
    assert found is not None
    assert found.strength == calibration.BRACKET[0]


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_budget_is_refused(budget):
    with pytest.raises(ValueError, match="KL budget"):
        calibration.solve_budget(lambda strength: strength, budget)


def test_calibration_spends_its_budget(laboratory):
    ranges, seeds = ("all", "first quarter", "layer 0"), (1, 2)
    solutions = calibration.calibrate(InOrder(), laboratory.engine, ranges, seeds, 0.2,
                                      laboratory.conditions)
    assert list(solutions) == list(ranges)
    for name, found in solutions.items():
        for seed, solution in zip(seeds, found, strict=True):
            assert solution is not None
            assert solution.divergence == pytest.approx(0.2, rel=0.02)
            again = laboratory.injection(
                Task("commitment", solution.strength, name, seed))
            kl = coherence.divergence(laboratory.engine.speaker,
                                      laboratory.conditions.material, again,
                                      laboratory.conditions.baseline)
            assert np.percentile(kl, 95) == pytest.approx(solution.divergence)
    strengths = {name: [s.strength for s in found] for name, found in solutions.items()}
    assert strengths["all"][0] < strengths["layer 0"][0]  # six layers spend it sooner than one
