"""One name for whatever is stored: the digest of all that decides it.

Nothing here is listed by hand. What a function depends on is read from its source: the modules
of this package that its module imports, transitively, the files of ``data/`` that they name, the
versions of the other packages that they import and, where llama.cpp is one of them, the patch and
the sampler that it is built from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from lablog.files import repository, sha256, sha256_of
from lablog.provenance import packages_imported, source_dependencies

ENGINE = "llama_cpp"
"""The package whose library ``native/`` patches and builds."""


def key(function: Callable[..., Any], *parts: Any) -> str:
    """The digest, 16 hexadecimal digits, under which what `function` makes of `parts` is stored.

    A part is a setting (None, bool, number, string, list, tuple, mapping in its order, dataclass,
    pydantic model), an array or tensor, which counts by dtype, shape and bytes, or the path of a
    file or folder, which counts by its contents and never by where it lies.

    Raises FileNotFoundError for a path that is not there and TypeError for a part that is none of
    these.
    """
    source = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").resolve()
    told = json.dumps([function.__qualname__, _made_by(source), [_plain(part) for part in parts]],
                      sort_keys=True, allow_nan=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@cache
def _made_by(source: Path) -> dict[str, Any]:
    """Hash of the sources and data behind a module, and the versions of what else it imports."""
    files = made_from(source)
    return {"code": sha256_of(files, repository()), "packages": _versions(packages_imported(files))}


def made_from(source: Path) -> list[Path]:
    """The files whose change gives another key to what a module makes: its source and those that
    it imports, their data files and, where llama.cpp takes part, its patch and sampler."""
    files = source_dependencies(source)
    native = repository() / "native"
    if ENGINE in packages_imported(files):
        files += [*native.glob("CMakeLists.txt"), *native.glob("cmake/*"),
                  *native.glob("patches/*.patch"), *native.glob("src/*")]
    return files


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each distribution that provides one of the imported `packages`."""
    provided = distributions()
    return {name: metadata.version(name)
            for name in sorted({d for package in packages for d in provided.get(package, ())})}


@cache
def distributions() -> Mapping[str, list[str]]:
    """Which distributions provide each package that is installed; found out once a process."""
    return metadata.packages_distributions()


def _plain(part: Any) -> Any:
    """`part` as JSON that is equal only for equal parts."""
    match part:
        case None | bool() | int() | float() | str():
            return part
        case Path():
            return {"contents": _contents(part)}
        case BaseModel():
            return {type(part).__name__: _plain(part.model_dump(mode="json"))}
        case Mapping():
            return {"mapping": [[_plain(name), _plain(value)] for name, value in part.items()]}
        case list() | tuple():
            return [_plain(each) for each in part]
        case np.generic():
            return _plain(part.item())
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {field.name: _plain(getattr(part, field.name))
                  for field in dataclasses.fields(part)}
        return {type(part).__name__: fields}
    if hasattr(part, "detach"):  # a tensor, on whatever device
        part = part.detach().cpu().numpy()
    if isinstance(part, np.ndarray) and not part.dtype.hasobject:
        digest = hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest()
        return {"array": [part.dtype.str, list(part.shape), digest]}
    raise TypeError(f"a {type(part).__name__} cannot be part of a key ({part!r:.80}): give the "
                    "values that it is made of")


def _contents(path: Path) -> str:
    if path.is_dir():
        return sha256_of((each for each in path.rglob("*") if each.is_file()), path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it is part of the key of a stored result")
    return sha256(path)
