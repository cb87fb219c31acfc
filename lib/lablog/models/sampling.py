"""From logits to probabilities and tokens, the same for every engine."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis, in the precision of `logits`."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def chosen_tokens(logits: np.ndarray, uniforms: np.ndarray | None = None) -> np.ndarray:
    """The next token of each row of `logits`, float64 [rows, vocabulary]; int64 [rows].

    uniforms: float64 [rows] in [0, 1), which pick tokens at temperature 1 by inverting the
    cumulative distribution; None takes the most probable ones.
    """
    if uniforms is None:
        return logits.argmax(axis=1)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True)).cumsum(axis=1)
    found: np.ndarray = (weights <= (uniforms * weights[:, -1])[:, None]).sum(axis=1)
    return found
