"""Token embeddings that need no trained model: co-occurrence statistics, and noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def ppmi_embedding(
    documents: Iterable[Sequence[int]], vocabulary: int, width: int, window: int
) -> Tensor:
    """Positive pointwise mutual information and truncated SVD: [vocabulary, width], float32.

    Counts pairs of tokens at most `window` apart in a document, takes
    max(0, ln p(a, b) / p(a) p(b)) and returns U sqrt(S) of its best rank-`width` approximation
    (Levy and Goldberg, NIPS 2014; Bullinaria and Levy 2007). Columns beyond the number of
    distinct tokens are zero, and so are the rows of tokens that never occur. Signs are fixed, so
    the result is a function of the arguments. Raises ValueError when the vocabulary is smaller
    than `width` or an id does not fit it.
    """
    if vocabulary < width:
        raise ValueError(f"vocabulary of {vocabulary} tokens cannot fill {width} dimensions")
    flat: list[int] = []
    for document in documents:
        flat += [*document, *[-1] * window]  # -1 keeps pairs inside their document
    ids = np.asarray(flat, dtype=np.int64)
    if not len(ids) or ids.max() >= vocabulary or ids.min() < -1:
        raise ValueError(
            f"{len(ids)} ids, largest {max(flat, default=None)}: need 0..{vocabulary - 1}"
        )
    used = np.unique(ids[ids >= 0])
    index = np.full(vocabulary + 1, -1)
    index[used] = np.arange(len(used))
    ids = index[ids]  # -1 maps to the last entry, -1
    counts = np.zeros(len(used) ** 2)
    for distance in range(1, window + 1):
        a, b = ids[:-distance], ids[distance:]
        both = (a >= 0) & (b >= 0)
        counts += np.bincount(a[both] * len(used) + b[both], minlength=len(counts))
    directed = torch.from_numpy(counts).view(len(used), len(used))
    pairs = directed + directed.t()
    margin = pairs.sum(1, keepdim=True)
    pmi = (pairs * pairs.sum() / (margin * margin.t())).log().clamp_min(0).nan_to_num(0)
    # The matrix is symmetric: its singular values are the magnitudes of its eigenvalues.
    values, vectors = torch.linalg.eigh(pmi)
    order = values.abs().argsort(descending=True)[:width]
    u, s, rank = vectors[:, order], values[order].abs(), len(order)
    largest = u.abs().argmax(0)
    u = u * u[largest, torch.arange(rank)].sign()
    table = torch.zeros(vocabulary, width)
    table[torch.from_numpy(used), :rank] = (u * s.sqrt()).float()
    return table


def gaussian_embedding(vocabulary: int, width: int, seed: int) -> Tensor:
    """Independent standard normal entries [vocabulary, width]: the control without meaning."""
    return torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(seed))
