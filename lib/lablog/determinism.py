"""One call that makes a run repeatable to the last digit on one machine."""

from __future__ import annotations

import os
import random

import numpy as np


def seed_everything(seed: int, threads: int | None = None) -> None:
    """Seed Python, NumPy and PyTorch, and ask PyTorch for deterministic algorithms.

    `threads` fixes PyTorch's intra-op thread count, since sums are reordered with it.
    """
    import torch

    # cuBLAS reads this when its first handle is made; without it CUDA products may differ.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written, and filling it first costs up to a tenth of a
    # training step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads is not None:
        torch.set_num_threads(threads)
