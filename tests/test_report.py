"""The mandated report: rendered exactly, in both languages, or not at all."""

import re
from datetime import UTC, datetime
from pathlib import Path

import jupytext
import pytest

from lablog.provenance import CloneState, Machine
from lablog.record import Metric, Record
from lablog.report import (
    IN_PROSE,
    ReportError,
    format_metric,
    mandated,
    reject_judgements,
    render,
    template,
)

REPOSITORY = Path(__file__).parents[1]
TEMPLATES = {
    "en": '''
Training:
- convergence: {{ value("train.convergence") }} ({{ counts("train.convergence") }} tokens) - \
{{ counts("train.iterations") }} iterations run
- effective rank: {{ dimensions("train.rank") }} ({{ value("train.rank") }})
- CVFP loss: {{ fixed6("train.loss") }}

Validation:
{% set key = "validation" %}
- convergence: {{ value(key ~ ".convergence") }} ({{ counts(key ~ ".convergence") }} tokens) - \
{{ counts(key ~ ".iterations") }} iterations run
- effective rank: {{ dimensions(key ~ ".rank") }} ({{ value(key ~ ".rank") }})

CVFP convergence check:
- final_diff = {{ fixed6("final_diff") }} (threshold: below {{ value("threshold") }})
''',
    "ja": '''
訓練結果:
- 収束率: {{ value("train.convergence") }} ({{ counts("train.convergence") }}トークン) - \
{{ counts("train.iterations") }}イテレーション完走
- Effective Rank: {{ dimensions("train.rank") }} ({{ value("train.rank") }})
- CVFPロス: {{ fixed6("train.loss") }}

検証結果:
{% set key = "validation" %}
- 収束率: {{ value(key ~ ".convergence") }} ({{ counts(key ~ ".convergence") }}トークン) - \
{{ counts(key ~ ".iterations") }}イテレーション完走
- Effective Rank: {{ dimensions(key ~ ".rank") }} ({{ value(key ~ ".rank") }})

CVFP収束チェック:
- final_diff = {{ fixed6("final_diff") }} (閾値 {{ value("threshold") }} 未満)
''',
}


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
        source=CloneState(commit="0", dirty=False, library_sha256="0", patch_sha256="0"),
        machine=Machine(python="3.11", platform="", cpu="", threads=1, device="cpu", packages={}),
    )


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the two templates beside a notebook."""
    for language, text in TEMPLATES.items():
        path = tmp_path / "notebooks" / "reports" / f"04_cvfp_phase1.{language}.j2"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr("lablog.report.repository", lambda: tmp_path)
    return path.parent


def test_the_mandated_report_is_rendered_to_the_letter(beside):
    report = mandated(record(*METRICS))
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
    assert "- 収束率: 0.0% (0/6400トークン) - 10/10イ" in render(record(*metrics), TEMPLATES["ja"])


@pytest.mark.parametrize("missing", [metric.name for metric in METRICS])
@pytest.mark.parametrize("language", TEMPLATES)
def test_a_missing_number_is_refused_by_name(missing: str, language):
    metrics = [metric for metric in METRICS if metric.name != missing]
    with pytest.raises(ReportError, match=f"lacks a mandatory number: .*'{missing}'"):
        render(record(*metrics), TEMPLATES[language])


def test_an_undefined_metric_shows_its_reason():
    metric = Metric(name="loss", value=None, unit="", undefined="no steps were run")
    text = render(record(metric), 'Loss:\n- {{ number("loss") }}')
    assert text == "Loss:\n- undefined (no steps were run)"
    with pytest.raises(ReportError, match="is not a number"):
        render(record(metric), 'Loss:\n- {{ fixed6("loss") }}')


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
    text = render(record(metric), 'A:\n- x {{ number("m") }}')
    assert text == f"A:\n- x {expected}"


@pytest.mark.parametrize(("line", "expected"), [
    ("all went as planned", "holds no number of the record"),
    ("7 of 7 went as planned", "holds no number of the record"),
    ('{{ number("train.loss", "fancy") }}', "unknown style 'fancy'"),
    ('{{ counts("train.loss") }}', "has no numerator and denominator"),
    ('{{ dimensions("train.loss") }}', "has no numerator and denominator"),
    ('{{ number(arm ~ ".loss") }}', "04_cvfp_phase1: 'arm' is undefined"),
    ('{{ number("no metric") }}', "lacks a mandatory number: .*'no metric'"),
    ('{{ number("train.loss" }}', "04_cvfp_phase1: unexpected"),
])
def test_a_line_without_its_number_is_refused(line: str, expected: str):
    with pytest.raises(ReportError, match=expected):
        render(record(*METRICS), f"A:\n- {line}")


def test_a_template_loops_over_what_the_notebook_names():
    lines = '{% for arm in arms %}\n- {{ arm }}: {{ value(arm ~ ".rank") }}\n{% endfor %}'
    assert render(record(*METRICS), f"Ranks:\n{lines}", arms=["train", "validation"]) == (
        "Ranks:\n- train: 74.0%\n- validation: 66.6%")


@pytest.mark.parametrize("language", TEMPLATES)
def test_a_notebook_without_its_template_is_refused(beside, language: str):
    (beside / f"04_cvfp_phase1.{language}.j2").unlink()
    with pytest.raises(ReportError, match=f"04_cvfp_phase1.{language}.j2 is missing"):
        mandated(record(*METRICS))


WORDS = ["GOOD", "EXCELLENT", "MODERATE", "excellent", "Good", "改善した", "良好", "適切"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("place", ["title", "line", "value"])
def test_a_word_that_judges_is_refused_wherever_it_stands(word: str, place: str):
    title = f"The {word} run" if place == "title" else "Run"
    line = 'loss {{ number("m") }}' + (f" ({word})" if place == "line" else "")
    metric = Metric(name="m", value=word if place == "value" else 0.5, unit="")
    with pytest.raises(ReportError, match=f"judgement '{word}' in .*: give the number"):
        render(record(metric), f"{title}:\n- {line}")


def test_both_languages_of_every_report_ask_for_the_same_numbers():
    for notebook in sorted((REPOSITORY / "notebooks").glob("*.py")):
        english, japanese = (
            sorted(re.findall(r"(?:number|value|counts|dimensions|fixed6)\([^)]*\)",
                              template(notebook.stem, language))) for language in TEMPLATES)
        assert english == japanese
        assert english


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


@pytest.mark.parametrize(("value", "shown"), [
    (9_999.4, "9999 tokens/s"), (9_999.6, "10,000 tokens/s"), (16_573.2, "16,573 tokens/s"),
    (-44_920.0, "-44,920 tokens/s"),
    (482.04, "482 tokens/s"), (2e9, "2e+09 tokens/s"), (16_573, "16,573 tokens/s")])
def test_large_numbers_are_written_out(value, shown):
    assert format_metric(Metric.of("x", value, "tokens/s")) == shown
