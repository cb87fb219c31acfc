"""The ledger: every claim has one verdict, by the rule of its row and by nothing else."""

import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lablog import claims, claims_page
from lablog.claims import Claim, as_csv, as_text, counts, judge, ledger, load_claims, read_records
from lablog.intervals import Interval
from lablog.profiles import declared_parameters, notebook_path, notebooks
from lablog.provenance import CloneState, Machine
from lablog.record import FigureFile, Metric, Record
from lablog.report import reject_judgements

ROOT = Path(__file__).parents[1]
SPEC = ROOT.parent / "shared" / "spec" / "claims.csv"
PLAIN = {
    "id": "X01", "experiment": "cvfp", "quantity": "rank", "claimed": "55.9", "unit": "%",
    "tolerance": "5 points", "conditions": "w=0.9", "notebook": "04_cvfp_phase1", "measure": "rank",
    "rule": "within", "number": "0.559", "allowed": "0.05", "requires": "", "differs": "",
    "needs": "", "contradicts": "",
}


def claim(**changes: str) -> Claim:
    return Claim(**(PLAIN | changes))


def metric(value, name: str = "rank", interval: tuple[float, float] | None = None) -> Metric:
    return Metric.of(name, value, "", interval=interval and Interval(*interval, "a test's"))


def record(*metrics: Metric, notebook: str = "04_cvfp_phase1", profile: str = "laptop",
           parameters: dict | None = None, device: str = "cpu", status: str = "ok") -> Record:
    return Record(
        notebook=notebook, profile=profile, status=status, parameters=parameters or {}, seeds=(1,),
        started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0, metrics=metrics,
        source=CloneState(commit="0123456789abcdef", dirty=False, library_sha256="",
                          patch_sha256=""),
        machine=Machine(python="3", platform="Linux", cpu="x", threads=1, device=device,
                        packages={}))


def judged(row: Claim, *found: Record) -> claims.Judged:
    records: dict[str, dict[str, Record]] = {}
    for each in found:
        records.setdefault(each.profile, {})[each.notebook] = each
    return judge(row, records)


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "number", "allowed", "inside", "outside"), [
    ("within", "0.5", "0.1", [0.4, 0.5, 0.59], [0.39, 0.61]),
    ("relative", "100", "0.02", [98, 100, 102], [97.9, 103]),
    ("factor", "0.02", "2", [0.01, 0.02, 0.04], [0.0099, 0.041, 0, -0.02]),
    ("exact", "1", "", [1], [0, 2, 1.0001]),
    ("at least", "23", "", [23, 24.5], [22.999]),
    ("below", "1", "", [0.5, -3], [1, 2]),
    ("equal", "coherent", "", ["coherent"], ["incoherent", "Coherent"]),
])
def test_a_value_is_compared_by_the_rule_of_its_row(rule, number, allowed, inside, outside):
    row = claim(rule=rule, number=number, allowed=allowed)
    assert [row.holds(metric(value)) for value in inside] == [True] * len(inside)
    assert [row.holds(metric(value)) for value in outside] == [False] * len(outside)


def test_an_interval_must_be_on_one_side_as_a_whole():
    above, below = (claim(rule=f"{side} interval", number="0", allowed="")
                    for side in ("above", "below"))
    for low, high, expected in ((0.1, 0.3, (True, False)), (-0.3, -0.1, (False, True)),
                                (-0.1, 0.3, (False, False)), (0.0, 0.3, (False, False))):
        found = metric((low + high) / 2, interval=(low, high))
        assert (above.holds(found), below.holds(found)) == expected
    assert above.holds(metric(0.2)) is None  # without an interval nothing is said


def test_what_is_only_reported_falls_on_no_side():
    row = claim(rule="report", number="", allowed="")
    assert row.holds(metric(3.0)) is None
    assert judged(row, record(metric(3.0))).verdict == "indicative"


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(0.01, 5))
def test_what_is_within_is_no_farther_than_allowed(value, number, allowed):
    row = claim(number=repr(number), allowed=repr(allowed))
    assert row.holds(metric(value)) == (abs(value - number) <= allowed)


# --- verdicts -------------------------------------------------------------------------------------


