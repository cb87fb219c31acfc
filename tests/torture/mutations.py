"""Ways in which a file goes wrong, each a pure function of its bytes and of a random generator.

Half of them know what the files of this project are made of: lengths and counts in binary, little
endian, near the beginning, or text with numbers, keys, brackets and lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

Generator = np.random.Generator
Mutation = Callable[[bytes, Generator], bytes]
HEADER = 4096  # bytes at the beginning that are changed more often: counts and lengths stand there
EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
           0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF)
INSERTED = (b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b"\r", b"\n\n", b'"',
            b"'", b",", b":", b"{", b"}", b"[", b"]", b"- ", b"\t", b"&a ", b"*a", b"!!python/x ",
            b"null", b"NaN", b"Infinity", b"true", "\u2028".encode(), "\u2581".encode(),
            b"../../../etc/passwd", b"<script>alert(1)</script>", b"{{ x }}", b"\\ud800")
NUMBERS = (b"-1", b"0", b"1e400", b"-0.0", b"99999999999999999999999999", b"NaN", b'"7"', b"null",
           b"[]", b"0x10", b"1_000", b".5", b"2147483648", b"18446744073709551616")
DEPTH = 100_000  # of nested brackets


def _place(data: bytes, rng: Generator, width: int = 1) -> int:
    """An offset at which `width` bytes begin, in the header as often as anywhere."""
    last = max(len(data) - width, 0)
    near = min(last, HEADER)
    return int(rng.integers(0, (near if rng.random() < 0.5 else last) + 1))


def truncate(data: bytes, rng: Generator) -> bytes:
    """The file ends early."""
    return data[: _place(data, rng)]


def flip(data: bytes, rng: Generator) -> bytes:
    """One to eight bits are others."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if data else 0):
        changed[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def number(data: bytes, rng: Generator) -> bytes:
    """A number of one to eight bytes is extreme, or a little larger or smaller."""
    width = int(rng.choice([1, 2, 4, 4, 8, 8]))
    if len(data) < width:
        return data
    at = _place(data, rng, width)
    if rng.random() < 0.5:
        value = EXTREME[int(rng.integers(len(EXTREME)))]
    else:
        value = int.from_bytes(data[at : at + width], "little") + int(rng.integers(-2, 3))
    there = (value % (1 << 8 * width)).to_bytes(width, "little")
    return data[:at] + there + data[at + width :]


def swap_endianness(data: bytes, rng: Generator) -> bytes:
    """A number has its bytes the other way round."""
    width = int(rng.choice([2, 4, 8]))
    at = _place(data, rng, width)
    return data[:at] + data[at : at + width][::-1] + data[at + width :]


def _chunk(data: bytes, rng: Generator) -> tuple[int, int]:
    begin = _place(data, rng)
    return begin, begin + int(rng.integers(0, 1 << int(rng.integers(1, 12))))


def duplicate(data: bytes, rng: Generator) -> bytes:
    """A stretch stands there twice."""
    begin, end = _chunk(data, rng)
    return data[:end] + data[begin:]


def remove(data: bytes, rng: Generator) -> bytes:
    """A stretch is missing."""
    begin, end = _chunk(data, rng)
    return data[:begin] + data[end:]


def zero(data: bytes, rng: Generator) -> bytes:
    """A stretch is zeros, as a file system leaves it that lost power."""
    begin, end = _chunk(data, rng)
    return data[:begin] + bytes(len(data[begin:end])) + data[end:]


def append(data: bytes, rng: Generator) -> bytes:
    """Something stands behind the end."""
    return data + rng.bytes(int(rng.integers(1, 200)))


def insert(data: bytes, rng: Generator) -> bytes:
    """A character or word that has a meaning in some format stands where it should not."""
    at = _place(data, rng)
    return data[:at] + INSERTED[int(rng.integers(len(INSERTED)))] + data[at:]


def _one(pattern: bytes, data: bytes, rng: Generator) -> re.Match[bytes] | None:
    found = list(re.finditer(pattern, data[: 1 << 16]))
    return found[int(rng.integers(len(found)))] if found else None


def digits(data: bytes, rng: Generator) -> bytes:
    """A number in the text is another one, or none."""
    found = _one(rb"-?\d+(\.\d+)?", data, rng)
    if not found:
        return flip(data, rng)
    there = NUMBERS[int(rng.integers(len(NUMBERS)))]
    return data[: found.start()] + there + data[found.end() :]


def word(data: bytes, rng: Generator) -> bytes:
    """A word is another one of the same file: keys twice, values under other keys."""
    one, other = (_one(rb"[\w.-]+", data, rng) for _ in range(2))
    if not one or not other:
        return flip(data, rng)
    return data[: one.start()] + other[0] + data[one.end() :]


def lines(data: bytes, rng: Generator) -> bytes:
    """A line is missing, stands there twice, or elsewhere."""
    rows = data.splitlines(keepends=True)
    if not rows:
        return data
    row = rows.pop(int(rng.integers(len(rows))))
    for _ in range(int(rng.integers(0, 3))):
        rows.insert(int(rng.integers(len(rows) + 1)), row)
    return b"".join(rows)


def nest(data: bytes, rng: Generator) -> bytes:
    """Brackets, deeper than a parser that calls itself can follow."""
    at = _place(data, rng)
    bracket = (b"[", b"{", b'{"a":', b"- ", b"(")[int(rng.integers(5))]
    return data[:at] + bracket * DEPTH + data[at:]


def bomb(data: bytes, rng: Generator) -> bytes:
    """YAML whose aliases grow a thousandfold with every level."""
    levels = [b"a0: &a0 [x]"] + [
        b"a%d: &a%d [%s]" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 10)]
    return data + b"\n" + b"\n".join(levels) + b"\n"


def other(data: bytes, rng: Generator) -> bytes:
    """Nothing, zeros, noise, or a file of another kind."""
    return (b"", bytes(64), rng.bytes(512), b"GGUF", b"PK\x03\x04", b"[]", b"{}", b"null", b"0",
            b"\x80\x04K\x01.", b"<!DOCTYPE html>")[int(rng.integers(11))]


BINARY: tuple[Mutation, ...] = (truncate, flip, number, number, swap_endianness, duplicate, remove,
                                zero, append, other)
TEXT: tuple[Mutation, ...] = (truncate, flip, insert, insert, digits, word, lines, duplicate,
                              remove, nest, bomb, append, other)


def mutated(data: bytes, mutations: tuple[Mutation, ...], rng: Generator) -> bytes:
    """`data` after one to three of `mutations`."""
    for _ in range(int(rng.integers(1, 4))):
        data = mutations[int(rng.integers(len(mutations)))](data, rng)
    return data
