"""Make: its help, which environment it takes, what it says when tools are missing."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from clone import Clone, until

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    made = Clone(tmp_path)
    yield made
    made.close()


def make(*arguments: str, **variables: str) -> str:
    """Output of Make in this clone; for targets that change nothing."""
    return subprocess.run(["make", *arguments, *(f"{k}={v}" for k, v in variables.items())],
                          cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_help_is_the_default_and_lists_every_target_for_users():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", text, re.MULTILINE)[1].replace("\\\n", " ")
    wanted = {name for name in phony.split() if not name.startswith("_")}
    assert {"help", "setup", "lab", "reproduce", "test", "book", "bench", "verify", "clean",
            "test-native-sanitize"} <= wanted
    shown = make("help")
    assert make() == shown
    listed = dict(re.findall(r"^  make (\S+) +(\S.*)$", shown, re.MULTILINE))
    assert set(listed) == wanted
    for option in ("PROFILE=smoke|laptop|study|pretrained|full ", 'SET="model=my.gguf" ',
                   'NOTEBOOKS="01 02" '):
        assert f"\n  {option}" in shown


# --- set-up ---------------------------------------------------------------------------------------


def outdated(clone: Clone) -> None:
    """Let the native library be out of date."""
    (clone.root / "build" / "native" / ".built").unlink()


@pytest.mark.parametrize(("variable", "tool"), [
    ("CXX", "nonexistent-cxx"), ("CMAKE", "nonexistent-cmake"),
])
def test_a_missing_tool_is_named_with_what_to_install(clone: Clone, variable: str, tool: str):
    outdated(clone)
    done = clone.make("_setup", f"{variable}={tool}")
    assert done.returncode == 2
    assert f"error: {tool} is not installed" in done.stderr
    for remedy in ("CMake", "C++17 compiler", "apt-get install cmake g++", "environment.yml"):
        assert remedy in done.stderr
    assert not (clone.root / "build" / "native" / ".built").exists()


def test_a_failing_native_build_leaves_no_stamp_and_shows_why(clone: Clone):
    outdated(clone)
    clone.write("native/CMakeLists.txt", 'message(FATAL_ERROR "the planted reason")\n')
    done = clone.make("_setup")
    assert done.returncode == 2
    assert "the planted reason" in done.stderr
    assert not (clone.root / "build" / "native" / ".built").exists()


def test_a_second_setup_does_nothing(clone: Clone):
    for _ in range(2):
        done = clone.make("setup")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_who_tests_a_clone_waits_for_another_who_does(clone: Clone):
    lock = clone.write("build/.test.lock", "")
    first = clone.spawn("python3", "lib/tools/exclusive.py", str(lock), "sleep", "60")
    until(lock.read_text, "the first one's lock")
    second = clone.spawn("make", "test")
    assert second.stderr
    assert second.stderr.readline() == (f"waiting for process {first.pid}, which does the same in "
                                        "this clone (build/.test.lock)\n")
    assert second.poll() is None


def test_other_arguments_for_cmake_build_the_library_anew(clone: Clone):
    """As those for CUDA, after a `make test` that had none; without arguments it stays."""
    clone.write("native/CMakeLists.txt", """\