def test_the_verdicts():
    inside, outside = record(metric(0.56)), record(metric(0.7))
    assert judged(claim(), inside).verdict == "reproduced"
    assert judged(claim(), outside).verdict == "not reproduced"
    elsewhere = claim(requires="embedding=gpt2; items=200")
    found = judged(elsewhere, outside)
    assert (found.verdict, found.side) == ("indicative", "outside")
    assert found.why == ("embedding = not recorded where the log has gpt2; "
                         "items = not recorded where the log has 200")
    fitting = record(metric(0.7), parameters={"embedding": "gpt2", "items": 200})
    assert judged(elsewhere, fitting).verdict == "not reproduced"
    pinned = record(metric(0.7), parameters={"embedding": f"gpt2@{'a1' * 20}", "items": 200})
    assert judged(elsewhere, pinned).verdict == "not reproduced"
    always = judged(claim(differs="another machine"), inside)
    assert (always.verdict, always.side, always.why) == ("indicative", "within", "another machine")
    against = judged(claim(contradicts="X02 X03"), inside)
    assert against.verdict == "inconsistent"
    assert against.why == "excludes X02 and X03 of the same log"
    assert against.measured[0].shown == "0.56"


def test_what_no_record_holds_was_not_run_and_says_what_it_needs():
    for found in ((), (record(metric(1.0, "other")),), (record(metric(0.56), notebook="05_x"),),
                  (record(Metric.of("rank", None, "", undefined="not run")),)):
        row = judged(claim(), *found)
        assert (row.verdict, row.side, row.why) == (
            "not run", "", "needs make reproduce NOTEBOOKS=04")
    assert judged(claim(needs="a GPU")).why == "needs a GPU"
    assert judged(claim(notebook="bench")).why == "needs make bench"


def test_the_profile_nearest_to_the_log_judges_and_the_others_stand_beside_it():
    found = [record(metric(value), profile=profile)
             for profile, value in (("laptop", 0.56), ("study", 0.7), ("full", 0.3))]
    row = judged(claim(), *found)
    assert row.verdict == "not reproduced"
    assert [(each.profile, each.shown) for each in row.measured] == [
        ("full", "0.3"), ("study", "0.7"), ("laptop", "0.56")]


def test_a_record_under_the_claims_conditions_judges_before_a_nearer_profile():
    row = claim(requires="base_model=")
    found = [record(metric(0.9), profile="pretrained", parameters={"base_model": "stories"}),
             record(metric(0.56), profile="laptop")]
    assert judged(row, *found).verdict == "reproduced"
    assert [each.profile for each in judged(row, *found).measured] == ["laptop", "pretrained"]
    assert judged(row, found[0]).why == "base_model = stories where the log has none"


def test_a_measure_may_have_another_name_in_another_size():
    row = claim(measure="a b | c d")
    for names in (("a", "b"), ("c", "d")):
        assert judged(row, record(*(metric(0.56, n) for n in names))).verdict == "reproduced"
    assert judged(row, record(metric(0.56, "a"), metric(0.56, "d"))).verdict == "not run"


def test_a_chapter_that_only_ever_failed_counts_as_a_failure(tmp_path):
    row = claim(measure="@failures", rule="exact", number="0", allowed="")
    record(status="failed").write(tmp_path / "laptop" / "failed" / "04_cvfp_phase1.json")
    assert judge(row, read_records(tmp_path)).verdict == "not reproduced"
    record().write(tmp_path / "laptop" / "records" / "04_cvfp_phase1.json")
    assert judge(row, read_records(tmp_path)).verdict == "reproduced"


def test_a_run_of_smoke_settles_nothing(tmp_path):
    for profile in ("smoke", "laptop"):
        record(metric(0.5), profile=profile).write(tmp_path / profile / "records" / "04_x.json")
    assert set(read_records(tmp_path)) == {"laptop"}


def test_the_rule_must_hold_for_all_that_is_measured():
    row = claim(measure="a b")
    found = [record(metric(0.56, "a"), metric(value, "b")) for value in (0.55, 0.9)]
    assert [judged(row, each).verdict for each in found] == ["reproduced", "not reproduced"]
    assert judged(row, record(metric(0.56, "a"))).verdict == "not run"


def test_what_a_record_says_of_itself_can_be_measured():
    row = claim(measure="@failures", rule="exact", number="0", allowed="")
    assert judged(row, record()).verdict == "reproduced"
    assert judged(row, record(status="failed")).verdict == "not reproduced"
    row = claim(measure="@without_gpu", rule="equal", number="no", allowed="")
    assert judged(row, record()).measured[0].shown == "yes"
    for asked in ({"device": "cuda"}, {"device": "cpu", "trainings": "h100"}):
        assert judged(row, record(parameters=asked)).verdict == "not run"
    assert judged(row, record(status="failed")).verdict == "not run"


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.skipif(not SPEC.is_file(), reason="the specification is not beside this clone")
def test_no_claim_of_the_specification_is_dropped_or_reworded():
    with SPEC.open(newline="") as file:
        stated = list(csv.DictReader(file))
    rows = [row.model_dump() for row in load_claims()]
    assert [{name: row[name] for name in stated[0]} for row in rows] == stated


