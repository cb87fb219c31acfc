"""What the book's live page loads: the engine, and models of the chapters, as scripts.

A page that was opened from a file may load scripts beside it and nothing else, so everything is a
script: ``engine.js`` (the module, its worker, the WebAssembly), ``NAME.0.js``, ``NAME.1.js``, …
(a model in parts, so that progress can be shown and none is large), and ``index.js``, which says
what there is. They lie in ``build/PROFILE/live``, and the book takes them along.

    python -m tools.live [--profile laptop]
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from lablog import layout, profiles
from lablog.arianna import chat as arianna
from lablog.arianna.exports import FILES
from lablog.commitment.log_experiments import layer_range
from lablog.commitment.novelty import HEADLINE, material, whole_topics
from lablog.commitment.posterior import VariationalCommitment
from lablog.commitment.probes import Items, Material, make_items
from lablog.commitment.rendering import Rendering, asked
from lablog.files import atomic_folder, repository
from lablog.models import convert
from lablog.models.llama_cpp import Model
from lablog.record import Record
from lablog.text.chat_tokenizer import tokenizer_of
from lablog.text.dialogues import Draw, settings_for

PART = 1 << 20
"""Bytes of a model in one script."""
LARGEST = 40 << 20
"""Bytes of a model, at most, that a reader is asked to load."""
PROMPTS = 110
"""A spawn key, apart from those of dialogues and probes."""
Type = Literal["f16", "q8_0"]


def call(function: str, *arguments: Any) -> str:
    """A script that calls ``lablogLive.FUNCTION`` with JSON arguments."""
    return f"lablogLive.{function}({', '.join(json.dumps(each) for each in arguments)});\n"


def version(data: bytes) -> str:
    """What a browser's cache tells one file from another of its name by."""
    return hashlib.sha256(data).hexdigest()[:12]


def packed(array: np.ndarray) -> str:
    """Numbers as base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


class Bundle:
    """A folder of scripts that is being written, and its table of contents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program: dict[str, Any] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.figures: dict[str, dict[str, Any]] = {}

    def model(self, name: str, gguf: Path, dtype: Type | None = None) -> None:
        """A GGUF file, in another type if one is named; ValueError for one that is too large."""
        with tempfile.TemporaryDirectory() as scratch:
            path = gguf if dtype is None else convert.quantize(
                gguf, Path(scratch) / gguf.name, dtype)
            data = path.read_bytes()
        if len(data) > LARGEST:
            raise ValueError(f"{gguf} has {len(data) >> 20} MB: too much for a page")
        parts = [data[begin : begin + PART] for begin in range(0, len(data), PART)]
        for number, part in enumerate(parts):
            text = call("part", name, number, base64.b64encode(part).decode())
            (self.folder / f"{name}.{number}.js").write_text(text)
        self.models[name] = {"bytes": len(data), "parts": len(parts), "version": version(data)}

    def engine(self, built: Path) -> None:
        """The module of `built` (Emscripten's) and its worker."""
        program = (built / "live.js").read_text()
        worker = (repository() / "native" / "live" / "worker.js").read_text()
        wasm = (built / "live.wasm").read_bytes()
        text = call("program", f"{program}\n{worker}", base64.b64encode(wasm).decode())
        (self.folder / "engine.js").write_text(text)
        self.program = {"bytes": len(text), "version": version(text.encode())}

    def close(self) -> None:
        """Write the table of contents."""
        told = {"engine": self.program, "models": self.models, "figures": self.figures}
        (self.folder / "index.js").write_text(call("index", told))


def strength(bundle: Bundle, results: Path, record: Record) -> None:
    """Figure *Turn λ*: the model of chapter 2, and the λ that spends its budget in each range.

    A model that is too large to be loaded from a page is the reader's to choose, as a file.
    """
    gguf = results / record.files[0].path
    parameters = record.parameters
    with Model(gguf) as read:
        layers = read.layers
    settings = settings_for(parameters["chat"])
    prompts = [asked([Draw(settings, 0, PROMPTS, number).turn("U", "question", topic)],
                     parameters["chat"]) for number, topic in enumerate(settings.topics)]
    marks = []
    for name in parameters["ranges"]:
        found = record.metric(f"budget.{name.replace(' ', '_')}.lambda").value
        if found is not None:
            marks.append({"range": name, "layers": layer_range(name, layers), "strength": found})
    small = gguf.stat().st_size <= LARGEST
    if small:
        bundle.model("dialogue", gguf, "f16")
    bundle.figures["strength"] = {
        "model": "dialogue" if small else None, "file": gguf.name, "k": parameters["k"],
        "window": parameters["window"], "layers": layers, "marks": marks,
        "budget": parameters["kl_budget"], "prompts": prompts[:6]}


