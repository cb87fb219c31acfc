"""A commitment as a GGUF control vector, in the community's layout (repeng; llama.cpp's common)."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np

from lablog.models.llama_cpp import Commitment, check_gguf

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
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as room:
        writer = gguf.GGUFWriter(Path(room) / path.name, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", last - first + 1)
        for layer in range(first, last + 1):
            writer.add_tensor(f"direction.{layer}", addition.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (Path(room) / path.name).replace(path)
    return path


def read_control_vector(path: Path) -> Commitment:
    """The commitment (λ = 1) that a control vector holds.

    Raises FileNotFoundError, or ValueError for a file that is truncated, no control vector, or
    holds different directions or a gap, which one commitment cannot express.
    """
    check_gguf(path)
    try:
        reader = gguf.GGUFReader(path)
        # Where the sizes in the header exceed the file, numpy's views are short or impossible.
        found = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
        kind = reader.fields["general.architecture"].contents()
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): export it again") from error
    names = {name.partition(".")[0] for name in found}
    if kind != ARCHITECTURE or names != {"direction"}:
        raise ValueError(f"{path} is no control vector: architecture {kind!r}, tensors "
                         f"{sorted(names)}; expected {ARCHITECTURE!r} and direction.1, …")
    layers = sorted(int(name.partition(".")[2]) for name in found)
    rows = [found[f"direction.{layer}"] for layer in layers]
    if layers != list(range(layers[0], layers[-1] + 1)) or layers[0] < 1 or any(
        not np.array_equal(row, rows[0]) for row in rows
    ):
        raise ValueError(f"{path} differs between layers {layers}: one commitment adds the same "
                         "vector in a range of layers; give the file to llama.cpp instead")
    return Commitment(rows[0], 1.0, (layers[0], layers[-1]))
