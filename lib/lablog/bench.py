"""Speed, as ratios within one process: ``make bench`` writes build/bench.json.

The file is a record like those of the notebooks. Ratios are medians over pairs of rounds that
follow each other (A B A B), with the bootstrap interval of the median.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lablog.arianna import bench as arianna
from lablog.commitment import bench as qlora
from lablog.commitment import sampler
from lablog.cvfp import bench as cvfp
from lablog.files import repository
from lablog.intervals import bootstrap_percentile
from lablog.keys import key
from lablog.models import convert, source
from lablog.models.llama_cpp import bindings, native_folder
from lablog.progress import progress
from lablog.report import format_metric
from lablog.run import Run


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(reference: Callable[[], None], candidate: Callable[[], None], pairs: int) -> float:
    """Median of reference time over candidate time (speed of candidate over reference).

    Each pair runs both, in alternating order; one unrecorded pair warms up.
    """
    ratios = []
    for number in range(-1, pairs):
        if number % 2:
            first, second = _seconds(reference), _seconds(candidate)
        else:
            second, first = _seconds(candidate), _seconds(reference)
        if number >= 0:
            ratios.append(first / second)
    return float(np.median(ratios))


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
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = artifacts / f"random-51m-{key(random_llama)}"
    gguf = folder.with_suffix(".gguf")
    if not gguf.is_file():
        tokenizer = source.hugging_face_folder("offline:smoke", artifacts) / "tokenizer.model"
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


def native_decode(run: Run) -> None:
    """Decoding with a commitment in all layers over decoding with the unpatched library: of one
    sequence with the context's, and of eight sequences together, each with its own.

    A token of the offline model takes a tenth of a millisecond, and where the allocator happens to
    put a context moves that by several per cent. So contexts are made anew for every round, in
    alternating order, and the interval is over rounds.
    """
    offline = source.gguf_file("offline:laptop", repository() / "build/laptop/artifacts")
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
        rates.append(sequences * tokens / _seconds(partial(patched.run, tokens)))
        stock.close()
        patched.close()
        bar.update()
    bar.close()
    run.metric(f"native.decode.committed_over_stock.{suffix}", float(np.median(medians)), "ratio",
               interval=bootstrap_percentile(medians, 50), n=rounds)
    run.metric(f"native.decode.tokens_per_s.{suffix}", float(np.median(rates)), "tokens/s",
               n=rounds)


def native_build(run: Run) -> None:
    """How long this clone's first native build took."""
    path = native_folder() / "build_seconds"
    if path.is_file():
        run.metric("native.build_seconds", float(path.read_text()), "s")
    else:
        run.metric("native.build_seconds", None, "s",
                   undefined="this clone's build was not made in one go; see `make distclean`")


def cvfp_speed(run: Run) -> None:
    """CVFP's ratios against the matrix product, the memory bound and its sequential variants."""
    for name, value, unit, details in cvfp.run():
        run.metric(name, value, unit)
        for detail in ("sequential_fraction_of_memory_bound", "relative_deviation"):
            if detail in details:
                run.metric(f"{name}.{detail}", details[detail], "ratio")


def arianna_speed(run: Run) -> None:
    """Arianna's training in four modes, generation, tokenisation with packing."""
    for name, value, unit in arianna.run():
        run.metric(f"arianna.{name}", value, unit)


def qlora_speed(run: Run) -> None:
    """A training step with the commitment over LoRA alone on the same tokens, 4 bits over f32, and
    forked choices a second; with one thread, as chapter 3 trains several such models at a time."""
    base = source.hugging_face_folder("offline:laptop", repository() / "build/laptop/artifacts")
    plain, committed = qlora.step(base, 0, "nf4"), qlora.step(base, 12, "nf4")
    whole, threads = qlora.step(base, 12, "none"), torch.get_num_threads()
    for name, reference, candidate, used in (
        ("step.commitment_over_lora.all_threads", plain, committed, threads),
        ("step.commitment_over_lora", plain, committed, 1),
        ("step.nf4_over_f32", whole, committed, 1),
    ):
        torch.set_num_threads(used)
        ratios = [1 / paired(reference, candidate, 1) for _ in range(20)]
        run.metric(f"qlora.{name}", float(np.median(ratios)), "ratio", n=len(ratios),
                   interval=bootstrap_percentile(ratios, 50))
    run.metric("qlora.memory.nf4_over_f32",
               qlora.memory(base, "nf4") / qlora.memory(base, "none"), "ratio")
    run.metric("qlora.forks_per_s", qlora.ITEMS / _seconds(qlora.forks(base)), "items/s")
    torch.set_num_threads(threads)


def main() -> int:
    """Measure everything, write the record and print it."""
    folder = repository() / "build"
    parameters: dict[str, Any] = {}
    run = Run("bench", "bench", folder, folder / "bench", parameters)
    for stage in (native_build, native_decode, qlora_speed, cvfp_speed, arianna_speed):
        with run.stage(stage.__name__):
            stage(run)
    record = run.record()
    record.write(folder / "bench.json")
    for metric in record.metrics:
        print(f"{metric.name}: {format_metric(metric)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
