"""SentencePiece tokenizers: training, encoding, and a hash that names one.

Byte-pair encoding with byte fallback and no normalisation at all, as Llama 2 has it but for the
space that Llama 2 puts in front of a text; llama.cpp tokenises identically
(``tests/test_tokenizer.py``). Line ends never occur in the training sentences, so "\\n" is a
byte token and no piece spans two lines: encoding a dialogue equals encoding its lines.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from lablog.files import atomic_write, sha256

SPACE = "\u2581"  # SentencePiece's mark for a space, therefore not itself representable


class Tokenizer:
    """A SentencePiece model file with the few operations that the project needs."""

    def __init__(self, path: Path):
        """Load `path`; FileNotFoundError or ValueError say what is wrong with it."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: expected a SentencePiece tokenizer.model")
        self.path = path
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, UnicodeDecodeError) as error:  # its message may hold what is no text
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from error

    def __len__(self) -> int:
        """Number of token ids."""
        return int(self._model.vocab_size())

    @property
    def bos(self) -> int:
        """Id of the token that begins every text."""
        return int(self._model.bos_id())

    @property
    def eos(self) -> int:
        """Id of the token that ends a text."""
        return int(self._model.eos_id())

    @property
    def hash(self) -> str:
        """SHA-256 of the model file: equal hashes tokenise equally."""
        return sha256(self.path)

    def piece(self, token: int) -> str:
        """The piece with id `token`; a leading U+2581 stands for a space."""
        return str(self._model.id_to_piece(token))

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of any Unicode text.

        Raises ValueError for U+2581, which SentencePiece cannot tell from a space.
        """
        if SPACE in text:
            raise ValueError(f"U+2581 at {text.index(SPACE)} cannot be encoded: use a space")
        ids = list(self._model.encode(text))
        return [self.bos, *ids] if bos else ids

    def encode_all(self, texts: Sequence[str], threads: int = 2) -> list[NDArray[np.int32]]:
        """Token ids of many texts, each beginning with BOS; ValueError as in :meth:`encode`."""
        for text in texts:
            if SPACE in text:
                self.encode(text)
        ids: list[NDArray[np.int32]] = self._model.encode(
            list(texts), add_bos=True, num_threads=threads, return_type="numpy"
        )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, control tokens nothing."""
        return str(self._model.decode(list(ids)))


def train_tokenizer(
    sentences: Iterable[str], vocabulary: int, path: Path, add_prefix_space: bool = False,
    llama2c: bool = False,
) -> Tokenizer:
    """Train byte-pair encoding on `sentences` (no line ends inside) and write `path`.

    `vocabulary` counts 3 control tokens and 256 bytes too; a corpus that does not support that
    many merges gets fewer. One thread, sorted distinct input with counts: the same sentences
    give the same file. `llama2c` splits numbers into digits and allows pieces of spaces alone,
    as karpathy/llama2.c's ``tinystories.py`` does. ValueError if `vocabulary` is too small for
    the characters.
    """
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=add_prefix_space,
            split_digits=llama2c,
            allow_whitespace_only_pieces=llama2c,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocabulary} pieces: {error}") from error
    atomic_write(path, buffer.getvalue())
    write_settings(path.parent, add_prefix_space)
    return Tokenizer(path)


def write_settings(folder: Path, add_prefix_space: bool) -> None:
    """Write ``tokenizer_config.json`` beside a ``tokenizer.model`` of the project's kind: the
    Hugging Face and llama.cpp loaders learn from it what the model file implies."""
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_prefix_space": add_prefix_space,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": False,
    }
    atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