cmake_minimum_required(VERSION 3.20)
project(told NONE)
file(APPEND "${CMAKE_BINARY_DIR}/told" "${WISH};")
""")
    clone.age(3600)
    clone.stamps()
    told = clone.root / "build" / "native" / "told"
    for arguments, expected in (("", None), ("-DWISH=a", "a;"), ("-DWISH=a", "a;"), ("", "a;"),
                                ("-DWISH=b -DX=1", "a;b;"), ("-DWISH=b -DX=1", "a;b;")):
        done = clone.make("setup", f"CMAKE_ARGS={arguments}")
        assert done.returncode == 0, done.stderr
        assert (told.read_text() if told.exists() else None) == expected


@pytest.mark.parametrize(("python", "told"), [
    ("nonexistent-python", "no Python with venv"), ("false", "no Python with venv"),
    ("./python3.10", "Python 3.10"), ("./python3.14", "Python 3.14"),
])
def test_a_wrong_python_is_refused_before_anything_is_made(
    tmp_path: Path, python: str, told: str
):
    clone = Clone(tmp_path, environment=False)
    for version in ("3.10", "3.14"):
        clone.write(f"python{version}", f"#!/bin/sh\necho {version}\n").chmod(0o755)
    done = clone.make("_setup", f"PYTHON={python}")
    assert done.returncode == 2
    assert f"error: {python} is {told}; needed is 3.11, 3.12 or 3.13: install one" in done.stderr
    assert not (tmp_path / "build" / "venv").exists()


def test_another_python_in_the_environment_is_refused(clone: Clone):
    """An activated conda environment may hold any Python."""
    python = clone.root / "conda" / "bin" / "python"
    clone.write("conda/bin/python", "#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    clone.environment |= {"CONDA_PREFIX": str(clone.root / "conda"), "CONDA_DEFAULT_ENV": "other"}
    done = clone.make("_setup")
    assert done.returncode == 2
    told = f"error: {python} is no Python; needed is 3.11, 3.12 or 3.13: activate an environment"
    assert told in done.stderr


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, "build/venv"),
    ({"CONDA_PREFIX": "/opt/conda/envs/lablog", "CONDA_DEFAULT_ENV": "lablog"},
     "/opt/conda/envs/lablog"),
    ({"CONDA_PREFIX": "/somewhere/env", "CONDA_DEFAULT_ENV": "/somewhere/env"}, "/somewhere/env"),
    ({"CONDA_PREFIX": "/somewhere/env"}, "/somewhere/env"),
    ({"CONDA_PREFIX": "/opt/conda", "CONDA_DEFAULT_ENV": "base"}, "build/venv"),
])
def test_an_activated_conda_environment_is_used_but_not_its_base(
    clone: Clone, variables: dict[str, str], expected: str
):
    clone.environment |= variables
    shown = clone.make("-n", "why")
    assert shown.returncode == 0, shown.stderr
    wanted = Path(expected) if expected.startswith("/") else clone.root / expected
    assert shown.stdout.startswith(f"{wanted}/bin/python -m lablog.runner why")


def test_clean_keeps_what_is_slow_to_make(clone: Clone):
    for name in ("laptop/records/a.json", "book/html/index.html", "native-sanitize/x",
                 "native-live/bin/live.js"):
        clone.write(f"build/{name}", "")
    assert clone.make("clean").returncode == 0
    left = {path.name for path in (clone.root / "build").iterdir() if path.name[0] != "."}
    assert left == {"venv", "native", "native-sanitize", "native-live", "source"}
    assert clone.make("setup").stdout == ""  # the environment still counts as made


# --- one place for versions -----------------------------------------------------------------------


def test_the_book_is_built_without_emscripten_and_says_so(clone: Clone, tmp_path: Path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "bash", "sed", "nproc", "uname"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    (programs / "python3").symlink_to(sys.executable)

    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        return clone.call("env", f"PATH={programs}", str(shutil.which("make")), *arguments)

    told = make("-n", "book").stdout
    assert "live page stays a picture: Emscripten is not installed" in told
    assert "tools.live" not in told
    assert "needs Emscripten" in make("live").stderr
    (programs / "emcmake").write_text("#!/bin/sh\n")
    (programs / "emcmake").chmod(0o755)
    told = make("-n", "book").stdout
    assert "stays a picture" not in told
    assert "tools.live" in told


def test_environment_and_project_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "python=3.11" in conda["dependencies"]
    # conda brings tools; the packages and their versions stand in pyproject.toml alone
    assert all(isinstance(entry, str) for entry in conda["dependencies"])
    pinned = [entry for entry in conda["dependencies"] if re.search(r"[=<>~]", entry)]
    assert pinned == ["python=3.11"]
    assert {"pip", "make", "cmake", "cxx-compiler"} <= set(conda["dependencies"])
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (r for group in groups for r in group):
        assert re.fullmatch(r"[\w.-]+==\d[\w.]*", requirement), requirement
    names = [re.split("==", r)[0].lower() for group in groups for r in group]
    assert len(set(names)) == len(names)


def test_the_installed_packages_are_the_pinned_ones():
    from importlib.metadata import version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        name, pin = requirement.split("==")
        assert version(name).split("+")[0] == pin, name
    assert (3, 11) <= sys.version_info[:2] < (3, 14)


def test_no_version_is_pinned_anywhere_else():
    for name in ("Makefile", "environment.yml", ".ci/run", "native/CMakeLists.txt"):
        found = re.findall(r"[\w-]+==\d[\w.]*", (ROOT / name).read_text())
        assert not found, f"{name} pins {found}"


def tracked_texts() -> dict[str, str]:
    shown = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if shown.returncode:
        pytest.skip("this is no git checkout")
    names = [name for name in shown.stdout.decode().split("\0") if (ROOT / name).is_file()]
    return {name: (ROOT / name).read_text(errors="replace") for name in names}


def test_no_registry_is_named():
    """Whoever installs decides where packages come from."""
    options = ["--" + option for option in ("index-url", "extra-index-url", "trusted-host")]
    hosts = [r"py" + r"pi\.org", r"pythonhosted" + r"\.org", r"ana" + r"conda\.(?:org|com)"]
    pattern = re.compile("|".join([*options, *hosts]))
    for name, text in tracked_texts().items():
        assert not pattern.search(text), f"{name}: {pattern.search(text)}"


def test_no_file_names_a_folder_of_somebodys_machine():
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w+")
    for name, text in tracked_texts().items():
        assert not pattern.search(text), f"{name}: {pattern.search(text)}"


def test_the_integration_script_calls_make_test():
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and line[0] != "#"]
    assert commands[-1] == "exec make test"
    assert script.stat().st_mode & 0o111
    assert shutil.which("bash")
