"""The runner and Make, on a clone in miniature: how runs end, and what makes a result stale."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from clone import Clone, alive, contents, finish, until
from hypothesis import given, settings
from hypothesis import strategies as st

from lablog import runner
from lablog.record import Record

RESULTS = ("figures", "notebooks", "records")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    clone = Clone(tmp_path_factory.mktemp("clone"))
    yield clone
    clone.close()


@pytest.fixture(scope="module")
def good(clone: Clone) -> Path:
    """Folder of a profile with one good run of alpha."""
    folder = clone.planned("good")
    done = clone.runner("run", str(folder), "01_alpha")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def last(clone: Clone, good: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the good run's folder for a test of its own."""
    folder = clone.root / "build" / re.sub(r"\W+", "-", request.node.name)
    shutil.copytree(good, folder)
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """The bytes of all results: what a later step or the book would read."""
    return {f"{kind}/{name}": data for kind in RESULTS if (folder / kind).is_dir()
            for name, data in contents(folder / kind).items()}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def scratch(folder: Path) -> list[Path]:
    return list(folder.glob(".run-*"))


# --- one run --------------------------------------------------------------------------------------


def test_a_good_run_leaves_record_notebook_and_figures(good: Path):
    record = read(good / "records" / "01_alpha.json")
    assert (record["status"], record["profile"]) == ("ok", "good")
    assert record["parameters"] == {"mode": "ok", "value": 0.5, "seeds": [1, 2]}
    assert record["seeds"] == [1, 2]
    assert {m["name"]: m["value"] for m in record["metrics"]} == {"value": 0.5, "rows": 3}
    assert record["report"]["ja"] == "結果:\n- 値 50.0%"
    for kind in ("svg", "csv"):
        assert (good / record["figures"][0][kind]).is_file()
    assert (good / record["figures"][0]["csv"]).read_text() == "x,y\n0,0.0\n1,0.5\n"
    executed = nbformat.read(good / "notebooks" / "01_alpha.ipynb", as_version=4)
    assert any("value 50.0%" in str(cell.get("outputs")) for cell in executed.cells)
    assert not scratch(good)
    assert not list((good / "failed").glob("*"))


def test_a_failing_cell_keeps_its_remains_aside_and_the_last_result(clone: Clone, last: Path):
    before = results(last)
    clone.planned(last.name, mode="fail")
    done = clone.runner("run", str(last), "01_alpha")
    assert done.returncode == 1
    assert "ValueError: planted fault" in done.stderr
    assert results(last) == before
    record = read(last / "failed" / "01_alpha.json")
    assert record["status"] == "failed"
    assert record["failure"] == {
        "kind": "PapermillExecutionError", "message": "ValueError: planted fault",
    }
    partial = nbformat.read(last / "failed" / "01_alpha.ipynb", as_version=4)
    assert any(o.get("ename") == "ValueError" for c in partial.cells for o in c.get("outputs", ()))
    assert not scratch(last)


def test_a_notebook_without_finish_is_a_failed_run(clone: Clone, last: Path):
    before = results(last)
    clone.planned(last.name, mode="no finish")
    done = clone.runner("run", str(last), "01_alpha")
    assert done.returncode == 1
    assert "run.finish()" in done.stderr
    assert results(last) == before
    assert read(last / "failed" / "01_alpha.json")["status"] == "failed"


def test_a_timeout_exits_with_124(clone: Clone, last: Path):
    before = results(last)
    process, kernel = clone.start_waiting(last.name, "--timeout", "4", mode="hang")
    done = finish(process)
    assert done.returncode == 124, done.stderr
    assert results(last) == before
    record = read(last / "failed" / "01_alpha.json")
    assert record["status"] == "timeout"
    assert "tim" in record["failure"]["message"].lower()
    assert (last / "failed" / "01_alpha.ipynb").is_file()
    until(lambda: not alive(kernel), "the end of the kernel")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_exits_with_130(clone: Clone, last: Path, number: signal.Signals):
    before = results(last)
    process, kernel = clone.start_waiting(last.name)
    process.send_signal(number)
    done = finish(process)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert results(last) == before
    record = read(last / "failed" / "01_alpha.json")
    assert record["status"] == "interrupted"
    assert (last / "failed" / "01_alpha.ipynb").is_file()
    assert not scratch(last)
    until(lambda: not alive(kernel), "the end of the kernel")


def test_a_run_that_ignores_ctrl_c_can_be_terminated(clone: Clone, last: Path):
    """As one does that a script has started in the background."""
    process, kernel = clone.start_waiting(
        last.name, through=("sh", "-c", 'trap "" INT; exec "$@"', "sh"))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert finish(process, 60).returncode == 130
    assert read(last / "failed" / "01_alpha.json")["status"] == "interrupted"
    until(lambda: not alive(kernel), "the end of the kernel")


