"""llama2.c models, version-0 ``.bin`` weights and tokenizer ``.bin``, from and to Hugging Face.

Format: karpathy/llama2.c, ``export.py`` (``legacy_export``) and ``tokenizer.py``; all numbers are
little-endian. An import of an export has the same weights to the last bit, and the same tokens.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2

from lablog.files import atomic_folder, atomic_write, parsing
from lablog.text.tokenizer import write_settings

sentencepiece_proto: Any = sentencepiece_model_pb2  # generated code without type stubs
HEADER = struct.Struct("<7i")
ROPE_THETA, NORM_EPSILON = 10000.0, 1e-5  # fixed in llama2.c's run.c and model.py
LAYER = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj",
}
"""llama2.c's names of what every layer has, and Hugging Face's."""


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


def _parts(shape: Sequence[int], own_classifier: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of all float32 arrays of a file, in their order, from the seven numbers above."""
    width, feed_forward, layers, heads, kv_heads, vocabulary, window = shape
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
    return parts | ({"classifier": (vocabulary, width)} if own_classifier else {})


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
    parts = _parts(shape, own_classifier=signed_vocabulary < 0)
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


def read_sentencepiece(path: Path) -> list[tuple[bytes, float]]:
    """Pieces and scores of a SentencePiece model, as a tokenizer ``.bin`` holds them.

    Raises FileNotFoundError, or ValueError for what is no SentencePiece model, and for one that
    run.c, which knows pieces and scores only, would tokenise differently.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no SentencePiece model {path}")
    proto = sentencepiece_proto.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    kinds = sentencepiece_proto.ModelProto.SentencePiece
    expected = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    expected += [kinds.NORMAL] * (len(proto.pieces) - len(expected))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for holds, rule in (
        (trainer.model_type == sentencepiece_proto.TrainerSpec.BPE, "is byte-pair encoding"),
        ([piece.type for piece in proto.pieces] == expected,
         "has <unk>, <s>, </s>, 256 bytes, then plain pieces"),
        ((trainer.bos_id, trainer.eos_id) == (1, 2),
         "begins a text with token 1 and ends it with 2"),
        (not normalizer.precompiled_charsmap, "normalises nothing"),
        (not normalizer.remove_extra_whitespaces, "keeps repeated spaces"),
        (normalizer.add_dummy_prefix, "puts a space in front of a text (add_prefix_space=True)"),
        (not trainer.treat_whitespace_as_suffix, "has spaces in front of words"),
    ):
        if not holds:
            raise ValueError(f"{path} cannot become a llama2.c tokenizer, which {rule}; this one "
                             "does not: train the tokenizer that way, or export to GGUF")
    with parsing(path, "a SentencePiece model of text", TypeError):  # bytes are no text
        texts = [piece.piece.replace("▁", " ") for piece in proto.pieces]
    texts[1:3] = "\n<s>\n", "\n</s>\n"  # as llama2.c's tokenizer.py writes them
    return [(t.encode(), p.score) for t, p in zip(texts, proto.pieces, strict=True)]


def tokenizer_bin(pieces: list[tuple[bytes, float]]) -> bytes:
    """Contents of a tokenizer ``.bin``: length of the longest piece, then score, length, piece."""
    longest = max(len(piece) for piece, _ in pieces)
    return struct.pack("<i", longest) + b"".join(
        struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces
    )


def _rotary(weight: np.ndarray, heads: int, pairs: bool) -> np.ndarray:
    """Reorder rows between Meta's layout (rotary pairs are neighbours) and Hugging Face's (they
    lie half a head apart); `pairs` says which of the two to return."""
    rows, width = weight.shape
    half = rows // heads // 2
    split = weight.reshape(heads, *((2, half) if pairs else (half, 2)), width)
    return split.swapaxes(1, 2).reshape(rows, width)


def to_hugging_face(model: Path, tokenizer: Path, folder: Path) -> Path:
    """Convert a llama2.c model and its tokenizer to a Hugging Face folder, atomically."""
    source = read_model(model)
    pieces = read_tokenizer(tokenizer, source.vocabulary)
    w = source.weights
    rotary = {"wq": source.heads, "wk": source.kv_heads}
    tensors = {"model.embed_tokens.weight": w["embedding"], "model.norm.weight": w["final_norm"]}
    for i in range(source.layers):
        for part, name in LAYER.items():
            value = w[part][i]
            if part in rotary:
                value = _rotary(value, rotary[part], pairs=False)
            tensors[f"model.layers.{i}.{name}.weight"] = value
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
        write_settings(scratch, add_prefix_space=True)
    return folder


def _checked_config(folder: Path) -> Any:
    """The configuration; ValueError names what llama2.c fixes to another value."""
    from transformers import AutoConfig  # seconds to import; only an export needs it

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a Hugging Face model: it has no config.json")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type != "llama":
        raise ValueError(f"{folder}: model_type is {config.model_type!r}; llama2.c holds a llama")
    rope, head_size = config.rope_parameters, config.hidden_size // config.num_attention_heads
    for key, value, fixed in (
        ("hidden_act", config.hidden_act, "silu"), ("head_dim", config.head_dim, head_size),
        ("rms_norm_eps", config.rms_norm_eps, NORM_EPSILON),
        ("rope_theta", rope["rope_theta"], ROPE_THETA),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("attention_bias", config.attention_bias, False), ("mlp_bias", config.mlp_bias, False),
    ):
        if value != fixed:
            raise ValueError(f"{folder}: {key} is {value!r}; a llama2.c model can only have "
                             f"{fixed!r}: export to GGUF, or train with that value")
    return config


def from_hugging_face(folder: Path, model: Path, tokenizer: Path) -> Path:
    """Write the Llama in a Hugging Face folder as a version-0 ``.bin`` and a tokenizer ``.bin``.

    Weights in half precision are widened to float32, without loss. Returns `model`. Raises
    FileNotFoundError, or ValueError naming what the format cannot hold; then writes nothing.
    """
    import torch
    from safetensors.torch import load_file

    config = _checked_config(folder)
    pieces = read_sentencepiece(folder / "tokenizer.model")
    if len(pieces) != config.vocab_size:
        raise ValueError(f"{folder}: the model has a vocabulary of {config.vocab_size}, its "
                         f"tokenizer one of {len(pieces)}")
    tensors = {name: tensor.float().numpy() for path in folder.glob("*.safetensors")
               for name, tensor in load_file(path).items()}
    shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers,
             config.num_attention_heads, config.num_key_value_heads, config.vocab_size,
             config.max_position_embeddings)
    # PyTorch's cosines, as in llama2.c's model.py: NumPy's differ in the last bit.
    frequency = 1 / ROPE_THETA ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    angle = torch.outer(torch.arange(shape[-1]), frequency)
    sources = {"embedding": "model.embed_tokens", "final_norm": "model.norm",
               "classifier": "lm_head"}
    rotary = {"wq": shape[3], "wk": shape[4]}
    arrays = {"rope_real": angle.cos().numpy(), "rope_imaginary": angle.sin().numpy()}
    parts = _parts(shape, own_classifier=not config.tie_word_embeddings)
    try:
        for part in parts.keys() - arrays.keys():
            if part in sources:
                arrays[part] = tensors[f"{sources[part]}.weight"]
                continue
            layers = [tensors[f"model.layers.{i}.{LAYER[part]}.weight"] for i in range(shape[2])]
            if part in rotary:
                layers = [_rotary(layer, rotary[part], pairs=True) for layer in layers]
            arrays[part] = np.stack(layers)
    except KeyError as error:
        raise ValueError(f"{folder}: its *.safetensors hold no tensor {error}") from None
    for part, expected in parts.items():
        if arrays[part].shape != expected:
            raise ValueError(f"{folder}: {part} has the shape {arrays[part].shape}; the "
                             f"configuration asks for {expected}")
    signed = shape[5] if config.tie_word_embeddings else -shape[5]
    header = HEADER.pack(*shape[:5], signed, shape[6])
    atomic_write(tokenizer, tokenizer_bin(pieces))
    data = (np.ascontiguousarray(arrays[part], dtype="<f4").tobytes() for part in parts)
    return atomic_write(model, header + b"".join(data))
