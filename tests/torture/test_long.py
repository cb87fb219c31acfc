"""A kernel that stays open: what it holds is measured, and what grows is seen."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lablog import torture_page
from lablog.profiles import Profile
from lablog.record import Record
from torture import disk, long
from torture.long import QUANTITIES, Held, OpenKernel, grown, own_shared_memory

NOTEBOOK = """\
# %% tags=["parameters"]
leaking: bool = False  # whether it leaves things behind

# %%
import json, os, sys, tempfile, threading
assert "before" not in globals()
before = True
results = json.load(open(os.environ["LABLOG_RUN"]))["folder"]
os.mkdir(results)
open(f"{results}/result", "w").write("result")

# %%
if leaking:
    sys.kept = [*getattr(sys, "kept", []), bytearray(10_000_000), open(os.devnull),
                open(os.devnull)]
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    tempfile.mkstemp()
"""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "00_tiny.py").write_text(NOTEBOOK)
    monkeypatch.setattr("lablog.profiles.notebook_path", lambda name: tmp_path / f"{name}.py")
    monkeypatch.setattr("lablog.profiles.load", lambda name: Profile(name, {"00_tiny": {}}))
    with OpenKernel(tmp_path / "open") as opened:
        yield opened


@pytest.mark.parametrize(("leaking", "grows"), [
    (False, []), (True, ["memory", "files", "threads", "temporary"])])
def test_what_grows_is_seen(kernel: OpenKernel, leaking: bool, grows: list[str]):
    kernel.profile = Profile("smoke", {"00_tiny": {"leaking": leaking}})
    held = []
    for _ in range(2 * long.ENOUGH):
        assert kernel.round(["00_tiny"]) == ""
        held.append(kernel.held())
    assert grown(held) == grows, held
    assert held[-1].hours > held[0].hours > 0
    assert held[0].processes == 1
    assert 0 < held[0].disk < 0.1


@pytest.mark.skipif(not disk.may_mount(), reason="this process may not mount file systems")
def test_what_others_put_into_shared_memory_is_not_counted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("lablog.profiles.load", lambda name: Profile(name, {}))
    name = long.SHARED_MEMORY / f"lablog-of-another-{os.getpid()}"
    with subprocess.Popen(["sh", "-c", f"read go; touch {name}; echo made; read go; rm {name}"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin
        assert other.stdout
        disk._private_mounts.cache_clear()  # the other one stays where this process was
        with own_shared_memory(), OpenKernel(tmp_path / "open") as opened:
            before = opened.held().temporary
            print("go", file=other.stdin, flush=True)
            assert other.stdout.readline() == "made\n"
            assert not name.exists()
            assert opened.held().temporary == before
            (long.SHARED_MEMORY / "own").touch()
            assert opened.held().temporary == before + 1
        assert name.exists()
        print("go", file=other.stdin, flush=True)


def test_an_error_in_a_chapter_is_told(kernel: OpenKernel, tmp_path: Path):
    (tmp_path / "00_tiny.py").write_text("# %%\n1 / 0\n")
    assert kernel.round(["00_tiny"]) == "00_tiny: ZeroDivisionError: division by zero"


def test_a_stopped_run_keeps_what_it_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The rounds before, and no error: who stops it is none."""
    monkeypatch.setattr("lablog.profiles.notebooks", lambda: ["00_tiny"])
    monkeypatch.setattr("lablog.profiles.notebook_path", lambda name: tmp_path / f"{name}.py")
    monkeypatch.setattr("lablog.profiles.load", lambda name: Profile(name, {"00_tiny": {}}))
    monkeypatch.setattr("lablog.layout.built", lambda *names: tmp_path.joinpath("built", *names))
    (tmp_path / "00_tiny.py").write_text(
        f"# %%\nimport os\nif os.path.exists({str(tmp_path / 'seen')!r}):\n"
        f"    raise KeyboardInterrupt\nopen({str(tmp_path / 'seen')!r}, 'w').close()\n")
    with pytest.raises(KeyboardInterrupt):
        long.main(["--hours", "1"])
    record = Record.read(tmp_path / "built" / "long.json")
    assert record.metric("long.rounds").value == 1
    assert record.metric("long.error").value == "none"


def test_a_kernel_that_dies_is_told(kernel: OpenKernel, tmp_path: Path):
    (tmp_path / "00_tiny.py").write_text("# %%\nimport os\nos.kill(os.getpid(), 9)\n")
    assert kernel.round(["00_tiny"]) == "00_tiny: DeadKernelError: Kernel died"


def rounds(memory) -> list[Held]:
    return [Held(0.01 * (one + 1), float(size), *[1] * (len(QUANTITIES) - 1))
            for one, size in enumerate(memory)]


def test_steady_growth_is_seen_and_noise_a_step_and_too_few_rounds_are_none():
    rng = np.random.default_rng(0)
    assert grown(rounds(100 + 0.1 * np.arange(90))) == ["memory"]
    assert grown(rounds(800 + 4 * np.arange(30) + rng.normal(0, 8, 30))) == ["memory"]
    assert grown(rounds(800 + rng.normal(0, 16, 30))) == []
    assert grown(rounds([800] * 20 + [900] * 10)) == []
    assert grown(rounds([100, 500, 900] + [900] * 9)) == []
    assert grown(rounds(np.arange(1, long.ENOUGH) * 100)) == []


class Stub:
    """Stands in for a kernel: every round takes 0.01 hours and holds what is told."""

    def __init__(self, memory, error: str = "") -> None:
        self.left, self.error, self.closed = iter(rounds(memory)), error, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def round(self, notebooks):
        self.last = next(self.left, None)
        return "" if self.last else self.error

    def held(self):
        return self.last


@pytest.mark.parametrize(("memory", "error", "code", "said", "cell"), [
    ([500] * 20, "", 0, "10 rounds", "| memory of all together, MB | 500 | 500 | 500 | no |"),
    (range(500, 700, 10), "", 1, "memory grows",
     "| memory of all together, MB | 500 | 550 | 590 | **grew** |"),
    ([], "04: ValueError: x", 1, "04: ValueError: x", "The first round ended in an error"),
    ([500] * 4, "04: ValueError: x", 1, "04: ValueError: x",
     "| memory of all together, MB | 500 | 500 | 500 | 4 rounds say nothing; it takes 9 |"),
])
def test_make_long_says_what_grew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, memory, error, code, said, cell
):
    monkeypatch.setattr("lablog.layout.built", lambda *names: tmp_path.joinpath(*names))
    kernel = Stub(memory, error)
    monkeypatch.setattr(long, "OpenKernel", lambda folder: kernel)
    assert long.main(["--hours", "0.1", "04", "06"]) == code
    assert kernel.closed
    assert said in capsys.readouterr().out
    record = Record.read(tmp_path / "long.json")
    assert record.parameters["chapters"] == ["04_cvfp_phase1", "06_arianna_finetune"]
    told = torture_page.page("{long run}", None, record, tmp_path)
    assert cell in told
    assert ("Chapters 04, 06." in told) == bool(memory)
    assert (f"`{error}`" in told) == bool(error)
    assert (tmp_path / "long_run.csv").is_file() == bool(memory)
