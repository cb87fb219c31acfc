"""What chapters 1 and 2 record, against computations of their own on made-up sweeps."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lablog.commitment import coherence, log_experiments, plots
from lablog.commitment import sweep_metrics as results
from lablog.commitment.calibration import Solution
from lablog.run import Run

SEEDS, ITEMS = (1, 2, 3, 4, 5), 60
SPANS = {"all": "0–2", "last quarter": "2", "first quarter": "0", "layer 0": "0"}
"""Of a model with three layers: four names, three ranges."""
COHERENT = coherence.Coherence(4.0, 0.01, 0.1, 0.99, 0.02, 0.2, 0.05, 0.5, 0.6)


def row(control, strength, layers, seed, shares, word="coherent", language=True):
    """One row of a sweep; `shares` gives each probe's chance of success."""
    entry = {"control": control, "strength": strength, "layers": layers, "seed": seed,
             "language": language, "span": SPANS[layers], "items": ITEMS, "dose": 0.3 * strength,
             "word": word if language else "unread"}
    for name, value in vars(COHERENT).items():
        entry[name] = value + 0.001 * seed if language else math.nan
    rng = np.random.default_rng([ITEMS, seed, round(1000 * strength), len(control),
                                 *map(ord, SPANS[layers])])
    for name in ("recall", "eviction", "same_choice", "answered"):
        hits = rng.random(ITEMS) < shares.get(name, 0.5)
        entry |= {name: hits.mean(), f"{name}_items": "".join("01"[int(hit)] for hit in hits)}
    for name in ("yes_sum", "answer_mass", "named_mass", "first_named"):
        values = rng.random(ITEMS)
        entry |= {name: values.mean(), f"{name}_items": " ".join(f"{v:.6g}" for v in values)}
    return entry


def made_up(planted=None, words=None, names=tuple(SPANS)):
    """Every range × λ 0.1 and 1 × seeds × both controls, at 10 % unless planted."""
    planted, words, low = planted or {}, words or {}, {"recall": 0.1, "eviction": 0.1,
                                                       "same_choice": 0.1}
    rows = [row("none", 0.0, "all", 0, low), row("text", 0.0, "all", 0, low)]
    for layers in names:
        for strength in (0.1, 1.0):
            for seed in SEEDS:
                for control in ("commitment", "redrawn"):
                    shares = low | planted.get((control, SPANS[layers], strength), {})
                    word = words.get((SPANS[layers], strength), "coherent")
                    rows.append(row(control, strength, layers, seed, shares, word))
    return pd.DataFrame(rows)


def opened(tmp_path):
    return Run("02_lambda_calibration", "smoke", tmp_path, tmp_path, {})


PLANTED = {
    ("commitment", "0–2", 1.0): {"recall": 0.9, "same_choice": 0.8},  # works on two probes
    ("commitment", "2", 1.0): {"eviction": 0.9},  # better than λ = 0, but so is the control
    ("redrawn", "2", 1.0): {"eviction": 0.9},
    ("commitment", "0", 1.0): {"recall": 0.9},  # better than both, but incoherent
}


def test_improvements_count_distinct_cells_against_both_controls(tmp_path):
    run = opened(tmp_path)
    rows = made_up(PLANTED, {("0", 1.0): "incoherent"})
    run.metrics(results.of_improvements(rows, results.improvements(rows)))
    record = run.record()

    def counted(name):
        metric = record.metric(name)
        assert metric.value == metric.numerator
        return metric.numerator, metric.denominator

    assert record.metric("cells").value == 6  # three ranges, not four names, × two strengths
    assert record.metric("comparisons").value == 18
    assert counted("works.recall") == (1, 6)
    assert counted("works.eviction") == (0, 6)
    assert counted("works.same_choice") == (1, 6)
    assert counted("works.recall_and_same_choice") == (1, 6)
    assert counted("above_unmodified.eviction") == (1, 6)
    assert counted("above_redrawn.eviction") == (0, 6)
    assert counted("coherent_cells") == (5, 6)
    assert record.metric("works.recall").seeds == SEEDS
    assert record.metric("works.recall").n == ITEMS


def test_nothing_planted_nothing_works(tmp_path):
    """Fifty sweeps without any effect: Holm keeps a false cell to one sweep in twenty."""
    found = 0
    for number in range(50):
        rows = made_up(names=("all", "layer 0"))
        rng = np.random.default_rng(number)
        for name in results.PROBES:  # other luck for each sweep
            rows[f"{name}_items"] = ["".join("01"[int(hit)] for hit in rng.random(ITEMS) < 0.3)
                                     for _ in range(len(rows))]
        found += int((results.compare_cells(rows)["p_holm"] < 0.05).any())
    assert found <= 3


