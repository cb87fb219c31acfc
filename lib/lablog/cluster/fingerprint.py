"""What two machines must have in common so that a task gives the same result on both."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata

from lablog import layout
from lablog.files import repository, sha256_of
from lablog.provenance import PACKAGES


class OtherSoftware(RuntimeError):
    """A worker has another library, other packages or another llama.cpp than its client."""


@cache
def fingerprint() -> dict[str, str]:
    """Hashes of the library, its data and the patched llama.cpp, and the versions behind them.

    Taken once a process: what was imported then is what computes. Vector instructions are no part
    of it; where each task ran is in the record, and with it what its processor has.
    """
    root = repository()
    built = [path for path in (layout.native() / "lib").glob("*") if path.is_file()]
    native = [*root.joinpath("native").rglob("*.patch"), *root.joinpath("native", "src").rglob("*")]
    return {
        "library": sha256_of((root / "lib" / "lablog").rglob("*.py"), root)[:16],
        "data": sha256_of((p for p in (root / "data").rglob("*") if p.is_file()), root)[:16],
        "llama.cpp patch": sha256_of((p for p in native if p.is_file()), root)[:16],
        "llama.cpp built": str(bool(built)),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: metadata.version(name) for name in (*PACKAGES, "dask", "distributed")},
    }


def check(asked: Mapping[str, str], where: str) -> None:
    """Raise OtherSoftware naming every difference of this process to what a client has."""
    mine = fingerprint()
    other = [f"{name} is {mine.get(name)} there and {asked.get(name)} here"
             for name in {**asked, **mine} if mine.get(name) != asked.get(name)]
    if other:
        raise OtherSoftware(
            f"the worker {where} does not compute what this clone does: {'; '.join(other)}. Check "
            "out the same commit there, run `make setup`, and start the worker again"
        )
