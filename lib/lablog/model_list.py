"""The models of others that may be fetched: ``data/models.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Len
from pydantic import Field

from lablog.files import data_file
from lablog.strict import Strict, validated
from lablog.yaml_file import read_yaml

SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PackagedFile(Strict):
    """Bytes [begin, begin + bytes) of one member of the archive."""

    member: str
    begin: Annotated[int, Field(ge=0)] = 0
    bytes: Annotated[int, Field(gt=0)]
    sha256: SHA256


class Package(Strict):
    """One entry of ``data/models.yaml``: a package, whose model it is, and what is read of it."""

    package: Annotated[str, Field(pattern=r"^(pypi:[^:]+==|npm:[^:]+@)[^:]+$")]
    archive: SHA256
    megabytes: int  # of the archive
    name: str
    by: str
    licence: str
    shape: str
    about: str  # what it was trained on, and what it is good for here
    files: Annotated[dict[Annotated[str, Field(pattern=r"^[^/.][^/]*$")], PackagedFile], Len(1)]


class Packages(Strict):
    """The whole file."""

    models: tuple[Package, ...]


def listed(path: Path | None = None) -> dict[str, Package]:
    """The packages that may be named; by default those of ``data/models.yaml``."""
    path = path or data_file("models.yaml")
    entries = validated(Packages, {"models": read_yaml(path)}, str(path)).models
    return {entry.package: entry for entry in entries}
