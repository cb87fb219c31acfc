"""Run a script in two processes on the CPU, with the launcher that ``accelerate launch`` uses."""

import os
import subprocess
import sys
from pathlib import Path

from lablog.files import repository


def in_two_processes(code: str, script: Path, *arguments: Path) -> str:
    """What the script printed; an assertion error with all of its output if it failed."""
    script.write_text(code)
    paths = [Path(__file__).parent, repository() / "lib"]  # this clone's, whatever is installed
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
