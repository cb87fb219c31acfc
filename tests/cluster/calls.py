"""What the tests hand to workers."""

import os
import signal
import time
from pathlib import Path

import psutil
import torch


def threads() -> int:
    return torch.get_num_threads()


def process() -> int:
    return os.getpid()


def copied(source: Path, target: Path) -> Path:
    """Write a folder with the text of `source`, twice as long."""
    target.mkdir(parents=True)
    (target / "inner").mkdir()
    (target / "inner" / "text").write_text(2 * source.read_text())
    return target


def slow(folder: Path, seconds: float) -> int:
    """Note the process, and wait."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(seconds)
    return os.getpid()


def once_slow(folder: Path) -> int:
    """Wait for ever at first; the second time, end. Returns how often it was begun."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.pid").touch()
    begun = len(list(folder.glob("*.pid")))
    if begun == 1:
        time.sleep(600)
    return begun


def worker_of(process: int) -> psutil.Process:
    """The worker whose server of processes has begun `process`."""
    return psutil.Process(process).parent().parent()


def kill_the_worker(what: str) -> None:
    worker_of(os.getpid()).send_signal(signal.SIGKILL)
    time.sleep(600)
