"""Writes requirements.lock: every package that pyproject.toml leads to, with its hashes.

``python lib/tools/lock.py [--upgrade]``. The file holds for every supported Python, on Linux and
macOS. What is locked stays as it is, unless a pin changed or ``--upgrade`` asks for what is newer.
PyTorch is left out: its builds, for CPUs and for each release of CUDA, share a version but neither
files nor hashes, and which of them is wanted only the machine can tell. What all builds need is
locked. Needs Python's standard library only.
"""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
UNLOCKED = "torch"
HEADER = f"""\
# Written by `make lock` from pyproject.toml; `make setup` installs from here.
# Not locked, on purpose: {UNLOCKED} (see lib/tools/lock.py).
"""


def main() -> None:
    """Write the lock; exits with the resolver's message when the pins do not fit together."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (resolver,) = project["project"]["optional-dependencies"]["lock"]
    name, version = resolver.split("==")
    if (name, version) not in {(d.name, d.version) for d in metadata.distributions()}:
        subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet",
                        "install", resolver], check=True)
    lowest = project["project"]["requires-python"].split(",")[0].removeprefix(">=")
    done = subprocess.run(
        [Path(sys.executable).with_name(name), "pip", "compile", "--quiet", *sys.argv[1:],
         "--universal", "--python-version", lowest, "--generate-hashes", "--no-header",
         "--no-emit-package", UNLOCKED, "--extra", "test", "--extra", "build",
         "--output-file", LOCK, "pyproject.toml", "-"],
        cwd=ROOT, text=True, input="\n".join(project["build-system"]["requires"]), check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)
    LOCK.write_text(HEADER + LOCK.read_text())


if __name__ == "__main__":
    main()
