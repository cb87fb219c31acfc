"""The clock of the benchmarks: what counts, in which order, and what a ratio divides."""

import pytest

from tools import timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until work adds to it."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def lasting(clock: list[float], *durations: float, log: list[float] | None = None):
    left = list(durations)

    def work() -> str:
        clock[0] += left.pop(0)
        if log is not None:
            log.append(durations[0])
        return "done"

    return work


def test_work_is_timed_and_its_result_kept(clock: list[float]):
    assert timing.timed(lasting(clock, 2.5)) == (2.5, "done")
    assert timing.seconds(lasting(clock, 0.25)) == 0.25


def test_the_median_leaves_out_the_first_run(clock: list[float]):
    assert timing.median_seconds(lasting(clock, 100, 1, 7, 3), 3) == 3


def test_a_ratio_is_the_candidates_speed_over_the_references(clock: list[float]):
    """Pairs alternate in order; the first, which warms up, does not count."""
    order: list[float] = []
    reference = lasting(clock, 4, 6, 6, 6, log=order)
    candidate = lasting(clock, 9, 3, 2, 1, log=order)
    assert timing.paired(reference, candidate, 3) == 3
    assert order == [4, 9, 9, 4, 4, 9, 9, 4]


def test_on_a_gpu_the_clock_waits_for_the_device(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lasting(clock, 5))
    assert timing.seconds(lasting(clock, 1), "cuda") == 6