def test_a_killed_run_leaves_nothing_that_counts(clone: Clone):
    folder = clone.root / "build" / "killed"
    process, kernel = clone.start_waiting("killed")
    process.kill()
    assert finish(process).returncode == -signal.SIGKILL
    assert results(folder) == {}
    assert len(scratch(folder)) == 1
    until(lambda: not alive(kernel), "the end of the orphaned kernel")
    # The next good run takes these remains and those of earlier failures away.
    clone.planned("killed")
    clone.write("build/killed/failed/01_alpha.json", "{}")
    assert clone.runner("run", str(folder), "01_alpha").returncode == 0
    assert not scratch(folder)
    assert not (folder / "failed").exists()
    assert read(folder / "records" / "01_alpha.json")["status"] == "ok"


def test_a_second_run_at_once_is_refused_and_a_record_is_as_old_as_its_run(
    clone: Clone, last: Path
):
    begin = time.time()
    process, _ = clone.start_waiting(last.name)
    before = results(last)
    second = clone.runner("run", str(last), "01_alpha")
    assert second.returncode == 2
    assert re.search(r"another run of 01_alpha is writing to .*wait until it ends", second.stderr)
    assert "Traceback" not in second.stderr
    assert results(last) == before
    clone.go(last.name)
    first = finish(process)
    assert first.returncode == 0, first.stderr
    path = last / "records" / "01_alpha.json"
    assert read(path)["parameters"]["mode"] == "wait"
    # A source that is touched while the cell waits is therefore newer than the record.
    assert begin - 1 < path.stat().st_mtime < (last / "artifacts" / "waiting").stat().st_mtime


def test_an_unknown_parameter_does_not_reach_a_notebook(clone: Clone):
    folder = clone.planned("unknown", valeu=0.5)
    done = clone.runner("run", str(folder), "01_alpha")
    assert done.returncode == 2
    assert "unknown parameter 'valeu' of 01_alpha; did you mean 'value'?" in done.stderr
    assert results(folder) == {}


