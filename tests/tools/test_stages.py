"""A measurement in stages: kept one by one, alone or several at once."""

import multiprocessing
import os
import time
from pathlib import Path

import psutil
import pytest

from lablog.record import Record
from tools.stages import in_stages


@pytest.fixture(autouse=True)
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lablog.layout.built", lambda *names: tmp_path.joinpath(*names))


def stage(number: int, log: Path, behind: int = 0):
    """A stage that notes its number, behind so many others."""
    def measure(run):
        deadline = time.monotonic() + 60
        while behind and (not log.exists() or len(numbers(log)) < behind):
            assert time.monotonic() < deadline, "the others wait for this one"
            time.sleep(0.02)
        with log.open("a") as file:
            print(number, os.getpid(), file=file)
        run.metric(f"m{number}", number, "count")
    return measure


def numbers(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()]


def test_several_at_once_make_the_record_of_one_after_the_other(tmp_path: Path):
    log = tmp_path / "log"
    alone = in_stages("x", {f"s{n}": stage(n, log) for n in range(6)}, tmp_path / "alone.json")
    assert numbers(log) == list("012345")
    log.unlink()
    stages = {f"s{n}": stage(n, log, 5 if n == 0 else 0) for n in range(6)}
    together = in_stages("x", stages, tmp_path / "together.json", processes=2)
    assert together.metrics == alone.metrics
    assert [part.name for part in together.stages] == [part.name for part in alone.stages]
    assert Record.read(tmp_path / "together.json") == together
    assert numbers(log)[-1] == "0"
    processes = {line.split()[1] for line in log.read_text().splitlines()}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


def test_a_stage_that_fails_leaves_what_has_ended(tmp_path: Path, capfd):
    log = tmp_path / "log"

    def broken(run):
        raise ValueError("planted")

    stages = {"a": stage(0, log), "b": broken, "c": stage(2, log), "d": stage(3, log)}
    with pytest.raises(RuntimeError, match="a stage failed, as said above"):
        in_stages("x", stages, tmp_path / "x.json", processes=2)
    assert "ValueError: planted" in capfd.readouterr().err
    assert sorted(numbers(log)) == ["0", "2", "3"]
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(ValueError, match="planted"):
        in_stages("x", stages, tmp_path / "x.json")
    assert sorted(numbers(log)) == ["0", "2", "3"], "what was kept is not made again"


def waiting(run):
    print("begun", flush=True)
    time.sleep(600)


def test_stages_end_with_the_process_that_asked_for_them(tmp_path: Path, capfd):
    asking = multiprocessing.get_context("fork").Process(target=in_stages, args=(
        "x", {"a": waiting, "b": waiting}, tmp_path / "x.json", 2))
    asking.start()
    said = ""
    while said.count("begun") < 2:
        time.sleep(0.1)
        said += capfd.readouterr().out
        assert asking.is_alive()
    children = psutil.Process(asking.pid).children()
    assert len(children) == 2
    asking.kill()
    assert psutil.wait_procs(children, timeout=10)[1] == []
