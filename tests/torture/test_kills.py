"""Signals at random moments: a short part of ``make torture``."""

import pytest

from torture.kills import WAYS, Kills, chosen
from torture.results import SmallClone


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Kills:
    return Kills(SmallClone(tmp_path_factory.mktemp("kills")))


@pytest.mark.parametrize("number", range(2))
def test_a_run_that_is_ended_leaves_nothing_and_the_next_one_is_whole(clone: Kills, number: int):
    trial = clone.trial(*chosen(clone.results.seconds, 2, seed=1)[number])
    assert not trial.fault, trial


def test_half_are_killed_and_all_ways_are_tried():
    ways = chosen(10, 40, 0)
    assert [way for way, *_ in ways].count("killed") == 20
    assert {way for way, *_ in ways} == set(WAYS)
    assert all(0 <= moment < 10 for _, moment, _ in ways)
    assert {times for way, _, times in ways if way == "killed"} == {1, 2}
    assert ways == chosen(10, 40, 0) != chosen(10, 40, 1)


def test_what_is_left_behind_is_seen(clone: Kills, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clone, "_ended", lambda *_: "")
    monkeypatch.setattr(clone.results, "command", ("sh", "-c", "make reproduce && touch "
                                                   f"{clone.results.built}/.half"))
    assert clone.trial("killed", 0).fault == "left behind or missing: .half"
