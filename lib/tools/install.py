"""Installs requirements.lock into the environment whose Python runs this: ``install.py SDIST``.

Every file is checked against its hash. SDIST is where the source package of the bindings lies, or
will lie: what is missing is fetched. The bindings are built here, without their own llama.cpp, and
so is this package; what builds them comes from the lock too, so nothing unchecked takes part.
PyTorch comes last, in the pinned version and whichever build of it this machine's pip finds (see
lock.py), with the libraries that a build for CUDA asks for in exact versions.
Needs Python's standard library only.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_LLAMA = "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"
"""In the environment, since pip's option --config-settings means other things in other versions."""
LOCKED = ("--require-hashes", "--no-deps")


def pip(command: str, *arguments: str | Path) -> None:
    """Run pip in this environment; exits with its code when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", command,
         *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "CMAKE_ARGS": WITHOUT_LLAMA}, check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)


def split(lock: str, sdist: str) -> tuple[str, str]:
    """The lock without the package that file `sdist` is of, and that package alone."""
    package = sdist.rsplit("-", 1)[0].replace("_", "-")
    entries = re.split(r"(?m)^(?=\S)", lock)
    taken = [entry for entry in entries if entry.startswith(f"{package}==")]
    if len(taken) != 1 or f"-{taken[0].split()[0].split('==')[1]}.tar.gz" not in sdist:
        sys.exit(f"error: requirements.lock holds no {sdist}: run `make lock`")
    return "".join(entry for entry in entries if entry is not taken[0]), taken[0]


def main() -> None:
    """Install everything; what is there already in the right version stays."""
    sdist = Path(sys.argv[1])
    rest, bindings = split((ROOT / "requirements.lock").read_text(), sdist.name)
    with tempfile.TemporaryDirectory() as name:
        wheels, source, built = (Path(name) / part for part in ("wheels", "source", "built"))
        wheels.write_text(rest)
        source.write_text(bindings)
        pip("install", *LOCKED, "--only-binary", ":all:", "--requirement", wheels)
        if not sdist.is_file():
            pip("download", *LOCKED, "--no-build-isolation", "--no-binary", ":all:",
                "--dest", sdist.parent, "--requirement", source)
        hashes = " ".join(re.findall(r"--hash=\S+", bindings))
        built.write_text(f"{sdist.resolve()} {hashes}\n")
        pip("install", *LOCKED, "--no-build-isolation", "--requirement", built)
    pip("install", "--no-build-isolation", "--editable", ".[test]")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
