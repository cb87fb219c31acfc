"""Which tokens can be read off a context: all that it was made of, and no others."""

import pytest
import torch
from torch.nn import functional as F

from lablog.cvfp.readout import readable

VOCABULARY, WIDTH = 40, 16


@pytest.fixture(scope="module")
def table():
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))


def text(table, held, seed, n=1500):
    """Random ids, and contexts that are the embeddings of the tokens `held` before, mixed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (n,), generator=generator)
    parts = [F.pad(table[ids], (0, 0, lag, 0))[:n] for lag in held]
    mix = torch.randn(WIDTH * len(held), 64, generator=torch.Generator().manual_seed(9))
    return torch.cat(parts, 1) @ mix, ids


def test_what_a_context_was_made_of_is_read_and_nothing_else(table):
    training, dev, test = (text(table, (0, 2, 3), seed) for seed in (1, 2, 3))
    found = readable(table, training, dev, test, [0, 1, 2, 3, 4])
    assert [share > 0.99 for share in found] == [True, False, True, True, False]
    assert max(found[1], found[4]) < 0.1  # chance is one in forty


def test_a_constant_carries_nothing(table):
    (contexts, ids), dev, test = (text(table, (0,), seed) for seed in (1, 2, 3))
    still = [torch.ones_like(each) for each in (contexts, dev[0], test[0])]
    found = readable(table, (still[0], ids), (still[1], dev[1]), (still[2], test[1]), [0, 1])
    assert max(found) < 0.1


def test_the_penalty_is_chosen_on_dev_and_not_on_test(table):
    """With a dev text whose contexts say nothing, the first penalty stays, whatever test says."""
    training, dev, test = (text(table, (0,), seed, 60) for seed in (1, 2, 3))
    silent = (torch.zeros_like(dev[0]), torch.zeros_like(dev[1]))
    first = readable(table, training, silent, test, [0], ridges=[1e3])
    assert readable(table, training, silent, test, [0], ridges=[1e3, 1e-6]) == first


def test_a_text_that_is_too_short_is_refused(table):
    training, dev, test = (text(table, (0,), seed, 20) for seed in (1, 2, 3))
    with pytest.raises(ValueError, match="dev: 3 contexts, 3 ids: expected equally many, more"):
        readable(table, training, (dev[0][:3], dev[1][:3]), test, [0, 5])
