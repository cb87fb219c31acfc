"""Sampling a commitment: z*, W_c and their product, by the native sampler."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np

from lablog.models.llama_cpp import native_folder


@dataclass(frozen=True)
class Latent:
    """z* ~ N(0, 1/k) [k], W_c with variance 2/(d + k) [d, k] and W_c z* [d], all float32."""

    z: np.ndarray
    projection: np.ndarray
    direction: np.ndarray

    @property
    def norm(self) -> float:
        """‖W_c z*‖, about sqrt(2d/(d + k))."""
        return float(np.linalg.norm(self.direction.astype(np.float64)))


@cache
def _sampler() -> ctypes.CDLL:
    library = ctypes.CDLL(str(next((native_folder() / "lib").glob("libcommitment.*"))))
    floats = ctypes.POINTER(ctypes.c_float)
    library.commitment_sample.argtypes = [ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32,
                                          floats, floats, floats]
    library.commitment_sample.restype = ctypes.c_int32
    library.commitment_error.argtypes = [ctypes.c_int32]
    library.commitment_error.restype = ctypes.c_char_p
    library.commitment_once.argtypes = [
        ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32,
        ctypes.POINTER(floats), ctypes.POINTER(ctypes.c_uint64),
    ]
    library.commitment_once.restype = ctypes.c_int32
    return library


def _checked(code: int, seed: int, k: int, d: int) -> None:
    if code:
        reason = _sampler().commitment_error(code).decode()
        raise ValueError(f"no commitment for seed = {seed}, k = {k}, d = {d}: {reason}")


def sample(seed: int, k: int, d: int) -> Latent:
    """Sample z* and W_c; the same bits on every platform (lab log A1).

    seed: 0 … 2^64 − 1; k: latent dimension; d: width of the model. Raises ValueError for k or d
    below 1 or beyond what the sampler allows.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed} does not fit 64 bits without sign")
    size = max(k, 0), max(d, 0)
    z, projection = np.empty(size[0], np.float32), np.empty(size[::-1], np.float32)
    direction = np.empty(size[1], np.float32)
    pointers = [
        array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for array in (z, projection, direction)
    ]
    _checked(_sampler().commitment_sample(seed, k, d, *pointers), seed, k, d)
    return Latent(z, projection, direction)


def sample_once(seed: int, k: int, d: int) -> tuple[np.ndarray, int]:
    """The log's process-wide commitment: W_c z* and how often it was initialised (claim A06).

    Raises ValueError when an earlier call in this process had other arguments.
    """
    pointer, count = ctypes.POINTER(ctypes.c_float)(), ctypes.c_uint64()
    code = _sampler().commitment_once(seed, k, d, ctypes.byref(pointer), ctypes.byref(count))
    _checked(code, seed, k, d)
    return np.ctypeslib.as_array(pointer, shape=(d,)).copy(), count.value
