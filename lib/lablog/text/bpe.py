"""Byte-level byte-pair encoding (GPT-2's kind), from the vocabulary in a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lablog.files import parsing
from lablog.models.gguf_file import open_gguf

CONTROL, USER_DEFINED = 3, 4  # GGUF's types of a token that is no text, and of one added to BPE
PRE_TOKENIZERS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True),
               pre_tokenizers.ByteLevel(add_prefix_space=False)],
}
"""How a text is cut before merges, by GGUF's ``tokenizer.ggml.pre``."""


def byte_level(source: Path, fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the `fields` of the GGUF file `source` describe, control tokens included.

    ValueError, naming the file, for another kind, a way of cutting text that is not known, or a
    vocabulary that contradicts itself.
    """
    with parsing(source, "a file with a vocabulary of GPT-2's kind", Exception):  # of `tokenizers`
        return _byte_level(source, fields)


def _byte_level(source: Path, fields: Mapping[str, Any]) -> Tokenizer:
    def field(name: str) -> Any:
        found = fields.get(f"tokenizer.ggml.{name}")
        return None if found is None else found.contents()

    kind, cut = field("model"), field("pre") or "gpt-2"
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        raise ValueError(f"{source} has a tokenizer of kind {kind!r}, pre-tokenizer {cut!r}; read "
                         f"are 'gpt2' with {', '.join(PRE_TOKENIZERS)}")
    tokens, merges = field("tokens"), field("merges")
    if tokens is None or merges is None:
        raise ValueError(f"{source} holds no vocabulary with merges")
    engine = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)},
                                  merges=[tuple(merge.split(" ")) for merge in merges]))
    engine.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[cut])
    engine.decoder = decoders.ByteLevel()
    added = [(token, of) for token, of in zip(tokens, field("token_type") or [], strict=False)
             if of in (CONTROL, USER_DEFINED)]  # never cut
    engine.add_tokens([AddedToken(token, special=of == CONTROL, normalized=False)
                       for token, of in added])
    return engine


class GGUFTokenizer:
    """The tokenizer of a GGUF file, a whole model or a vocabulary alone, as llama.cpp ships GPT-2's
    (``models/ggml-vocab-gpt-2.gguf``)."""

    def __init__(self, path: Path) -> None:
        """Load `path`; FileNotFoundError or ValueError say what is wrong with it."""
        self._engine = byte_level(path, open_gguf(path).fields)

    def __len__(self) -> int:
        """Number of token ids."""
        return int(self._engine.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token ids of any text."""
        return list(self._engine.encode(text).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self._engine.decode(list(ids), skip_special_tokens=False))
