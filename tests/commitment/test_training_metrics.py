"""What chapter 3 records: values and intervals against a second computation, targets, report."""

import math
import re

import jupytext
import numpy as np
import pytest
from scipy import stats

from lablog.commitment import training_metrics
from lablog.commitment.arms import ARMS, Asked
from lablog.commitment.novelty import HEADLINE, KINDS
from lablog.commitment.training_metrics import (
    MAIN,
    MEASURES,
    Measured,
    against_target,
    of_arms,
    of_contrasts,
    slug,
    stacked,
    table,
)
from lablog.profiles import notebook_path
from lablog.record import Metric
from lablog.report import ReportError, mandated
from lablog.run import Run

BASES, SEEDS, ITEMS, TEXTS = (1, 4, 7), (1, 2, 3, 4, 5), 40, 10
ASKED = Asked(11, ITEMS, TEXTS)
ONE_SEED = ("base", "window")
CONTROLS = {"lora": SEEDS[:3], "note": SEEDS[:3]}
CHANCE = {"lora": 0.1, "base": 0.1, "redrawn": 0.1, "random": 0.15}


def seeds_of(arm: str) -> tuple[int, ...]:
    return SEEDS[:1] if arm in ONE_SEED else CONTROLS.get(arm, SEEDS)


def measured(asked: Asked = ASKED, arms=MAIN, certain: bool = False) -> list[Measured]:
    """Made-up rows: bases, seeds and items each have a say in whether an item succeeds."""
    dice = np.random.default_rng(5)
    offset = {"base": dice.normal(0, 0.6, len(BASES)), "seed": dice.normal(0, 0.3, 15),
              "item": dice.normal(0, 0.8, ITEMS)}
    tokens = dice.integers(20, 60, TEXTS).astype(float)
    rows = []
    for b, base in enumerate(BASES):
        for seed in SEEDS:
            for arm in arms:
                if seed not in seeds_of(arm):
                    continue
                level = stats.norm.ppf(CHANCE.get(arm, 0.85))
                score = level + offset["base"][b] + offset["seed"][seed] + offset["item"]
                values = {name: (dice.normal(size=ITEMS) < score).astype(float)
                          for name in ("answered", "recall", "eviction", "same_choice", "kept",
                                       "hangman")}
                if certain:
                    values["same_choice"] = np.ones(ITEMS)
                values |= {name: stats.norm.cdf(score) for name in ("yes_named", "yes_largest")}
                values["yes_sum"] = 0.5 + stats.gamma.rvs(2, scale=0.3, size=ITEMS,
                                                          random_state=dice)
                values["nll"] = tokens * (0.5 + 0.1 * dice.random(TEXTS))
                values["own_tokens"], values["kl_base"] = tokens, 0.1 * tokens * dice.random(TEXTS)
                if ARMS[arm].source == "prior":
                    values["reached"] = dice.integers(8, 13, 6) / 12
                if arm == "prefix":
                    values["kl"] = 2 + dice.random(ITEMS)
                rows.append(Measured(base, seed, arm, asked,
                                     {n: list(map(float, v)) for n, v in values.items()}))
    return rows


ROWS = measured()


