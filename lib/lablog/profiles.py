"""Profiles: which parameters each notebook runs with.

A notebook declares its parameters, with types, comments and smoke values, in the cell tagged
``parameters``; a profile (YAML) says what differs from them. Nothing else holds defaults.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import yaml
from pydantic import ConfigDict, ValidationError, create_model

from lablog.files import repository
from lablog.yaml_file import parse_yaml, read_yaml

RESERVED = ("extends", "all")
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
"""What a parameters cell is as a model: no text for a number, no name but the declared ones."""


class ProfileError(ValueError):
    """A profile, an override or a parameters cell that cannot be used; says what and the remedy."""


@dataclass(frozen=True)
class Parameter:
    """A declared parameter: its type as written, and the smoke value."""

    name: str
    annotation: str
    default: Any

    def check(self, value: Any, origin: str) -> Any:
        """Return `value` if it has the declared type (an int is a float), else ProfileError."""
        return _validated({self.name: self}, {self.name: value}, origin)[self.name]


def _validated(declared: Mapping[str, Parameter], values: Mapping[str, Any],
               origin: str) -> dict[str, Any]:
    """All parameters, with `values` in place of defaults; ProfileError names the first misfit."""
    fields: dict[str, Any] = {
        name: (_type(parameter, origin), parameter.default) for name, parameter in declared.items()}
    model = create_model("Parameters", __config__=STRICT, **fields)
    try:
        return model.model_validate(values).model_dump()
    except ValidationError as errors:
        error = errors.errors()[0]
        name = error["loc"][0]
        if error["type"] == "extra_forbidden":
            raise ProfileError(
                f"unknown parameter {name!r} of {origin}{_nearest(name, declared)}") from None
        parameter = declared[str(name)]
        raise ProfileError(
            f"{origin}: {name} = {values[str(name)]!r} does not fit {parameter.annotation} "
            f"({error['msg']}); a valid value is for example {parameter.default!r}"
        ) from None


def _type(parameter: Parameter, origin: str) -> Any:
    """The declared type: one of `TYPES`, or a list of one."""
    def read(node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name) if name in TYPES:
                return TYPES[name]
            case ast.Subscript(value=ast.Name(id="list"), slice=item):
                return list[read(item)]  # type: ignore[misc]  # known when it runs
        raise ProfileError(f"{origin}: the type {parameter.annotation} of {parameter.name} is not "
                           f"made of {', '.join(sorted(TYPES))}")

    return read(ast.parse(parameter.annotation, mode="eval").body)


def notebooks() -> list[str]:
    """Names of all notebooks, in order."""
    return sorted(path.stem for path in (repository() / "notebooks").glob("[0-9][0-9]_*.py"))


def notebook_path(name: str) -> Path:
    """Source of a notebook; ProfileError with the nearest name when there is none."""
    path = repository() / "notebooks" / f"{name}.py"
    if not path.is_file():
        raise ProfileError(f"there is no notebook {name!r}{_nearest(name, notebooks())}")
    return path


def _nearest(name: Any, valid: Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are: {', '.join(valid)}"


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters that a notebook's source declares, by name, in order."""
    cells = [
        cell
        for cell in jupytext.read(notebook).cells
        if "parameters" in cell.metadata.get("tags", ())
    ]
    if len(cells) != 1:
        raise ProfileError(f"{notebook} has {len(cells)} cells tagged `parameters`; it needs one")
    found = {}
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise ProfileError(f"{notebook}: the parameters cell is no Python: {error}") from None
    for statement in statements:
        try:
            if not isinstance(statement, ast.AnnAssign):
                raise ValueError("no annotated assignment")
            if not isinstance(statement.target, ast.Name) or statement.value is None:
                raise ValueError("no name, or no value")
            default = ast.literal_eval(statement.value)
        except ValueError:
            raise ProfileError(
                f"{notebook}: `{ast.unparse(statement)}` in the parameters cell is no "
                "`name: type = value` with a literal value"
            ) from None
        parameter = Parameter(statement.target.id, ast.unparse(statement.annotation), default)
        parameter.check(parameter.default, str(notebook))
        found[parameter.name] = parameter
    return found


