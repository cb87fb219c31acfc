"""Losses and divergences against PyTorch's own."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from lablog.commitment.language import divergences, reading


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dice = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 11, generator=dice, dtype=torch.float64)
    targets = torch.randint(11, (6,), generator=dice)
    return *logits.log_softmax(-1).numpy(), targets.numpy()


def test_a_reading_is_cross_entropy_and_kullback_leibler(rows):
    mine, base, targets = rows
    found = reading(mine, base, targets)
    loss = cross_entropy(torch.from_numpy(mine[:6]), torch.from_numpy(targets), reduction="none")
    np.testing.assert_allclose(found.loss, loss, rtol=1e-12)
    kl = kl_div(torch.from_numpy(base), torch.from_numpy(mine), reduction="none", log_target=True)
    np.testing.assert_allclose(found.divergence, kl.sum(dim=1), rtol=1e-10)
    assert found.same_top.tolist() == [bool(a.argmax() == b.argmax())
                                       for a, b in zip(mine, base, strict=True)]
    assert len(found.divergence) == 7  # what follows the last token is a prediction too


def test_a_model_does_not_diverge_from_itself(rows):
    mine, base, targets = rows
    found = reading(base, base, targets)
    assert not found.divergence.any()
    assert found.same_top.all()
    assert (divergences(mine, base) > 0).all()
