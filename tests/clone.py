"""A clone in miniature: the real library and Makefile, tiny notebooks, and the real environment.

Its notebooks do what their `mode` parameter says, so that every way a run can end can be caused.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
HEADER = """\
# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
# ---
"""
ALPHA = HEADER + '''
# %% [markdown]
# # Alpha

# %% tags=["parameters"]
mode: str = "ok"  # what the notebook does
value: float = 0.5  # recorded as it is
seeds: list[int] = [1, 2]  # recorded as they are

# %%
from lablog.alpha import work

work.begin(mode)

# %%
import matplotlib.pyplot as plt
import pandas as pd
from lablog import figures
from lablog.run import begin

figures.use_style()
run = begin("01_alpha", globals())
run.metric("value", value, "fraction")
run.metric("rows", work.rows(), "count")

# %%
axes = plt.figure().subplots()
axes.plot([0, 1], [0, value])
run.figure("line", axes.figure, pd.DataFrame({"x": [0, 1], "y": [0, value]}), "A line.")

# %%
work.act(mode, run)

# %%
if mode != "no finish":
    print(run.finish())
'''
BETA = HEADER + '''
# %% [markdown]
# # Beta

# %% tags=["parameters"]
size: int = 3  # recorded as it is

# %%
import lablog.beta.work
from lablog.run import begin

run = begin("02_beta", globals())
run.metric("size", lablog.beta.work.twice(size), "count")
run.finish()
'''
ALPHA_WORK = '''"""What notebook alpha does."""

import json
import os
import time
from pathlib import Path

from lablog.files import data_file


def rows():
    return len(data_file("alpha.csv").read_text().splitlines())


def begin(mode):
    if mode == "hang":
        wait(Path(json.loads(Path(os.environ["LABLOG_RUN"]).read_text())["artifacts"]))


def act(mode, run):
    if mode == "fail":
        raise ValueError("planted fault")
    if mode == "clock":
        run.metric("clock", time.time(), "s")
    if mode == "wait":
        wait(run.artifacts)


def wait(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "half").write_text(str(os.getpid()))
    (folder / "half").replace(folder / "waiting")
    while not (folder / "go").exists():
        time.sleep(0.02)
'''
BETA_WORK = '''"""What notebook beta does."""


def twice(size):
    return 2 * size
'''
TORCH = '''"""Stands in for PyTorch, of which these notebooks only ask the device, and fast."""

__version__ = "0"


class Tensor:
    pass


class cuda:
    is_available = staticmethod(lambda: False)


class backends:
    class cpu:
        get_cpu_capability = staticmethod(lambda: "NONE")
'''
SLOW = 'raise ImportError("optional for its importer, and slow")\n'
JUPYTER_BOOK = '''#!/usr/bin/env python
"""Stands in for jupyter-book where the book is not the point."""

import sys
from pathlib import Path

html = Path(sys.argv[sys.argv.index("--path-output") + 1]) / "_build" / "html"
try:
    html.mkdir(parents=True)
    (html / "index.html").write_text("a book")
except OSError as error:
    sys.exit(str(error))
'''


def until(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    """Poll until a condition holds; AssertionError names what did not happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether a process runs (one that ended but was not collected does not)."""
    shown = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(shown) and not shown.startswith("Z")


def started(command: Sequence[str], root: Path, environment: dict[str, str],
            **options: object) -> subprocess.Popen[str]:
    """Start a command in a session of its own.

    It heeds Ctrl-C, which a shell makes everything ignore that it starts in the background.
    """
    return subprocess.Popen(
        command, cwd=root, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,  # type: ignore[call-overload]
    )


class Clone:
    """A clone in miniature in `root`, set up as if `make setup` had run."""

    def __init__(self, root: Path, environment: bool = True) -> None:
        self.root = root
        self.started: list[subprocess.Popen[str]] = []
        self.python = str(root / "build/venv/bin/python")
        shutil.copytree(REPOSITORY / "lib", root / "lib",
                        ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        (root / "data").mkdir()
        for name in ("Makefile", "pyproject.toml", "requirements.lock", "environment.yml",
                     "jupytext.toml", "data/models.yaml", "data/claims.csv"):
            shutil.copyfile(REPOSITORY / name, root / name)
        files = {
            "notebooks/01_alpha.py": ALPHA, "notebooks/02_beta.py": BETA,
            "notebooks/reports/01_alpha.en.j2": 'Result:\n- value {{ number("value") }}\n',
            "notebooks/reports/01_alpha.ja.j2": '結果:\n- 値 {{ number("value") }}\n',
            "notebooks/reports/02_beta.en.j2": 'Result:\n- size {{ number("size") }}\n',
            "notebooks/reports/02_beta.ja.j2": '結果:\n- 大きさ {{ number("size") }}\n',
            "notebooks/profiles/smoke.yaml": "# as the notebooks say\n",
            "notebooks/profiles/laptop.yaml": "all:\n  value: 0.25\n02_beta:\n  size: 5\n",
            "lib/lablog/alpha/__init__.py": '"""A room."""\n',
            "lib/lablog/alpha/work.py": ALPHA_WORK,
            "lib/lablog/beta/__init__.py": '"""Another room."""\n',
            "lib/lablog/beta/work.py": BETA_WORK,
            "data/alpha.csv": "a\nb\nc\n", "data/unused.csv": "x\n",
            "native/CMakeLists.txt": "", "stubs/torch.py": TORCH,
            "stubs/rfc3987_syntax.py": SLOW, "book/intro.md": "# A small book\n",
        }
        for name, text in files.items():
            self.write(name, text)
        self.age(3600)
        self.environment = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("CONDA", "MAKE", "MFLAGS", "LABLOG", "PYTEST", "COV"))
        }
        self.environment |= {
            "PYTHONPATH": f"{root}/stubs:{root}/lib", "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if environment:
            self.borrow(Path(sys.prefix), root / "build" / "venv")
            self.stamps()

    def borrow(self, real: Path, venv: Path) -> None:
        """Make a virtual environment that is the real one, but for jupyter-book."""
        (venv / "bin").mkdir(parents=True)
        for program in (real / "bin").iterdir():
            if program.name != "jupyter-book":
                (venv / "bin" / program.name).symlink_to(program)
        for name in ("lib", "share", "etc"):
            if (real / name).is_dir():
                (venv / name).symlink_to(real / name)
        shutil.copyfile(real / "pyvenv.cfg", venv / "pyvenv.cfg")
        self.write("build/venv/bin/jupyter-book", JUPYTER_BOOK).chmod(0o755)

    def stamps(self) -> None:
        """Make Make believe that environment and native library are up to date."""
        (archive,) = (
            line.split('"')[1].replace("-", "_").replace("==", "-") + ".tar.gz"
            for line in (self.root / "pyproject.toml").read_text().splitlines()
            if '"llama-cpp-python==' in line
        )
        venv = str(self.root / "build" / "venv")
        for name in (f"build/source/{archive}", "build/.environment" + venv.replace("/", "-"),
                     "build/native/.built"):
            self.write(name, "")
            moment = time.time() - 1800
            os.utime(self.root / name, (moment, moment))

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def age(self, seconds: float) -> None:
        """Let all files be that old."""
        moment = time.time() - seconds
        for path in self.root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                os.utime(path, (moment, moment))

    def spawn(self, *command: str, **options: object) -> subprocess.Popen[str]:
        """Start a command with the clone's library."""
        process = started(command, self.root, self.environment, **options)
        self.started.append(process)
        return process

    def close(self) -> None:
        """End what a failed test left running."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return finish(self.spawn(*command))

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.call("make", *arguments)

    def runner(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.call(*self.runner_command(*arguments))

    def runner_command(self, *arguments: str) -> Sequence[str]:
        return (self.python, "-m", "lablog.runner", *arguments)

    def planned(self, profile: str, notebook: str = "01_alpha", **parameters: object) -> Path:
        """Write the parameters of a run as the runner's `plan` does; the folder of the profile."""
        values = {"mode": "ok", "value": 0.5, "seeds": [1, 2]} if notebook == "01_alpha" else {}
        self.write(f"build/{profile}/parameters/{notebook}.json", json.dumps(values | parameters))
        return self.root / "build" / profile

    def start_waiting(
        self, profile: str, *options: str, mode: str = "wait", through: Sequence[str] = ()
    ) -> tuple[subprocess.Popen[str], int]:
        """Start a run of alpha, by a command `through` which it is run, that waits in its cell; the
        process, and that of its kernel."""
        folder = self.planned(profile, mode=mode)
        mark = folder / "artifacts" / "waiting"
        for left in (mark, folder / "artifacts" / "go"):
            left.unlink(missing_ok=True)
        command = self.runner_command("run", str(folder), "01_alpha", *options)
        process = self.spawn(*through, *command)
        until(lambda: mark.exists() or process.poll() is not None, "the start of the cell")
        assert process.poll() is None, process.communicate()
        return process, int(mark.read_text())

    def go(self, profile: str) -> None:
        """Let the waiting run of a profile continue."""
        self.write(f"build/{profile}/artifacts/go", "")


Finished = subprocess.CompletedProcess[str]


def finish(process: subprocess.Popen[str], seconds: float = 240) -> Finished:
    """Wait for a process and collect its output; what is not waited for to its end is ended."""
    try:
        out, error = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }
