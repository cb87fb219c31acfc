"""The base corpus that needs no network: documentation strings of the installed packages.

Taken are the distributions that ``pyproject.toml`` pins and everything that they require, as found
in the environment. The text stays where it is installed; nothing of it is committed.
"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from importlib import metadata
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lablog.files import repository
from lablog.progress import progress

PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


def closure(names: Iterable[str] = ()) -> list[str]:
    """Canonical names of the installed distributions among `names` and all that they require.

    No names stand for every package that ``pyproject.toml`` pins to run and to test. ValueError
    for a name that is not installed; optional requirements that are not installed are none.
    """
    project = tomllib.loads((repository() / "pyproject.toml").read_text())["project"]
    pins = chain(project["dependencies"], project["optional-dependencies"]["test"])
    wanted = list(names) or [Requirement(pin).name for pin in pins]
    found: set[str] = set()
    queue = [(canonicalize_name(name), True) for name in wanted]
    while queue:
        name, needed = queue.pop()
        if name in found:
            continue
        try:
            requirements = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            if needed:
                raise ValueError(f"package {name!r} is not installed: run `make setup`") from None
            continue
        found.add(name)
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append((canonicalize_name(requirement.name), False))
    return sorted(found)


def _strings(node: ast.AST) -> Iterator[str]:
    """Documentation strings of a module, class or function and of those inside, in order."""
    body = getattr(node, "body", None)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    for part in (body, *(getattr(node, name, None) for name in ("handlers", "orelse"))):
        for child in part if isinstance(part, list) else ():
            yield from _strings(child)


def _paragraphs(path: Path) -> list[list[str]]:
    """Documentation strings of one file as lists of paragraphs; none if it is no Python 3."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # test data and templates that only look like modules
        return []
    texts = (inspect.cleandoc(text) for text in _strings(tree))
    kept = (text.encode(errors="ignore").decode() for text in texts)  # no lone surrogates
    return [[part.rstrip() for part in PARAGRAPH.split(text)] for text in kept]


def documents(names: Sequence[str] = (), processes: int = 2) -> list[str]:
    """Documentation strings of :func:`closure`, a paragraph that occurred before left out.

    In the order of distribution, file and place in the file, hence the same in equal
    environments. Strings of which nothing new remains are left out.
    """
    paths: dict[Path, None] = {}
    for name in closure(names):
        files = metadata.distribution(name).files or []
        inside = (str(file) for file in files if file.suffix == ".py" and ".." not in file.parts)
        paths |= {Path(str(metadata.distribution(name).locate_file(file))): None
                  for file in sorted(inside)}
    seen: set[bytes] = set()
    kept = []
    # Not by a server of processes: a program has but one, which is there for tasks.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        bar = progress(len(paths), "reading documentation", "file")
        for strings in pool.map(_paragraphs, paths, chunksize=64):
            for parts in strings:
                new = []
                for part in parts:
                    digest = sha256(part.encode()).digest()[:16]
                    if part and digest not in seen:
                        new.append(part)
                    seen.add(digest)
                if new:
                    kept.append("\n\n".join(new))
            bar.update()
        bar.close()
    return kept
