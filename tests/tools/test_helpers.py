"""The helpers of Make: what they say when something is missing, and what they leave behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from lablog import layout
from lablog.profiles import load
from tools import check, help, native, publish


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# --- check ----------------------------------------------------------------------------------------


def test_the_versions_of_python_are_those_of_the_project():
    assert check.supported() == ["3.11", "3.12", "3.13"]


def test_this_python_is_accepted():
    check.check_python(sys.executable, new=True)
    check.check_python(sys.executable, new=False)


def test_an_environment_needs_venv_and_one_that_is_there_does_not(folder: Path):
    python = script(folder / "python", 'case "$2" in *venv*) exit 1;; *) echo 3.12;; esac')
    check.check_python(python, new=False)
    with pytest.raises(SystemExit, match="is no Python with venv; needed is"):
        check.check_python(python, new=True)


def test_a_missing_program_is_named():
    check.check_programs(["sh"])
    with pytest.raises(SystemExit, match="nonexistent-program is not installed"):
        check.check_programs(["sh", "nonexistent-program"])


# --- native ---------------------------------------------------------------------------------------


def build(folder: Path, cmake: str, log: str = "build.log") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, native.__file__, "out", cmake, "2", log, "-DX=1"],
                          cwd=folder, capture_output=True, text=True, check=False)


def test_a_build_is_quiet_and_its_first_time_is_kept(folder: Path):
    cmake = script(folder / "cmake", 'echo "$@"; touch out/CMakeCache.txt')
    done = build(folder, cmake)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "out/configure.log").read_text() == "-S native -B out -DX=1\n"
    assert (folder / "out/build.log").read_text() == "--build out -j 2\n"
    assert (folder / "out/build_seconds").read_text() == "0\n"
    (folder / "out/build_seconds").write_text("77\n")
    assert build(folder, cmake, "build-tests.log").returncode == 0
    assert (folder / "out/build_seconds").read_text() == "77\n"  # only the first build counts
    assert (folder / "out/build-tests.log").is_file()


def test_a_failed_build_shows_the_end_of_its_log_and_goes_on_counting(folder: Path):
    fails = 'case "$1" in --build) seq 100; exit 3;; *) touch out/CMakeCache.txt;; esac'
    done = build(folder, script(folder / "cmake", fails))
    assert done.returncode == 1
    assert done.stderr.split() == [str(number) for number in range(61, 101)]
    assert not (folder / "out/build_seconds").exists()
    assert build(folder, script(folder / "cmake", "true")).returncode == 0
    assert (folder / "out/build_seconds").exists()


def test_a_large_file_is_refused_by_name(folder: Path):
    for name, size in (("small", 1_000_000), ("large", 1_000_001)):
        (folder / name).write_bytes(bytes(size))
    check.check_size(["small"])
    with pytest.raises(SystemExit, match="large has 1,000,001 bytes, more than 1,000,000"):
        check.check_size(["small", "large"])


# --- publish and help -----------------------------------------------------------------------------


@pytest.fixture
def clone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone that generates and publishes below `folder`."""
    for module in (publish, layout):
        monkeypatch.setattr(module, "repository", lambda: folder)
    return folder


@pytest.mark.parametrize(("results", "chosen"), [
    ("laptop", []), ("laptop", ["02"]), (None, ["--set", "02.items=7", "--", "02"])])
def test_records_chosen_figures_and_the_record_of_speed_are_published(
    clone: Path, results: str | None, chosen: list[str]
):
    made = results or load("laptop", ["02.items=7"]).name
    for name in (f"build/{made}/records/02_lambda_calibration.json", "build/bench.json",
                 f"build/{made}/figures/02_lambda_calibration/heat.svg",
                 f"build/{made}/figures/02_lambda_calibration/other.svg"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text('{"status": "ok"}')
    publish.main(["--profile", "laptop", *chosen])
    published = {str(path.relative_to(clone / "book/records"))
                 for path in (clone / "book").rglob("*.*")}
    assert published == {"bench.json", "laptop/02_lambda_calibration.heat.svg",
                         "laptop/02_lambda_calibration.json"}


def test_a_run_that_failed_is_not_published(clone: Path):
    record = clone / "build" / "laptop" / "records" / "02_lambda_calibration.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"status": "failed"}')
    with pytest.raises(SystemExit, match="has the status failed"):
        publish.main(["--profile", "laptop"])


@pytest.mark.parametrize("arguments", [["--profile", "study"], ["--profile", "laptop", "01"]])
def test_nothing_to_publish_is_an_error(clone: Path, arguments: list[str]):
    record = clone / "build" / "laptop" / "records" / "02_lambda_calibration.json"
    record.parent.mkdir(parents=True)
    record.touch()
    with pytest.raises(SystemExit, match="run `make reproduce` with the same PROFILE"):
        publish.main(arguments)
    assert not (clone / "book").exists()


def test_help_shows_targets_and_options():
    makefile = '## SIZE="a b"   how large\nSIZE ?= 1\n_own: x\nmake-it: y ## makes it\n'
    shown = help.described(makefile)
    assert shown.splitlines() == ["  make make-it               makes it", "",
                                  '  SIZE="a b"                        how large']
