"""YAML that people write: every key once, and aliases that do not grow beyond what can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lablog.files import parsing

LARGEST = 1_000_000
"""Entries of a file with its aliases written out. The project's own largest has some thousand."""


def read_yaml(path: Path, typed: bool = True) -> Any:
    """The content of a file, None if it is empty; with `typed` off every scalar is text.

    Raises ValueError naming the file: no UTF-8, no YAML, a key that stands twice in a mapping, an
    alias inside of what it stands for, aliases that grow beyond `LARGEST`, nesting too deep.
    """
    with parsing(path, "valid YAML", yaml.YAMLError):
        return parse_yaml(path.read_text(encoding="utf-8"), typed)


def parse_yaml(text: str, typed: bool = True) -> Any:
    """`read_yaml` of a text; ValueError or yaml.YAMLError."""
    loader = (yaml.SafeLoader if typed else yaml.BaseLoader)(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if (size := _written_out(root, {})) > LARGEST:
            raise ValueError(f"its aliases written out are {size} entries, more than {LARGEST}")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are under one, each counted as often as an alias names it."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias stands inside of what it "
                             "stands for")
        return known[id(node)]
    known[id(node)] = 0  # not yet counted
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} stands there "
                                 "twice")
            if name:
                seen.add(name)
            inner += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[id(node)] = 1 + sum(_written_out(part, known) for part in inner)
    return known[id(node)]
