"""Training, validation and test tokens of the CVFP experiment, and what is refused.

Training: the first dialogues, each cut to the same number of tokens. Validation, as the log
specifies it: the last fifth of the *training* dialogues, written to a text file and read back.
Test: dialogues that occur in neither (the log has none).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from lablog.cvfp.model import ModelConfig, Token, TokenEmbedding
from lablog.files import atomic_write, repository
from lablog.keys import key
from lablog.models import locate
from lablog.text.bpe import GGUFTokenizer
from lablog.text.corpora import SUFFIXES, documents
from lablog.text.embeddings import gaussian_embedding, ppmi_embedding
from lablog.text.pretrained import gguf_embedding, gpt2_embedding
from lablog.text.tokenizer import Tokenizer, train_tokenizer


class Encoder(Protocol):
    """What both tokenizers share."""

    def __len__(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


def tokenizer_from(path: Path) -> Encoder:
    """The project's tokenizer from ``*.model``, GPT-2's kind from ``*.gguf``; else ValueError."""
    if path.suffix == ".gguf":
        return GGUFTokenizer(path)
    if path.suffix == ".model":
        return Tokenizer(path)
    raise ValueError(f"{path}: expected a SentencePiece .model or a GGUF vocabulary .gguf")


def cut(documents: Iterable[str], tokenizer: Encoder, count: int, length: int) -> list[list[int]]:
    """The first `count` documents that have `length` tokens, cut to that length.

    Documents whose cut is not reproduced by decoding and encoding (half a character at the end)
    are passed over, because the validation text goes through a text file. Raises ValueError
    when there are fewer.
    """
    taken: list[list[int]] = []
    seen = 0
    for document in documents:
        seen += 1
        ids = list(tokenizer.encode(document))[:length]
        if len(ids) == length and list(tokenizer.encode(tokenizer.decode(ids))) == ids:
            taken.append(ids)
        if len(taken) == count:
            return taken
    raise ValueError(
        f"{count} dialogues of {length} tokens asked for ({count * length} tokens), but only "
        f"{len(taken)} of {seen} documents have that many: ask for fewer or add text"
    )


def write_validation(
    training: Sequence[Sequence[int]], tokenizer: Encoder, path: Path, fraction: float = 0.2
) -> Path:
    """Write the last `fraction` of the training dialogues to `path`, one JSON string a line."""
    count = round(fraction * len(training))
    if not 0 < count <= len(training):
        raise ValueError(f"fraction = {fraction} of {len(training)} dialogues is {count} dialogues")
    lines = [json.dumps(tokenizer.decode(ids), ensure_ascii=False) for ids in training[-count:]]
    return atomic_write(path, "\n".join(lines) + "\n")


def read_validation(
    source: str,
    path: Path,
    tokenizer: Encoder,
    training: Iterable[int] | None = None,
    tokens: int | None = None,
) -> list[int]:
    """Token ids of the validation file, exactly `tokens` of them if given.

    `source` is the configuration's ``val_data_source``. Raises ValueError for any other than
    "text_file" (also ``auto_split``), for an empty or malformed file, for fewer tokens than asked
    for, and for a token that does not occur among the `training` ids; FileNotFoundError for a
    missing file.
    """
    if source != "text_file":
        raise ValueError(
            f"val_data_source = {source!r}: only 'text_file' is allowed, because an automatic "
            "split does not guarantee that validation tokens occur in training"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"validation file {path} is missing: write it with lablog.cvfp.data.write_validation"
        )
    ids: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            text = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not a JSON string: {error}") from error
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number} is {type(text).__name__}, expected a string")
        ids += tokenizer.encode(text)
    if not ids:
        raise ValueError(f"validation file {path} is empty: write it with write_validation")
    if tokens is not None and len(ids) < tokens:
        raise ValueError(f"{path} has {len(ids)} tokens, {tokens} were asked for")
    ids = ids if tokens is None else ids[:tokens]
    if training is not None and (absent := sorted(set(ids) - set(training))):
        raise ValueError(
            f"{path}: {len(absent)} validation token(s) do not occur in training, for example "
            f"{[tokenizer.decode([i]) for i in absent[:3]]} (ids {absent[:3]}): write the file "
            "from the training data"
        )
    return ids


def shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    """`rows` [n, ...] in an order that the CPU's `generator` draws."""
    return rows[torch.randperm(len(rows), generator=generator).to(rows.device)]


