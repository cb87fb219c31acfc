"""Import of llama2.c models: version-0 ``.bin`` weights and tokenizer ``.bin``.

Format: karpathy/llama2.c, ``export.py`` (``legacy_export``) and ``tokenizer.py``; all numbers are
little-endian. The result is a Hugging Face folder, which llama.cpp's converter reads.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2


from lablog.files import atomic_folder, atomic_write

sentencepiece_proto: Any = sentencepiece_model_pb2  # generated code without type stubs
HEADER = struct.Struct("<7i")
ROPE_THETA, NORM_EPSILON = 10000.0, 1e-5  # fixed in llama2.c's run.c and model.py


@dataclass(frozen=True)
class Llama2c:
    """A llama2.c model: shape and float32 weights as they lie in the file (memory-mapped).

    wq and wk are in Meta's layout: rotary pairs are neighbouring rows.
    """

    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    window: int
    weights: dict[str, np.ndarray]


def read_model(path: Path) -> Llama2c:
    """Read a version-0 ``.bin``.

    Raises FileNotFoundError, or ValueError for a header that is no llama2.c model and for a file
    whose size does not match its header (truncated).
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no llama2.c model {path}: check the `model` parameter")
    size = path.stat().st_size
    head = path.open("rb").read(HEADER.size)
    if len(head) < HEADER.size:
        raise ValueError(f"{path} has {size} bytes; a llama2.c model has a header of 28")
    width, feed_forward, layers, heads, kv_heads, signed_vocabulary, window = HEADER.unpack(head)
    vocabulary = abs(signed_vocabulary)  # negative: the classifier has weights of its own
    shape = (width, feed_forward, layers, heads, kv_heads, vocabulary, window)
    if min(shape) <= 0 or max(shape) > 1 << 22 or width % heads or heads % kv_heads:
        raise ValueError(f"{path} is no llama2.c version-0 model: its header reads {shape}")
    head_size, kv_width = width // heads, width // heads * kv_heads
    parts: dict[str, tuple[int, ...]] = {
        "embedding": (vocabulary, width), "attention_norm": (layers, width),
        "wq": (layers, width, width), "wk": (layers, kv_width, width),
        "wv": (layers, kv_width, width), "wo": (layers, width, width),
        "ffn_norm": (layers, width), "w1": (layers, feed_forward, width),
        "w2": (layers, width, feed_forward), "w3": (layers, feed_forward, width),
        "final_norm": (width,), "rope_real": (window, head_size // 2),
        "rope_imaginary": (window, head_size // 2),
    }
    if signed_vocabulary < 0:
        parts["classifier"] = (vocabulary, width)
    expected = HEADER.size + 4 * sum(int(np.prod(shape)) for shape in parts.values())
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, its header asks for {expected}: "
            f"{'truncated, copy it again' if size < expected else 'not a version-0 file'}"
        )
    data = np.memmap(path, dtype="<f4", mode="r", offset=HEADER.size)
    weights, offset = {}, 0
    for name, part in parts.items():
        count = int(np.prod(part))
        weights[name] = data[offset : offset + count].reshape(part)
        offset += count
    weights.setdefault("classifier", weights["embedding"])
    return Llama2c(*shape, weights)


def read_tokenizer(path: Path, vocabulary: int) -> list[tuple[bytes, float]]:
    """Pieces and scores of a tokenizer ``.bin``; ValueError when it is not of `vocabulary` size."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no llama2.c tokenizer {path}")
    data, offset, pieces = path.read_bytes(), 4, []
    while offset + 8 <= len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        piece = data[offset + 8 : offset + 8 + length]
        if length < 0 or len(piece) < length:
            break
        pieces.append((piece, score))
        offset += 8 + length
    if offset != len(data) or len(pieces) != vocabulary:
        raise ValueError(
            f"{path} holds {len(pieces)} whole pieces; the model has a vocabulary of {vocabulary}: "
            "truncated, or the tokenizer of another model"
        )
    return pieces


def find_tokenizer(model: Path, vocabulary: int) -> Path:
    """The tokenizer beside a model: ``tok<vocabulary>.bin`` or ``tokenizer.bin``."""
    candidates = [model.parent / f"tok{vocabulary}.bin", model.parent / "tokenizer.bin"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no tokenizer beside {model}: expected {' or '.join(p.name for p in candidates)}"
    )


def sentencepiece_model(pieces: list[tuple[bytes, float]]) -> bytes:
    """A SentencePiece model file (byte-pair encoding, byte fallback, no normalisation)."""
    kinds = sentencepiece_proto.ModelProto.SentencePiece
    proto = sentencepiece_proto.ModelProto()
    proto.trainer_spec.model_type = sentencepiece_proto.TrainerSpec.BPE
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    special = {0: ("<unk>", kinds.UNKNOWN), 1: ("<s>", kinds.CONTROL), 2: ("</s>", kinds.CONTROL)}
    for index, (piece, score) in enumerate(pieces):
        if index in special:
            text, kind = special[index]
        elif 3 <= index < 259:
            text, kind = f"<0x{index - 3:02X}>", kinds.BYTE
        else:
            text, kind = piece.decode().replace(" ", "▁"), kinds.NORMAL
        proto.pieces.add(piece=text, score=score, type=kind)
    return proto.SerializeToString()


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from Meta's layout (rotary pairs interleaved) to Hugging Face's (in two halves)."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def to_hugging_face(model: Path, tokenizer: Path, folder: Path) -> Path:
    """Convert a llama2.c model and its tokenizer to a Hugging Face folder, atomically."""
    source = read_model(model)
    pieces = read_tokenizer(tokenizer, source.vocabulary)
    w = source.weights
    tensors = {"model.embed_tokens.weight": w["embedding"], "model.norm.weight": w["final_norm"]}
    for i in range(source.layers):
        layer = {
            "input_layernorm": w["attention_norm"][i], "post_attention_layernorm": w["ffn_norm"][i],
            "self_attn.q_proj": _rotary_halves(w["wq"][i], source.heads),
            "self_attn.k_proj": _rotary_halves(w["wk"][i], source.kv_heads),
            "self_attn.v_proj": w["wv"][i], "self_attn.o_proj": w["wo"][i],
            "mlp.gate_proj": w["w1"][i], "mlp.down_proj": w["w2"][i], "mlp.up_proj": w["w3"][i],
        }
        tensors |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    tied = w["classifier"] is w["embedding"]
    if not tied:
        tensors["lm_head.weight"] = w["classifier"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": source.width, "intermediate_size": source.feed_forward,
        "num_hidden_layers": source.layers, "num_attention_heads": source.heads,
        "num_key_value_heads": source.kv_heads, "vocab_size": source.vocabulary,
        "max_position_embeddings": source.window, "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_THETA, "hidden_act": "silu", "tie_word_embeddings": tied,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }
    with atomic_folder(folder) as scratch:
        arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(arrays, scratch / "model.safetensors", metadata={"format": "pt"})
        atomic_write(scratch / "config.json", json.dumps(config, indent=1) + "\n")
        atomic_write(scratch / "tokenizer.model", sentencepiece_model(pieces))
    return folder
