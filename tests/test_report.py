"""The mandated report: rendered exactly, in both languages, or not at all."""

from datetime import UTC, datetime
from pathlib import Path

import jupytext
import pytest

from lablog.provenance import Machine, Source
from lablog.record import Metric, Record
from lablog.report import IN_PROSE, ReportError, Section, mandated, reject_judgements, render

REPOSITORY = Path(__file__).parents[1]
CVFP = (
    Section(("Training", "訓練結果"), (
        ("convergence: {train.convergence:value} ({train.convergence:counts} tokens) - "
         "{train.iterations:counts} iterations run",
         "収束率: {train.convergence:value} ({train.convergence:counts}トークン) - "
         "{train.iterations:counts}イテレーション完走"),
        ("effective rank: {train.rank:dimensions} ({train.rank:value})",
         "Effective Rank: {train.rank:dimensions} ({train.rank:value})"),
        ("CVFP loss: {train.loss:fixed6}", "CVFPロス: {train.loss:fixed6}"),
    )),
    Section(("Validation", "検証結果"), (
        ("convergence: {validation.convergence:value} ({validation.convergence:counts} tokens) - "
         "{validation.iterations:counts} iterations run",
         "収束率: {validation.convergence:value} ({validation.convergence:counts}トークン) - "
         "{validation.iterations:counts}イテレーション完走"),
        ("effective rank: {validation.rank:dimensions} ({validation.rank:value})",
         "Effective Rank: {validation.rank:dimensions} ({validation.rank:value})"),
    )),
    Section(("CVFP convergence check", "CVFP収束チェック"), (
        ("final_diff = {final_diff:fixed6} (threshold: below {threshold:value})",
         "final_diff = {final_diff:fixed6} (閾値 {threshold:value} 未満)"),
    )),
)


def fraction(name: str, numerator: float, denominator: float) -> Metric:
    return Metric(name=name, value=numerator / denominator, unit="fraction", numerator=numerator,
                  denominator=denominator)


METRICS = (
    fraction("train.convergence", 1923, 6400), fraction("train.iterations", 10, 10),
    fraction("train.rank", 568.31, 768), Metric(name="train.loss", value=0.0017321, unit=""),
    fraction("validation.convergence", 1280, 1280), fraction("validation.iterations", 10, 10),
    fraction("validation.rank", 511.56, 768), Metric(name="final_diff", value=0.00074512, unit=""),
    Metric(name="threshold", value=0.001, unit=""),
)


def record(*metrics: Metric) -> Record:
    return Record(
        notebook="04_cvfp_phase1", profile="laptop", status="ok", parameters={}, seeds=(1,),
        started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0, metrics=metrics,
        source=Source(commit="0", dirty=False, library_sha256="0", patch_sha256="0"),
        machine=Machine(python="3.11", platform="", cpu="", threads=1, device="cpu", packages={}),
    )


def test_the_mandated_report_is_rendered_to_the_letter():
    report = mandated(record(*METRICS), CVFP)
    assert report.japanese == """\
訓練結果:
- 収束率: 30.0% (1923/6400トークン) - 10/10イテレーション完走
- Effective Rank: 568.31/768 (74.0%)
- CVFPロス: 0.001732

検証結果:
- 収束率: 100.0% (1280/1280トークン) - 10/10イテレーション完走
- Effective Rank: 511.56/768 (66.6%)

CVFP収束チェック:
- final_diff = 0.000745 (閾値 0.001 未満)"""
    assert report.english == """\
Training:
- convergence: 30.0% (1923/6400 tokens) - 10/10 iterations run
- effective rank: 568.31/768 (74.0%)
- CVFP loss: 0.001732

Validation:
- convergence: 100.0% (1280/1280 tokens) - 10/10 iterations run
- effective rank: 511.56/768 (66.6%)

CVFP convergence check:
- final_diff = 0.000745 (threshold: below 0.001)"""
    assert str(report) == f"{report.english}\n\n{report.japanese}"
    assert report._repr_markdown_().count("```") == 4


