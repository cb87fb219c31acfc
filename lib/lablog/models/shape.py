"""Shapes of the Llama models that the project trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field, model_validator
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from lablog.strict import Strict


class ModelShape(Strict):
    """Shape of a Llama model; the vocabulary is the tokenizer's."""

    layers: int = Field(ge=1)
    width: int = Field(ge=2)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    feed_forward: int = Field(ge=1)
    context: int = Field(ge=2)
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool
    initializer_range: float = Field(gt=0)
    mimetic: bool = False

    @model_validator(mode="after")
    def _check(self) -> ModelShape:
        if self.mimetic and self.kv_heads != self.heads:
            raise ValueError(
                f"mimetic needs kv_heads = heads, got {self.kv_heads} and {self.heads}"
            )
        return self

    @classmethod
    def of(cls, folder: Path) -> ModelShape:
        """The shape of the Llama in a Hugging Face folder; ValueError for another architecture."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, LlamaConfig):
            raise ValueError(f"{folder} holds a {config.model_type!r} model, expected a llama")
        found = cast(Any, config)  # its numbers are typed as optional
        return cls(
            layers=found.num_hidden_layers, width=found.hidden_size,
            heads=found.num_attention_heads, kv_heads=found.num_key_value_heads,
            feed_forward=found.intermediate_size, context=found.max_position_embeddings,
            rope_theta=found.rope_parameters["rope_theta"], norm_eps=found.rms_norm_eps,
            tied_embeddings=found.tie_word_embeddings, initializer_range=found.initializer_range,
        )

    def model(self, vocabulary: int) -> LlamaForCausalLM:
        """A model of this shape with random weights from PyTorch's generator.

        With `mimetic` keys begin equal to queries and the output projection as the transpose of
        that of the values: every head begins by looking for equal tokens and copying them (after
        Trockman & Kolter, Mimetic Initialization of Self-Attention Layers, 2023). The two
        halves of the gated unit begin equal too, as detectors of energy: of two values added
        up in one state, equal ones have twice the energy of different ones.
        """
        model = LlamaForCausalLM(self.config(vocabulary))
        if self.mimetic:
            with torch.no_grad():
                for layer in model.model.layers:
                    attention = layer.self_attn
                    attention.k_proj.weight.copy_(attention.q_proj.weight)
                    attention.o_proj.weight.copy_(attention.v_proj.weight.T)
                    layer.mlp.up_proj.weight.copy_(layer.mlp.gate_proj.weight)
        return model

    def config(self, vocabulary: int) -> LlamaConfig:
        """The Hugging Face configuration."""
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.norm_eps,
            tie_word_embeddings=self.tied_embeddings,
            initializer_range=self.initializer_range,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )
