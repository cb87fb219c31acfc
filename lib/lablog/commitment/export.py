"""A trained commitment as files for other programs, and back (lab log A5).

``commitment.safetensors`` + ``.json``   head and W_c, and what they are (`VariationalCommitment`)
``adapter/``, ``plan.json``              LoRA in peft's format; how all of it was trained
``base.gguf``                            the base model as training saw it: dequantised, f32
``lora.gguf``                            LoRA for llama.cpp, to be applied to ``base.gguf``
``export.json``                          SHA-256 of every file

A sampled commitment also fits a GGUF control vector, in the community's layout (repeng; the
``--control-vector`` of llama.cpp), if it leaves layer 0 alone.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import PeftModel

from lablog.commitment.posterior import (
    SETTINGS,
    WEIGHTS,
    CommitmentSettings,
    VariationalCommitment,
)
from lablog.commitment.qlora import Plan, base_hash, dequantised, plan_of, renamed
from lablog.files import atomic_folder, atomic_write, scratch_folder, sha256
from lablog.models import convert
from lablog.models.llama_cpp import Commitment

MANIFEST = "export.json"


@dataclass(frozen=True)
class Export:
    """An export whose files are whole and belong to its base model."""

    folder: Path
    settings: CommitmentSettings

    @property
    def base(self) -> Path:
        """GGUF file of the base model."""
        return self.folder / "base.gguf"

    @property
    def lora(self) -> Path:
        """GGUF file of the LoRA."""
        return self.folder / "lora.gguf"

    def injected(self, z: torch.Tensor) -> list[Commitment]:
        """What the patched llama.cpp is to add for each z* [n, k]."""
        with torch.no_grad():
            directions = VariationalCommitment.load(self.folder).direction(z).numpy()
        return [Commitment(row, self.settings.strength, self.settings.layers) for row in directions]

    def control_vector(self, z: torch.Tensor, path: Path) -> Path:
        """One sampled commitment z* [k] as a control vector for any llama.cpp."""
        kind = gguf.GGUFReader(self.lora).fields["general.architecture"].contents()
        return write_control_vector(path, self.injected(z[None])[0], kind)


def export(trained: Path, base: Path, output: Path) -> Export:
    """Write everything of the training result `trained` on the Hugging Face model `base`.

    `output` appears whole or not at all. Raises ValueError if `trained` belongs to another base.
    """
    settings = _settings(trained, base)
    if settings.positions != "all":
        raise ValueError(f"{trained} adds z* at the {settings.positions} position alone, which "
                         "no engine but PyTorch does: export one trained with positions = all")
    with atomic_folder(output) as room, scratch_folder(output) as scratch:
        for name in (SETTINGS, WEIGHTS, "plan.json"):
            shutil.copyfile(trained / name, room / name)
        shutil.copytree(trained / "adapter", room / "adapter")
        folder = write_dequantised(base, plan_of(trained), scratch / "base")
        with ThreadPoolExecutor() as pool:  # mostly they import their libraries
            model = pool.submit(convert.to_gguf, folder, room / "base.gguf")
            lora = pool.submit(convert.lora_to_gguf, room / "adapter", base, room / "lora.gguf")
            model.result(), lora.result()
        files = sorted(path for path in room.rglob("*") if path.is_file())
        hashes = {str(path.relative_to(room)): sha256(path) for path in files}
        atomic_write(room / MANIFEST, json.dumps(hashes, indent=1) + "\n")
    return Export(output, settings)


def reimport(folder: Path, base: Path) -> Export:
    """Open what `export` wrote, for the Hugging Face model `base`.

    Raises FileNotFoundError or ValueError naming the file: missing, truncated or otherwise not as
    it was exported, or trained on another base.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} holds no export: it has no {MANIFEST}")
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} is truncated ({error}): export again") from error
    for name, stated in hashes.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: export again")
        if (actual := sha256(folder / name)) != stated:
            raise ValueError(f"{folder / name} is truncated or changed: SHA-256 {actual}, exported "
                             f"was {stated}; copy it again, or export again")
    return Export(folder, _settings(folder, base))


def _settings(folder: Path, base: Path) -> CommitmentSettings:
    settings = VariationalCommitment.load(folder).settings
    if settings.base_sha256 != (actual := base_hash(base)):
        raise ValueError(f"{folder} was trained on the base model with SHA-256 "
                         f"{settings.base_sha256}; {base} has {actual}: give that one")
    return settings


def write_dequantised(base: Path, plan: Plan, output: Path, adapter: Path | None = None) -> Path:
    """Hugging Face folder of `dequantised` (f32), with the LoRA `adapter` merged if given."""
    network: Any = dequantised(base, plan)
    if adapter is not None:
        with renamed():
            network = PeftModel.from_pretrained(network, adapter).merge_and_unload()
    with atomic_folder(output) as room:
        network.save_pretrained(room)
        for path in (*base.glob("tokenizer*"), *base.glob("chat_template*")):
            shutil.copyfile(path, room / path.name)
    return output


ARCHITECTURE = "controlvector"


def write_control_vector(path: Path, commitment: Commitment, model_hint: str) -> Path:
    """Write λ · direction for each layer, whole or not at all; any llama.cpp loads it at scale 1.

    model_hint: architecture of the model that it is for. Raises ValueError when layer 0 is in
    range, which the layout cannot hold (``direction.N`` is applied at layer N ≥ 1).
    """
    first, last = commitment.layers
    if first < 1:
        raise ValueError(
            f"layers = {commitment.layers}: a control vector cannot touch layer 0; train with "
            "layers from 1 on, or use the commitment itself in the patched llama.cpp"
        )
    addition = commitment.strength * np.asarray(commitment.direction, np.float32)
    with scratch_folder(path) as room:
        writer = gguf.GGUFWriter(room / path.name, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", last - first + 1)
        for layer in range(first, last + 1):
            writer.add_tensor(f"direction.{layer}", addition.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (room / path.name).replace(path)
    return path