def test_the_comparisons_are_paired_and_corrected_together():
    """Against differences and an analysis of variance made here, and Bonferroni step by step."""
    rows = made_up(PLANTED)
    table = results.compare_cells(rows)

    def items(control, span, strength, name):
        part = rows[(rows["control"] == control) & (rows["span"] == span)
                    & (rows["strength"] == strength)].drop_duplicates("seed")
        return np.array([[int(x) for x in text] for text in part[f"{name}_items"]])

    def p_value(d):
        seeds, count = d.shape
        ms_seed = count * d.mean(1).var(ddof=1)
        ms_item = seeds * d.mean(0).var(ddof=1)
        centred = d - d.mean(1, keepdims=True) - d.mean(0) + d.mean()
        ms_rest = (centred**2).sum() / (seeds - 1) / (count - 1)
        error = max(ms_seed + ms_item - ms_rest, ms_seed, ms_item)
        freedom = error**2 / (ms_seed**2 / (seeds - 1) + ms_item**2 / (count - 1)
                              + ms_rest**2 / (seeds - 1) / (count - 1))
        return stats.t.sf(d.mean() / math.sqrt(error / d.size), max(freedom, 1))

    base = rows[rows["control"] == "none"].iloc[0]
    for entry in table.to_dict("records"):
        mine = items("commitment", entry["span"], entry["strength"], entry["probe"])
        control = items("redrawn", entry["span"], entry["strength"], entry["probe"])
        unmodified = np.array([int(x) for x in base[f"{entry['probe']}_items"]])
        assert entry["over_unmodified"] == pytest.approx((mine - unmodified).mean())
        assert entry["over_redrawn"] == pytest.approx((mine - control).mean())
        expected = p_value(mine - unmodified), p_value(mine - control)
        assert (entry["p_unmodified"], entry["p_redrawn"]) == pytest.approx(expected)
        assert entry["p"] == pytest.approx(max(expected))
    ordered = table.sort_values("p", kind="stable")
    largest = 0.0
    for step, (_, entry) in enumerate(ordered.iterrows()):
        largest = max(largest, min(1.0, (18 - step) * entry["p"]))
        assert entry["p_holm"] == pytest.approx(largest)


def test_a_cell_without_its_control_is_refused():
    rows = made_up()
    gone = (rows["control"] == "redrawn") & (rows["span"] == "2") & (rows["seed"] == 4)
    with pytest.raises(ValueError, match="in layers 2 has no redrawn control under the same seeds"):
        results.compare_cells(rows[~gone])


def test_names_of_the_same_layers_are_drawn_once():
    table = results.summarise(made_up())
    drawn = plots.distinct(table)
    assert len(table) == 2 + 4 * 2 * 2
    assert len(drawn) == 2 + 3 * 2 * 2
    assert set(drawn["range"]) == {"all", "last quarter", "first quarter = layer 0"}
    for function in (plots.heat, plots.by_range, plots.dose):
        _, data = function(table)
        assert "first quarter = layer 0" in set(data["range"])
        assert not data.duplicated(["control", "range", "strength"]).any()
        assert data["dose"].notna().all()


def named_rows(language=True):
    rows = [row("none", 0.0, "all", 0, {"recall": 1.0}), row("text", 0.0, "all", 0, {})]
    rows += [row(control, named.strength, named.layers, seed, {}, language=language)
             for named in log_experiments.NAMED_ROWS for control in ("commitment", "redrawn")
             for seed in SEEDS]
    return pd.DataFrame(rows)


def test_named_rows_are_recorded_with_their_controls(tmp_path):
    rows, run = named_rows(), opened(tmp_path)
    run.metrics(results.of_named_rows(rows))
    record = run.record()
    for named in log_experiments.NAMED_ROWS:
        for control, key in (("commitment", named.key), ("redrawn", f"redrawn.{named.key}")):
            part = rows[(rows["control"] == control) & (rows["layers"] == named.layers)
                        & (rows["strength"] == named.strength)]
            hits = sum(text.count("1") for text in part["eviction_items"])
            metric = record.metric(f"{key}.eviction")
            assert metric.value == pytest.approx(hits / (5 * ITEMS))
            assert (metric.numerator, metric.denominator) == (hits, 5 * ITEMS)
            assert metric.n == ITEMS  # five seeds of the same items are not five times as many
            assert metric.seeds == SEEDS
            assert "over 5 seeds and 60 items" in metric.interval_method
            perplexity = record.metric(f"{key}.perplexity")
            assert perplexity.value == pytest.approx(np.mean(part["perplexity"]))
            assert perplexity.interval == pytest.approx(
                stats.t.interval(0.95, 4, perplexity.value, stats.sem(part["perplexity"])))
            assert perplexity.n is None
            assert record.metric(f"{key}.dose").value == pytest.approx(0.3 * named.strength)
            word = record.metric(f"{key}.word")
            assert (word.value, word.numerator, word.denominator) == ("coherent", 5, 5)
    unmodified = record.metric("unmodified.recall")
    assert (unmodified.value, unmodified.interval_method) == (1, "Wilson score over 60 items")
    assert unmodified.seeds is None


