"""The N-th call fails: a short part of ``make torture``, and what it has found."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import exclusive
from torture.faults import Faults, chosen


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


def test_a_run_whose_calls_fail_ends_in_words_and_the_next_one_is_whole(clone: Faults):
    calls = clone.calls()
    assert calls > 100
    for trial in (clone.trial(*one) for one in chosen(calls, 2, seed=3)):
        assert trial.what
        assert not trial.fault, trial


def test_a_lock_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, exclusive.__file__, tmp_path / "file" / "lock", "true"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*file.*\n", done.stderr)


def test_what_is_wrong_is_seen(clone: Faults, monkeypatch: pytest.MonkeyPatch):
    late = 10_000  # there is no such call
    monkeypatch.setattr(clone, "command", ("sh", "-c", "make reproduce && touch "
                                           f"{clone.built}/figures/half"))
    trial = clone.trial(late, errno.EIO, lasting=False)
    assert (trial.what, trial.fault) == ("", "left behind or missing: figures/half")


@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_calls_are_chosen_evenly(count: int):
    one = chosen(187, count, 0)
    assert len(one) == min(count, 187)
    assert sorted(call for call, *_ in one) == [call for call, *_ in one]
    assert {call for call, *_ in one} <= set(range(1, 188))
    assert one == chosen(187, count, 0)
    assert count in (1, 1000) or one != chosen(187, count, 1)
