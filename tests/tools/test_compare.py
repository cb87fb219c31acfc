"""Two runs compared: equal ones are equal, and each planted difference is found and named."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lablog.files import repository
from lablog.record import FigureFile, Metric, Record, ReportText
from tools import compare

PUBLISHED = repository() / "book" / "records"
NAME = "02_lambda_calibration"
METRICS = (
    Metric(name="recall", value=0.1 + 0.2, unit="fraction", n=200, interval=(0.25, 0.35),
           interval_method="Wilson score"),
    Metric(name="kl", value=1.5, unit="nat"),
    Metric(name="rank", value=None, unit="count", undefined="one seed"),
)
DATA = "strength,recall,seconds\n0.1,0.25,7\n0.3,0.5,9\n"


@pytest.fixture
def record() -> Record:
    """A record of two metrics, a figure and a report."""
    figure = FigureFile(name="heat", svg=f"figures/{NAME}/heat.svg",
                        csv=f"figures/{NAME}/heat.csv", caption="Heat.")
    real = Record.read(PUBLISHED / "laptop" / f"{NAME}.json")
    return real.model_copy(update={
        "metrics": METRICS, "figures": (figure,), "parameters": {"k": 12, "seeds": [1, 2]},
        "report": ReportText(en="Result:\n- recall 30%", ja="結果:\n- 再現 30%"),
    })


def keep(folder: Path, record: Record, data: str = DATA) -> Path:
    """A run's folder with one record and its figure's data."""
    record.write(folder / "records" / f"{record.notebook}.json")
    csv = folder / record.figures[0].csv
    csv.parent.mkdir(parents=True, exist_ok=True)
    csv.write_text(data)
    return folder


@pytest.fixture
def a(tmp_path: Path, record: Record) -> Path:
    return keep(tmp_path / "a", record)


def told(capsys: pytest.CaptureFixture[str], a: Path | str, b: Path | str, code: int) -> str:
    """What the command prints, run with two places; its exit code is checked."""
    assert compare.main([str(a), str(b)]) == code
    return capsys.readouterr().out


def test_a_run_equals_itself_in_every_form(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = shutil.copytree(a, tmp_path / "copy")
    for one, two in ((a, copy), (a / "records", copy), (a / "records" / f"{NAME}.json", copy)):
        assert told(capsys, one, two, 0) == f"== {NAME}: 3 metrics equal\n"


def test_a_profile_is_found_by_its_name(capsys: pytest.CaptureFixture[str]):
    assert "metrics equal" in told(capsys, PUBLISHED / "laptop", "book/records/laptop", 0)


def test_times_memory_commit_and_columns_of_seconds_are_no_difference(
    a: Path, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
):
    later = record.model_copy(update={
        "seconds": 1e6, "peak_memory_bytes": 1,
        "source": record.source.model_copy(update={"commit": "f" * 40}),
    })
    told(capsys, a, keep(tmp_path / "b", later, DATA.replace(",9\n", ",11\n")), 0)


@pytest.mark.parametrize(("number", "change", "expected"), [
    (0, {"value": 0.3}, r"^recall +0\.30000000000000004 fraction \[0\.25, 0\.35\] +0\.3 fraction "
                        r"\[0\.25, 0\.35\] +-5\.55e-17$"),
    (0, {"interval": (0.36, 0.4)}, r"^recall .*\[0\.36, 0\.4\] +intervals apart$"),
    (0, {"interval": (0.3, 0.4)}, r"^recall .*\[0\.3, 0\.4\] +intervals overlap$"),
    (0, {"n": 100}, r"^recall .*n 200 → 100$"),
    (1, {"unit": "bit"}, r"^kl +1\.5 nat +1\.5 bit$"),
    (1, {"value": 2}, r"^kl +1\.5 nat +2 nat +\+0\.5$"),
    (2, {"value": 3, "undefined": None}, r"^rank +undefined \(one seed\) count +3 count"),
    (1, {"name": "kl.mean"}, r"^kl +1\.5 nat +missing +removed$"),
    (1, {"name": "kl.mean"}, r"^kl\.mean +missing +1\.5 nat +added$"),
])
def test_a_metric_that_changed_is_told_with_every_digit(
    a: Path, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str],
    number: int, change: dict[str, object], expected: str,
):
    metrics = list(METRICS)
    metrics[number] = metrics[number].model_copy(update=change)
    other = keep(tmp_path / "b", record.model_copy(update={"metrics": tuple(metrics)}))
    out = told(capsys, a, other, 1)
    assert out.startswith(f"== {NAME}: differs\n")
    assert re.search(expected, out, re.MULTILINE), out


def test_a_whole_number_is_no_decimal(
    a: Path, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
):
    one, two = (record.model_copy(update={"metrics": (Metric(name="n", value=value, unit=""),)})
                for value in (1, 1.0))
    told(capsys, keep(tmp_path / "b", one), keep(tmp_path / "c", two), 1)


def test_another_order_is_a_difference(
    a: Path, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
):
    turned = record.model_copy(update={"metrics": (METRICS[0], METRICS[2], METRICS[1])})
    out = told(capsys, a, keep(tmp_path / "b", turned), 1)
    assert "order of metrics: A has kl, where B has rank" in out
    # A metric more moves the others, and does not change their order.
    more = record.model_copy(update={"metrics": (Metric(name="x", value=1, unit=""), *METRICS)})
    assert "order" not in told(capsys, a, keep(tmp_path / "c", more), 1)


def test_a_line_of_a_report_that_changed_is_told(
    a: Path, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
):
    text = ReportText(en="Result:\n- recall 31%", ja=record.report.ja)
    out = told(capsys, a, keep(tmp_path / "b", record.model_copy(update={"report": text})), 1)
    assert "report en: - - recall 30%\n" in out
    assert "report en: + - recall 31%\n" in out
    assert "ja" not in out


@pytest.mark.parametrize(("data", "expected"), [
    (DATA.replace("0.5,9", "0.50,9"), "1 of 4 values differ, first recall in row 2: 0.5 → 0.50"),
    (DATA + "1,1,1\n", "2 → 3 rows"),
    (DATA.replace("recall", "kept"), "columns ['strength', 'recall'] → ['strength', 'kept']"),
])
def test_data_of_a_figure_that_changed_are_told(
    a: Path, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str],
    data: str, expected: str,
):
    out = told(capsys, a, keep(tmp_path / "b", record, data), 1)
    assert f"figure heat: {expected}\n" in out


def test_a_figure_or_a_notebook_of_one_run_only_is_told(
    a: Path, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
):
    b = keep(tmp_path / "b", record)
    record.model_copy(update={"figures": ()}).write(b / "records" / f"{NAME}.json")
    assert "figure heat: only in A\n" in told(capsys, a, b, 1)
    c = keep(tmp_path / "c", record)
    keep(c, record.model_copy(update={"notebook": "04_cvfp_phase1"}))
    assert "== 04_cvfp_phase1: only in B" in told(capsys, a, c, 1)


def test_parameters_are_told_and_are_no_difference(
    a: Path, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
):
    renamed = record.model_copy(update={"parameters": {"latent": 12, "seeds": [1, 3]}})
    assert told(capsys, a, keep(tmp_path / "b", renamed), 0).splitlines()[1:] == [
        "parameter k: 12 → 'missing'", "parameter seeds: [1, 2] → [1, 3]",
        "parameter latent: 'missing' → 12",
    ]


@pytest.mark.parametrize(("place", "expected"), [
    ("nonexistent", "there is no record, folder or profile with results 'nonexistent'"),
    ("", "there is no record, folder or profile with results ''"),
    ("empty", "empty holds no record"), ("broken", "broken.json is not a record of schema 1"),
    ("other", "no notebook is in both"),
])
def test_nothing_to_compare_is_one_clear_error(
    a: Path, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, place: str, expected: str,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.json").write_text("{}")
    keep(tmp_path / "other", record.model_copy(update={"notebook": "04_cvfp_phase1"}))
    assert compare.main([str(a), place]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert expected in printed.err


def test_published_stands_for_the_other_ones_profile(capsys: pytest.CaptureFixture[str]):
    text = told(capsys, "published", PUBLISHED / "study", 0)
    assert "03_qlora_commitment: " in text
    assert "claims" not in text  # nothing differs
    for other in ("laptop", "HEAD:laptop", "elsewhere/build/laptop", "build/laptop/records"):
        assert compare.find("published", other).keys() == compare.find(
            str(PUBLISHED / "laptop")).keys()


def test_a_commit_stands_for_what_it_had_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):
    """In a small repository of its own, since a clone may be shallow."""
    folder = tmp_path / "book" / "records" / "laptop"
    shutil.copytree(PUBLISHED / "laptop", folder)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "published"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(compare, "repository", lambda: tmp_path)
    assert "differs" not in told(capsys, "HEAD:laptop", folder, 0)
    changed = Record.read(folder / f"{NAME}.json")
    changed.model_copy(update={"metrics": METRICS}).write(folder / f"{NAME}.json")
    text = told(capsys, "HEAD:laptop", folder, 1)
    assert f"== {NAME}: differs" in text
    assert re.search(r"claim A\d\d .*→ not run", text)  # what measured it is gone
    for wrong, why in (("nothing:laptop", "git has no commit 'nothing'"),
                       ("HEAD:full", "published nothing of profile 'full'")):
        assert compare.main([wrong, str(folder)]) == 2
        assert why in capsys.readouterr().err


def test_differences_are_counted_by_what_they_mean(
    a: Path, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    apart = METRICS[0].model_copy(update={"value": 0.9, "interval": (0.8, 0.95)})
    b = keep(tmp_path / "b", record.model_copy(update={"metrics": (apart, *METRICS[1:])}))
    assert "2 equal to the last digit; 1 differ by more than their intervals" in told(
        capsys, a, b, 1)
