"""Speed of the CVFP experiment as ratios within one process, for ``make bench``."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lablog.cvfp.data import prepare
from lablog.cvfp.model import CVFPBlock, ModelConfig
from lablog.cvfp.phase1 import (
    DiversityTracker,
    Phase1Config,
    SequentialStep,
    make_optimizer,
    parallel_step,
    sequential_iteration,
    train,
    true_pass_step,
)
from lablog.cvfp.rollout import TOLERANCE, Method, Recurrence, relative_errors, rollout
from lablog.provenance import peak_memory_bytes
from lablog.run import Run
from tools.timing import median_seconds, timed

Row = tuple[str, float, str, dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """What is timed; the log's size unless told otherwise."""

    width: int = 768
    layers: int = 6
    tokens: int = 6400
    slice: int = 60
    repeats: int = 3
    growth: tuple[int, ...] = (1000, 6400, 25000)
    rollout_tokens: int = 1600
    lengths: tuple[int, ...] = (1000, 6400, 25_000, 100_000)


def measured(size: Size | None = None, device: str = "cpu") -> list[Row]:
    """All measurements as (name, value, unit, details), printed as they come.

    Most of the time goes into training on true passes and into reading long texts by the loop.
    """
    size = size or Size()
    config = ModelConfig(context_dim=size.width, embed_dim=size.width, num_layers=size.layers,
                         layernorm_mix=1.0, weight_std=0.1, bias_std=0.01)
    settings = Phase1Config(
        variant="parallel", diversity_weight=0.9, iterations=10, learning_rate=0.002,
        clip_norm=1.0, convergence_threshold=0.1, early_stop_fraction=0.95, early_stop_from=2,
        ema_decay=0.99, seed=42,
    )
    length = min(128, size.tokens // 5)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(
            Path(folder), config, text_source="arianna", tokenizer="project", vocabulary=2048,
            embedding="ppmi", window=5, corpus_documents=2000, dialogues=size.tokens // length,
            dialogue_tokens=length, test_dialogues=1, val_data_source="text_file", seed=42,
            device=device,
        )
    bench = _Bench(size, config, settings, data.tokens["training"], device)
    rows = []
    for name, value, unit, details in chain(bench.training(), bench.rollouts(), bench.growth()):
        details |= {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        print(f"cvfp.{name} = {value:.4g} {unit} {details}", flush=True)
        rows.append((f"cvfp.{name}", value, unit, details))
    return rows


def record(run: Run) -> None:
    """Record the ratios against the matrix product, the memory bound and the sequential variants.
    """
    for name, value, unit, details in measured():
        run.metric(name, value, unit)
        for detail in ("sequential_fraction_of_memory_bound", "relative_deviation"):
            if detail in details:
                run.metric(f"{name}.{detail}", details[detail], "ratio")


class _Bench:
    def __init__(
        self, size: Size, config: ModelConfig, settings: Phase1Config, tokens: Tensor, device: str
    ) -> None:
        self.size, self.config, self.settings = size, config, settings
        self.tokens, self.device = tokens, device

    def block(self) -> CVFPBlock:
        return CVFPBlock(self.config, 42).to(self.device)

    def time(self, work: Callable[[], object], repeats: int | None = None) -> float:
        return median_seconds(work, repeats or self.size.repeats, self.device)

    def gemm_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second of the layer's product over all tokens."""
        hidden = self.config.hidden_dim
        a = torch.randn(self.size.tokens, hidden, device=self.device).to(dtype)
        b = torch.randn(hidden, hidden, device=self.device).to(dtype)
        out = torch.empty(self.size.tokens, hidden, device=self.device, dtype=dtype)
        once = self.time(lambda: torch.mm(a, b, out=out))
        return 2 * self.size.tokens * hidden**2 / once

    def weight_bytes(self) -> int:
        return 4 * self.config.num_layers * self.config.hidden_dim**2

    def parallel(self, autocast: bool) -> tuple[float, float, dict[str, Any], Tensor]:
        """(fraction of the product's rate, seconds a step, details, contexts of the first step).

        Product and step alternate, and the fraction is the median over pairs, so that what else
        the machine does meets both.
        """
        block, settings = self.block(), replace(self.settings, autocast=autocast)
        optimizer = make_optimizer(block, settings)
        work = partial(parallel_step, block, self.tokens, self.tokens, optimizer, settings)
        first, _ = work()
        flops = 3 * self.config.forward_flops * self.size.tokens
        pairs = [
            (self.gemm_rate(torch.bfloat16 if autocast else torch.float32), self.time(work, 1))
            for _ in range(self.size.repeats)
        ]
        fraction = statistics.median(flops / step / rate for rate, step in pairs)
        step = statistics.median(step for _, step in pairs)
        return fraction, step, {"pairs of FLOP/s and seconds": pairs}, first

    def training(self) -> Iterator[Row]:
        size = self.size
        fraction, step, details, exact = self.parallel(autocast=False)
        yield "parallel_step.fraction_of_gemm", fraction, "ratio", details
        half_fraction, half, details, rough = self.parallel(autocast=True)
        deviation = float((rough - exact).norm() / exact.norm())
        yield ("parallel_step.fraction_of_gemm.bf16", half_fraction, "ratio",
               details | {"f32_over_bf16": step / half,
                          "relative_deviation": deviation})

        by_the_loop = replace(self.true_pass(), reading="sequential")
        yield self.true_pass_over_parallel(self.block(), self.tokens, by_the_loop)
        block, slice_ = self.block(), self.tokens[: size.slice]
        settings = replace(self.settings, variant="sequential", diversity_weight=0.5)
        sequential = SequentialStep(block, settings, make_optimizer(block, settings))
        mean, variance = torch.zeros(2, size.width, device=self.device)
        tracker = DiversityTracker(mean, variance, 0.99)
        one = self.time(
            lambda: sequential_iteration(sequential, slice_, slice_, tracker)
        ) / len(slice_)
        for variant, once in (("parallel", step), ("sequential", one * size.tokens)):
            yield (f"ten_iterations.{variant}.seconds", 10 * once, "s", {"tokens": size.tokens})
        yield "train.sequential.tokens_per_s", 1 / one, "tokens/s", {"slice_tokens": size.slice}
        # Ten streams of the weights: two readings, one writing, and Adam's seven.
        a, b = torch.randn(2, self.weight_bytes() // 4, device=self.device)
        out = torch.empty_like(a)
        bandwidth = 3 * self.weight_bytes() / self.time(lambda: torch.add(a, b, out=out), 9)
        bound = 10 * self.weight_bytes() / bandwidth
        optimizer_alone = self.time(sequential.optimizer.step, 9)
        yield ("train.parallel_over_sequential", one * size.tokens / step, "ratio",
               {"sequential_seconds_per_token": one, "parallel_seconds": step,
                "slice_tokens": size.slice, "sequential_fraction_of_memory_bound": bound / one,
                "bandwidth_bytes_per_second": bandwidth,
                "adam_share": optimizer_alone / one})

    def true_pass_over_parallel(self, block: CVFPBlock, before: Tensor, settings: Phase1Config,
                                suffix: str = "") -> Row:
        """Time of a true pass over that of a parallel one, from contexts `before` of other weights,
        both with a step so small that `block` remains what it is."""
        tokens = self.tokens[: self.size.rollout_tokens]
        settings = replace(settings, learning_rate=1e-12)
        optimizer = make_optimizer(block, settings)
        times = [self.time(partial(step, block, tokens, before[: len(tokens)], optimizer, settings))
                 for step in (true_pass_step, parallel_step)]
        return (f"train.true_pass_over_parallel{suffix}", times[0] / times[1], "ratio",
                {"seconds": times, "tokens": len(tokens)})

    def rollouts(self) -> Iterator[Row]:
        block, tokens = self.block(), self.tokens[:400]
        loop, out = Recurrence(block), torch.empty_like(tokens)
        full = [layer.linear.weight.detach().t().contiguous() for layer in block.stack]
        read = sum(weight.nbytes for weight in loop.weights)
        pairs = [
            (self.products(loop.weights), self.products(full),
             self.time(lambda: loop.read(tokens, tokens[0], out), 1) / len(tokens))
            for _ in range(self.size.repeats)
        ]
        bound, _, once = (statistics.median(column) for column in zip(*pairs, strict=True))
        yield ("rollout.fraction_of_gemv", statistics.median(b / t for b, _, t in pairs), "ratio",
               {"tokens_per_second": 1 / once, "products_per_second": 1 / bound,
                "bytes_read_per_token": read, "bytes_per_second": read / bound,
                "of_all_weights": {"bytes": self.weight_bytes(),
                                   "fraction": statistics.median(n / t for _, n, t in pairs)}})
        half = Recurrence(block, torch.bfloat16)
        rough = torch.empty_like(tokens)
        fast = self.time(lambda: half.read(tokens, tokens[0], rough)) / len(tokens)
        yield ("rollout.bf16_over_f32", once / fast, "ratio",
               {"relative_deviation": float((rough - out).norm() / out.norm())})
        yield self.best_over_sequential("untrained", block)
        initial, true_pass = rollout(block, self.tokens).contexts, self.true_pass()
        for name, settings in (("trained", self.settings), ("true_pass", true_pass)):
            block = self.block()
            trained = train(block, self.tokens, settings, initial=initial)
            yield self.best_over_sequential(name, block)
        # Those of its last pass, before its last step: what the next pass would begin with.
        yield self.true_pass_over_parallel(block, trained.contexts, true_pass, ".contracting")
        yield from self.lengths(block)

    def true_pass(self) -> Phase1Config:
        """The settings of the variant that reads truly, as chapter 4 has them."""
        return replace(self.settings, variant="true_pass", diversity_weight=0.5,
                       reading="shooting")

    def products(self, weights: Sequence[Tensor]) -> float:
        """Seconds of one vector's product with each of `weights` [in, out], the fastest form.

        No form is the fastest for every shape and library: a product of one row, and the
        matrix-vector product of each layout.
        """
        rows = [torch.randn(1, len(w), device=self.device) for w in weights]
        results = [torch.empty(1, w.shape[1], device=self.device) for w in weights]
        transposed = [w.t().contiguous() for w in weights]

        def one_row() -> None:
            for x, w, y in zip(rows, weights, results, strict=True):
                torch.mm(x, w, out=y)

        def vector() -> None:
            for x, w, y in zip(rows, weights, results, strict=True):
                torch.mv(w.t(), x[0], out=y[0])

        def vector_transposed() -> None:
            for x, w, y in zip(rows, transposed, results, strict=True):
                torch.mv(w, x[0], out=y[0])

        return min(self.time(form, 100) for form in (one_row, vector, vector_transposed))

    def best_over_sequential(self, name: str, block: CVFPBlock) -> Row:
        """Time of the loop over that of the fastest method that is as near to double precision: at
        most the tolerance farther away than twice what the loop is."""
        tokens = self.tokens[: self.size.rollout_tokens]
        exact = rollout(deepcopy(block).double(), tokens.double()).contexts
        times: dict[str, float] = {}
        details: dict[str, Any] = {"tokens": len(tokens)}
        for method in get_args(Method):
            times[method], result = timed(partial(rollout, block, tokens, method=method))
            errors = relative_errors(result.contexts.double(), exact)
            details[method] = {"passes": result.passes, "error": float(errors.max()),
                               "median_error": float(errors.median()),
                               "loop_tokens": result.sequential_tokens}
        loop = times.pop("sequential")
        allowed = TOLERANCE + 2 * details["sequential"]["error"]
        best = min((method for method in times if details[method]["error"] <= allowed),
                   key=times.__getitem__)
        return (f"rollout.best_over_sequential.{name}", loop / times[best], "ratio",
                {"best": best, "seconds": {"sequential": loop, **times}, **details})

    def lengths(self, block: CVFPBlock) -> Iterator[Row]:
        """Time of the loop over that of shooting, by tokens of the text, once each. What is longer
        than the training text repeats it."""
        repeats = -(-max(self.size.lengths) // len(self.tokens))
        text = self.tokens.repeat(repeats, 1)
        for n in self.size.lengths:
            loop, shot = (rollout(block, text[:n], method=method)
                          for method in ("sequential", "shooting"))
            errors = relative_errors(shot.contexts, loop.contexts)
            yield (f"rollout.shooting_over_sequential.true_pass.{n}", loop.seconds / shot.seconds,
                   "ratio", {"seconds": [loop.seconds, shot.seconds], "passes": shot.passes,
                             "error": float(errors.max()), "median_error": float(errors.median()),
                             "loop_tokens": shot.sequential_tokens})

    def growth(self) -> Iterator[Row]:
        """Seconds and peak memory of a parallel step per token, relative to the smallest size."""
        block, per_token = self.block(), []
        optimizer = make_optimizer(block, self.settings)
        repeats = -(-max(self.size.growth) // len(self.tokens))
        text = self.tokens.repeat(repeats, 1)
        for n in self.size.growth:
            part = text[:n]
            work = partial(parallel_step, block, part, part, optimizer, self.settings)
            once = self.time(work, 1)
            per_token.append(once / n)
            yield (f"growth.seconds_per_token.{n}", once / n, "s", {
                "over_smallest": per_token[-1] / per_token[0],
                "peak_memory_bytes": peak_memory_bytes()})
