"""Several commands at once: a short part of ``make torture``."""

import pytest

from torture.races import COMMANDS, MOST, Races, chosen


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Races:
    return Races(tmp_path_factory.mktemp("races"))


def test_commands_at_once_make_what_one_makes(clone: Races):
    trial = clone.trial((
        ("make reproduce", 0.0), ("make verify", 0.0), ("make reproduce", 0.5),
        ("make verify", 1.0), ("the book", 4.0)))
    assert not trial.fault, trial


def test_what_is_wrong_is_seen(clone: Races, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(COMMANDS, "the book", ("sh", "-c", "echo Traceback; echo of; exit 1"))
    trial = clone.trial((("the book", 0.0), ("the book", 0.0)))
    assert trial.fault == "a traceback: of"
    monkeypatch.setitem(COMMANDS, "the book", ("sh", "-c", f"mkdir -p {clone.built}/half"))
    assert clone.trial((("the book", 0.0),)).fault == "left behind or missing: half"


def test_all_commands_are_started_at_all_moments():
    ways = chosen(10, 60, 0)
    assert {name for one in ways for name, _ in one} == set(COMMANDS)
    assert {len(one) for one in ways} == set(range(2, MOST + 1))
    for one in ways:
        assert one[0] == ("make reproduce", 0.0)
        assert [moment for _, moment in one] == sorted(moment for _, moment in one)
        assert all(0 <= moment < 10 for _, moment in one)
    assert ways == chosen(10, 60, 0) != chosen(10, 60, 1)
