"""The model in the formats of lab log C4: Hugging Face, GGUF and llama2.c."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from lablog import layout
from lablog.files import atomic_folder
from lablog.models import convert, llama2c
from lablog.record import Record

FILES = {
    "huggingface": "huggingface",  # a folder: safetensors, configuration, tokenizer
    "f32": "arianna-f32.gguf", "f16": "arianna-f16.gguf", "q8_0": "arianna-q8_0.gguf",
    "llama2c": "arianna.bin", "tokenizer": "tokenizer.bin",
}
"""Names of the exports below ``<artifacts>/arianna``; llama2.c's ``run`` reads the last two."""

PROFILES = ("full", "pretrained", "study", "laptop")
"""Those whose model is worth hearing."""


def export(folder: Path, artifacts: Path) -> dict[str, Path]:
    """Write the model in the Hugging Face folder `folder` to ``<artifacts>/arianna`` as `FILES`.

    Raises ValueError naming what a format cannot hold, for instance a tokenizer that does not
    put a space in front of a text.
    """
    target = artifacts / "arianna"
    paths = {kind: target / name for kind, name in FILES.items()}
    llama2c.from_hugging_face(folder, paths["llama2c"], paths["tokenizer"])
    with atomic_folder(paths["huggingface"]) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("tensorboard", "key"))
    convert.to_gguf(folder, paths["f32"], "f32")
    convert.quantize(paths["f32"], paths["f16"], "f16")
    convert.quantize(paths["f32"], paths["q8_0"], "q8_0")
    return paths


def sizes(exported: Mapping[str, Path]) -> dict[str, int]:
    """Bytes of each export; of the Hugging Face folder, of its weights."""
    files = {kind: path if path.is_file() else path / "model.safetensors"
             for kind, path in exported.items()}
    return {kind: file.stat().st_size for kind, file in files.items()}


def default_model() -> Path:
    """The GGUF file of the profile of `PROFILES` to whose model held-out answers were least
    surprising (bits per byte, in its record); FileNotFoundError says which command makes one."""
    surprise: dict[Path, float] = {}
    for profile in PROFILES:
        folder = layout.results(profile)
        path = layout.artifacts(folder) / "arianna" / FILES["f32"]
        record = folder / "records" / "06_arianna_finetune.json"
        if path.is_file() and record.is_file():
            surprise[path] = float(Record.read(record).metric("after.qa").value or math.inf)
    if not surprise:
        raise FileNotFoundError(
            f"{path} is not there yet: `make reproduce NOTEBOOKS=06` trains and exports it, "
            "or name another model with --model"
        )
    return min(surprise, key=surprise.__getitem__)
