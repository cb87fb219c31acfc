"""Sweep and calibration: resume, controls, intervals, the solver."""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from lablog.commitment import calibration, coherence, sweep


@pytest.fixture(scope="module")
def laboratory(gguf):
    settings = sweep.Settings(k=16, items=4, texts=4, continuations=2, tokens=12, item_seed=0,
                              sequences=27, window=256, chat="plain")
    with sweep.Laboratory(gguf, settings) as opened:
        yield opened


TASKS = sweep.grid((0.0, 0.5), ("all", "layer 0"), (1, 2), ("commitment", "redrawn"))


def test_a_sweep_that_was_cut_off_resumes_to_the_same_table(laboratory, tmp_path):
    whole = laboratory.run(TASKS, tmp_path / "whole")
    journal = next((tmp_path / "whole").glob("sweep-*.jsonl"))
    cut = tmp_path / "cut" / journal.name
    cut.parent.mkdir()
    lines = journal.read_text().splitlines()
    cut.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])  # killed while writing a line
    calls = []
    evaluate = laboratory.evaluate
    laboratory.evaluate = lambda task: calls.append(task) or evaluate(task)
    resumed = laboratory.run(TASKS, cut.parent)
    laboratory.evaluate = evaluate
    assert resumed.equals(whole)
    assert len(calls) == len(TASKS) - 3
    assert laboratory.run(TASKS, cut.parent).equals(whole)
    assert all(json.loads(line) for line in cut.read_text().splitlines()[4:])


def test_strength_zero_is_the_unmodified_model(laboratory):
    none = laboratory.evaluate(sweep.Task("none"))
    zero = laboratory.evaluate(sweep.Task("commitment", 0.0, "all", 1))
    for measure in sweep.MEASURES:
        assert none[measure] == zero[measure], measure


def test_ranges_of_the_same_layers_are_computed_once(laboratory, tmp_path):
    tasks = [sweep.Task("commitment", 0.5, name, 1) for name in ("layer 0", "layer 0", "all")]
    laboratory.run(tasks, tmp_path)
    assert len(next(tmp_path.glob("*.jsonl")).read_text().splitlines()) == 2


def test_the_grid_holds_its_controls():
    assert TASKS[:2] == [sweep.Task("none"), sweep.Task("text")]
    assert len(TASKS) == 2 + 2 * 2 * 2
    assert all(task.strength for task in TASKS[2:])


def test_a_redrawn_direction_has_the_norm_of_the_commitment(laboratory):
    (one,) = laboratory.injection(sweep.Task("commitment", 0.5, "all", 3)).commitments
    redrawn = laboratory.injection(sweep.Task("redrawn", 0.5, "all", 3)).commitments
    norms = [np.linalg.norm(c.direction) for c in redrawn]
    np.testing.assert_allclose(norms, np.linalg.norm(one.direction), rtol=1e-5)
    cosines = [abs(redrawn[0].direction @ c.direction) / norms[0] ** 2 for c in redrawn[1:]]
    assert max(cosines) < 0.6


def test_the_dose_is_what_the_log_defines(laboratory):
    task = sweep.Task("commitment", 0.25, "last quarter", 3)
    (one,) = laboratory.injection(task).commitments
    expected = 0.25 * 2 * np.linalg.norm(one.direction) / laboratory.residual.mean()
    assert laboratory.dose(task) == pytest.approx(expected)
    assert laboratory.dose(sweep.Task("none")) == 0


@given(st.integers(1, 200))
def test_named_ranges_lie_in_the_model(layers):
    for name in sweep.RANGES:
        first, last = sweep.layer_range(name, layers)
        assert 0 <= first <= last < layers
    assert sweep.layer_range("last quarter", 32) == (24, 31)  # the log's last 8 layers
    assert sweep.layer_range("all", layers) == (0, layers - 1)


def test_an_unknown_range_is_refused():
    with pytest.raises(ValueError, match="last quarter"):
        sweep.layer_range("last qarter", 8)


def test_summaries_are_means_with_t_intervals(laboratory, tmp_path):
    rows = laboratory.run(TASKS, tmp_path)
    table = sweep.summarise(rows)
    part = rows[(rows["control"] == "commitment") & (rows["layers"] == "all")]
    entry = table[(table["control"] == "commitment") & (table["layers"] == "all")].iloc[0]
    low, high = stats.t.interval(0.95, 1, part["kl_mean"].mean(), stats.sem(part["kl_mean"]))
    assert entry["kl_mean"] == pytest.approx(part["kl_mean"].mean())
    assert (entry["kl_mean_low"], entry["kl_mean_high"]) == pytest.approx((low, high))


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
    solutions = calibration.calibrate(laboratory, ranges, seeds, 0.2)
    assert list(solutions) == list(ranges)
    for name, found in solutions.items():
        for seed, solution in zip(seeds, found, strict=True):
            assert solution is not None
            assert solution.divergence == pytest.approx(0.2, rel=0.02)
            again = laboratory.injection(
                sweep.Task("commitment", solution.strength, name, seed))
            _, kl, _ = laboratory.with_speech(
                lambda s, i=again: coherence.read_divergence(s, laboratory.material, i))
            assert np.percentile(kl, 95) == pytest.approx(solution.divergence)
    strengths = {name: [s.strength for s in found] for name, found in solutions.items()}
    assert strengths["all"][0] < strengths["layer 0"][0]  # six layers spend it sooner than one