def test_every_claim_names_a_chapter_and_parameters_that_exist():
    for row in load_claims():
        if row.notebook not in notebooks():
            assert row.notebook == "bench" or row.needs, row.id
            continue
        known = declared_parameters(notebook_path(row.notebook))
        assert row.conditions_required.keys() <= known.keys(), row.id


def test_most_claims_are_measured_in_the_published_records():
    rows = ledger(read_records(ROOT / "book" / "records"))
    assert [row.claim.id for row in rows] == [row.id for row in load_claims()]
    assert sum(bool(row.measured) for row in rows) >= 38
    assert sum(counts(rows).values()) == len(rows) == 45


@pytest.mark.parametrize(("changes", "message"), [
    ({"rule": "about"}, "row 2: rule = 'about'"),
    ({"allowed": ""}, "row 2: .*allowed = '' do not fit"),
    ({"number": "many"}, "row 2: .*could not convert string to float: 'many'"),
    ({"requires": "gpt2"}, "row 2: .*expected name=value"),
    ({"contradicts": "B99"}, "X01 contradicts B99, which is no row"),
    ({"id": "1"}, "row 2: id = '1'"),
])
def test_a_wrong_row_is_refused_by_name(tmp_path, changes, message):
    path = tmp_path / "claims.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, PLAIN)
        writer.writeheader()
        writer.writerow(PLAIN | changes)
    with pytest.raises(ValueError, match=message):
        load_claims(path)


def test_a_claim_stands_there_once(tmp_path):
    path = tmp_path / "claims.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, PLAIN)
        writer.writeheader()
        writer.writerows([PLAIN, PLAIN])
    with pytest.raises(ValueError, match="X01 stands there twice"):
        load_claims(path)


# --- how it is told -------------------------------------------------------------------------------


def test_the_ledger_as_text_csv_and_json(capsys):
    assert claims.main([]) == 0
    text = capsys.readouterr().out
    assert claims.main(["--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert claims.main(["--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == table
    assert [row["id"] for row in table] == [row.id for row in load_claims()]
    for row in table:
        assert f"{row['id']}  {row['verdict']}" in text
    assert text.splitlines()[-1].startswith("45 claims: ")


def test_the_clones_own_runs_are_asked_for_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims.layout, "repository", lambda: tmp_path)
    assert claims.main(["--of", "own"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "45 claims: 0 reproduced, 0 not reproduced, 0 indicative, 0 inconsistent, 45 not run")
    broken = tmp_path / "build" / "laptop" / "records" / "04_x.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    assert claims.main(["--of", "own"]) == 2
    assert "04_x.json" in capsys.readouterr().err


def test_the_page_holds_every_claim_and_links_its_record(tmp_path):
    found = record(metric(0.56), parameters={"embedding": "<b>"})
    rows = [judged(claim(quantity="a < b", requires="embedding=gpt2"), found),
            judged(claim(id="X02", notebook="06_arianna_finetune"))]
    page = claims_page.page(rows, tmp_path, {"04_cvfp_phase1"})
    assert page.count("<tr id=") == 2
    assert 'href="records/laptop/04_cvfp_phase1.json"' in page
    assert 'href="notebooks/04_cvfp_phase1.html"' in page
    assert "chapter</a>" not in claims_page.page(rows, tmp_path, set())
    assert "a &lt; b" in page
    assert "embedding = &lt;b&gt; where" in page
    assert "| not run | 1 |" in page
    assert (tmp_path / "claims.csv").read_text() == as_csv(rows)
    table = page[page.index("<table"): page.index("</table>")]
    assert "\n\n" not in table
    reject_judgements(as_text(ledger(read_records(ROOT / "book" / "records"))))


def test_values_link_the_figures_that_are_published_with_their_record(tmp_path: Path):
    figures = tuple(FigureFile(name=name, svg=f"{name}.svg", csv=f"{name}.csv", caption="")
                    for name in ("shown", "kept"))
    found = record(metric(0.56)).model_copy(update={"figures": figures})
    published = tmp_path / "records" / "laptop"
    published.mkdir(parents=True)
    (published / "04_cvfp_phase1.shown.svg").write_text("<svg/>")
    page = claims_page.page([judged(claim(), found)], tmp_path, set())
    assert '<a href="records/laptop/04_cvfp_phase1.shown.svg">figure shown</a>' in page
    assert "figure kept" not in page