def test_language_that_was_not_measured_is_not_recorded(tmp_path):
    rows, run = named_rows(language=False), opened(tmp_path)
    run.metrics(results.of_named_rows(rows))
    names = {metric.name for metric in run.record().metrics}
    assert "redrawn.lambda1.all.recall" in names
    assert "redrawn.lambda1.all.perplexity" not in names
    assert "unmodified.perplexity" in names


def test_a_missing_named_row_is_refused():
    rows = named_rows()
    with pytest.raises(ValueError, match=r"no row 'λ = 0.1, all layers' \(redrawn\): add 0.1"):
        results.of_named_rows(rows[
            (rows["control"] != "redrawn") | (rows["strength"] != 0.1)])


def test_the_budget_is_a_geometric_mean_with_its_dose(tmp_path):
    run, strengths = opened(tmp_path), [2.0, 3.0, 8.0]
    units = [0.05, 0.06, 0.04]
    found = [Solution(s, 1.0, 9) for s in strengths]
    table = results.budget_table("last quarter", found, (1, 2, 3), units)
    run.metrics(results.of_budget(table), under="budget.last_quarter")
    record = run.record()
    for name, values in (("lambda", strengths), ("dose", np.multiply(strengths, units))):
        metric = record.metric(f"budget.last_quarter.{name}")
        assert metric.value == pytest.approx(stats.gmean(values))
        half = stats.t.ppf(0.975, 2) * np.std(np.log(values), ddof=1) / math.sqrt(3)
        assert metric.interval == pytest.approx(
            (metric.value * math.exp(-half), metric.value * math.exp(half)))
        assert metric.seeds == (1, 2, 3)
    assert table["dose"].tolist() == pytest.approx([0.1, 0.18, 0.32])
    assert table["mean"].tolist() == pytest.approx([stats.gmean(strengths)] * 3)


def test_a_budget_that_one_seed_reaches_is_undefined(tmp_path):
    run = opened(tmp_path)
    table = results.budget_table("all", [Solution(2.0, 1.0, 9), None, None], (1, 2, 3),
                                 [0.1, 0.1, 0.1])
    run.metrics(results.of_budget(table), under="budget.all")
    for name in ("lambda", "dose"):
        metric = run.record().metric(f"budget.all.{name}")
        assert metric.value is None
        assert metric.undefined == "1 of 3 seeds reach the budget"
    assert table["mean"].isna().all()
    found = [Solution(2.0, 1.0, 9), None, Solution(8.0, 1.0, 9)]
    two = results.budget_table("all", found, (1, 2, 3), [0.1] * 3)
    assert two["mean"].iloc[0] == pytest.approx(4.0)


def test_the_journal_can_hold_what_a_row_holds():
    entry = row("redrawn", 0.5, "all", 1, {}, language=False)
    again = json.loads(json.dumps(entry))
    for name in results.BY_ITEM:
        np.testing.assert_array_equal(results.by_item(pd.DataFrame([again]), name),
                                      results.by_item(pd.DataFrame([entry]), name))


def test_controls_that_help_by_text_are_recorded_and_drawn_under_their_names(tmp_path):
    named = log_experiments.NAMED_ROWS[:1]
    rows = pd.concat([made_up(), pd.DataFrame([
        row(aid, 0.0, "all", 0, {"same_choice": share}, language=False)
        for aid, share in (("system", 0.9), ("instruction", 0.2))])], ignore_index=True)
    run = opened(tmp_path)
    run.metrics(results.of_named_rows(rows, named))
    record = run.record()
    for aid in ("unmodified", "text", "system", "instruction"):
        assert record.metric(f"{aid}.same_choice").denominator == ITEMS
    told, wished = (record.metric(f"{aid}.same_choice").value for aid in ("system", "instruction"))
    assert told > wished
    assert "system.perplexity" not in {metric.name for metric in record.metrics}
    figure, data = plots.named_rows(results.summarise(rows), named)
    assert list(data["row"][:4]) == ["unmodified", "a line of text instead", "told by the system",
                                     "asked to keep to it"]
    plt.close(figure)


def test_a_grid_without_the_logs_rows_is_refused_before_anything_is_swept():
    strengths, ranges = [0.0, 0.01, 0.1, 1.0], ["all", "last quarter", "last 8"]
    results.check_named(ranges, strengths)
    with pytest.raises(ValueError, match="needs 'last quarter': add it"):
        results.check_named(["all"], strengths)
    with pytest.raises(ValueError, match=r"strengths = .* needs 0\.1: add it"):
        results.check_named(ranges, [0.01, 1.0])


def test_the_budget_is_drawn_for_the_ranges_that_were_solved():
    solutions = [Solution(1.0, 1.0, 5), Solution(2.0, 1.0, 5)]
    table = pd.concat([results.budget_table(name, solutions, (1, 2), (0.1, 0.1))
                       for name in ("all", "last 8", "last 1")])
    figure, _ = plots.budget(table, 1.0)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all", "last 8", "last 1"]
    plt.close(figure)
