"""Small networks for the CVFP tests; widths differ, so that a swapped call cannot pass."""

from dataclasses import replace

import pytest
import torch

from lablog.cvfp.model import CVFPBlock, ModelConfig
from lablog.cvfp.phase1 import Phase1Config
from lablog.cvfp.phase2 import Phase2Config

SMALL = ModelConfig(12, 10, 22, 3, 1.0, 0.3, 0.05)
PHASE1 = Phase1Config("parallel", 0.7, 5, 0.002, 1.0, 0.1, 1.0, 2, 0.9, 0)
PHASE2 = Phase2Config("v2.0", 4, 3, 8, 0.002, 1.0, 1.0, 0.1, 0)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small():
    return SMALL


@pytest.fixture
def phase1():
    return PHASE1


@pytest.fixture
def phase2():
    return PHASE2


@pytest.fixture
def network():
    """network(seed, dtype, **changes to the configuration) with random gains and biases too."""

    def make(seed=0, dtype=torch.float64, **changes):
        block = CVFPBlock(replace(SMALL, **changes), seed).to(dtype)
        generator = torch.Generator().manual_seed(seed + 1)
        for name, parameter in block.named_parameters():
            if "norm" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.1 * noise.to(dtype)
        return block

    return make


@pytest.fixture
def embeddings():
    """embeddings(n, width, seed): normalised random token embeddings."""

    def make(n, width=SMALL.embed_dim, seed=0, dtype=torch.float64):
        x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return torch.nn.functional.layer_norm(x, (width,))

    return make