def choice(bundle: Bundle, results: Path, record: Record) -> None:
    """Figure *Hold a choice*: the first commitment of chapter 3, its draws from the prior, and a
    guessing game and a forgotten favourite about each topic, in phrasings new to it."""
    parameters = record.parameters
    base, seed = parameters["base_seeds"][0], parameters["seeds"][0]
    made = layout.artifacts(results).glob(f"qlora-commitment-{base}-{seed}-*-export")
    export = max(made, key=lambda folder: folder.stat().st_mtime)
    drawn = pd.read_csv(results / next(f.csv for f in record.figures if f.name == "latent_space"))
    drawn = drawn[(drawn["base"] == base) & (drawn["seed"] == seed)]
    commitment = VariationalCommitment.load(export)
    z = commitment.prior(len(drawn), torch.Generator().manual_seed(parameters["item_seed"]))
    tokenizer = tokenizer_of(results / Path(record.files[0].path).parent)
    settings = settings_for(parameters["chat"])
    rendering = Rendering(tokenizer, parameters["chat"], settings.chat.system)
    new = material(settings, HEADLINE)
    bundle.model("base", export / "base.gguf", "f16")
    bundle.model("lora", export / "lora.gguf")
    bundle.figures["choice"] = {
        "model": "base", "lora": "lora", "window": 512,
        "strength": commitment.settings.strength, "layers": commitment.settings.layers,
        "directions": packed(commitment.direction(z).detach().numpy()),
        "draws": [[round(x, 3), round(y, 3), value] for x, y, value in
                  zip(drawn["x"], drawn["y"], drawn["choice"], strict=True)],
        "topic": whole_topics(settings)[0],
        **{answer: words(rendering, answer) for answer in ("yes", "no")},
        "stops": sorted(rendering.stops),
        "topics": {topic: game(rendering, make_items(
            Material(new.settings, (topic,)), parameters["item_seed"], 1))
            for topic in whole_topics(settings)}}


def words(rendering: Rendering, answer: str) -> list[list[int]]:
    """Tokens of an answer, lower-case and capitalised where these differ."""
    prompt = rendering.prompt([], "")
    _, found = rendering.continuations(prompt, (answer, answer.capitalize()))
    return [list(each) for each in dict.fromkeys(map(tuple, found))]


def game(rendering: Rendering, items: Items) -> dict[str, Any]:
    """The tokens of one topic's questions, and these in words."""
    fork, recall = items.fork[0], items.recall[0]
    naming = rendering.prompt([*fork.opening, fork.naming], fork.stem)
    guesses = [rendering.prompt([*fork.opening, guess], "") for guess in fork.guesses]
    stem = min(naming.shared(guess) for guess in guesses)
    kept, values = rendering.continuations(naming, fork.values)
    evicted = rendering.prompt([*recall.distractors, recall.requestion], recall.restem)
    return {"names": fork.values, "opening": naming.ids[:stem].tolist(),
            "naming": naming.ids[stem:kept].tolist(), "values": values,
            "guesses": [guess.ids[stem:].tolist() for guess in guesses],
            "evicted": evicted.ids.tolist(),
            "told": {"opening": [turn.text for turn in fork.opening], "naming": fork.naming.text,
                     "stem": fork.stem, "guess": fork.guesses[0].text,
                     "again": recall.requestion.text}}


def voice(bundle: Bundle, results: Path, record: Record) -> None:
    """Figure *Arianna*: the base run's model and the fine-tuned one."""
    artifacts = layout.artifacts(results)
    folder = next(Path(file.path).parent.name for file in record.files
                  if Path(file.path).parent.name.startswith("base-"))
    before = max(artifacts.glob(f"{folder}-*-f32.gguf"), key=lambda path: path.stat().st_mtime)
    with Model(before) as read:
        window = read.window
    bundle.model("before", before, "q8_0")
    bundle.model("after", artifacts / "arianna" / FILES["q8_0"])
    bundle.figures["voice"] = {
        "models": ["before", "after"], "form": arianna.prompt("{question}"), "until": "\nQ:",
        "window": window, "temperature": 0.8, "top_p": 0.9, "count": 120,
        "question": "What is resonance?"}


FIGURES = {"02_lambda_calibration": strength, "03_qlora_commitment": choice,
           "06_arianna_finetune": voice}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the scripts of a profile; says which figures have no model in this clone."""
    parser = argparse.ArgumentParser(prog="live", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="laptop", help="name, or path of a YAML file")
    parser.add_argument("--set", nargs="*", default=[], metavar="[NN.]NAME=VALUE",
                        help="the values that the results were made with")
    parser.add_argument("notebooks", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    results = layout.results(profiles.load(options.profile, options.set).name)
    built = layout.live_engine()
    if not (built / "live.wasm").is_file():
        sys.exit(f"error: {built} holds no engine: run `make live`, which builds it")
    results.mkdir(parents=True, exist_ok=True)
    with atomic_folder(layout.live(results)) as room:
        bundle = Bundle(room)
        bundle.engine(built)
        for notebook, figure in FIGURES.items():
            path = results / "records" / f"{notebook}.json"
            try:
                figure(bundle, results, Record.read(path))
            except (FileNotFoundError, StopIteration, ValueError) as error:
                print(f"live page: {figure.__name__} stays a picture ({error})", file=sys.stderr)
        bundle.close()


if __name__ == "__main__":
    main()
