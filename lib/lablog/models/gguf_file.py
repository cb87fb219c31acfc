"""GGUF files, compared with their own size before anything reads them that trusts what they say.

Format: ggml, ``docs/gguf.md``. The Python reader and llama.cpp's loader take counts, lengths and
offsets as they stand there; a damaged one costs them a crash, or minutes and gigabytes.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import gguf

from lablog.files import parsing

VERSIONS = (2, 3)  # with 64-bit counts
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
           11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
DIMENSIONS = 4  # of a tensor, at most
LONGEST = 63  # bytes of a tensor's name: ggml keeps 64 with the zero behind it
TOKENS = b"tokenizer.ggml.tokens"
LAYERS = 512  # that llama.cpp has room for (LLAMA_MAX_LAYERS); of more, or none, it dies
DAMAGED = "a whole GGUF file"


def check_gguf(path: Path) -> Path:
    """Return `path` if every count, length and offset in it fits the file.

    Raises FileNotFoundError, or ValueError naming the file: another format or version, truncated,
    a key or tensor twice, a type that ggml does not know, tensors that overlap.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file {path}: check the `model` parameter")
    with path.open("rb") as file:
        head = file.read(24)
        if len(head) < 8 or head[:4] != b"GGUF":
            raise ValueError(
                f"{path} is not a GGUF file (it starts with {head[:4]!r}); convert a Hugging Face "
                "folder by naming the folder, or a llama2.c file by naming the .bin"
            )
        version = struct.unpack_from("<I", head, 4)[0]
        if version not in VERSIONS:
            raise ValueError(f"{path} is GGUF version {version}; this llama.cpp reads 2 and 3")
        with (parsing(path, DAMAGED, struct.error),
              mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data):
            _Walk(data).all()
    return path


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A reader of a file that `check_gguf` has found whole."""
    with parsing(path, DAMAGED, KeyError, IndexError, OverflowError):
        return gguf.GGUFReader(check_gguf(path))


class _Walk:
    """A place in a file, which moves over what the file says is there."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, len(data)

    def all(self) -> None:
        """Header, keys, tensors; ValueError for the first fault."""
        self.at = 8
        tensors, keys = self.scalar("<Q"), self.scalar("<Q")
        alignment, seen = 32, set()
        for _ in range(self.count(keys, 12, "keys")):
            key = self.string("a key")
            if key in seen:
                raise ValueError(f"the key {key!r} stands there twice")
            seen.add(key)
            value = self.value(self.scalar("<I"))
            if key == b"general.alignment":
                alignment = value
            if key == TOKENS and isinstance(value, list) and len(set(value)) < len(value):
                raise ValueError("a token of its vocabulary stands there twice")
            if key.endswith(b".block_count") and not (
                    isinstance(value, int) and 1 <= value <= LAYERS):
                raise ValueError(f"it has {value} layers; llama.cpp takes 1 to {LAYERS}")
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}, no power of two")
        parts = [self.tensor() for _ in range(self.count(tensors, 24, "tensors"))]
        names = {name for name, _, _ in parts}
        if len(names) < len(parts):
            raise ValueError("a tensor stands there twice")
        begin = -(-self.at // alignment) * alignment
        last = 0
        for name, offset, length in sorted(parts, key=lambda part: part[1]):
            if offset % alignment or offset < last:
                raise ValueError(f"the tensor {name!r} is at {offset}, where none can be")
            last = offset + length
            if begin + last > self.size:
                raise ValueError(f"it has {self.size} bytes, and the tensor {name!r} ends at "
                                 f"{begin + last}: truncated, fetch it again")

    def scalar(self, form: str) -> Any:
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def count(self, number: int, least: int, what: str) -> int:
        """`number`, if so many of at least `least` bytes can follow."""
        if number * least > self.size - self.at:
            raise ValueError(f"it names {number} {what}, for which it is too small")
        return number

    def string(self, what: str) -> bytes:
        length = self.count(self.scalar("<Q"), 1, f"bytes of {what}")
        self.at += length
        return self.data[self.at - length : self.at]

    def value(self, kind: int) -> Any:
        """Move over a key's value and return it, None for an array of numbers."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string("a value")
        if kind != ARRAY:
            raise ValueError(f"a value is of type {kind}, which GGUF does not have")
        inner, number = self.scalar("<I"), self.scalar("<Q")
        if inner == STRING:
            return [self.string("an array") for _ in range(self.count(number, 8, "strings"))]
        if inner in SCALARS:
            width = struct.calcsize(SCALARS[inner])
            self.at += width * self.count(number, width, "values")
            return None
        raise ValueError(f"an array is of type {inner}, which GGUF does not have")

    def tensor(self) -> tuple[str, int, int]:
        """Name, offset, and bytes of the next tensor."""
        name = self.string("a tensor's name").decode()
        dimensions = self.scalar("<I")
        if not 1 <= dimensions <= DIMENSIONS or not 0 < len(name.encode()) <= LONGEST:
            raise ValueError(f"the tensor {name[:LONGEST]!r} has {dimensions} dimensions")
        shape = [self.scalar("<Q") for _ in range(dimensions)]
        kind, offset = self.scalar("<I"), self.scalar("<Q")
        sizes = gguf.GGML_QUANT_SIZES.get(kind)  # by number, since its keys are of an IntEnum
        if sizes is None or min(shape) == 0 or shape[0] % sizes[0]:
            raise ValueError(f"the tensor {name!r} has type {kind} and shape {shape}")
        elements = 1
        for length in shape:
            elements *= length
        return name, offset, elements // sizes[0] * sizes[1]
