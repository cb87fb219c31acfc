"""Documents as one stream of tokens in memory-mapped shards, and windows of it to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import Field
from torch.utils.data import Dataset

from lablog.files import atomic_folder, atomic_write, parsing, sha256
from lablog.keys import key
from lablog.progress import progress
from lablog.strict import Strict
from lablog.text.datasets import Item
from lablog.text.tokenizer import Tokenizer

MANIFEST = "manifest.json"
BATCH = 4096  # documents that are encoded together


def digest(document: str) -> str:
    """SHA-256 of a document up to white space: what makes two documents the same."""
    return hashlib.sha256(" ".join(document.split()).encode()).hexdigest()


def split(documents: Iterable[str], every: int) -> tuple[list[str], list[str]]:
    """(training, held out): by the document's digest, about one of `every` is held out.

    Equal documents fall on the same side, whatever stands around them.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        sides[int(digest(document)[:8], 16) % every == 0].append(document)
    return sides


def refuse_overlap(training: Iterable[str], held_out: Iterable[str]) -> None:
    """Raise ValueError if a document is on both sides (white space aside) or one side is empty."""
    seen, other = {digest(d) for d in training}, {digest(d): d for d in held_out}
    if not seen or not other:
        raise ValueError(f"{len(seen)} training and {len(other)} held-out documents: need both")
    if common := [other[d] for d in other if d in seen]:
        raise ValueError(
            f"{len(common)} of {len(other)} held-out documents are training documents, the first "
            f"begins {common[0][:60]!r}: held-out loss would measure memory; split anew"
        )


class Manifest(Strict):
    """What `pack` says of a folder: `key` of what it was made of, shards' names and SHA-256."""

    tokenizer: str
    key: str
    documents: int = Field(ge=1)
    bytes: int = Field(ge=0)
    tokens: int = Field(ge=1)
    shards: dict[Annotated[str, Field(pattern=r"^\d+\.u16$")], str] = Field(min_length=1)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder; ValueError naming it if it is none."""
        path = folder / MANIFEST
        with parsing(path, f"a manifest of packed text: delete {folder} and pack again"):
            return cls.model_validate_json(path.read_bytes())


class Stream:
    """The tokens of a folder that :func:`pack` wrote."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        """Open `folder`; ValueError if a shard has changed or another tokenizer encoded it."""
        self.folder = folder
        self.manifest = Manifest.read(folder)
        if self.manifest.tokenizer != tokenizer.hash:
            raise ValueError(
                f"{folder} was encoded with tokenizer {self.manifest.tokenizer[:12]}, not "
                f"{tokenizer.hash[:12]}: delete it and pack again"
            )
        for name, expected in self.manifest.shards.items():
            if sha256(folder / name) != expected:
                raise ValueError(f"{folder / name} has changed: delete {folder} and pack again")
        self.shards = [np.memmap(folder / name, "<u2", "r") for name in self.manifest.shards]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.key = sha256(folder / MANIFEST)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> NDArray[np.int32]:
        """`count` token ids from `start` on."""
        parts = []
        for shard, end in zip(self.shards, self.ends, strict=True):
            first, last = start - (end - len(shard)), start + count - (end - len(shard))
            if last > 0 and first < len(shard):
                parts.append(shard[max(first, 0) : last])
        return np.concatenate(parts).astype(np.int32)


def pack(
    documents: Sequence[str], tokenizer: Tokenizer, folder: Path, shard: int = 1 << 22,
    threads: int = 2,
) -> Stream:
    """Encode `documents`, each after BOS, into `folder`: uint16 shards of `shard` tokens.

    The folder appears whole or not at all and is taken as it is when it holds the same. The
    manifest names tokenizer, documents, bytes (UTF-8), tokens, and the hash of each shard.
    ValueError if there is no document or the vocabulary does not fit uint16.
    """
    if not documents or len(tokenizer) > 1 << 16:
        raise ValueError(f"{len(documents)} documents, {len(tokenizer)} token ids: cannot pack")
    made_of = key(pack, hashlib.sha256("\0".join(documents).encode()).hexdigest(),
                  tokenizer.hash, shard)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not ((folder / MANIFEST).is_file() and Manifest.read(folder).key == made_of):
            _pack(documents, tokenizer, folder, shard, threads, made_of)
        return Stream(folder, tokenizer)


def _pack(documents: Sequence[str], tokenizer: Tokenizer, folder: Path, shard: int, threads: int,
          made_of: str) -> None:
    with atomic_folder(folder) as scratch:
        held: list[NDArray[np.uint16]] = []
        shards: dict[str, str] = {}
        tokens = 0

        def flush(least: int) -> None:
            """Write whole shards while more than `least` tokens are held."""
            nonlocal held
            stack = np.concatenate(held)
            while len(stack) > least:
                path = scratch / f"{len(shards):04d}.u16"
                atomic_write(path, stack[:shard].tobytes())
                shards[path.name], stack = sha256(path), stack[shard:]
            held = [stack]

        bar = progress(len(documents), f"packing {folder.name}", "document")
        for first in range(0, len(documents), BATCH):
            batch = documents[first : first + BATCH]
            held += [ids.astype("<u2") for ids in tokenizer.encode_all(batch, threads)]
            tokens += sum(map(len, held[-len(batch) :]))
            flush(shard)
            bar.update(len(batch))
        bar.close()
        flush(0)
        manifest = Manifest(
            tokenizer=tokenizer.hash, key=made_of, documents=len(documents),
            bytes=sum(len(document.encode()) for document in documents), tokens=tokens,
            shards=shards)
        atomic_write(scratch / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


class Windows(Dataset[Item]):
    """`count` windows of `context` tokens, each epoch in another order and from another offset.

    Neighbouring windows share one token, so that an epoch predicts each token once. A window is a
    pure function of (stream, context, seed, index). ValueError if the stream holds no window.
    """

    def __init__(self, stream: Stream, context: int, count: int, seed: int):
        self.stream, self.context, self.count, self.seed = stream, context, count, seed
        self.stride = context - 1
        self.each = (len(stream) - 1) // self.stride - 1  # whatever the offset
        if self.each < 1:
            raise ValueError(
                f"{stream.folder} holds {len(stream)} tokens; windows of {context} need at least "
                f"{2 * self.stride + 1}: add text or lower the context"
            )
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def __len__(self) -> int:
        return self.count

    def _epoch(self, number: int) -> tuple[int, NDArray[np.int64]]:
        draw = np.random.Generator(np.random.PCG64([self.seed, number]))
        return int(draw.integers(self.stride)), draw.permutation(self.each)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.count:
            raise IndexError(index)
        offset, order = self.epoch(index // self.each)
        start = offset + int(order[index % self.each]) * self.stride
        ids = self.stream.read(start, self.context)
        weights = np.ones(self.context, np.float32)
        weights[0] = 0
        return Item(ids, weights)
