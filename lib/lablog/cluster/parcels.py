"""Calls, results and files on their way between machines.

A path means something on one machine only. Inside a parcel a path below a known *place* (the
clone, the artifacts of a run) is told from there, and means the same file on the other side. Files
travel as bytes under their SHA-256 and are written atomically.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from lablog.files import atomic_folder, atomic_write, sha256

Places = Mapping[str, Path]
"""Folders by name, the narrowest first; a path is told from the first that holds it."""


@dataclass(frozen=True)
class Entry:
    """One file: the place and the path inside it, and its SHA-256."""

    place: str
    path: str
    sha256: str


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, places: Places) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.places, self.paths = places, list[Path]()

    def persistent_id(self, obj: Any) -> tuple[str, str] | None:
        if not isinstance(obj, PurePath):
            return None
        self.paths.append(Path(obj))
        for name, root in self.places.items():
            if obj.is_relative_to(root):
                return name, obj.relative_to(root).as_posix()
        return "", str(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, places: Places) -> None:
        super().__init__(file)
        self.places = places

    def persistent_load(self, told: tuple[str, str]) -> Path:
        name, path = told
        return self.places[name] / path if name else Path(path)


def pack(value: Any, places: Places) -> tuple[bytes, list[Path]]:
    """`value` as bytes, and the paths that occur in it."""
    room = io.BytesIO()
    pickler = _Pickler(room, places)
    pickler.dump(value)
    return room.getvalue(), pickler.paths


def unpack(data: bytes, places: Places) -> Any:
    """What was packed, with its paths below these `places`."""
    return _Unpickler(io.BytesIO(data), places).load()


def listed(paths: Iterable[Path], places: Places) -> dict[Entry, Path]:
    """Every file of `paths` (files, or folders with all that is in them) and where it lies.

    Raises FileNotFoundError for a path that is not there and ValueError for one outside all places.
    """
    found: dict[Entry, Path] = {}
    for path in paths:
        inside = next(((name, root) for name, root in places.items()
                       if path.is_relative_to(root)), None)
        if inside is None:
            raise ValueError(f"{path} lies outside the clone, where a worker on another machine "
                             "does not have it: copy it into the clone, or use a shared folder")
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: a task reads it")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            entry = Entry(inside[0], file.relative_to(inside[1]).as_posix(), sha256(file))
            found[entry] = file
    return found


@dataclass(frozen=True)
class Parcel:
    """What a task gives back: its result, the files behind it, and where it was made."""

    result: bytes
    seconds: float
    worker: str
    files: Mapping[Entry, bytes] = field(default_factory=dict, repr=False)


def put(entry: Entry, content: bytes, places: Places) -> None:
    """Write a file that this machine lacks; one with other contents is refused (OSError).

    Raises ValueError if `content` is not what the entry says, or its path leaves the place.
    """
    _check(entry, content)
    path = _within(places[entry.place], entry.path)
    if path.is_file():
        if sha256(path) != entry.sha256:
            raise OSError(f"{path} is there with other contents than the client's: remove it")
        return
    atomic_write(path, content)


def unload(parcel: Parcel, places: Places) -> Any:
    """The result of a parcel, with its files in place: a folder whole or not at all."""
    result = unpack(parcel.result, places)
    if parcel.files:
        for top in pack(result, places)[1]:
            _unload_into(top, parcel.files, places)
    return result


def _unload_into(top: Path, files: Mapping[Entry, bytes], places: Places) -> None:
    below = {path.relative_to(top): (entry, content) for entry, content in files.items()
             if (path := _within(places[entry.place], entry.path)).is_relative_to(top)}
    if list(below) == [Path()]:
        put(*below[Path()], places)
        return
    if not below or top.is_dir():
        return
    with atomic_folder(top) as scratch:
        for inner, (entry, content) in below.items():
            _check(entry, content)
            (scratch / inner).parent.mkdir(parents=True, exist_ok=True)
            (scratch / inner).write_bytes(content)


def _within(root: Path, inner: str) -> Path:
    path = (root / inner).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{inner} leads out of {root}")
    return root / inner


def _check(entry: Entry, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ValueError(f"{entry.path} arrived damaged: its SHA-256 is not {entry.sha256}")
