"""Corrupt files: each reader is given thousands, in a process of its own with little memory.

``python -m torture.corrupt READER FIRST LAST SEED`` tries the cases FIRST to LAST−1 of a reader and
writes a line of JSON for each that is no plain refusal; its standard output begins each case with
its number, so that the parent knows which one ended the process.
"""

from __future__ import annotations

import collections
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lablog.models.llama_cpp import EngineError

SECONDS = 10  # that a case may take
MEMORY = 1 << 30  # bytes that a case may take beside what the process has
BLOCK = 2000  # cases of a process


@dataclass
class Tried:
    """What became of the cases of a reader: numbers, and for each kind of fall the cases."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    fell: dict[str, list[int]] = field(default_factory=lambda: collections.defaultdict(list))


def corrupt(reader: Any, whole: bytes, seed: int, case: int) -> bytes:
    """The bytes of a case: a function of the reader's name, seed and number."""
    from torture.mutations import mutated

    rng = np.random.default_rng([seed, zlib.crc32(reader.name.encode()), case])
    return mutated(whole, reader.mutations, rng)


def verdict(reader: Any, path: Path) -> str:
    """``read``, ``refused``, or how the reader fell, with the innermost line of the library."""
    try:
        reader.read(path)
    except (ValueError, OSError, EngineError) as error:
        if path.name in str(error) or path.parent.name in str(error):
            return "refused"
        return f"the file is not named: {_where(error)}"
    except Exception as error:
        return _where(error)
    return "read"


def _where(error: BaseException) -> str:
    inner = [frame for frame in traceback.extract_tb(error.__traceback__)
             if "/lablog/" in frame.filename]
    at = f"{inner[-1].filename.rpartition('/lablog/')[2]}, {inner[-1].name}" if inner else "?"
    return f"{type(error).__name__} in {at}"


def _cases(name: str, first: int, last: int, seed: int) -> None:
    """Try cases, as the child."""
    from torture.readers import READERS

    reader = READERS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = reader.make(Path(folder))
        whole = path.read_bytes()
        reader.read(path)  # loads what it needs
        told = os.dup(1)
        os.dup2(2, 1)  # what libraries print is no answer
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for case in range(first, last):
            os.write(told, f"{case}\n".encode())
            path.write_bytes(corrupt(reader, whole, seed, case))
            signal.alarm(SECONDS)
            found = verdict(reader, path)
            signal.alarm(0)
            os.write(told, f"{json.dumps(found)}\n".encode())


def tried(name: str, count: int, seed: int = 0) -> Tried:
    """Try `count` cases of a reader in processes of `BLOCK` cases; one that dies is a fall, and the
    next process goes on behind it."""
    result, case = Tried(), 0
    while case < count:
        last = min(case + BLOCK, count)
        child = subprocess.run(
            [sys.executable, "-m", "torture.corrupt", name, str(case), str(last), str(seed)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"})  # which takes longer than a case may
        answers = child.stdout.decode().splitlines()
        for number, found in zip(answers[::2], map(json.loads, answers[1::2]), strict=False):
            case = int(number) + 1
            result.cases += 1
            if found in ("read", "refused"):
                setattr(result, found, getattr(result, found) + 1)
            else:
                result.fell[found].append(int(number))
        if len(answers) % 2:  # a case without an answer
            case = int(answers[-1]) + 1
            result.cases += 1
            signalled = signal.Signals(-child.returncode) if child.returncode < 0 else None
            result.fell[f"took more than {SECONDS} s" if signalled == signal.SIGALRM else
                        f"the process ended: {signalled.name if signalled else child.returncode}"
                        ].append(case - 1)
        elif child.returncode:
            raise RuntimeError(f"the cases of {name} cannot be tried: exit code "
                               f"{child.returncode} before case {case}")
    return result


def main() -> None:
    """The child."""
    name, *numbers = sys.argv[1:]
    _cases(name, *map(int, numbers))


if __name__ == "__main__":
    main()
