"""Plans a profile and lets Make run the plan: ``reproduce.py PYTHON MAKE RUNNER_ARGUMENT...``.

The plan, one rule for each notebook, can only be written when the environment is there; Make then
reads it in a process of its own, which holds the lock on the profile's folder. Under ``make -n``
this runs as well, so that Make can show what it would do.
Needs the standard library only, of Python 3.8 or later.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def planned(python: str, arguments: list[str]) -> str:
    """The runner's plan; exits with its code when it fails."""
    done = subprocess.run([python, "-m", "lablog.runner", "plan", *arguments],
                          stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main() -> int:
    """Plan and run; the exit code is Make's."""
    python, make, *arguments = sys.argv[1:]
    if not os.access(python, os.X_OK):
        profile = arguments[arguments.index("--profile") + 1]
        print(f"# then every notebook of profile {profile}: none has run yet")
        return 0
    plan = Path("build", f".plan.{os.getpid()}.mk")
    try:
        rules = planned(python, arguments)
        plan.write_text(rules)
        folder = rules.splitlines()[0].removeprefix("FOLDER := ")
        exclusive = str(Path(__file__).with_name("exclusive.py"))
        # Make's own descriptors, by which it shares its jobs, stay open.
        process = subprocess.Popen(
            [sys.executable, exclusive, f"build/{folder}/.lock", make, "--no-print-directory",
             f"PLAN={plan}", "_results"], close_fds=False,
        )
        # Ctrl-C reaches Make and the notebook by itself: wait for how they end.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()
    finally:
        plan.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as problem:
        sys.exit(f"error: {problem}")
