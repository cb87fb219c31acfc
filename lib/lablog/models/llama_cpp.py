"""The llama.cpp engine: batched evaluation of GGUF models with a commitment.

Thin and typed, over the bindings of llama-cpp-python and the patched library of ``native/``.
A :class:`Model` holds weights, a :class:`Context` the key-value caches of many sequences, which
are evaluated together. Two contexts of one model hold two commitments and may run in two threads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal

import numpy as np

from lablog import layout
from lablog.models.gguf_file import check_gguf
from lablog.models.sampling import chosen_tokens

Tokens = Sequence[int]


class EngineError(RuntimeError):
    """llama.cpp refused something; the message says what and the remedy."""


def native_folder() -> Path:
    """Folder of the patched build; EngineError with the remedy when it is not there."""
    folder = layout.native()
    if not any((folder / "lib").glob("libllama.*")):
        raise EngineError(f"the patched llama.cpp is not built ({folder}/lib): run `make setup`")
    return folder


@cache
def bindings() -> ModuleType:
    """llama_cpp, bound to the patched library, with the commitment's functions declared."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(native_folder() / "lib")
    import llama_cpp

    library = llama_cpp.llama_cpp._lib
    context, floats, i32 = ctypes.c_void_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int32
    for name, result, arguments in (
        ("llama_set_commitment", i32,
         [context, floats, ctypes.c_size_t, i32, ctypes.c_float, i32, i32]),
        ("llama_set_commitment_lambda", i32, [context, ctypes.c_float]),
        ("llama_set_commitment_range", i32, [context, i32, i32]),
        ("llama_clear_commitment", i32, [context]),
        ("llama_set_commitment_seq", i32,
         [context, i32, floats, ctypes.c_size_t, i32, ctypes.c_float, i32, i32]),
        ("llama_clear_commitment_seq", i32, [context, i32]),
        ("llama_commitment_error", ctypes.c_char_p, [i32]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    llama_cpp.llama_log_set(_quiet_log, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    return llama_cpp


_log_lines: list[str] = []


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet_log(level: int, text: bytes, _: Any) -> None:
    """Keep llama.cpp's errors for our messages; its other lines are not for readers."""
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        _log_lines.append(text.decode(errors="replace").strip())


def _last_errors() -> str:
    lines = "; ".join(_log_lines[-3:])
    _log_lines.clear()
    return lines or "no reason given"


@dataclass(frozen=True)
class Commitment:
    """A direction and how it is injected: λ · direction after each layer of [first, last].

    direction: float32 array [n_embd] (W_c z*); strength: λ; layers: 0-based and inclusive.
    """

    direction: np.ndarray
    strength: float
    layers: tuple[int, int]


class Model:
    """A GGUF model in memory (close it, or use it as a context manager).

    lora: GGUF file of a LoRA adapter that all contexts of the model apply in full.
    """

    def __init__(self, path: Path, gpu_layers: int = 0, lora: Path | None = None) -> None:
        self.path = check_gguf(path)
        adapter = None if lora is None else os.fsencode(check_gguf(lora))
        self._binding = bindings()
        parameters = self._binding.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        self._handle = self._binding.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._handle:
            raise EngineError(f"llama.cpp cannot load {path}: {_last_errors()}")
        self._lora = None  # freed with the model
        if adapter is not None:
            # Before any context is made: llama.cpp reserves room for the adapter's operations.
            self._lora = self._binding.llama_adapter_lora_init(self._handle, adapter)
            if not self._lora:
                self.close()
                raise EngineError(f"llama.cpp cannot apply {lora} to {path}: {_last_errors()}")
        self._vocab = self._binding.llama_model_get_vocab(self._handle)
        self.width: int = self._binding.llama_model_n_embd(self._handle)
        self.layers: int = self._binding.llama_model_n_layer(self._handle)
        self.vocabulary: int = self._binding.llama_vocab_n_tokens(self._vocab)
        self.window: int = self._binding.llama_model_n_ctx_train(self._handle)
        self.parameters: int = self._binding.llama_model_n_params(self._handle)
        self._stops: dict[str, frozenset[int]] = {}
        template = self._binding.llama_model_chat_template(self._handle, None)
        self.chat_template: str | None = template.decode(errors="replace") if template else None

    def close(self) -> None:
        """Free the weights; contexts must be closed before."""
        if self._handle:
            self._binding.llama_model_free(self._handle)
            self._handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def tokenize(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`, with the beginning-of-sequence token if asked for."""
        data = text.encode()
        size = len(data) + 16
        buffer = (self._binding.llama_token * size)()
        count = self._binding.llama_tokenize(
            self._vocab, data, len(data), buffer, size, bos, special
        )
        if count < 0:
            raise EngineError(f"{text[:60]!r}… needs {-count} tokens, more than it has bytes")
        return list(buffer[:count])

    def detokenize(self, tokens: Tokens) -> str:
        """Text of token ids (undecodable bytes become U+FFFD)."""
        array = (self._binding.llama_token * len(tokens))(*tokens)
        size = 16 * len(tokens) + 16
        buffer = ctypes.create_string_buffer(size)
        count = self._binding.llama_detokenize(
            self._vocab, array, len(tokens), buffer, size, False, False
        )
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._binding.llama_detokenize(
                self._vocab, array, len(tokens), buffer, -count, False, False
            )
        return buffer.raw[:count].decode(errors="replace")

    def piece(self, token: int) -> bytes:
        """UTF-8 bytes of one token (perhaps a part of a character); none for a control token."""
        buffer = ctypes.create_string_buffer(1024)
        size = self._binding.llama_token_to_piece(self._vocab, token, buffer, 1024, 0, False)
        return buffer.raw[: max(size, 0)]

    def chat(self, messages: Sequence[tuple[str, str]], answer: bool = False) -> str:
        """Messages, (role, text) each, as the text in the model's own chat template; with `answer`
        up to where the assistant speaks.

        By llama.cpp's own function, which recognises the usual templates and runs none of their
        code. Raises EngineError for a model without a template, or with one that is not known.
        """
        if self.chat_template is None:
            raise EngineError(f"{self.path} holds no chat template: choose chat=plain or "
                              "chat=llama2, or a model that was taught to chat")
        engine = self._binding
        array = (engine.llama_chat_message * len(messages))(
            *((role.encode(), text.encode()) for role, text in messages))
        size = 256 + sum(64 + 2 * len(text.encode()) for _, text in messages)
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            used = engine.llama_chat_apply_template(self.chat_template.encode(), array,
                                                    len(messages), answer, buffer, size)
            if used < 0:
                raise EngineError(f"{self.path}: llama.cpp does not know this chat template "
                                  f"({self.chat_template[:60]!r}…): choose chat=plain or "
                                  "chat=llama2")
            if used <= size:
                break
            size = used
        return buffer.raw[:used].decode()

    @property
    def bos(self) -> int:
        """Id of the beginning-of-sequence token (-1 if the model has none)."""
        return self._binding.llama_vocab_bos(self._vocab)

    def ends_generation(self, token: int) -> bool:
        """Whether a token ends generation (end of sequence or of turn)."""
        return bool(self._binding.llama_vocab_is_eog(self._vocab, token))

    def stops(self, text: str = "\n") -> frozenset[int]:
        """Ids of all tokens that contain `text` or end generation."""
        if text not in self._stops:
            self._stops[text] = frozenset(
                token for token in range(self.vocabulary)
                if self.ends_generation(token) or text in self.detokenize([token])
            )
        return self._stops[text]


class Context:
    """Caches of up to `sequences` sequences of up to `window` tokens each.

    A sequence is an integer below `sequences`; it grows by :meth:`decode`, is brought to a given
    content by :meth:`prefill` and copied by :meth:`fork`. Close it, or use it as a context manager.

    cache_type: ``f32`` computes attention in single precision (for comparisons with PyTorch);
    ``f16`` is llama.cpp's default, with flash attention where it has it, and half again as fast.
    watch_residual: keep the mean norms of the residual stream (`residual_norms`). keep_layer: keep
    what it is behind this layer (`states`).
    """

    def __init__(self, model: Model, sequences: int = 1, window: int = 512, threads: int = 1,
                 batch: int = 2048, cache_type: Literal["f32", "f16"] = "f32",
                 watch_residual: bool = False, keep_layer: int | None = None) -> None:
        self.model, self.sequences, self.window = model, sequences, window
        self._binding = model._binding
        limit = self._binding.llama_max_parallel_sequences()
        if not 1 <= sequences <= limit:
            raise ValueError(f"sequences = {sequences}: llama.cpp allows 1 to {limit}")
        # llama.cpp pads each cache to multiples of 256 cells by itself.
        parameters = self._binding.llama_context_default_params()
        parameters.n_ctx = window * sequences
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = {"f32": 0, "f16": 1}[cache_type]
        parameters.flash_attn_type = 0 if cache_type == "f32" else -1  # its sums are half precision
        parameters.kv_unified = False  # a sequence then attends to its own cells only
        parameters.no_perf = True
        self._watched: dict[int, tuple[float, int]] = {}
        self._sums, self._keep = watch_residual, keep_layer
        self._kept: list[np.ndarray] = []
        if watch_residual or keep_layer is not None:
            self._callback = self._binding.ggml_backend_sched_eval_callback(self._watch)
            parameters.cb_eval = self._callback
        self._handle = self._binding.llama_init_from_model(model._handle, parameters)
        if not self._handle:
            raise EngineError(
                f"llama.cpp made no context of {sequences} sequences of {window} tokens for "
                f"{model.path}: {_last_errors()}"
            )
        if model._lora:
            adapters = (self._binding.llama_adapter_lora_p_ctypes * 1)(model._lora)
            scale = (ctypes.c_float * 1)(1.0)
            self._binding.llama_set_adapters_lora(self._handle, adapters, 1, scale)
        self._memory = self._binding.llama_get_memory(self._handle)
        self._batch = batch
        self.tokens: list[list[int]] = [[] for _ in range(sequences)]
        self._commitment: Commitment | None = None
        self._own: dict[int, Commitment] = {}  # of sequences

    def close(self) -> None:
        """Free the caches."""
        if self._handle:
            self._binding.llama_free(self._handle)
            self._handle = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # --- commitment ---------------------------------------------------------------------------

    def _checked(self, code: int) -> None:
        if code:
            message = self._binding.llama_cpp._lib.llama_commitment_error(code).decode()
            _log_lines.clear()
            raise ValueError(f"commitment refused: {message}")

    def commit(self, commitment: Commitment | None, sequence: int | None = None) -> None:
        """Set the commitment for all tokens decoded from now on; None clears it.

        With `sequence`, that sequence's own, which it uses instead of the context's (strength 0:
        nothing is added to it); None lets it use the context's again. A sequence keeps its own
        when it is rewound, cleared or filled by :meth:`fork`.

        Raises ValueError (and changes nothing) for a wrong width, values that are not finite,
        a layer range that is reversed or beyond the model, or a sequence that is not there.
        """
        library = self._binding.llama_cpp._lib
        if sequence is not None:
            self._commit_sequence(commitment, sequence)
            return
        if commitment is None:
            self._checked(library.llama_clear_commitment(self._handle))
            self._commitment = None
            return
        same = self._commitment is not None and self._commitment.direction is commitment.direction
        first, last = commitment.layers
        if not same or self._commitment is None:
            vector = np.ascontiguousarray(commitment.direction, dtype=np.float32)
            self._checked(library.llama_set_commitment(
                self._handle, vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), vector.size,
                vector.size, commitment.strength, first, last,
            ))
        else:
            if commitment.strength != self._commitment.strength:
                self._checked(
                    library.llama_set_commitment_lambda(self._handle, commitment.strength)
                )
            if commitment.layers != self._commitment.layers:
                self._checked(library.llama_set_commitment_range(self._handle, first, last))
        self._commitment = commitment

    def _commit_sequence(self, commitment: Commitment | None, sequence: int) -> None:
        library = self._binding.llama_cpp._lib
        if commitment is None:
            self._checked(library.llama_clear_commitment_seq(self._handle, sequence))
            self._own.pop(sequence, None)
            return
        held = self._own.get(sequence)
        if held is not None and held.direction is commitment.direction and (
            held.strength, held.layers) == (commitment.strength, commitment.layers):
            return
        vector = np.ascontiguousarray(commitment.direction, dtype=np.float32)
        self._checked(library.llama_set_commitment_seq(
            self._handle, sequence, vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            vector.size, vector.size, commitment.strength, *commitment.layers,
        ))
        self._own[sequence] = commitment

    def committed(self, sequence: int) -> Commitment | None:
        """The commitment that a sequence has of its own."""
        return self._own.get(sequence)

    # --- evaluation ---------------------------------------------------------------------------

    def clear(self) -> None:
        """Empty all sequences; the commitment stays."""
        self._binding.llama_memory_clear(self._memory, False)
        self.tokens = [[] for _ in range(self.sequences)]

    def fork(self, source: int, targets: Sequence[int]) -> None:
        """Make `targets` copies of sequence `source`."""
        for target in targets:
            self._binding.llama_memory_seq_rm(self._memory, target, -1, -1)
            self._binding.llama_memory_seq_cp(self._memory, source, target, -1, -1)
            self.tokens[target] = list(self.tokens[source])

    def rewind(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence from position `length` on."""
        if length < len(self.tokens[sequence]):
            self._binding.llama_memory_seq_rm(self._memory, sequence, length, -1)
            del self.tokens[sequence][length:]

    def prefill(self, contents: Mapping[int, Tokens],
                logits: Literal["last", "all"] = "last") -> dict[int, np.ndarray]:
        """Bring sequences to hold exactly `contents`, decoding only what they do not hold yet.

        What they hold stays as it was computed, under whatever commitment was set then. At least
        the last token of each is decoded again, for its logits.
        """
        additions = {}
        for sequence, tokens in contents.items():
            held = self.tokens[sequence]
            common = 0
            for mine, theirs in zip(held, tokens[:-1], strict=False):
                if mine != theirs:
                    break
                common += 1
            self.rewind(sequence, common)
            additions[sequence] = tokens[common:]
        return self.decode(additions, logits)

    def decode(self, additions: Mapping[int, Tokens],
               logits: Literal["last", "all"] = "last") -> dict[int, np.ndarray]:
        """Append tokens to sequences, all in as few batches as possible.

        Returns for each sequence float32 logits [n, vocabulary]: those after each of its n added
        tokens (``all``), or after the last one only (``last``, n = 1).
        Raises ValueError when a sequence would outgrow the window or a token id is out of range.
        """
        additions = {sequence: tokens for sequence, tokens in additions.items() if len(tokens)}
        sizes = {sequence: len(tokens) for sequence, tokens in additions.items()}
        held = {sequence: len(self.tokens[sequence]) for sequence in sizes}
        for sequence, size in sizes.items():
            if held[sequence] + size > self.window:
                raise ValueError(f"sequence {sequence} would hold {held[sequence] + size} tokens; "
                                 f"the window holds {self.window}: raise `window`")
        if not additions:
            return {}
        self._kept.clear()
        owner = np.repeat(np.fromiter(sizes, np.int32), list(sizes.values()))
        token = np.concatenate([np.asarray(t, dtype=np.int32) for t in additions.values()])
        if token.min() < 0 or token.max() >= self.model.vocabulary:
            raise ValueError(f"token ids span [{token.min()}, {token.max()}]; the vocabulary has "
                             f"{self.model.vocabulary}")
        position = np.concatenate(
            [np.arange(held[s], held[s] + n, dtype=np.int32) for s, n in sizes.items()]
        )
        if logits == "all":
            wanted = np.ones(len(token), dtype=np.int8)
        else:
            wanted = np.zeros(len(token), dtype=np.int8)
            wanted[np.cumsum(list(sizes.values())) - 1] = 1
        rows = [
            self._decode_batch(*(x[i : i + self._batch] for x in (token, position, owner, wanted)))
            for i in range(0, len(token), self._batch)
        ]
        every = np.concatenate(rows)
        counts = list(sizes.values()) if logits == "all" else [1] * len(sizes)
        for sequence, tokens in additions.items():
            self.tokens[sequence].extend(map(int, tokens))
        return dict(zip(sizes, np.split(every, np.cumsum(counts)[:-1]), strict=True))

    def _decode_batch(self, token: np.ndarray, position: np.ndarray, owner: np.ndarray,
                      wanted: np.ndarray) -> np.ndarray:
        def pointer(array: np.ndarray, kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        owner = np.ascontiguousarray(owner)
        addresses = owner.ctypes.data + 4 * np.arange(len(owner), dtype=np.uint64)
        ones = np.ones(len(token), dtype=np.int32)
        batch = self._binding.llama_batch(
            n_tokens=len(token), token=pointer(token, ctypes.c_int32),
            pos=pointer(position, ctypes.c_int32), n_seq_id=pointer(ones, ctypes.c_int32),
            seq_id=pointer(addresses, ctypes.POINTER(ctypes.c_int32)),
            logits=pointer(wanted, ctypes.c_int8),
        )
        code = self._binding.llama_decode(self._handle, batch)
        if code:
            raise EngineError(f"llama.cpp could not decode {len(token)} tokens (code {code}): "
                              f"{_last_errors()}")
        count = int(wanted.sum())
        if not count:
            return np.empty((0, self.model.vocabulary), dtype=np.float32)
        start = self._binding.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(start, shape=(count, self.model.vocabulary)).copy()

    # --- residual stream ----------------------------------------------------------------------

    def _watch(self, tensor: int, ask: bool, _: Any) -> bool:
        name = _ggml().ggml_get_name(tensor).decode()
        kind, _, layer = name.rpartition("-")
        if kind != "l_out" or not (self._sums or int(layer) == self._keep):
            return not ask  # asked: not of interest; told: go on
        if not ask:
            count = _ggml().ggml_nelements(tensor)
            values = np.empty(count, dtype=np.float32)
            _ggml().ggml_backend_tensor_get(
                tensor, values.ctypes.data_as(ctypes.c_void_p), 0, values.nbytes
            )
            rows = values.reshape(-1, self.model.width)
            if self._sums:
                norms = np.linalg.norm(rows.astype(float), axis=1)
                total, seen = self._watched.get(int(layer), (0.0, 0))
                self._watched[int(layer)] = (total + float(norms.sum()), seen + len(norms))
            if int(layer) == self._keep:
                self._kept.append(rows)
        return True

    def states(self) -> np.ndarray:
        """The residual stream behind the layer that is kept, float32 [tokens, width]: of all tokens
        of the last :meth:`decode`, if that was of one sequence."""
        if not self._kept:
            raise EngineError("no states were kept: make the context with keep_layer and decode")
        return np.concatenate(self._kept)

    def residual_norms(self) -> np.ndarray:
        """Mean Euclidean norm of the residual stream after each layer, float64 [layers].

        Over all tokens decoded since the context was made with ``watch_residual=True``.
        """
        if len(self._watched) != self.model.layers:
            raise EngineError(
                f"watched {len(self._watched)} of {self.model.layers} layers: make the context "
                "with watch_residual=True and decode with logits='all' first"
            )
        return np.array([total / seen for _, (total, seen) in sorted(self._watched.items())])


def generate_tokens(context: Context, logits: Mapping[int, np.ndarray], count: int,
                    stops: frozenset[int] = frozenset(),
                    uniforms: Mapping[int, np.ndarray] | None = None) -> dict[int, list[int]]:
    """Continue all sequences together by up to `count` tokens each, without the stop token.

    logits: those after each sequence's last token [1, vocabulary], as ``decode`` returns them.
    uniforms: for each sequence float64 [count] in [0, 1), which pick tokens at temperature 1 by
    inverting the cumulative distribution; None decodes greedily.
    """
    written: dict[int, list[int]] = {sequence: [] for sequence in logits}
    current = {sequence: rows[-1] for sequence, rows in logits.items()}
    for step in range(count):
        active = list(current)
        stacked = np.stack([current[sequence] for sequence in active]).astype(np.float64)
        chosen = chosen_tokens(stacked, None if uniforms is None else np.array(
            [uniforms[s][step] for s in active]))
        going = {s: int(t) for s, t in zip(active, chosen, strict=True) if int(t) not in stops}
        for sequence, token in going.items():
            written[sequence].append(token)
        if not going or step == count - 1:
            break
        current = {s: rows[-1] for s, rows in
                   context.decode({s: [t] for s, t in going.items()}).items()}
    return written


@dataclass(frozen=True)
class Sampling:
    """How :func:`stream` draws tokens, as llama2.c and transformers do: logits over `temperature`
    (0: always the most probable token), then the smallest set of tokens with probability `top_p`,
    then a draw seeded by `seed`. ValueError for a value out of range."""

    temperature: float = 0.8
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("seed", 0 <= self.seed < RANDOM_SEED, f"0 to {RANDOM_SEED - 1}"),
        ):
            if not valid:
                raise ValueError(f"{name} = {getattr(self, name)}: expected {expected}")

    def nth(self, number: int) -> Sampling:
        """The same with another seed, `number` further on."""
        return replace(self, seed=(self.seed + number) % RANDOM_SEED)


RANDOM_SEED = 0xFFFFFFFF  # to llama.cpp this one means: take any


def stream(context: Context, count: int, sampling: Sampling, sequence: int = 0) -> Iterator[int]:
    """Yield tokens that continue `sequence`, which must be what the context decoded last, as
    llama.cpp's samplers draw them: up to `count`, an end of generation or the window's end."""
    engine = context._binding
    chain = engine.llama_sampler_chain_init(engine.llama_sampler_chain_default_params())
    parts = [engine.llama_sampler_init_greedy()] if not sampling.temperature else [
        engine.llama_sampler_init_temp(sampling.temperature),
        engine.llama_sampler_init_top_p(sampling.top_p, 1),
        engine.llama_sampler_init_dist(sampling.seed),
    ]
    for part in parts:
        engine.llama_sampler_chain_add(chain, part)
    try:
        for step in range(count):
            token = engine.llama_sampler_sample(chain, context._handle, -1)
            if context.model.ends_generation(token):
                return
            yield token
            if step == count - 1 or len(context.tokens[sequence]) == context.window:
                return
            context.decode({sequence: [token]})
    finally:
        engine.llama_sampler_free(chain)


@cache
def _ggml() -> ctypes.CDLL:
    library = ctypes.CDLL(str(next((native_folder() / "lib").glob("libggml-base.*"))))
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    library.ggml_nelements.restype = ctypes.c_int64
    library.ggml_nelements.argtypes = [ctypes.c_void_p]
    library.ggml_backend_tensor_get.restype = None
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p,
                                                ctypes.c_size_t, ctypes.c_size_t]
    return library