def check(notebook: str, values: Mapping[str, Any]) -> None:
    """Raise ProfileError for a value that the notebook does not declare, or of another type."""
    _validated(declared_parameters(notebook_path(notebook)), values, notebook)


@dataclass(frozen=True)
class Profile:
    """A resolved profile: for each notebook every parameter's value."""

    name: str
    parameters: Mapping[str, Mapping[str, Any]]


def _read(source: str, seen: tuple[Path, ...] = ()) -> tuple[str, dict[str, Any]]:
    folder = repository() / "notebooks" / "profiles"
    path = Path(source) if source.endswith((".yaml", ".yml")) else folder / f"{source}.yaml"
    if not path.is_file():
        shipped = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ProfileError(f"there is no profile {source!r}{_nearest(source, shipped)}")
    path = path.resolve()
    if path in seen:
        raise ProfileError(f"{path} extends itself")
    try:
        content = read_yaml(path) or {}
    except ValueError as error:
        raise ProfileError(str(error)) from None
    if not isinstance(content, dict):
        raise ProfileError(f"{path} holds a {type(content).__name__}; expected `notebook: {{...}}`")
    base = content.pop("extends", None)
    if not isinstance(base, str | None):
        raise ProfileError(f"{path}: extends holds {base!r}; expected the name of a profile")
    merged: dict[str, Any] = _read(base, (*seen, path))[1] if base else {}
    for key, section in content.items():
        if key not in (*RESERVED, *notebooks()):
            valid = (*RESERVED, *notebooks())
            raise ProfileError(f"{path}: unknown key {key!r}{_nearest(key, valid)}")
        if not isinstance(section, dict):
            raise ProfileError(f"{path}: {key} holds {section!r}; expected `parameter: value`")
        merged[key] = merged.get(key, {}) | section
    return path.stem, merged


def _parse_override(text: str) -> tuple[str | None, str, Any]:
    target, separator, value = text.partition("=")
    if not separator:
        raise ProfileError(f"override {text!r} is not of the form [NOTEBOOK.]PARAMETER=VALUE")
    prefix, _, name = target.rpartition(".")
    try:
        content = parse_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProfileError(f"override {text!r} is not valid YAML: {error}") from None
    if not prefix:
        return None, name, content
    matches = [notebook for notebook in notebooks() if notebook.startswith(prefix)]
    if len(matches) != 1:
        raise ProfileError(f"override {text!r}: no single notebook {prefix!r}"
                           f"{_nearest(prefix, notebooks())}")
    return matches[0], name, content


def load(source: str, overrides: Sequence[str] = ()) -> Profile:
    """Read a profile by name or path and apply overrides.

    An override is ``[NOTEBOOK.]PARAMETER=VALUE`` (value in YAML; a notebook's number is enough);
    without a notebook it holds for every notebook that declares the parameter. With overrides
    the profile's name carries a digest of them, so that their results lie in their own folder.

    Raises ProfileError for unknown keys (with the nearest valid one), wrong types, NaN.
    """
    name, sections = _read(source)
    declared = {notebook: declared_parameters(notebook_path(notebook)) for notebook in notebooks()}
    values = {n: {p.name: p.default for p in d.values()} for n, d in declared.items()}

    def assign(
        notebook: str | None, parameter: str, value: Any, origin: str
    ) -> list[tuple[str, str]]:
        targets = [notebook] if notebook else [n for n in declared if parameter in declared[n]]
        valid = declared[notebook] if notebook else {p: 0 for d in declared.values() for p in d}
        if parameter not in valid:
            where = f"{origin}: unknown parameter {parameter!r}"
            raise ProfileError(where + (f" of {notebook}" if notebook else "")
                               + _nearest(parameter, valid))
        for target in targets:
            values[target][parameter] = declared[target][parameter].check(value, origin)
        return [(target, parameter) for target in targets]

    for key in ("all", *sorted(set(sections) - {"all"})):
        for parameter, value in sections.get(key, {}).items():
            assign(None if key == "all" else key, parameter, value, f"profile {source}, {key}")
    changed = {}
    for text in overrides:
        for target, parameter in assign(*_parse_override(text), origin=f"override {text!r}"):
            changed[f"{target}.{parameter}"] = values[target][parameter]
    if overrides:
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{name}+{digest}"
    return Profile(name, values)