@pytest.mark.parametrize(("status", "code"), [
    ("ok", 0), ("failed", 1), ("timeout", 124), ("interrupted", 130),
])
def test_the_exit_code_tells_how_a_run_ended(
    status: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    folder = tmp_path / "own"
    (folder / "parameters").mkdir(parents=True)
    (folder / "parameters" / "01_alpha.json").write_text('{"k": 3}')
    handed = []

    def execute(spec: runner.RunSpec) -> runner.Outcome:
        handed.append(spec)
        return runner.Outcome(status, folder / "failed" / "01_alpha.json", "because")

    monkeypatch.setattr(runner, "execute", execute)
    before = signal.getsignal(signal.SIGTERM)
    try:
        arguments = ["run", str(folder), "01_alpha", "--timeout", "5", "--cluster", "jobs.yaml"]
        assert runner.main(arguments) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    spec = runner.RunSpec("01_alpha", "own", {"k": 3}, folder.resolve(), 5.0, "jobs.yaml")
    assert handed == [spec]
    assert ("because" in capsys.readouterr().err) == (code != 0)


def test_figures_are_compared_apart_from_their_seconds(tmp_path):
    """Other columns and pictures count; a figure over time is compared by its other columns."""
    def folder(name: str, seconds: float, value: int, picture: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "timed.csv").write_text(f"value,seconds\n{value},{seconds}\n")
        (path / "timed.svg").write_text(f"<svg>{seconds}</svg>")
        (path / "plain.csv").write_text(f"value\n{value}\n")
        (path / "plain.svg").write_text(picture)
        return path

    one = folder("one", 0.1, 1, "<svg/>")
    assert runner.figure_differences(one, folder("slower", 0.2, 1, "<svg/>")) == []
    assert runner.figure_differences(one, folder("other", 0.1, 2, "<svg/>")) == [
        "plain.csv", "timed.csv"]
    assert runner.figure_differences(one, folder("drawn", 0.1, 1, "<svg>1</svg>")) == ["plain.svg"]
    fewer = folder("fewer", 0.1, 1, "<svg/>")
    (fewer / "plain.csv").unlink()
    assert runner.figure_differences(one, fewer) == ["plain.csv"]
    assert runner.figure_differences(fewer, one) == ["plain.csv"]


def test_every_file_that_a_parameter_names_is_looked_at(tmp_path: Path, monkeypatch):
    """In lists, in folders of folders, and in the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    files = [tmp_path / name for name in ("model.gguf", "book.txt", "trainings/a/adapter/weights")]
    for path in (*files, tmp_path / "trainings/.git/index"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = runner.dependencies("06_arianna_finetune", tmp_path, {
        "model": "~/model.gguf", "files": ["nowhere.txt", str(files[1])], "seeds": [1, 2],
        "trainings": str(tmp_path / "trainings"), "empty": "", "rate": 0.1})
    assert set(files) <= set(found)
    assert tmp_path / "trainings/.git/index" not in found
    assert set(files).isdisjoint(runner.dependencies("06_arianna_finetune", tmp_path, {}))


@given(st.text() | st.sampled_from(["~nobody/x", "x" * 5000, "a\0b", "~"]))
@settings(max_examples=50, deadline=None)
def test_a_text_that_is_no_path_is_none(text: str):
    found = runner.dependencies("01_zero_shot_commitment", Path("x"), {"said": text, "all": [text]})
    assert found


KILLED = """
import os, sys
from lablog import runner

move = runner._move

def killed(source, target):
    move(source, target)
    if target.suffix == ".json":
        os._exit(9)

runner._move = killed
runner.main(sys.argv[1:])
"""


def test_a_record_is_never_in_place_with_a_later_date(clone: Clone):
    """Killed right behind the move: what changed during the run must still be newer."""
    folder = clone.planned("killed")
    script = clone.write("killed.py", KILLED)
    done = clone.call(clone.python, str(script), "run", str(folder), "01_alpha")
    assert done.returncode == 9
    record = folder / "records" / "01_alpha.json"
    assert record.stat().st_mtime <= Record.read(record).started.timestamp()


# --- verify ---------------------------------------------------------------------------------------


def test_verify_finds_a_metric_that_differs_and_passes_clean_notebooks(clone: Clone):
    done = clone.runner("verify", "--profile", "smoke", "--set", "mode=clock", "--", "01")
    assert done.returncode == 1, done.stderr
    assert "01_alpha: differs in ['clock']" in done.stdout.splitlines()
    clean = clone.runner("verify", "--profile", "smoke", "--", "02")
    assert clean.returncode == 0, clean.stdout + clean.stderr
    assert "02_beta: identical" in clean.stdout.splitlines()
    one, two = (
        [cell.id for cell in nbformat.read(path, as_version=4).cells
         if "injected-parameters" not in cell.metadata.get("tags", ())]
        for path in sorted((clone.root / "build" / "verify").glob("smoke+*/notebooks/01*.ipynb"))
    )
    assert one == two
    assert len(set(one)) == len(one)


# --- Make -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(clone: Clone) -> Path:
    """Folder of the default profile after `make reproduce`."""
    done = clone.make("reproduce")
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("- value 25.0%", "- size 10", "records, figures, notebooks: build/laptop/"):
        assert line in done.stdout
    assert (clone.root / "build" / "book" / "html" / "index.html").is_file()
    return clone.root / "build" / "laptop"


def test_a_second_make_reproduce_does_nothing(clone: Clone, made: Path):
    html = clone.root / "build" / "book" / "html"
    before = {path: path.stat().st_mtime_ns for folder in (made, html)
              for path in folder.rglob("*") if path.is_file()}
    again = clone.make("reproduce")
    assert again.returncode == 0, again.stderr
    assert "running" not in again.stdout
    after = {path: path.stat().st_mtime_ns for folder in (made, html)
             for path in folder.rglob("*") if path.is_file()}
    changed = {path for path in after if after[path] != before.get(path)}
    assert {path.name for path in changed} <= {".lock", ".01_alpha.lock", ".02_beta.lock"}


BOTH = ["01_alpha", "02_beta"]
CHANGES = {
    "lib/lablog/alpha/work.py": ["01_alpha"],
    "lib/lablog/beta/__init__.py": ["02_beta"],
    "notebooks/02_beta.py": ["02_beta"],
    "data/alpha.csv": ["01_alpha"],
    "data/unused.csv": [],
    "lib/lablog/intervals.py": BOTH,
    "lib/lablog/figures.py": BOTH,  # imported inside a function of the record
    "lib/lablog/runner.py": [],
    "lib/lablog/models/training.py": [],
    "build/native/.built": [],  # neither notebook uses the native library
    "notebooks/profiles/laptop.yaml": [],  # the file alone, without a change in it
    "build/laptop/parameters/02_beta.json": ["02_beta"],
}
WHAT_IF = """
import json, os, re, subprocess, sys
from pathlib import Path
from lablog import profiles, runner

profile = profiles.load("laptop")
Path("plan.mk").write_text(runner.plan(profile, []))
found = {}
for name in json.loads(sys.argv[1]):
    before = Path(name).stat().st_mtime
    os.utime(name)
    shown = subprocess.run(["make", "-n", "PLAN=plan.mk", "_results"], text=True, check=True,
                           capture_output=True).stdout
    runs = re.findall(r"lablog.runner run \\S+ (\\S+)", shown)
    told = runner.why(profile, [])
    os.utime(name, (before, before))
    found[name] = runs, told
print(json.dumps(found))
"""


def test_what_depends_on_a_touched_file_would_run_and_nothing_else(clone: Clone, made: Path):
    script = clone.write("what_if.py", WHAT_IF)
    done = clone.call(clone.python, str(script), json.dumps(list(CHANGES)))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: runs for name, (runs, _) in found.items()} == CHANGES
    for name, (runs, told) in found.items():
        for notebook in BOTH:
            reason = f"runs: newer than its result: {name}" if notebook in runs else "up to date"
            assert f"{notebook}: {reason}" in told.splitlines(), (name, told)


def test_a_change_in_one_section_of_a_profile_concerns_its_notebook(clone: Clone, made: Path):
    before = results(made)
    profile = clone.root / "notebooks" / "profiles" / "laptop.yaml"
    profile.write_text(profile.read_text().replace("size: 5", "size: 6"))
    shown = clone.make("-n", "reproduce")
    assert re.findall(r"lablog\.runner run \S+ (\S+)", shown.stdout) == ["02_beta"]
    assert re.findall(r"^(\w+): runs", clone.make("why").stdout, re.MULTILINE) == ["02_beta"]
    done = clone.make("reproduce")
    assert done.returncode == 0, done.stderr
    after = results(made)
    assert {name for name in after if after[name] != before.get(name)} == {
        "records/02_beta.json", "notebooks/02_beta.ipynb",
    }
    assert "- size 12" in done.stdout


def test_a_result_from_the_future_is_no_excuse(clone: Clone, made: Path):
    """After the clock was set back, a record could be newer than what is edited for days."""
    record = made / "records" / "02_beta.json"
    moment = time.time() + 3600
    os.utime(record, (moment, moment))
    assert "02_beta: runs: its result is dated in the future" in clone.make("why").stdout
    done = clone.make("reproduce")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\[(\w+)\] running", done.stdout, re.MULTILINE) == ["02_beta"]
    assert record.stat().st_mtime < time.time()
    assert re.findall(r"^(\w+): runs", clone.make("why").stdout, re.MULTILINE) == []


def test_two_make_reproduce_at_once_give_one_refusal(clone: Clone):
    profile = clone.write("waiting.yaml", "01_alpha:\n  mode: wait\n")
    arguments = ("make", "reproduce", f"PROFILE={profile}", "NOTEBOOKS=01")
    first = clone.spawn(*arguments)
    mark = clone.root / "build" / "waiting" / "artifacts" / "waiting"
    until(lambda: mark.exists() or first.poll() is not None, "the start of the cell")
    second = clone.call(*arguments)
    assert second.returncode == 2
    refusals = [line for line in second.stderr.splitlines() if line.startswith("error:")]
    assert len(refusals) == 1
    assert re.search(r"another `make` \(process \d+\) is already producing", refusals[0])
    clone.go("waiting")
    done = finish(first)
    assert done.returncode == 0, done.stderr
    assert not list((clone.root / "build").glob(".plan.*"))


def test_control_c_during_make_keeps_the_last_result(clone: Clone, good: Path):
    profile = clone.write("stopped.yaml", "01_alpha:\n  mode: wait\n")
    folder = clone.root / "build" / "stopped"
    shutil.copytree(good, folder)
    before = results(folder)
    process = clone.spawn("make", "reproduce", f"PROFILE={profile}", "NOTEBOOKS=01")
    mark = folder / "artifacts" / "waiting"
    until(lambda: mark.exists() or process.poll() is not None, "the start of the cell")
    kernel = int(mark.read_text())
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process)
    assert done.returncode != 0
    until(lambda: (folder / "failed" / "01_alpha.json").is_file(), "the record of the failure")
    assert read(folder / "failed" / "01_alpha.json")["status"] == "interrupted"
    assert results(folder) == before
    until(lambda: not alive(kernel), "the end of the kernel")


def test_a_misspelt_parameter_stops_make_before_anything_runs(clone: Clone):
    done = clone.make("reproduce", "SET=valeu=1")
    assert done.returncode == 2
    assert "unknown parameter 'valeu'; did you mean 'value'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_results_of_an_override_lie_in_a_folder_of_their_own(clone: Clone, made: Path):
    before = results(made)
    done = clone.make("reproduce", "SET=02.size=9", "NOTEBOOKS=02")
    assert done.returncode == 0, done.stderr
    (folder,) = (clone.root / "build").glob("laptop+*")
    assert read(folder / "records" / "02_beta.json")["parameters"] == {"size": 9}
    assert results(made) == before
