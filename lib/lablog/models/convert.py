"""Hugging Face folders to GGUF, by llama.cpp's own converter."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from lablog.files import repository


def native_tree() -> Path:
    """The unpacked and patched llama.cpp tree; FileNotFoundError names the remedy."""
    tree = repository() / "build" / "native" / "llama.cpp"
    if not (tree / "convert_hf_to_gguf.py").is_file():
        raise FileNotFoundError(f"{tree} holds no llama.cpp: run `make setup`")
    return tree


def to_gguf(folder: Path, output: Path, dtype: Literal["f32", "f16", "q8_0"] = "f32") -> Path:
    """Convert the Hugging Face model in `folder` to the GGUF file `output`, whole or not at all.

    Raises FileNotFoundError if `folder` has no ``config.json`` or the llama.cpp tree is missing,
    RuntimeError with the end of the converter's output if it fails.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a Hugging Face model: it has no config.json")
    script = native_tree() / "convert_hf_to_gguf.py"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as room:
        made = Path(room) / "model.gguf"
        command = [sys.executable, str(script), str(folder), "--outfile", str(made)]
        run = subprocess.run(
            [*command, "--outtype", dtype], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )
        if run.returncode or not made.is_file():
            raise RuntimeError(
                f"llama.cpp's converter failed on {folder} (exit status {run.returncode}):\n"
                + run.stdout[-2000:]
            )
        made.replace(output)
    return output
