"""Where the repository lies, and how files are written and hashed."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SCRATCH = ".scratch-"  # in the name of what is being made; its maker holds a lock on it


def repository() -> Path:
    """Root of the clone that this package belongs to (the folder with ``pyproject.toml``)."""
    return Path(__file__).resolve().parents[2]


def data_file(name: str) -> Path:
    """Path of ``data/<name>``; the name must be written out so that Make sees the dependency."""
    path = repository() / "data" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: restore it with `git checkout data/{name}`")
    return path


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Write `content` so that `path` holds either the old or the whole new content.

    Raises OSError naming the path and the remedy when the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{SCRATCH}")
        if _held(descriptor, Path(name)):
            break
        os.close(descriptor)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)  # while its lock is held, or others could sweep it
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"the disk is full: {path} ({len(data)} bytes) was not written and any earlier "
                "version is untouched; free some space and run again",
            ) from error
        raise
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to make it in, gone when the block ends. One that a killed process
    left is removed by the next that makes `path`, and by `sweep`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    while True:
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{SCRATCH}"))
        with suppress(FileNotFoundError):  # swept before it could be locked
            descriptor = os.open(scratch, os.O_RDONLY)
            if _held(descriptor, scratch):
                break
            os.close(descriptor)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends well, and vanishes otherwise."""
    with scratch_folder(path) as scratch:
        yield scratch
        scratch.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        scratch.replace(path)


def _held(descriptor: int, scratch: Path) -> bool:
    """Lock the open `scratch` until it is closed, by whatever end of this process; False if
    another process had swept it by then."""
    with suppress(OSError):  # a file system without locks, where nothing is swept either
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return scratch.exists()


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half made in `folder` (of `name` alone, or everywhere in
    it): what has no living maker, which would hold its lock."""
    where = "**/.*" if name is None else f".{glob.escape(name)}"
    for stale in [*folder.glob(f"{where}{SCRATCH}*")]:
        with suppress(OSError):  # its maker lives, or another process sweeps it
            descriptor = os.open(stale, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def parsing(path: Path, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise ValueError naming `path`, where its content is found not to be `what`.

    For parsers, which say what they met but not in which file: ValueError (of UTF-8 and of JSON
    too), nesting that is too deep, and `errors`.
    """
    wrong: tuple[type[Exception], ...] = (ValueError, RecursionError, *errors)
    try:
        yield
    except wrong as error:
        if str(path) in str(error) and isinstance(error, ValueError):
            raise
        raise ValueError(f"{path} is not {what}: {error}") from error


def write_if_changed(path: Path, content: str) -> bool:
    """Write `content` atomically unless `path` holds it already, so that Make sees real changes."""
    if path.is_file() and path.read_text() == content:
        return False
    atomic_write(path, content)
    return True


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(paths: Iterable[Path], root: Path) -> str:
    """One SHA-256 over the names (relative to `root`) and contents of several files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root)}\0{sha256(path)}\n".encode())
    return digest.hexdigest()
