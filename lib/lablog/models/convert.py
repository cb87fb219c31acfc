"""Hugging Face folders and LoRA adapters to GGUF, by llama.cpp's own converters."""

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
    return _converted("convert_hf_to_gguf.py", folder, output, "--outtype", dtype)


def lora_to_gguf(adapter: Path, base: Path, output: Path) -> Path:
    """Convert the peft LoRA in `adapter`, of the model in the folder `base`, to a GGUF file (f32).

    Raises FileNotFoundError if `adapter` has no safetensors (pickled weights are not read) or
    the llama.cpp tree is missing, RuntimeError with the end of the converter's output if it fails.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise FileNotFoundError(f"{adapter} is not a peft adapter: it has no {name}")
    return _converted("convert_lora_to_gguf.py", adapter, output, "--base", str(base))


def _converted(script: str, source: Path, output: Path, *options: str) -> Path:
    """Run a converter of the llama.cpp tree; `output` appears whole or not at all."""
    tree = native_tree()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as room:
        made = Path(room) / "model.gguf"
        command = [sys.executable, str(tree / script), str(source), "--outfile", str(made)]
        run = subprocess.run(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )
        if run.returncode or not made.is_file():
            raise RuntimeError(
                f"llama.cpp's converter failed on {source} (exit status {run.returncode}):\n"
                + run.stdout[-2000:]
            )
        made.replace(output)
    return output
