"""A scheduler and two workers as a user starts them by hand, in processes of their own."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from lablog.cluster import client
from lablog.files import repository

TESTS = Path(__file__).parents[1]


@dataclass
class ByHand:
    """`address` of a scheduler and the processes behind it."""

    scheduler: subprocess.Popen
    address: str
    workers: list[subprocess.Popen] = field(default_factory=list)

    def join(self, count: int) -> None:
        """More workers with one thread each; returns once they have joined."""
        new = [start("worker", self.address, "--threads", "1") for _ in range(count)]
        assert all(one.stdout.readline().startswith("worker with 1 threads") for one in new)
        self.workers += new

    def close(self) -> None:
        for process in [*self.workers, self.scheduler]:
            process.send_signal(signal.SIGINT)
        for process in [*self.workers, self.scheduler]:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


def start(*arguments: str) -> subprocess.Popen:
    path = os.pathsep.join([str(repository() / "lib"), str(TESTS / "cluster")])
    return subprocess.Popen(
        [sys.executable, "-m", "lablog.cluster", *arguments], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)


def by_hand(workers: int) -> ByHand:
    scheduler = start("scheduler", "--port", "0")
    address = scheduler.stdout.readline().split()[2].rstrip(";")
    made = ByHand(scheduler, address)
    made.join(workers)
    return made


@pytest.fixture(scope="package", autouse=True)
def _light():
    """A chapter's processes find loaded what it has imported; all that tests have would be slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "imported_here", lambda: ("lablog.cluster.warm",))
        yield


@pytest.fixture(scope="session")
def two():
    """A cluster of two workers that no test harms."""
    made = by_hand(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def fragile():
    """One whose workers a test may kill, since each is started again; the scheduler by the last."""
    made = by_hand(2)
    yield made
    made.close()
