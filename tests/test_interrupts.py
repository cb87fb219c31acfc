"""Ctrl-C while a command is being loaded or has only begun: no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lablog.files import repository
from tools import exclusive, install, native, reproduce

INTERRUPTS = "kill -INT $PPID; sleep 5"


@pytest.mark.parametrize("module", [
    "lablog.runner", "lablog.claims", "lablog.cluster", "lablog.arianna", "tools.bench",
    "tools.compare", "torture", "torture.long"])
def test_a_command_that_is_being_loaded_ends_quietly(module: str, tmp_path: Path):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join(map(str, (tmp_path, repository() / "lib", repository() / "tests")))
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True,
                          check=False, env=os.environ | {"PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_other_errors_are_told(tmp_path: Path):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('planted')\n")
    path = os.pathsep.join(map(str, (tmp_path, repository() / "lib")))
    done = subprocess.run([sys.executable, "-m", "lablog.claims"], capture_output=True, text=True,
                          check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.stderr.endswith("RuntimeError: planted\n")


def test_a_library_leaves_the_hook_of_its_user_alone():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; a = sys.excepthook; import lablog; "
                               "print(sys.excepthook is a)"],
        capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(repository() / "lib")})
    assert done.stdout == "True\n"


@pytest.mark.parametrize(("script", "arguments"), [
    (reproduce, ["{python}", "make", "--profile", "laptop", "--"]),
    (native, ["out", "{python}", "2", "log"]),
])
def test_a_helper_that_waits_ends_quietly(script, arguments, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{INTERRUPTS}\n")
    python.chmod(0o755)
    (tmp_path / "build").mkdir()
    done = subprocess.run(
        [sys.executable, script.__file__, *(one.format(python=python) for one in arguments)],
        cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert not list((tmp_path / "build").iterdir())


def test_who_waits_for_a_lock_or_for_pip_ends_quietly(tmp_path: Path):
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, exclusive.__file__, str(lock), "sleep", "60"]) as first:
        try:
            while not (lock.exists() and lock.read_text()):
                assert first.poll() is None
            with subprocess.Popen(
                [sys.executable, exclusive.__file__, "--wait", str(lock), "true"],
                stderr=subprocess.PIPE, text=True) as second:
                assert second.stderr
                assert "waiting for process" in second.stderr.readline()
                second.send_signal(signal.SIGINT)
                assert (second.stderr.read(), second.wait()) == ("", 130)
        finally:
            first.kill()
    (tmp_path / "pip.py").write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)"
                                     "\ntime.sleep(5)\n")
    (archive,) = (line.split('"')[1].replace("-", "_").replace("==", "-") + ".tar.gz"
                  for line in (repository() / "pyproject.toml").read_text().splitlines()
                  if '"llama-cpp-python==' in line)
    done = subprocess.run([sys.executable, install.__file__, str(tmp_path / archive)],
                          capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "")
