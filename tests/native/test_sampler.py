"""The native sampler against an independent implementation in Python."""

import ctypes
import math
import struct
import sys
from pathlib import Path
from statistics import NormalDist

import pytest

LIB = Path(__file__).parents[2] / "build" / "native" / "lib"
SUFFIX = {"darwin": ".dylib"}.get(sys.platform, ".so")

MASK = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def normal(seed: int, stream: int, index: int) -> float:
    block = index // 2
    x = philox([block & MASK, block >> 32, stream, 0], [seed & MASK, seed >> 32])
    low, high = x[2 * (index % 2) : 2 * (index % 2) + 2]
    return NormalDist().inv_cdf((((high << 32 | low) >> 12) + 0.5) / 2**52)


def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    path = LIB / f"libcommitment{SUFFIX}"
    if not path.exists():
        pytest.skip(f"{path} is not built: run 'make setup' first")
    library = ctypes.CDLL(str(path))
    pointer = ctypes.POINTER(ctypes.c_float)
    library.commitment_sample.argtypes = [
        ctypes.c_uint64,
        ctypes.c_int32,
        ctypes.c_int32,
        pointer,
        pointer,
        pointer,
    ]
    return library


@pytest.mark.parametrize(("seed", "k", "d"), [(7, 64, 128), (0, 1, 1), (2**64 - 1, 5, 33)])
def test_equals_the_python_implementation(library: ctypes.CDLL, seed: int, k: int, d: int) -> None:
    z, w_c, direction = ((ctypes.c_float * n)() for n in (k, d * k, d))
    assert library.commitment_sample(seed, k, d, z, w_c, direction) == 0

    expected_z = [f32(normal(seed, 0, i) * math.sqrt(1 / k)) for i in range(k)]
    expected_w = [f32(normal(seed, 1, i) * math.sqrt(2 / (d + k))) for i in range(d * k)]
    rows = [expected_w[r * k : (r + 1) * k] for r in range(d)]
    expected = [sum(w * x for w, x in zip(row, expected_z, strict=True)) for row in rows]

    # Python's quantile uses the C library's log: equal to a unit in the last place of a float
    assert list(z) == pytest.approx(expected_z, rel=2**-22)
    assert list(w_c) == pytest.approx(expected_w, rel=2**-22)
    assert list(direction) == pytest.approx(expected, rel=1e-5, abs=1e-7)
