"""Small networks for the CVFP tests; widths differ, so that a swapped call cannot pass."""

from dataclasses import replace

import pytest
import torch

from lablog.cvfp.model import CVFPBlock, ModelConfig
from lablog.cvfp.phase1 import Phase1Config
from lablog.cvfp.phase2 import Phase2Config

SMALL = ModelConfig(context_dim=12, embed_dim=10, num_layers=3, layernorm_mix=1.0,
                    weight_std=0.3, bias_std=0.05)
PHASE1 = Phase1Config(
    variant="parallel", diversity_weight=0.7, iterations=5, learning_rate=0.002, clip_norm=1.0,
    convergence_threshold=0.1, early_stop_fraction=1.0, early_stop_from=2, ema_decay=0.9, seed=0,
)
PHASE2 = Phase2Config(
    version="v2.0", epochs=4, patience=3, batch_tokens=8, learning_rate=0.002, clip_norm=1.0,
    context_weight=1.0, head_std=0.1, seed=0,
)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _checkpoint_behind_every_iteration(monkeypatch):
    monkeypatch.setattr("lablog.cvfp.phase1.KEPT_EVERY", 0.0)


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