def bootstrap(values: np.ndarray, sizes: np.ndarray | float = 1.0,
              draws: int = 4000) -> tuple[float, float]:
    """Bases, seeds within each, and items are drawn anew, each with its size; expanded
    percentiles."""
    bases, seeds, items = values.shape
    dice = np.random.default_rng(99)
    picked = dice.integers(0, bases, (draws, bases, 1)) * seeds
    units = (picked + dice.integers(0, seeds, (draws, bases, seeds))).reshape(draws, -1)
    drawn = dice.integers(0, items, (draws, items))
    rows, lengths = (np.broadcast_to(x, values.shape).reshape(-1, items) for x in (values, sizes))
    means = [(rows[u][:, i].sum(axis=1) / lengths[u][:, i].sum(axis=1)).mean()
             for u, i in zip(units, drawn, strict=True)]
    count = bases * seeds
    tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf(0.025, count - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run("03_qlora_commitment", "smoke", tmp_path, tmp_path, {"seeds": list(SEEDS)})


def of(arm: str, measure: str) -> np.ndarray:
    """[bases, seeds, items], put together by hand."""
    return np.array([[next(row.values[measure] for row in ROWS
                           if (row.base, row.seed, row.arm) == (base, seed, arm))
                      for seed in seeds_of(arm)] for base in BASES])


# --- values and intervals -------------------------------------------------------------------------


def test_rows_are_stacked_by_base_seed_and_item():
    other = measured(Asked(11, ITEMS, kind="new topic", gap=6))
    for arm in MAIN:
        np.testing.assert_array_equal(stacked([*other, *ROWS], arm, "recall"), of(arm, "recall"))
    assert stacked(ROWS, "prior", "kl") is None
    assert stacked(ROWS, "prior", "recall", "new topic") is None
    assert stacked(other, "prior", "recall", "new topic") is None  # at another gap
    found = stacked(other, "prior", "recall", "new topic", 6)
    assert found.shape == (3, 5, ITEMS)
    np.testing.assert_array_equal(stacked(ROWS, "prior", "recall", seeds=(2, 5)),
                                  of("prior", "recall")[:, [1, 4]])


def test_the_seeds_of_a_metric_are_those_of_its_kind_of_probe(run):
    new = Asked(11, ITEMS, kind="new topic")
    few = [row for row in measured(new) if row.seed in SEEDS[:2]]
    run.metrics(of_arms([*ROWS, *few], "new topic"), under="new_topic")
    assert run.record().metric("new_topic.prior.recall").seeds == SEEDS[:2]


def test_every_arm_is_recorded_with_its_mean_counts_and_seeds(run):
    run.metrics(of_arms(ROWS))
    record = run.record()
    names = {metric.name for metric in record.metrics}
    assert names == {f"{arm}.{measure}" for arm in MAIN for measure in
                     [*MEASURES, "perplexity", "kl_base"]
                     if (measure != "kl" or arm == "prefix")
                     and (measure != "reached" or ARMS[arm].source == "prior")}
    for arm in MAIN:
        for measure in ("recall", "same_choice", "yes_sum"):
            metric, values = record.metric(f"{arm}.{measure}"), of(arm, measure)
            assert metric.value == pytest.approx(values.mean())
            assert metric.n == ITEMS
            assert metric.seeds == (None if arm in ONE_SEED else seeds_of(arm))
            low, high = metric.interval
            assert low < metric.value < high
            if measure != "yes_sum":
                assert (metric.numerator, metric.denominator) == (values.sum(), values.size)
        nll, tokens = of(arm, "nll"), of(arm, "own_tokens")
        per_run = nll.sum(axis=2) / tokens.sum(axis=2)  # a text counts by its length
        assert record.metric(f"{arm}.perplexity").value == pytest.approx(
            math.exp(per_run.mean()))
        drift = of(arm, "kl_base").sum(axis=2) / tokens.sum(axis=2)
        assert record.metric(f"{arm}.kl_base").value == pytest.approx(drift.mean())


@pytest.mark.parametrize("measure", ["same_choice", "yes_sum"])
def test_intervals_are_those_of_a_bootstrap_over_bases_seeds_and_items(run, measure):
    run.metrics(of_arms(ROWS))
    values = of("prior", measure)
    low, high = run.record().metric(f"prior.{measure}").interval
    assert (low, high) == pytest.approx(bootstrap(values), abs=0.12 * (high - low))
    over_items = 1.96 * values.mean(axis=(0, 1)).std(ddof=1) / math.sqrt(ITEMS)
    if measure == "same_choice":  # where the bases differ, items alone are too sure
        assert high - low > 2.5 * over_items


def test_an_interval_of_a_ratio_is_that_of_its_logarithm(run):
    run.metrics(of_arms(ROWS))
    nll, tokens = of("prior", "nll"), of("prior", "own_tokens")
    logs = [math.log(x) for x in run.record().metric("prior.perplexity").interval]
    expected = bootstrap(nll, tokens)
    assert logs == pytest.approx(expected, abs=0.15 * (logs[1] - logs[0]))


def test_shares_of_zero_and_one_have_intervals_inside_with_width(run):
    rows = measured(certain=True)
    run.metrics(of_arms(rows))
    for metric in run.record().metrics:
        if metric.unit == "fraction":
            low, high = metric.interval
            assert 0 <= low < high <= 1
            assert low <= metric.value <= high
    sure = run.record().metric("prior.same_choice")
    assert sure.value == sure.interval[1] == 1
    z = stats.norm.ppf(0.975)
    assert sure.interval[0] == pytest.approx(1 / (1 + z**2 / ITEMS))  # Wilson over the items


def test_contrasts_are_paired_over_the_seeds_that_both_have(run):
    run.metrics(of_contrasts(ROWS))
    record = run.record()
    for arm, control in (("prior", "redrawn"), ("prior", "lora"), ("prefix", "note")):
        metric = record.metric(f"{arm}_minus_{control}.same_choice")
        seeds = set(seeds_of(control))
        chosen = [s in seeds for s in SEEDS]
        difference = of(arm, "same_choice")[:, chosen] - of(control, "same_choice")
        assert metric.value == pytest.approx(difference.mean())
        assert metric.seeds == seeds_of(control)
        low, high = metric.interval
        assert (low, high) == pytest.approx(bootstrap(difference), abs=0.2 * (high - low))
    tokens = of("lora", "own_tokens")
    ratio = (of("prior", "nll")[:, :3] - of("lora", "nll")).sum(axis=2) / tokens.sum(axis=2)
    assert record.metric("prior.perplexity_over_lora").value == pytest.approx(
        math.exp(ratio.mean()))
    assert record.metric("lora.eviction_over_chance").value == pytest.approx(
        12 * of("lora", "eviction").mean())


# --- table and report -----------------------------------------------------------------------------


def test_the_table_shows_the_recorded_numbers_and_a_dash_where_there_are_none(run):
    run.metrics(of_arms(ROWS))
    shown = table(run.record(), [*MAIN, "first_position.prior"])
    assert list(shown.index) == [ARMS[arm].label for arm in (*MAIN, "first_position.prior")]
    value = run.record().metric("prior.same_choice")
    low, high = value.interval
    cell = shown.loc[ARMS["prior"].label, "same X in both forms"]
    assert cell == f"{100 * value.value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
    assert set(shown.loc[ARMS["first_position.prior"].label]) == {"–"}
    assert "(" not in "".join(shown.to_numpy().ravel())  # counts of all runs together say nothing


def test_the_report_asks_for_every_number_and_gets_it(run):
    rows = list(ROWS)
    for kind in KINDS:
        if kind != HEADLINE:
            rows += measured(Asked(11, ITEMS, kind=kind))
    run.metrics(of_arms(rows))
    run.metrics(of_contrasts(rows))
    for kind in KINDS:
        run.metrics(of_arms(rows, kind), under=slug(kind))
    for name in ("training.steps", "training.tokens", "training.kl", "training.active_units",
                 "training.collapsed", "latent.kl", "latent.nll_gap_shuffled",
                 "latent.nll_gap_zero"):
        run.metric(name, 123, "")
    for engine in ("native", "pytorch"):
        for source in ("prior", "prefix", "q8_0"):
            for measure in ("recall", "eviction", "same_choice", "yes_sum", "logit_difference",
                            "greedy_equal", "named_equal", "yes_sum_difference"):
                run.metric(f"{engine}.{source}.{measure}", 0.5, "")
    for name in ("trained", "held_out", "gap", "gap_shuffled"):
        run.metric(f"personas.{name}", 0.5, "")
    named = {"arms": [(arm, ARMS[arm].label) for arm in MAIN], "kinds": KINDS}
    record = run.record()
    report = mandated(record, **named)
    for text in (report.english, report.japanese):
        assert "{" not in text
        for arm in MAIN:
            share = record.metric(f"{arm}.same_choice").value
            assert f"{100 * share:.1f}%" in text
    wanted = [*(f"{arm}.yes_named" for arm in MAIN),
              *(f"{slug(kind)}.prior.same_choice" for kind in KINDS),
              "prior.perplexity_over_lora", "latent.kl",
              "native.q8_0.logit_difference", "native.prefix.greedy_equal",
              "personas.gap"]
    for left_out in wanted:
        short = record.model_copy(update={
            "metrics": tuple(m for m in record.metrics if m.name != left_out)})
        with pytest.raises(ReportError, match=left_out):
            mandated(short, **named)


MET = {
    "training.steps": 900, "training.device": "cpu",
    "prior.same_choice": 0.931, "lora.same_choice": 0.111,
    "redrawn.same_choice": 0.112, "note.same_choice": 0.9311, "prior.yes_named": 0.88,
    "random.reached": 0.958,
    "lora.yes_named": 0.2, "prior.yes_sum": 1.03, "lora.yes_sum": 1.2, "prefix.eviction": 0.957,
    "prior.eviction": 0.847, "lora.eviction_over_chance": 1.37, "note.eviction": 0.77,
    "prefix.recall": 0.9, "prior.recall": 0.91, "lora.recall": 0.92, "prior.reached": 0.9167,
    "prefix.perplexity_over_lora": 1.013, "prior.perplexity_over_lora": 1.031,
    "prior.hangman": 0.3, "note.hangman": 0.4, "lora.hangman": 0.01,
}
TARGETS = {  # by metric, a value on each side that misses it
    "prior.same_choice": (0.899,), "prior.yes_sum": (0.79, 1.26), "prefix.eviction": (0.899,),
    "prior.eviction": (0.799,), "lora.eviction_over_chance": (2.01,), "prior.reached": (0.79,),
    "prefix.perplexity_over_lora": (1.051,), "prior.perplexity_over_lora": (1.051,),
}


def found_with(run: Run, **changes: float) -> str:
    for name, value in (MET | changes).items():
        run.metric(name, value, "count" if name == "training.steps" else "")
    return findings(run)


def findings(run: Run) -> str:
    """What the cells of the notebook below "Findings" say of the record, on one line."""
    said: list[str] = []
    cells = jupytext.read(notebook_path("03_qlora_commitment")).cells
    begin, end = (next(i for i, cell in enumerate(cells) if cell.source.startswith(title))
                  for title in ("## Findings", "## Report"))
    say = run.say
    run.say = lambda text: said.append(say(text).data)
    names = {"run": run, "metrics": training_metrics}
    for cell in cells[begin:end]:
        if cell.cell_type == "code":
            exec(cell.source, names)
    assert len(said) == 2
    return " ".join(" ".join(said).split())


def test_findings_hold_the_number_of_every_target(run):
    text = found_with(run)
    assert text.count(": met)") == len(TARGETS)
    assert "missed" not in text
    for name in TARGETS:
        assert f"{MET[name]:.4g} (target" in text


def test_the_sum_of_yes_without_a_latent_stands_as_it_is(run):
    assert "without z* is 0.2. " in found_with(run, **{"lora.yes_sum": 0.2})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in TARGETS.items() for v in vs])
def test_a_target_that_is_missed_is_said_to_be(run, name, value):
    text = found_with(run, **{name: value})
    assert text.count("missed") == 1
    assert re.search(rf"{value:.4g} \(target [a-z0-9. ]+: missed\)", text)


@pytest.mark.parametrize(("value", "interval", "limits", "told"), [
    (0.93, (0.91, 0.99), (0.9, 1), "target at least 0.9: met"),
    (0.93, (0.86, 0.99), (0.9, 1), "target at least 0.9: met, its interval lies on both sides"),
    (0.89, (0.80, 0.96), (0.9, 1), "target at least 0.9: missed, its interval lies on both sides"),
    (1.2, (0.42, 2.16), (0, 2), "target 0 to 2: met, its interval lies on both sides"),
    (2.5, (2.1, 3.0), (0, 2), "target 0 to 2: missed"),
    (None, None, (0, 2), "target 0 to 2: missed"),
])
def test_a_target_is_met_or_missed_and_what_the_interval_leaves_open(value, interval, limits, told):
    metric = Metric(name="x", value=value, unit="ratio", interval=interval,
                    interval_method="bootstrap" if interval else None,
                    undefined="not measured" if value is None else None)
    assert against_target(metric, *limits) == told