@dataclass(frozen=True)
class Prepared:
    """Ids [n] and normalised embeddings of the four texts, and the files they came from."""

    embedding: TokenEmbedding
    ids: dict[str, Tensor]
    tokens: dict[str, Token]
    files: dict[str, Path]

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the embedding (and Phase 2's head) knows."""
        return len(self.embedding.table)


def prepare(
    folder: Path, config: ModelConfig, *, text_source: str, tokenizer: str, vocabulary: int,
    embedding: str, window: int, corpus_documents: int, dialogues: int, dialogue_tokens: int,
    test_dialogues: int, val_data_source: str, seed: int, device: str,
) -> Prepared:
    """Everything that both notebooks feed to a network; writes only into `folder`.

    What is written lies in a folder of its own, named by all that decides it, so that a notebook
    that runs beside with other settings reads other files.

    `tokenizer`: "project" trains one of `vocabulary` pieces on the training documents, anything
    else is a ``.model`` or ``.gguf``, its path from the repository or its name in a package index.
    `embedding`: "ppmi" (co-occurrences at most `window` apart in the first `corpus_documents`
    training documents), "gaussian", that of a model in a ``.gguf``, named likewise, or GPT-2's (a
    ``.safetensors`` or a Hub name). Validation and dev have a fifth of the training tokens each,
    test has `test_dialogues`; the last two are of dialogues that occur nowhere else. A
    `text_source` that is a file is one of the `files`.
    """
    documents_ = list(islice(documents(text_source, "train", seed), corpus_documents))
    made_of = key(prepare, hashlib.sha256("\0".join(documents_).encode()).hexdigest(), tokenizer,
                  vocabulary, embedding, window, config.embed_dim, dialogues, dialogue_tokens,
                  test_dialogues, seed)
    folder = folder / f"texts-{made_of}"
    files = {"tokenizer": folder / "tokenizer.model", "validation": folder / "validation.txt",
             "embedding": folder / "embedding.safetensors"}
    if text_source.endswith(SUFFIXES):
        files["text"] = repository() / text_source
    if tokenizer == "project":
        lines = sorted({line for document in documents_ for line in document.splitlines()})
        encoder: Encoder = train_tokenizer(lines, vocabulary, files["tokenizer"])
    else:
        files["tokenizer"] = locate.local_file(tokenizer)
        encoder = tokenizer_from(files["tokenizer"])
    if embedding == "ppmi":
        encoded = [encoder.encode(document) for document in documents_]
        table = ppmi_embedding(encoded, len(encoder), config.embed_dim, window)
    elif embedding == "gaussian":
        table = gaussian_embedding(len(encoder), config.embed_dim, seed)
    elif embedding.endswith(".gguf"):
        table = gguf_embedding(locate.local_file(embedding))
    else:
        table = gpt2_embedding(embedding)
    if len(table) != len(encoder):
        raise ValueError(
            f"embedding {embedding!r} has {len(table)} rows, tokenizer {tokenizer!r} "
            f"{len(encoder)} ids: choose a pair of one vocabulary"
        )
    atomic_write(files["embedding"], save({"table": table}))
    module = TokenEmbedding(table, config).to(device)
    training = cut(documents_, encoder, dialogues, dialogue_tokens)
    flat = [i for ids in training for i in ids]
    held_out = round(0.2 * dialogues)
    write_validation(training, encoder, files["validation"])
    validation = read_validation(
        val_data_source, files["validation"], encoder, flat, held_out * dialogue_tokens
    )
    unseen = cut(documents(text_source, "test", seed), encoder, test_dialogues + held_out,
                 dialogue_tokens)
    test, dev = ([i for ids in part for i in ids]
                 for part in (unseen[:test_dialogues], unseen[test_dialogues:]))
    texts = {"training": flat, "validation": validation, "test": test, "dev": dev}
    ids = {name: torch.tensor(text, device=device) for name, text in texts.items()}
    return Prepared(module, ids, {name: module(i) for name, i in ids.items()}, files)
