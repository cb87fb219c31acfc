"""A GGUF model as a Hugging Face folder: weights dequantised to f32, tokenizer, chat template.

For training and for PyTorch. The tokenizer is built from the file's own vocabulary and merges with
the pre-tokenizer that the file names, so that it gives llama.cpp's tokens (tests compare them).
One exception: a byte for which a vocabulary has no token is lost in both, and what stood on its two
sides may become one token here. SmolLM2 has none for six control characters, nor for the first
bytes of the planes 4 to 11, which hold no characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lablog.files import atomic_folder
from lablog.models.gguf_file import open_gguf
from lablog.provenance import available_memory_bytes
from lablog.text.bpe import byte_level

COPIES = 2  # of the weights, in f32, that lie in memory while they are read


def to_hugging_face(source: Path, folder: Path) -> Path:
    """Convert the Llama in the GGUF file `source` to `folder`, whole or not at all.

    Raises ValueError for another architecture or tokenizer than can be read exactly, and
    MemoryError where the dequantised weights do not fit.
    """
    reader = open_gguf(source)
    fields = dict(reader.fields.items())
    kind = fields["general.architecture"].contents()
    if kind != "llama":
        raise ValueError(f"{source} holds a {kind!r} model; only llama is read for training")
    needed = COPIES * 4 * sum(int(tensor.n_elements) for tensor in reader.tensors)
    free = available_memory_bytes()
    if needed > free:
        raise MemoryError(f"{source.name} needs {needed / 2**30:.1f} GiB when its weights are "
                          f"dequantised, {free / 2**30:.1f} are free: choose a smaller model")
    tokenizer = _tokenizer(source, fields)
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model that was read from GGUF counts as quantised and refuses to be saved.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(read.state_dict())
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return folder


def _tokenizer(source: Path, fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The file's byte-level BPE; ValueError for another kind."""
    def field(name: str, default: Any = None) -> Any:
        found = fields.get(f"tokenizer.{name}")
        return default if found is None else found.contents()

    engine, tokens = byte_level(source, fields), field("ggml.tokens")

    def token(name: str) -> str | None:
        number = field(f"ggml.{name}_token_id")
        return None if number is None else tokens[number]

    return PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token=token("bos"), eos_token=token("eos"),
        unk_token=token("unknown"), chat_template=field("chat_template"),
        clean_up_tokenization_spaces=False, add_bos_token=bool(field("ggml.add_bos_token", False)))
