"""What a Hugging Face folder must be before anything reads it: weights without pickle, as many as
its configuration says, and no code of its own."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lablog.files import parsing

WEIGHTS = "model*.safetensors"
"""What Transformers and llama.cpp's converter read; beside other files they would look for pickled
weights."""


def checked_folder(folder: Path) -> Path:
    """Return `folder`, if what reads it may.

    Raises ValueError where a configuration names code (``auto_map``), which llama.cpp's converter
    would fetch and run; where there are no safetensors, since pickled weights run code too; and
    where the configuration has more layers than there are weights: Transformers would begin to
    build them, as many as it says.
    """
    with parsing(folder, "a model's folder", SafetensorError):
        found = {path.name: json.loads(path.read_text(encoding="utf-8"))
                 for path in sorted(folder.glob("*.json"))}
        for name, settings in found.items():
            # A vocabulary may have a token of that name, whose value is its number.
            code = settings.get("auto_map") if isinstance(settings, dict) else None
            if isinstance(code, dict | list | str):
                raise ValueError(f"{name} names code of its own (auto_map), which is not run: "
                                 "choose a model that Transformers knows, or take that entry out")
        stored = 0
        for path in folder.glob(WEIGHTS):
            with safe_open(path, "pt") as file:
                stored += len(file.keys())
        if not stored:
            raise ValueError(f"there are no weights in {WEIGHTS}; pickled ones are not read")
        config = found.get("config.json")
        layers = config.get("num_hidden_layers") if isinstance(config, dict) else None
        if isinstance(layers, int) and layers > stored:
            raise ValueError(f"config.json has {layers} layers, and there are {stored} weights")
    return folder
