"""What a Hugging Face folder must be before anything reads it: weights without pickle, as many as
its configuration says, and no code of its own."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lablog.files import parsing


def checked_folder(folder: Path) -> Path:
    """Return `folder`, if what reads it may.

    Raises ValueError where a configuration names code (``auto_map``), which llama.cpp's converter
    would fetch and run; where there are no safetensors, since pickled weights run code too; and
    where the configuration has more layers than there are weights: Transformers would begin to
    build them, as many as it says.
    """
    with parsing(folder, "a model's folder", SafetensorError):
        for path in sorted(folder.glob("*.json")):
            if _holds(json.loads(path.read_text(encoding="utf-8")), "auto_map"):
                raise ValueError(f"{path.name} names code of its own (auto_map), which is not run: "
                                 "choose a model that Transformers knows, or take that entry out")
        config = json.loads((folder / "config.json").read_text())
        layers = config.get("num_hidden_layers") if isinstance(config, dict) else None
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise ValueError("there are no *.safetensors; pickled weights are not read")
        stored = 0
        for path in weights:
            with safe_open(path, "pt") as file:
                stored += len(file.keys())
        if isinstance(layers, int) and layers > stored:
            raise ValueError(f"config.json has {layers} layers, and there are {stored} weights")
    return folder


def _holds(value: object, name: str) -> bool:
    """Whether a JSON value is an object with that entry, or has such an object anywhere below."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case dict() as entries:
                if name in entries:
                    return True
                waiting += entries.values()
            case list() as entries:
                waiting += entries
    return False
