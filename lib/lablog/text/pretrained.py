"""Token embeddings that others have trained: GPT-2's, or those of a model in a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from torch import Tensor

from lablog.files import repository
from lablog.models import hub
from lablog.models.gguf_file import open_gguf

EMBEDDING = "token_embd.weight"  # in GGUF


def gpt2_embedding(source: str) -> Tensor:
    """GPT-2's token embedding [50257, 768], float32.

    `source` is a local ``.safetensors`` file or a Hub repository, ``OWNER/NAME[@REVISION]``.
    Raises ValueError when the file holds no such matrix.
    """
    path = repository() / source
    if path.suffix != ".safetensors":
        name, _, revision = source.partition("@")
        path = hub.download(name, "model.safetensors", revision or None)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected GPT-2's weights as safetensors")
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.split(".")[-2:] == ["wte", "weight"]]  # noqa: SIM118
        if len(names) != 1:
            raise ValueError(f"{path} holds no tensor wte.weight: is it a GPT-2 checkpoint?")
        return torch.as_tensor(file.get_tensor(names[0])).float()


def gguf_embedding(path: Path) -> Tensor:
    """The token embedding [vocabulary, width] of the model in a GGUF file, dequantised to float32.

    Raises ValueError when the file holds none (a vocabulary alone).
    """
    for tensor in open_gguf(path).tensors:
        if tensor.name == EMBEDDING:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            return torch.from_numpy(values.reshape(tuple(reversed(tensor.shape.tolist())))).float()
    raise ValueError(f"{path} holds no tensor {EMBEDDING}: is it a vocabulary without a model?")
