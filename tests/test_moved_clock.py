"""Somebody sets the clock while results are being made."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clone import Clone, finish

from lablog.record import Record

DAY = 86_400


@pytest.fixture
def moved(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A file whose eight bytes say by how many seconds the clock is ahead, and the environment of
    what looks at it."""
    library, file = tmp_path / "moving.so", tmp_path / "ahead"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library),
                    str(Path(__file__).with_name("moving_clock.c"))], check=True)
    file.write_bytes(bytes(8))
    return file, {"LD_PRELOAD": str(library), "MOVING_CLOCK": str(file)}


def move(file: Path, seconds: int) -> None:
    with file.open("r+b") as opened:
        opened.write(seconds.to_bytes(8, "little", signed=True))


TASKS = """
import sys, time
from pathlib import Path
from lablog.cluster.client import Cluster
with Cluster("", Path(sys.argv[1]), 2) as cluster:
    for _ in range(4):
        began = time.time()
        cluster.map("sleep", time.sleep, [(1.0,), (1.01,), (1.02,)])
        print(round(time.time() - began), flush=True)
    print(all(0.9 < place.seconds < 60 for place in cluster.ran))
"""


def test_tasks_end_whatever_the_clock_says(moved, tmp_path: Path):
    """Schedulers forget workers and connections that they have not heard of for a while."""
    file, environment = moved
    with subprocess.Popen([sys.executable, "-c", TASKS, str(tmp_path)], stdout=subprocess.PIPE,
                          text=True, env={**os.environ, **environment}) as process:
        assert process.stdout
        took = [int(process.stdout.readline())]
        for ahead in (DAY, -DAY, 0):
            time.sleep(0.7)
            move(file, ahead)
            took.append(int(process.stdout.readline()))
        assert process.stdout.read() == "True\n"
    assert took[0] < 60 < DAY - 60 < took[1], took
    assert took[2] < -DAY, "the process has seen the clock move"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    clone = Clone(tmp_path_factory.mktemp("clone"))
    yield clone
    clone.close()


@pytest.mark.parametrize("ahead", [DAY, -DAY])
def test_results_are_those_of_a_quiet_clock(clone: Clone, moved, ahead: int):
    """They are as old as their run; where that lies in the future, they are made again (there are
    tests of the runner for that)."""
    folder = clone.planned("quiet")
    assert clone.runner("run", str(folder), "01_alpha").returncode == 0
    file, environment = moved
    before, clone.environment = clone.environment, clone.environment | environment
    began = time.time()
    process, _ = clone.start_waiting("moved")
    clone.environment = before
    move(file, ahead)
    clone.go("moved")
    done = finish(process)
    assert done.returncode == 0, done.stderr
    path = clone.root / "build/moved/records/01_alpha.json"
    found, quiet = Record.read(path), Record.read(folder / "records/01_alpha.json")
    assert found.metrics == quiet.metrics
    assert 0 < found.seconds < 120
    assert began <= path.stat().st_mtime <= time.time()
