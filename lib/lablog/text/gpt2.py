"""GPT-2's tokenizer and embedding matrix, from local files or the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from lablog.files import repository
from lablog.models import hub


class GPT2Tokenizer:
    """Byte-level byte-pair encoding with GPT-2's vocabulary, read from a GGUF file.

    llama.cpp ships it as ``models/ggml-vocab-gpt-2.gguf``.
    """

    def __init__(self, path: Path) -> None:
        """Load `path`; FileNotFoundError or ValueError say what is wrong with it."""
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: expected GPT-2's vocabulary (llama.cpp's source tree has it)"
            )
        try:
            fields = gguf.GGUFReader(path).fields
            kind = fields["tokenizer.ggml.model"].contents()
            tokens = fields["tokenizer.ggml.tokens"].contents()
            merges = fields["tokenizer.ggml.merges"].contents()
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a GGUF file with a BPE vocabulary: {error}") from error
        if kind != "gpt2":
            raise ValueError(f"{path} holds a {kind!r} tokenizer, expected 'gpt2'")
        self._engine = Engine(
            models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=[tuple(merge.split(" ")) for merge in merges],
            )
        )
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._engine.decoder = decoders.ByteLevel()

    def __len__(self) -> int:
        """Number of token ids (50,257)."""
        return int(self._engine.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token ids of any text."""
        return list(self._engine.encode(text).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self._engine.decode(list(ids), skip_special_tokens=False))


def gpt2_embedding(source: str, revision: str | None = None) -> Tensor:
    """GPT-2's token embedding [50257, 768], float32.

    `source` is a local ``.safetensors`` file or the name of a Hub repository (then `revision`
    should be a commit). Raises ValueError when the file holds no such matrix.
    """
    path = repository() / source
    if path.suffix != ".safetensors":
        path = hub.download(source, "model.safetensors", revision)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected GPT-2's weights as safetensors")
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.split(".")[-2:] == ["wte", "weight"]]  # noqa: SIM118
        if len(names) != 1:
            raise ValueError(f"{path} holds no tensor wte.weight: is it a GPT-2 checkpoint?")
        return torch.as_tensor(file.get_tensor(names[0])).float()
