"""Hugging Face folders and LoRA adapters to GGUF, by llama.cpp's own converters and quantizer."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from lablog import layout
from lablog.files import scratch_folder
from lablog.models.gguf_file import check_gguf
from lablog.models.llama_cpp import EngineError, bindings
from lablog.models.model_folder import checked_folder


def native_tree() -> Path:
    """The unpacked and patched llama.cpp tree; FileNotFoundError names the remedy."""
    tree = layout.native() / "llama.cpp"
    if not (tree / "convert_hf_to_gguf.py").is_file():
        raise FileNotFoundError(f"{tree} holds no llama.cpp: run `make setup`")
    return tree


def to_gguf(folder: Path, output: Path, dtype: Literal["f32", "f16", "q8_0"] = "f32") -> Path:
    """Convert the Hugging Face model in `folder` to the GGUF file `output`, whole or not at all.

    Raises FileNotFoundError if `folder` has no ``config.json`` or the llama.cpp tree is missing,
    ValueError if it may not be read (`checked_folder`), RuntimeError with the end of the
    converter's output if it fails.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a Hugging Face model: it has no config.json")
    return _converted("convert_hf_to_gguf.py", checked_folder(folder), output, "--outtype", dtype)


def lora_to_gguf(adapter: Path, base: Path, output: Path) -> Path:
    """Convert the peft LoRA in `adapter`, of the model in the folder `base`, to a GGUF file (f32).

    Raises FileNotFoundError if `adapter` has no safetensors (pickled weights are not read) or
    the llama.cpp tree is missing, RuntimeError with the end of the converter's output if it fails.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise FileNotFoundError(f"{adapter} is not a peft adapter: it has no {name}")
    return _converted("convert_lora_to_gguf.py", adapter, output,
                      "--base", str(checked_folder(base)))


def _converted(script: str, source: Path, output: Path, *options: str) -> Path:
    """Run a converter of the llama.cpp tree; `output` appears whole or not at all."""
    tree = native_tree()
    with scratch_folder(output) as room:
        made = room / "model.gguf"
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


def quantize(source: Path, output: Path, dtype: Literal["f16", "q8_0"]) -> Path:
    """Write the f32 GGUF file `source` in another type, atomically: what ``to_gguf`` gives, in a
    hundredth of its time. Rows that are no multiple of 32 long become f16 where q8_0 is asked for.

    EngineError if llama.cpp refuses.
    """
    engine = bindings()
    parameters = engine.llama_model_quantize_default_params()
    parameters.ftype = {"f16": engine.LLAMA_FTYPE_MOSTLY_F16,
                        "q8_0": engine.LLAMA_FTYPE_MOSTLY_Q8_0}[dtype]
    parameters.nthread = 1
    with scratch_folder(output) as room:
        made = room / "model.gguf"
        names = os.fsencode(check_gguf(source)), os.fsencode(made)
        if engine.llama_model_quantize(*names, ctypes.byref(parameters)):
            raise EngineError(f"llama.cpp cannot write {source} as {dtype}")
        made.replace(output)
    return output
