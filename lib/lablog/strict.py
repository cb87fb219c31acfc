"""Settings and records in which an unknown or a wrong field is an error that names it."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

M = TypeVar("M", bound=BaseModel)
Name = Annotated[str, Field(pattern=r'^[^<>"`|\n]*$')]
"""A string that pages, file names and terminals show in the midst of a line: no markup."""


class Strict(BaseModel):
    """A model in which unknown fields are errors, and whose values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def validated(model: type[M], data: object, where: str) -> M:
    """`data` as a `model`; ValueError names `where`, the key, the value and what is wrong."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [
            f"{where}: {'.'.join(map(str, e['loc'])) or 'file'} = {e['input']!r:.120}: {e['msg']}"
            if e["loc"]
            else f"{where}: {e['msg']}"
            for e in error.errors()
        ]
        raise ValueError("\n".join(problems)) from error
