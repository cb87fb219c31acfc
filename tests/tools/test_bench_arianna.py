"""The benchmark: what it counts, and that every number comes out in small."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from lablog.models.shape import ModelShape
from tools import bench_arianna as bench

SMALL = ModelShape(width=32, layers=2, heads=2, kv_heads=2, feed_forward=64, context=64,
                   tied_embeddings=True, initializer_range=0.02)


def test_the_log_s_shape_has_its_parameters():
    assert sum(p.numel() for p in bench.ARIANNA.model(4096).parameters()) == 7_155_360


def test_operations_are_those_of_every_product():
    """An independent count: 6 a weight and token (norms included, as in 6 N), 12 T d a layer."""
    config, tokens = SMALL.config(300), 64
    products = [config.hidden_size * config.vocab_size]
    products += config.num_hidden_layers * [
        4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
        + 2 * config.hidden_size
    ]
    products.append(config.hidden_size)
    attention = 2 * 3 * 2 * tokens * config.hidden_size * config.num_hidden_layers
    assert bench.training_flops(SMALL, 300) == 6 * sum(products) + attention
    assert sum(products) == sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def test_every_number_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    modes = {name: mode for name, mode in bench.MODES.items() if not mode[1]}  # compiling is slow
    monkeypatch.setattr(bench, "MODES", modes)
    rows = bench.measured(bench.Size(SMALL, 600, 2, 2, 20, ("filelock",)))
    values = {name: value for name, value, _ in rows}
    assert values.keys() == {
        *(f"train.{mode}.{what}" for mode in ("f32", "bf16") for what in ("tokens_per_s", "mfu")),
        *(f"generate.{engine}.tokens_per_s" for engine in
          ("pytorch", "llama_cpp_f32", "llama_cpp_q8_0")), "packing.mb_per_s",
    }
    assert all(value > 0 for value in values.values())
    assert values["train.f32.mfu"] < 1