def test_no_convergence_is_a_number_like_any_other():
    metrics = (fraction("train.convergence", 0, 6400), *METRICS[1:])
    assert "- 収束率: 0.0% (0/6400トークン) - 10/10イ" in render(record(*metrics), CVFP, "ja")


@pytest.mark.parametrize("missing", [metric.name for metric in METRICS])
@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_missing_number_is_refused_by_name(missing: str, language):
    metrics = [metric for metric in METRICS if metric.name != missing]
    with pytest.raises(ReportError, match=f"lacks a mandatory number: .*'{missing}'"):
        render(record(*metrics), CVFP, language)


def test_an_undefined_metric_shows_its_reason():
    metric = Metric(name="loss", value=None, unit="", undefined="no steps were run")
    text = render(record(metric), [Section(("Loss", "損失"), [("{loss}", "{loss}")])], "en")
    assert text == "Loss:\n- undefined (no steps were run)"
    with pytest.raises(ReportError, match="is not a number"):
        render(record(metric), [Section(("Loss", "損失"), [("{loss:fixed6}", "")])], "en")


@pytest.mark.parametrize(("metric", "expected"), [
    (Metric(name="m", value=0.975, unit="fraction", numerator=195, denominator=200,
            interval=(0.943, 0.989), interval_method="Wilson score"),
     "97.5% (195/200) [94.3, 98.9]"),
    (Metric(name="m", value=1234567, unit="count"), "1,234,567"),
    (Metric(name="m", value=0.0123441, unit="nats"), "0.01234 nats"),
    (Metric(name="m", value=True, unit=""), "True"),
    (Metric(name="m", value="repetitive", unit="class"), "repetitive"),
    (Metric(name="m", value=2.5, unit="", interval=(2.0, 3.0), interval_method="t"),
     "2.5 [2, 3]"),
])
def test_a_metric_is_told_with_counts_unit_and_interval(metric: Metric, expected: str):
    text = render(record(metric), [Section(("A", "あ"), [("x {m}", "x {m}")])], "en")
    assert text == f"A:\n- x {expected}"


@pytest.mark.parametrize(("line", "expected"), [
    ("all went as planned", "holds no number of the record"),
    ("{train.loss:fancy}", "unknown style 'fancy'"),
    ("{train.loss:counts}", "has no numerator and denominator"),
    ("{train.loss:dimensions}", "has no numerator and denominator"),
])
@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_line_without_its_number_is_refused(line: str, expected: str, language):
    with pytest.raises(ReportError, match=expected):
        render(record(*METRICS), [Section(("A", "あ"), [(line, line)])], language)


WORDS = ["GOOD", "EXCELLENT", "MODERATE", "excellent", "Good", "改善した", "良好", "適切"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("place", ["title", "line", "value"])
@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_word_that_judges_is_refused_wherever_it_stands(word: str, place: str, language):
    title = f"The {word} run" if place == "title" else "Run"
    line = "loss {m}" + (f" ({word})" if place == "line" else "")
    metric = Metric(name="m", value=word if place == "value" else 0.5, unit="")
    with pytest.raises(ReportError, match=f"judgement '{word}' in .*: give the number"):
        render(record(metric), [Section((title, title), [(line, line)])], language)


def test_prose_may_speak_of_a_good_result_but_not_give_a_verdict():
    assert reject_judgements("the last good result", IN_PROSE)
    assert reject_judgements("goodness of fit")
    for verdict in ("Result: GOOD", "結果は良好", "convergence: EXCELLENT (high)"):
        with pytest.raises(ReportError, match="give the number"):
            reject_judgements(f"first line\n{verdict}\nlast line", IN_PROSE)


PAGES = [*sorted((REPOSITORY / "notebooks").glob("*.py")),
         *sorted((REPOSITORY / "book").glob("*.md")), REPOSITORY / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_notebook_and_no_page_judges(page: Path):
    reject_judgements(page.read_text(), IN_PROSE)


def test_every_notebook_ends_with_their_mandated_report():
    for path in sorted((REPOSITORY / "notebooks").glob("*.py")):
        code = [c.source for c in jupytext.read(path).cells if c.cell_type == "code"]
        assert "run.finish(" in code[-1], path.name
