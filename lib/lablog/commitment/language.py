"""What a model makes of a text, token by token, beside another: losses and divergences.

Written once for all engines: rows of log probabilities come from `Speaker.read`, or from whatever
else reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Reading:
    """For each token of a text its negative log-likelihood, and for each prediction the divergence
    from the other model's, D_KL(p ‖ base) (both in nats), and whether both hold the same token to
    be the likeliest."""

    loss: np.ndarray
    divergence: np.ndarray
    same_top: np.ndarray


def reading(rows: np.ndarray, base: np.ndarray, targets: np.ndarray) -> Reading:
    """Of log probabilities [tokens, vocabulary] behind the tokens before `targets` [tokens], and of
    the other model's for the same text, in the precision that they come in. There may be one more
    prediction than targets: behind the last of them."""
    return Reading(-rows[np.arange(len(targets)), targets], divergences(rows, base),
                   rows.argmax(axis=1) == base.argmax(axis=1))


def divergences(rows: np.ndarray, base: np.ndarray) -> np.ndarray:
    """D_KL(p ‖ base) of each row of log probabilities, float64 [rows]."""
    return np.einsum("ij,ij->i", np.exp(rows), rows - base).astype(np.float64)
