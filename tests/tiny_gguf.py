"""A tiny Llama as GGUF, with GPT-2's vocabulary and a chat template, written without llama.cpp."""

from pathlib import Path

import gguf
import numpy as np

from lablog import layout

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}")
WIDTH, HEADS, KV_HEADS, LAYERS, FEED_FORWARD, WINDOW = 32, 4, 2, 2, 64, 512


def write_tiny(path: Path, template: str | None = CHATML, architecture: str = "llama",
               pre: str = "gpt-2", size: int = 50_257) -> Path:
    """Random weights (f32, tied embeddings); of GPT-2's vocabulary the first tokens, so that there
    are `size` with three control tokens, which are the last."""
    vocabulary = gguf.GGUFReader(
        layout.native() / "llama.cpp" / "models" / "ggml-vocab-gpt-2.gguf").fields
    tokens = [*vocabulary["tokenizer.ggml.tokens"].contents()[: size - 3],
              "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    there = set(tokens)
    merges = [merge for merge in vocabulary["tokenizer.ggml.merges"].contents()
              if merge.replace(" ", "") in there]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[-3:] = [gguf.TokenType.CONTROL] * 3
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(WINDOW)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    rng, kv = np.random.default_rng(5), WIDTH // HEADS * KV_HEADS

    def add(name: str, *shape: int, one: bool = False) -> None:
        drawn = 0.3 * rng.standard_normal(shape)
        writer.add_tensor(name, (1 + 0.1 * drawn if one else drawn).astype(np.float32))

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH, one=True)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", WIDTH, one=True)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH, one=True)
        add(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.attn_k.weight", kv, WIDTH)
        add(f"blk.{layer}.attn_v.weight", kv, WIDTH)
        add(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", FEED_FORWARD, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", FEED_FORWARD, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
