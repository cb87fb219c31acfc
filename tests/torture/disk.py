"""A small disk: results are being made in a file system of their own, which has less room than they
take. A run must end in words, and with room again the next one makes what an undisturbed one does.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from clone import finish

from torture.faults import wrong_end
from torture.results import LONG, Results

ROOM = 64 * 2**20
"""Bytes that the file system has, or twice what the results take."""
CLONE_NEWNS = 0x00020000  # of <sched.h>


@dataclass(frozen=True)
class Trial:
    """Which share of what the results take there was room for, and what was wrong, if anything."""

    share: float
    fault: str


def chosen(count: int, seed: int | Sequence[int]) -> Sequence[float]:
    """`count` shares between nothing and everything, spread evenly."""
    rng = np.random.default_rng(seed)
    return [float(share) for share in (np.arange(count) + rng.random(count)) / max(count, 1)]


@functools.cache
def may_mount() -> bool:
    """Whether this process may mount file systems (in a container even root may not)."""
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        return not subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "lablog", folder],
            capture_output=True, check=False).returncode


@functools.cache
def _private_mounts() -> None:
    """Let nobody else see what this process mounts, so that it goes with the process, however that
    ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "cannot have mounts of its own")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """An empty file system of `size` bytes in memory, at `folder`."""
    _private_mounts()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "lablog", str(folder)],
                       check=True)
        yield
    finally:
        if folder.is_mount():
            subprocess.run(["umount", str(folder)], check=True)


class SmallDisk:
    """Results whose folder is a file system of its own (:func:`on_a_small_disk`)."""

    def __init__(self, results: Results) -> None:
        self.results = results
        before = shutil.disk_usage(results.built).used
        shutil.copytree(results.expected, results.built, dirs_exist_ok=True)
        self.taken = shutil.disk_usage(results.built).used - before
        results.forget()

    def trial(self, share: float) -> Trial:
        """Make the results with room for that share of them, then with all the room."""
        self.results.forget()
        filler = self.results.built / "filler"
        free = shutil.disk_usage(self.results.built).free
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - int(share * self.taken))
        try:
            ended = finish(self.results.start(), LONG)
        finally:
            filler.unlink()
        fault = wrong_end(ended)
        if not ended.returncode:
            fault = fault or "it ended well, without the room for its results"
        return Trial(share, fault or self.results.wrong_afterwards())


@contextmanager
def on_a_small_disk(results: Results) -> Iterator[SmallDisk]:
    """Let results be made in a file system of their own."""
    results.forget()
    taken = sum(path.stat().st_size for path in results.expected.rglob("*"))
    with mounted(results.built, max(ROOM, 3 * taken)):
        yield SmallDisk(results)
