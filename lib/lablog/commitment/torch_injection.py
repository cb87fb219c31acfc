"""The same injection in PyTorch, by forward hooks on a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


@contextmanager
def injected(
    model: PreTrainedModel, addition: torch.Tensor, layers: tuple[int, int]
) -> Iterator[None]:
    """Add `addition` to the output of each decoder layer in [first, last] while the block lasts.

    addition: λ · W_c z*, broadcastable to the hidden states [batch, tokens, width].
    layers: 0-based, inclusive. Raises ValueError for a range that the model does not have.
    """
    blocks = model.get_decoder().layers
    first, last = layers
    if not 0 <= first <= last < len(blocks):
        raise ValueError(f"layers = {layers}: the model has layers 0 to {len(blocks) - 1}")

    def add(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + addition.to(output[0]), *output[1:])
        return output + addition.to(output)

    handles = [blocks[i].register_forward_hook(add) for i in range(first, last + 1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
