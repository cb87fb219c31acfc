"""``make torture`` as a whole: its record, what it says, and its page."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import torture.__main__ as torture
from lablog import torture_page
from lablog.record import Record
from torture import disk
from torture.corrupt import Tried
from torture.faults import Trial
from torture.kills import Trial as Killed
from torture.races import Trial as Race
from torture.readers import READERS

ALONE = ["--processes", "1"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two readers, of which the second falls; results lie in the folder that is returned."""
    monkeypatch.setattr(torture, "READERS", {n: READERS[n] for n in ("text", "list of models")})
    monkeypatch.setattr("lablog.layout.built", lambda *names: tmp_path.joinpath(*names))
    monkeypatch.setattr(torture.results, "SmallClone", lambda folder: SimpleNamespace(seconds=10))
    monkeypatch.setattr(torture.kills, "Kills", lambda results: SimpleNamespace(
        trial=lambda way, moment, times: Killed(way, moment, times, "")))
    monkeypatch.setattr(torture.races, "Races", lambda folder: SimpleNamespace(
        seconds=10, trial=lambda started: Race(started, "left behind" * (len(started) > 3))))
    monkeypatch.setattr(torture, "Clone", lambda folder: None)
    monkeypatch.setattr(torture.results, "tried_sequences", lambda clone, count, seed: "")
    monkeypatch.setattr(torture.faults, "Faults", lambda folder: SimpleNamespace(
        calls=lambda: 187, trial=lambda call, code, lasting: Trial(
            call, code, lasting, "open x", "a traceback" if call > 100 else "")))
    monkeypatch.setattr(disk, "may_mount", lambda: False)
    monkeypatch.setattr(torture.corrupt, "tried", lambda name, cases, seed: (
        Tried(cases, cases, 0) if name == "text" else
        Tried(cases, 0, cases - 2, {"KeyError in x.py, read": [3, seed]})))
    return tmp_path


def test_what_fell_is_said_and_stands_in_the_record(small: Path, capsys):
    assert torture.main(["--hours", "0.1", "--seed", "9", *ALONE]) == 1
    said = capsys.readouterr().out.splitlines()
    calls = sum(line.startswith("open x: a traceback (Trial(call=1") for line in said)
    assert 0 < calls < 5
    assert said[-2:] == [
        "list of models: KeyError in x.py, read: cases 3, 9",
        "2520 damaged files for 2 readers, 1 ended runs, 5 failing calls, 0 small disks, 1 times "
        f"several commands at once, 52 sequences; kinds of fall: {calls + 1}; record: "
        "build/torture.json"]
    record = Record.read(small / "torture.json")
    assert {m.name: m.value for m in record.metrics if m.name.startswith("corrupt.list")} == {
        "corrupt.list_of_models.cases": 1260, "corrupt.list_of_models.read": 0,
        "corrupt.list_of_models.refused": 1258, "corrupt.list_of_models.fell": 2}
    told = torture_page.page(
        "{sequences}\n{ended runs}\n{failing calls}\n{damaged files}\n{small disks}\n{races}\n"
        "{long run}\n", record, None, small)
    assert "| list of models | 1,260 | 0 | 1,258 | 2 |" in told
    assert "| all | 2,520 | 1,260 | 1,258 | 2 |" in told
    assert "| small clone | 1 | 0 | 0 | 0 | 0 | 0 | 0 |" in told
    assert f"| 187 | 5 | {calls} |" in told
    assert "| times | commands | fell |" in told
    assert "Not tried in this run" in told
    assert "It has not been run yet" in told
    assert "seed 9" in told


def test_hours_have_chapters_too_and_small_disks_where_one_may_mount(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    names: list[str] = []
    shares: list[float] = []

    @contextmanager
    def on_a_small_disk(made):
        yield SimpleNamespace(trial=lambda share: (
            shares.append(share), disk.Trial(share, "a traceback" if share > 0.8 else ""))[1])

    monkeypatch.setattr(torture.profiles, "notebooks", lambda: ["04_small", "05_small"])
    monkeypatch.setattr(torture, "made_in", lambda folder, name: (
        names.append(name), SimpleNamespace(seconds=10))[1])
    monkeypatch.setattr(disk, "may_mount", lambda: True)
    monkeypatch.setattr(disk, "on_a_small_disk", on_a_small_disk)
    assert torture.main(["--hours", "2", *ALONE]) == 1
    assert sorted(names) == ["", "", "04_small", "04_small", "05_small", "05_small"]
    assert len(set(shares)) == len(shares) == 10 + 2 * 2, "other chapters, other shares"
    assert "small clone, small disk: a traceback (Trial(share=" in capsys.readouterr().out
    record = Record.read(small / "torture.json")
    fell = sum(share > 0.8 for share in shares[:10])
    assert f"| small clone | 10 | {fell} |" in torture_page.small_disks(record)
    assert "| chapter 4 | 5 | 1 | 1 | 1 | 1 | 1 | 0 |" in torture_page.ended_runs(record)


def test_a_stopped_run_goes_on_behind_what_has_ended(small: Path, monkeypatch, capsys):
    whole = torture.corrupt.tried
    asked: list[str] = []

    def stopped(name, *rest):
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(name, *rest)

    monkeypatch.setattr(torture.corrupt, "tried", stopped)
    with pytest.raises(KeyboardInterrupt):
        torture.main(ALONE)
    torture.main(ALONE)
    assert asked == ["text", "list of models", "list of models"]
    assert capsys.readouterr().out.count("failing calls: ") == 0


def test_every_reader_has_its_row(small: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torture, "READERS", READERS)
    torture.main(ALONE)
    told = torture_page.corrupt_files(Record.read(small / "torture.json"))
    for name in READERS:
        assert f"| {name} | " in told


def test_nothing_tried_is_said():
    told = torture_page.page("{failing calls} and {damaged files}", None, None, Path("nowhere"))
    assert told.count("Nothing has been tried yet: `make torture`.") == 2
