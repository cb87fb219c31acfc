"""Runs a command while holding a lock file: ``python3 exclusive.py [--wait] LOCK COMMAND...``.

Needs nothing but Python's standard library, since it also guards the making of the environment.
The kernel releases the lock when the command's last process ends, also after SIGKILL.
"""

import fcntl
import os
import sys
from pathlib import Path


def main() -> None:
    """Take the lock (or wait, or refuse with exit code 75) and become the command."""
    arguments = sys.argv[1:]
    wait = arguments[0] == "--wait"
    lock, *command = arguments[wait:]
    Path(lock).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode().strip() or "unknown"
        if not wait:
            sys.exit(
                f"error: another `make` (process {holder}) is already producing these results; "
                "wait until it ends, or use a PROFILE of another name"
            )
        print(f"waiting for process {holder}, which does the same in this clone ({lock})",
              file=sys.stderr)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    os.set_inheritable(descriptor, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as problem:
        sys.exit(f"error: {problem}")
