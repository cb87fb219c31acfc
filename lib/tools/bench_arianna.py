"""Speed of Arianna's shape for ``make bench``: training in four modes, generation, packing."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lablog.arianna.finetuning import base_tokenizer
from lablog.models import convert
from lablog.models.llama_cpp import Context, Model, Sampling, stream
from lablog.models.shape import ModelShape
from lablog.run import Run
from lablog.text import packing
from lablog.text.corpora import base_documents
from lablog.text.tokenizer import Tokenizer
from tools.timing import seconds, timed

Row = tuple[str, float, str]
ARIANNA = ModelShape(width=288, layers=6, heads=6, kv_heads=6, feed_forward=768, context=256,
                     tied_embeddings=True, initializer_range=0.02)
MODES = {"f32": (torch.float32, False), "f32_compiled": (torch.float32, True),
         "bf16": (torch.bfloat16, False), "bf16_compiled": (torch.bfloat16, True)}


@dataclass(frozen=True)
class Size:
    """What is timed; the lab log's shape unless told otherwise."""

    shape: ModelShape = ARIANNA
    vocabulary: int = 4096
    batch: int = 8
    repeats: int = 9
    tokens: int = 200
    packages: tuple[str, ...] = ("scipy", "pandas", "numpy", "transformers")


def training_flops(shape: ModelShape, vocabulary: int) -> int:
    """Floating-point operations of a training step for each token: 6 N + 12 layers width context.

    N counts all weights that multiply: the tied matrix once, as the output product and not as the
    look-up of embeddings (Kaplan et al., 2020; attention as in PaLM, 2022, mask not deducted).
    """
    weights = sum(p.numel() for p in shape.model(vocabulary).parameters())
    return 6 * weights + 12 * shape.layers * shape.width * shape.context


class _Step:
    """Forward, backward and optimiser step of one batch of random tokens."""

    def __init__(self, size: Size, mode: str) -> None:
        self.dtype, compiled = MODES[mode]
        torch.manual_seed(0)
        model = size.shape.model(size.vocabulary)
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
        self.model: Any = torch.compile(model) if compiled else model
        self.ids = torch.randint(size.vocabulary, (size.batch, size.shape.context))

    def __call__(self) -> None:
        half = self.dtype == torch.bfloat16
        with torch.autocast("cpu", self.dtype) if half else nullcontext():
            logits = self.model(input_ids=self.ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1).float(), self.ids[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _product_rate(size: Size, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of the model's products over all tokens of a batch."""
    rows, width, rates = size.batch * size.shape.context, size.shape.width, []
    for columns in (width, size.shape.feed_forward, size.vocabulary):
        a, b = torch.randn(rows, width).to(dtype), torch.randn(width, columns).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        best = min(seconds(partial(torch.mm, a, b, out=out)) for _ in range(5))
        rates.append(2 * rows * width * columns / best)
    return max(rates)


def training(size: Size) -> Iterator[Row]:
    """Tokens per second of each mode, and its share of the matrix product's rate (MFU).

    Product and step alternate; the share is the median over pairs.
    """
    flops = training_flops(size.shape, size.vocabulary)
    tokens = size.batch * size.shape.context
    for mode, (dtype, _) in MODES.items():
        step = _Step(size, mode)
        for _number in range(2):  # the first compiles
            step()
        pairs = [(_product_rate(size, dtype), seconds(step)) for _ in range(size.repeats)]
        median = statistics.median(time for _, time in pairs)
        yield f"train.{mode}.tokens_per_s", tokens / median, "tokens/s"
        share = statistics.median(flops * tokens / time / rate for rate, time in pairs)
        yield f"train.{mode}.mfu", share, "ratio"


def generation(size: Size, tokenizer: Tokenizer) -> Iterator[Row]:
    """Greedy tokens per second: transformers with its cache, and llama.cpp in two formats, whose
    files are written beside the tokenizer."""
    torch.manual_seed(0)
    model = size.shape.model(len(tokenizer)).eval()
    model.generation_config.eos_token_id = None
    start = torch.tensor([[tokenizer.bos]])
    times = [
        seconds(lambda: model.generate(
            start, max_new_tokens=size.tokens, do_sample=False, use_cache=True))
        for _ in range(3)
    ]
    yield "generate.pytorch.tokens_per_s", size.tokens / min(times), "tokens/s"
    folder = tokenizer.path.parent
    model.save_pretrained(folder)
    exact = convert.to_gguf(folder, folder / "f32.gguf")
    small = convert.quantize(exact, folder / "q8_0.gguf", "q8_0")
    for kind, gguf in (("f32", exact), ("q8_0", small)):
        with Model(gguf) as engine, Context(engine, window=size.shape.context) as context:
            times, written = [], 0
            for _ in range(5):
                context.clear()
                context.prefill({0: [tokenizer.bos]})
                answer = islice(stream(context, size.tokens, Sampling(0.0)), size.tokens)
                once, written = timed(partial(_count, answer))
                times.append(once)
        yield f"generate.llama_cpp_{kind}.tokens_per_s", written / min(times), "tokens/s"


def _count(tokens: Iterable[object]) -> int:
    return sum(1 for _ in tokens)


def measured(size: Size | None = None) -> list[Row]:
    """All measurements as (name, value, unit), names without the room's."""
    size = size or Size()
    documents = base_documents("docstrings", size.packages)
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = base_tokenizer(documents[::8], size.vocabulary, folder)
        once = seconds(lambda: packing.pack(documents, tokenizer, folder / "corpus"))
        rows.append(("packing.mb_per_s", megabytes / once, "MB/s"))
        rows += list(generation(size, tokenizer))
    return [*training(size), *rows]


def record(run: Run) -> None:
    """Record training in four modes, generation, and tokenisation with packing."""
    for name, value, unit in measured():
        run.metric(f"arianna.{name}", value, unit)
