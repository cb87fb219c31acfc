"""Probing a real chat model: all forks together over one prompt after the other, and which weights
are the fastest to read and to write with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lablog import layout, model_list
from lablog.commitment import probes
from lablog.commitment.llama_cpp_speaker import Injection, LlamaCppSpeaker
from lablog.commitment.probes import ForkItem
from lablog.models import convert, locate
from lablog.models.llama_cpp import Context, Model
from lablog.provenance import usable_threads
from lablog.run import Run
from lablog.text.dialogues import settings_for
from tools.timing import paired, seconds

ITEMS, PAIRS, WINDOW = 4, 5, 384
READ, WRITTEN, SEQUENCES = 64, 8, 16  # tokens of each sequence
QUESTIONS = 13  # of a fork: twelve guesses and the name


def fetched() -> Path | None:
    """The chat model of ``data/models.yaml``, if a profile has fetched it."""
    for package in model_list.listed().values():
        for name in package.files:
            path = layout.fetched_package(package.package) / name
            if name.endswith(".gguf") and path.is_file():
                return path
    return None


def one_by_one(speaker: LlamaCppSpeaker, items: Sequence[ForkItem]) -> None:
    """The forks as a script without a cache would ask them: each prompt read from its beginning."""
    for item in items:
        for guess in item.guesses:
            speaker.context.clear()
            speaker.agree([[*item.opening, guess]], Injection())
        turns = [*item.opening, item.naming]
        prompt = speaker.prompt(turns, item.stem)
        for words in item.ways:
            for tokens in speaker.continuations(turns, item.stem, words):
                speaker.context.clear()
                speaker.context.prefill({0: prompt})
                speaker.context.decode({0: tokens}, "all")


def record(run: Run) -> None:
    """Record all measures; where the model was not fetched, that they are not defined."""
    gguf = fetched()
    if gguf is None:
        for name, unit in (("native.probes.together_over_one_by_one.pretrained", "ratio"),
                           ("native.probes_per_s.pretrained", "probes/s")):
            run.metric(name, None, unit, undefined="the model is not fetched; `make reproduce "
                                                   "PROFILE=pretrained NOTEBOOKS=01` fetches it")
        return
    settings, threads = settings_for("auto"), usable_threads()
    items = probes.make_items(settings, 0, ITEMS).fork
    with Model(gguf) as model, Context(model, 2 * QUESTIONS, WINDOW, threads,
                                       cache_type="f16") as context:
        speaker = LlamaCppSpeaker(context, "auto", settings.chat.system)

        def together() -> None:
            probes.fork(speaker, items, Injection())

        run.metric("native.probes.together_over_one_by_one.pretrained",
                   paired(lambda: one_by_one(speaker, items), together, PAIRS), "ratio", n=PAIRS)
        rates = [ITEMS * QUESTIONS / seconds(together) for _ in range(PAIRS)]
        run.metric("native.probes_per_s.pretrained", statistics.median(rates), "probes/s", n=PAIRS)
    for name, path in _weights(gguf, run.artifacts).items():
        _rates(run, name, path, threads)


def _weights(gguf: Path, artifacts: Path) -> dict[str, Path]:
    """The model as it was published, and dequantised in three types."""
    artifacts.mkdir(parents=True, exist_ok=True)
    exact = locate.gguf_file(str(locate.hugging_face_folder(str(gguf), artifacts)), artifacts)
    found = {gguf.stem.rpartition(".")[2].lower(): gguf, "f32": exact}
    for dtype in ("f16", "q8_0"):
        path = exact.with_name(f"{exact.stem}-{dtype}.gguf")
        found[dtype] = path if path.is_file() else convert.quantize(exact, path, dtype)
    return found


def _rates(run: Run, name: str, path: Path, threads: int) -> None:
    rng = np.random.default_rng(0)
    with Model(path) as model, Context(model, SEQUENCES, WINDOW, threads,
                                       cache_type="f16") as context:
        text = {s: rng.integers(10, 10_000, READ).tolist() for s in range(SEQUENCES)}
        more = {s: [11] for s in range(SEQUENCES)}

        def read() -> None:
            context.clear()
            context.decode(text)

        def write() -> None:
            for _ in range(WRITTEN):
                context.decode(more)

        read()
        times = [(seconds(read), seconds(write)) for _ in range(PAIRS)]
    for kind, tokens, took in zip(("prefill", "decode"), (READ, WRITTEN),
                                  map(statistics.median, zip(*times, strict=True)), strict=True):
        run.metric(f"native.{kind}.tokens_per_s.pretrained.{name}", SEQUENCES * tokens / took,
                   "tokens/s", n=PAIRS)
