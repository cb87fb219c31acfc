"""Decoding with the patched llama.cpp over decoding with the unpatched one."""

from __future__ import annotations

import ctypes
import statistics
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lablog import layout
from lablog.commitment import sampler
from lablog.intervals import bootstrap_percentile
from lablog.keys import key
from lablog.models import convert, locate
from lablog.models.llama_cpp import bindings, native_folder
from lablog.progress import progress
from lablog.run import Run
from tools.timing import paired, seconds


class Decoder:
    """Decodes token by token with one of the two builds of libllama, through nothing but C.

    sequences: how many are decoded together, each with a token in every batch.
    """

    def __init__(self, library: Path, gguf: Path, window: int = 256, sequences: int = 1) -> None:
        binding = bindings()
        self.library = ctypes.CDLL(str(next(library.glob("libllama.*"))))
        void = ctypes.c_void_p
        for name, result, arguments in (
            ("llama_model_load_from_file", void, [ctypes.c_char_p, binding.llama_model_params]),
            ("llama_init_from_model", void, [void, binding.llama_context_params]),
            ("llama_decode", ctypes.c_int32, [void, binding.llama_batch]),
            ("llama_get_memory", void, [void]),
            ("llama_memory_clear", None, [void, ctypes.c_bool]),
            ("llama_batch_init", binding.llama_batch, [ctypes.c_int32] * 3),
            ("llama_batch_free", None, [binding.llama_batch]),
            ("llama_model_n_embd", ctypes.c_int32, [void]),
            ("llama_model_n_layer", ctypes.c_int32, [void]),
            ("llama_free", None, [void]), ("llama_model_free", None, [void]),
        ):
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.model = self.library.llama_model_load_from_file(
            str(gguf).encode(), binding.llama_model_default_params()
        )
        parameters = binding.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = window * sequences, sequences
        parameters.n_threads = parameters.n_threads_batch = 1
        self.context = self.library.llama_init_from_model(self.model, parameters)
        self._batch = self.library.llama_batch_init(sequences, 0, 1)
        self._batch.n_tokens = sequences
        for sequence in range(sequences):
            self._batch.token[sequence] = 300
            self._batch.n_seq_id[sequence] = 1
            self._batch.seq_id[sequence][0] = sequence
            self._batch.logits[sequence] = 1

    def run(self, tokens: int) -> None:
        """Decode `tokens` tokens of every sequence from an empty cache."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)
        for position in range(tokens):
            for number in range(self._batch.n_tokens):
                self._batch.pos[number] = position
            code = self.library.llama_decode(self.context, self._batch)
            if code:
                raise RuntimeError(f"llama_decode returned {code}")

    def commit(self, strength: float) -> None:
        """Set a commitment in all layers (the patched build only); of several sequences, a
        different one for each."""
        width = self.library.llama_model_n_embd(self.model)
        last = self.library.llama_model_n_layer(self.model) - 1
        library = bindings().llama_cpp._lib
        for sequence in range(self._batch.n_tokens):
            vector = sampler.sample(1 + sequence, 64, width).direction
            what = (vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), width, width, strength,
                    0, last)
            if self._batch.n_tokens == 1:
                code = library.llama_set_commitment(self.context, *what)
            else:
                code = library.llama_set_commitment_seq(self.context, sequence, *what)
            if code:
                raise RuntimeError(f"setting a commitment returned {code}")

    def close(self) -> None:
        """Free context and model."""
        self.library.llama_batch_free(self._batch)
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)


def random_llama(artifacts: Path) -> Path:
    """GGUF of a Llama with 51 M random parameters (16 layers of width 512), f32."""
    folder = artifacts / f"random-51m-{key(random_llama)}"
    gguf = folder.with_suffix(".gguf")
    if not gguf.is_file():
        tokenizer = locate.hugging_face_folder("offline:smoke", artifacts) / "tokenizer.model"
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=16,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
            bos_token_id=1, eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        convert.to_gguf(folder, gguf)
    return gguf


def decode(run: Run) -> None:
    """Decoding with a commitment in all layers over decoding with the unpatched library: of one
    sequence with the context's, and of eight sequences together, each with its own.

    A token of the offline model takes a tenth of a millisecond, and where the allocator happens to
    put a context moves that by several per cent. So contexts are made anew for every round, in
    alternating order, and the interval is over rounds.
    """
    offline = locate.gguf_file("offline:laptop", layout.artifacts(layout.results("laptop")))
    wide = random_llama(run.artifacts)
    for suffix, gguf, sequences, tokens, pairs, rounds in (
        ("offline", offline, 1, 200, 10, 40),
        ("offline.per_sequence", offline, 8, 60, 10, 40),
        ("50m", wide, 1, 24, 4, 12),
        ("50m.per_sequence", wide, 8, 8, 4, 12),
    ):
        decode_ratio(run, suffix, gguf, sequences, tokens, pairs, rounds)


def decode_ratio(run: Run, suffix: str, gguf: Path, sequences: int, tokens: int, pairs: int,
                 rounds: int) -> None:
    """Record one ratio: `tokens` tokens of each of the sequences, in `pairs` a round."""
    libraries = [native_folder() / "lib-stock", native_folder() / "lib"]
    medians, rates = [], []
    bar = progress(rounds, f"decode {suffix}", "round")
    for number in range(rounds):
        decoders = {
            library: Decoder(library, gguf, sequences=sequences)
            for library in libraries[:: 1 - 2 * (number % 2)]
        }
        stock, patched = (decoders[library] for library in libraries)
        patched.commit(0.01)
        medians.append(paired(partial(stock.run, tokens), partial(patched.run, tokens), pairs))
        rates.append(sequences * tokens / seconds(partial(patched.run, tokens)))
        stock.close()
        patched.close()
        bar.update()
    bar.close()
    run.metric(f"native.decode.committed_over_stock.{suffix}", statistics.median(medians), "ratio",
               interval=bootstrap_percentile(medians, 50), n=rounds)
    run.metric(f"native.decode.tokens_per_s.{suffix}", statistics.median(rates), "tokens/s",
               n=rounds)


def build(run: Run) -> None:
    """How long this clone's first native build took."""
    path = native_folder() / "build_seconds"
    if path.is_file():
        run.metric("native.build_seconds", float(path.read_text()), "s")
    else:
        run.metric("native.build_seconds", None, "s",
                   undefined="this clone's build was not made in one go; see `make distclean`")
