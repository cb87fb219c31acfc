"""The page of times adds up what the records say, and says whose they are."""

from datetime import UTC, datetime

from lablog import times_page
from lablog.provenance import CloneState, Machine
from lablog.record import Record, Stage, TaskPlace


def record(notebook: str, seconds: float, stages: dict[str, float], profile: str) -> Record:
    return Record(
        notebook=notebook, profile=profile, status="ok", parameters={}, seeds=(), seconds=seconds,
        started=datetime(2026, 1, 1, tzinfo=UTC), peak_memory_bytes=3 * 2**29,
        stages=tuple(Stage(name=name, seconds=each) for name, each in stages.items()),
        source=CloneState(commit="a" * 40, dirty=False, library_sha256="", patch_sha256=""),
        machine=Machine(python="3", platform="Linux", cpu="A processor", threads=2, device="cpu",
                        packages={}))


def test_times_are_added_and_the_longest_stages_named():
    stages = {"short": 1.0, "long": 90.0, "longer": 100.0, "middle": 5.0}
    tasks = tuple(TaskPlace(kind="training", name=str(i), worker=f"host{i % 2}", seconds=1.0)
                  for i in range(5))
    own = [record("04_cvfp_phase1", 200.4, stages, "smoke").model_copy(update={"tasks": tasks}),
           record("05_cvfp_phase2", 3600.0, {}, "smoke")]
    theirs = {"laptop": {"04_cvfp_phase1": record("04_cvfp_phase1", 61.0, {}, "laptop")},
              "bench": {"bench": record("bench", 9.0, {}, "bench")}}
    page = times_page.page(own, theirs)
    mine, published = page.split("## Published, profile laptop")
    assert "## This clone, profile smoke" in mine
    assert ("| 04_cvfp_phase1 | 3:20 | longer 1:40, long 1:30, middle 0:05 | 5 on 2 | 1,536 MiB |\n"
            ) in mine
    assert f"{own[0].machine.processor}, 2 threads, commit `{'a' * 10}`." in mine
    assert "| **all** | **63:20** |" in mine
    assert "| **all** | **1:01** |" in published
    assert "profile bench" not in page


def test_machine_and_commit_stand_below_the_chapter_where_they_differ():
    own = [record("04_cvfp_phase1", 1.0, {}, "smoke"), record("05_cvfp_phase2", 1.0, {}, "smoke")]
    own[1] = own[1].model_copy(update={"source": CloneState(
        commit="b" * 40, dirty=False, library_sha256="", patch_sha256="")})
    page = times_page.page(own, {})
    for each in own:
        assert (f"| {each.notebook}<br>{each.machine.processor}, 2 threads, commit "
                f"`{each.source.commit[:10]}` |") in page


def test_a_clone_without_results_has_the_published_times():
    assert "This clone" not in times_page.page([], {})
