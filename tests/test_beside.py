"""A run beside the published one: what counts is told, and nothing else is made a difference."""

from datetime import UTC, datetime

import pytest

from lablog import beside
from lablog.intervals import Interval
from lablog.provenance import CloneState, Machine
from lablog.record import Metric, Record
from lablog.report import IN_PROSE, reject_judgements

PHASE1 = "04_cvfp_phase1"
RANK = "parallel.training.effective_rank"


def metric(name: str, value: float | str | None, interval: tuple[float, float] | None = None,
           unit: str = "") -> Metric:
    return Metric.of(name, value, unit, interval=interval and Interval(*interval, "a test's"),
                     undefined="no seeds" if value is None else None)


def record(*metrics: Metric, profile: str = "laptop", commit: str = "1" * 40,
           **parameters: object) -> Record:
    return Record(
        notebook=PHASE1, profile=profile, status="ok", parameters=parameters, seeds=(1,),
        started=datetime(2026, 1, 1, tzinfo=UTC), seconds=1.0, metrics=metrics,
        source=CloneState(commit=commit, dirty=False, library_sha256="", patch_sha256=""),
        machine=Machine(python="3", platform="Linux", cpu="x", threads=1, device="cpu",
                        packages={}))


@pytest.mark.parametrize(("one", "two", "kind"), [
    (metric("a", 0.1), metric("a", 0.1), "equal"),
    (metric("a", None), metric("a", None), "equal"),
    (metric("a", 0.1, (0.0, 0.2)), metric("a", 0.15, (0.1, 0.3)), "overlap"),
    (metric("a", 0.1, (0.0, 0.2)), metric("a", 0.2, (0.2, 0.3)), "overlap"),
    (metric("a", 0.1, (0.0, 0.2)), metric("a", 0.5, (0.4, 0.6)), "apart"),
    (metric("a", 0.5, (0.4, 0.6)), metric("a", 0.1, (0.0, 0.2)), "apart"),
    (metric("a", 0.1), metric("a", 0.2, (0.1, 0.3)), "no interval"),
    (metric("a", "pass"), metric("a", "fail"), "changed"),
    (metric("a", None), metric("a", 0.1), "changed"),
    (metric("a", 0.1), None, "missing"),
    (None, metric("a", 0.1), "missing"),
])
def test_what_a_difference_is(one: Metric | None, two: Metric | None, kind: str):
    assert beside.Pair("a", one, two).kind == kind


def test_numbers_that_differ_most_come_first_and_the_rest_is_counted():
    mine = record(*(metric(f"m{i}", 1.0 + i / 100) for i in range(beside.SHOWN + 3)))
    theirs = record(*(metric(f"m{i}", 1.0) for i in range(beside.SHOWN + 3)))
    page = beside.page([mine], {"laptop": {PHASE1: theirs}})
    shown = [line for line in page.splitlines() if line.startswith("| `m")]
    assert [line.split("`")[1] for line in shown] == [
        f"m{i}" for i in range(beside.SHOWN + 2, 2, -1)]
    assert "2 more have no interval" in page  # and m0 is equal


def test_the_page_tells_published_and_own_apart():
    theirs = record(metric("a", 0.1, (0.0, 0.2)), metric("b", "pass"), commit="a" * 40, k=1)
    mine = record(metric("a", 0.5, (0.4, 0.6)), metric("b", "fail"), commit="b" * 40, k=2)
    page = beside.page([mine], {"laptop": {PHASE1: theirs}})
    assert "| `a` | 0.1 \\[0, 0.2\\] | 0.5 \\[0.4, 0.6\\] | apart |" in page
    assert "| `b` | pass | fail | changed |" in page
    assert "Parameters that differ: `k`" in page
    assert page.index("b" * 10) < page.index("a" * 10)  # here, then published
    reject_judgements(page, IN_PROSE)


def test_a_claim_that_is_judged_otherwise_is_told():
    """B18: an effective rank of 689.26/768 within two points."""
    theirs = record(metric(RANK, 0.897, unit="fraction"), context_dim=768)
    mine = record(metric(RANK, 0.5, unit="fraction"), context_dim=768)
    page = beside.page([mine], {"laptop": {PHASE1: theirs}})
    (line,) = (line for line in page.splitlines() if line.startswith("| B18"))
    assert "within" in line.split("|")[3]
    assert "outside" in line.split("|")[4]
    same = beside.page([theirs], {"laptop": {PHASE1: theirs}})
    assert "All claims are judged alike" in same
    assert "Every number is equal" in same


def test_where_nothing_of_the_profile_is_published_the_page_says_so():
    mine = record(metric("a", 0.1), profile="smoke")
    page = beside.page([mine], {"laptop": {PHASE1: record(metric("a", 0.1))}})
    assert "No run of profile smoke is published" in page
