"""The experiments of notebook 06: corpus, base run, fine-tunings by fold, and what they did."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import LlamaForCausalLM

from lablog.arianna import guards, plots, results
from lablog.arianna.chat import prompt, until_question, write
from lablog.arianna.dialogues import Form, bits, folds, load_dialogues, ngram_overlap
from lablog.files import repository
from lablog.models.llama_cpp import Context, Model, Sampling
from lablog.models.training import ModelShape, TrainingSettings, fingerprint, train_causal_lm
from lablog.record import Run
from lablog.text.corpora import base_documents
from lablog.text.datasets import Item
from lablog.text.packing import Stream, Windows, pack, refuse_overlap, split
from lablog.text.tokenizer import train_tokenizer

Bits = results.Bits


@dataclass(frozen=True)
class Arm:
    """A fine-tuning: learning rate, batch size in windows, optimiser steps."""

    rate: float
    batch: int
    steps: int

    @property
    def name(self) -> str:
        """For metrics and folders."""
        return f"lr{self.rate:g}.batch{self.batch}.steps{self.steps}"


class Study:
    """Everything about one base model; numbers go to `run`, models to its artifacts."""

    def __init__(self, run: Run, shape: ModelShape):
        self.run, self.shape, self.folder = run, shape, run.artifacts / "arianna-runs"
        self.models: dict[str, Path] = {}
        self.table = pd.DataFrame()

    # --- data -------------------------------------------------------------------------------------

    def corpus(self, source: str, packages: Sequence[str], files: Sequence[str], limit: float,
               vocabulary: int, sample: float) -> str:
        """Base documents, their split, a tokenizer trained on `sample` MB of them, and shards."""
        run = self.run
        with run.stage("corpus"):
            paths = [run.file(repository() / file) for file in files]
            found = base_documents(source, packages, paths, limit)
        training, self.held_out = split(found, 200)
        refuse_overlap(training, self.held_out)
        size = sum(len(document.encode()) for document in training)
        with run.stage("tokenizer"):
            every = training[:: max(1, round(size / (1e6 * sample)))]
            lines = sorted({line for text in every for line in text.splitlines() if line})
            path = self.folder / "tokenizer" / "tokenizer.model"
            self.tokenizer = train_tokenizer(lines, vocabulary, path, True, llama2c=True)
            run.file(path)
        with run.stage("packing"):
            self.stream = pack(training, self.tokenizer, self.folder / "corpus")
        run.file(self.stream.folder / "manifest.json")
        manifest = self.stream.manifest
        for name in ("documents", "bytes", "tokens"):
            run.metric(f"corpus.{name}", manifest[name], "count")
        run.metric("corpus.held_out_documents", len(self.held_out), "count")
        run.metric("tokenizer.pieces", len(self.tokenizer), "count")
        run.metric("tokenizer.bytes_per_token", size / manifest["tokens"], "")
        return (f"{manifest['documents']:,} documents, {size / 1e6:.1f} MB, "
                f"{manifest['tokens']:,} tokens of {size / manifest['tokens']:.2f} bytes; "
                f"{len(self.held_out):,} documents held out.")

    def dialogues(self, path: Path, all_turns: bool, parts: int, seed: int) -> str:
        """Load the dialogues and divide them into folds; says how many outgrow the window."""
        self.known = load_dialogues(self.run.file(path), all_turns)
        self.sizes = np.array([d.answer_bytes for d in self.known], float)
        self.items: dict[Form, list[Item]] = {
            "qa": [d.item(self.tokenizer) for d in self.known],
            "bare": [d.item(self.tokenizer, "bare") for d in self.known],
        }
        self.folds = folds(len(self.known), parts, seed)
        for fold in range(parts):
            refuse_overlap(*self._sides(fold))
        lengths = [len(item.ids) for item in self.items["qa"]]
        longer = sum(length > self.shape.context for length in lengths)
        self.run.metric("dialogues.count", len(lengths), "count")
        self.run.metric("dialogues.tokens", sum(lengths), "count")
        self.run.metric("dialogues.folds", parts, "count")
        self.run.metric("dialogues.longer_than_window", longer, "count", numerator=longer,
                        denominator=len(lengths))
        return (f"{len(lengths)} dialogues, {sum(lengths):,} tokens; {longer} of them are longer "
                f"than the window of {self.shape.context}.")

    def _sides(self, fold: int) -> tuple[list[str], list[str]]:
        """(training, held out): the texts of the dialogues outside and inside a fold."""
        here = set(self.folds[fold].tolist())
        texts = [dialogue.text() for dialogue in self.known]
        return ([t for i, t in enumerate(texts) if i not in here],
                [t for i, t in enumerate(texts) if i in here])

    # --- training ---------------------------------------------------------------------------------

    def _output(self, name: str, stream: Stream, settings: TrainingSettings) -> Path:
        base = self.models["base"].name if self.models else ""
        key = fingerprint(self.shape.model_dump(), settings.model_dump(), stream.key, base)
        return self.folder / f"{name}-{key}"

    def base(self, settings: TrainingSettings) -> Path:
        """Train the base model, and read held-out documents with it."""
        count = settings.steps * settings.batch_size * settings.gradient_accumulation
        data = Windows(self.stream, self.shape.context, count, settings.seed)
        with self.run.stage("base training"):
            folder = train_causal_lm(
                self.shape, data, settings, self._output("base", self.stream, settings),
                tokenizer=self.tokenizer.path, data_key=self.stream.key,
            )
        log = json.loads((folder / "training.json").read_text())
        self.models["base"], self.settings = folder, settings
        self.run.metric("base.parameters", log["parameters"], "count")
        self.run.metric("base.tokens", log["tokens"], "count")
        self.run.metric("base.steps", settings.steps, "count")
        self.run.metric("base.checkpoint.bytes", log["checkpoint_bytes"], "count")
        self.run.file(folder / "model.safetensors")
        return folder

    def tune(self, arm: Arm, fold: int, ablation: Collection[str] = ()) -> Path:
        """Fine-tune the base model on all folds but one, guarded; returns the model's folder.

        Batch size and the like are the base run's unless `ablation` names them.
        """
        base, name = self.models["base"], f"{arm.name}.fold{fold}"
        guards.check_base(base, {
            **self.shape.model_dump(include=set(guards.SHAPE.values())),
            "vocabulary": len(self.tokenizer), "tokenizer": self.tokenizer.hash,
            "batch_size": arm.batch,
        }, ablation)
        texts, held_out = self._sides(fold)
        refuse_overlap(texts, held_out)
        stream = pack(texts, self.tokenizer, self.folder / f"dialogues.fold{fold}")
        settings = self.settings.model_copy(update={
            "steps": arm.steps, "batch_size": arm.batch, "learning_rate": arm.rate,
            "warmup_steps": arm.steps // 10, "checkpoint_every": max(arm.steps, 100),
            "log_every": max(1, arm.steps // 20), "seed": self.settings.seed + fold,
        })
        count = arm.steps * arm.batch * settings.gradient_accumulation
        data = Windows(stream, self.shape.context, count, settings.seed)
        self.models[name] = train_causal_lm(
            base, data, settings, self._output(name, stream, settings),
            tokenizer=self.tokenizer.path, data_key=stream.key,
        )
        return self.models[name]

    # --- measurements -----------------------------------------------------------------------------

    def _bits(self, folder: Path, items: Sequence[Item]) -> Bits:
        torch.set_num_threads(self.settings.threads)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return bits(model, items, self.shape.context)

    def read_documents(self, folder: Path, name: str, count: int) -> None:
        """Bits per byte of `count` held-out base documents."""
        chosen = self.held_out[:: max(1, len(self.held_out) // count)][:count]
        encoded = self.tokenizer.encode_all(chosen)
        items = [Item(ids, (np.arange(len(ids)) > 0).astype(np.float32)) for ids in encoded]
        sizes = np.array([len(document.encode()) for document in chosen], float)
        results.record_bits(self.run, f"{name}.documents.bits_per_byte",
                            self._bits(folder, items), sizes)

    def before_and_after(self, arm: Arm) -> pd.DataFrame:
        """The base model, and `arm` by fold, on answers that were held out; both forms."""
        self.main = arm
        found: dict[str, Bits] = {}
        updates = []
        with self.run.stage("cross-validation"):
            for fold in range(len(self.folds)):
                log = json.loads((self.tune(arm, fold) / "training.json").read_text())
                updates.append(log["relative_update"])
        with self.run.stage("reading answers"):
            for form, items in self.items.items():
                found[f"before.{form}"] = self._bits(self.models["base"], items)
                found[f"after.{form}"] = np.empty(len(items))
                for fold, here in enumerate(self.folds):
                    folder = self.models[f"{arm.name}.fold{fold}"]
                    found[f"after.{form}"][here] = self._bits(folder, [items[i] for i in here])
        self.run.metric("after.relative_update", float(np.mean(updates)), "", n=len(updates))
        self.run.metric("after.tokens", log["tokens"], "count")
        self.before = found["before.qa"]
        rows = [{"condition": name, **results.record_bits(self.run, name, values, self.sizes)}
                for name, values in found.items()]
        for name, one, other in (
            ("after_minus_before.qa", "after.qa", "before.qa"),
            ("after_minus_before.bare", "after.bare", "before.bare"),
            ("bare_minus_qa.before", "before.bare", "before.qa"),
            ("bare_minus_qa.after", "after.bare", "after.qa"),
        ):
            results.record_bits(self.run, name, found[one] - found[other], self.sizes)
        self.table = pd.DataFrame(rows)
        return self.table.set_index("condition").round(4)

    def compare(self, arms: Sequence[tuple[str, Arm]], fold: int = 0) -> pd.DataFrame:
        """Each (label, arm) on one fold: change against the base model; twice the batch also
        against the base run's at the same rate."""
        rows, here, found = [], self.folds[fold], {}
        items, sizes = [self.items["qa"][i] for i in here], self.sizes[here]
        with self.run.stage("comparisons"):
            for label, arm in arms:
                ablation = ("batch_size",) if arm.batch != self.settings.batch_size else ()
                found[arm] = self._bits(self.tune(arm, fold, ablation), items)
                row = results.record_bits(self.run, f"{arm.name}.minus_before",
                                          found[arm] - self.before[here], sizes)
                rows.append({"batch": label, "learning rate": arm.rate, "steps": arm.steps, **row,
                             "arm": arm.name})
                if ablation:
                    small = Arm(arm.rate, self.main.batch, self.main.steps)
                    results.record_bits(self.run, f"{arm.name}.minus_small",
                                        found[arm] - found[small], sizes)
        self.compared = pd.DataFrame(rows)
        shown = self.compared.drop(columns="arm").round(4)
        shown["learning rate"] = [f"{arm.rate:g}" for _, arm in arms]  # 1e-05 rounds to nothing
        return shown.set_index(["batch", "learning rate"])

    def arms(self, rates: Sequence[float], claimed: Sequence[float]) -> list[tuple[str, Arm]]:
        """The main arm at other `rates`, and twice the batch at the `claimed` ones."""
        batch, steps = self.main.batch, self.main.steps
        found = [(f"{batch}", Arm(rate, batch, steps)) for rate in (*rates, self.main.rate)]
        for rate in claimed:
            found += [(f"{2 * batch}, equal tokens", Arm(rate, 2 * batch, steps // 2)),
                      (f"{2 * batch}, equal steps", Arm(rate, 2 * batch, steps))]
        return found

    def said(self, name: str) -> str:
        """A recorded difference in words."""
        found = self.run.record().metric(name)
        low, high = found.interval or (float("-inf"), float("inf"))
        side = "includes" if low <= 0 <= high else "excludes"
        return (f"{found.value:+.4f} bits per byte, interval [{low:+.4f}, {high:+.4f}], which "
                f"{side} zero")

    def batch_claim(self, rates: Sequence[float]) -> str:
        """The log's explanation at each rate, as a list."""
        lines = []
        for label, arm in self.arms([], rates)[1:]:
            lines.append(f"- Learning rate {arm.rate:g}, batch of {label}, against a batch of "
                         f"{self.main.batch}: {self.said(f'{arm.name}.minus_small')}.")
        return "\n".join(lines)

    def curves(self) -> plots.Drawn:
        """Losses of the base run, the main arm and every comparison on the first fold."""
        return plots.loss_curves({name.removesuffix(".fold0"): folder
                                  for name, folder in self.models.items()
                                  if name == "base" or name.endswith(".fold0")})

    # --- voice ------------------------------------------------------------------------------------

    def questions(self, count: int) -> list[str]:
        """Held-out questions, the last `count` of the first fold."""
        return [self.known[i].exchanges[0][0] for i in self.folds[0][-count:]]

    def memory(self, said: Sequence[str], run_length: int = 5) -> pd.DataFrame:
        """What the first fold's model knows by heart: answers seen and unseen, and `said`."""
        folder, here = self.models[f"{self.main.name}.fold0"], self.folds[0]
        seen = np.setdiff1d(np.arange(len(self.known)), here)
        chosen = seen[:: max(1, len(seen) // len(here))][: len(here)]
        trained = self._bits(folder, [self.items["qa"][i] for i in chosen])
        after = self._bits(folder, [self.items["qa"][i] for i in here])
        rows = {
            name: results.record_bits(self.run, f"memory.{name}", values, self.sizes[which])
            for name, values, which in (
                ("before.trained", self.before[chosen], chosen), ("after.trained", trained, chosen),
                ("before.held_out", self.before[here], here), ("after.held_out", after, here),
            )
        }
        results.record_gap(self.run, "memory.gap",
                           (trained - self.before[chosen], self.sizes[chosen]),
                           (after - self.before[here], self.sizes[here]))
        texts, held_out = self._sides(0)
        for name, found in (("runs", said), ("runs.held_out_dialogues", held_out)):
            shared, total = ngram_overlap(found, texts, run_length)
            self.run.metric(f"memory.{name}", shared / max(total, 1), "fraction",
                            numerator=shared, denominator=total)
        return pd.DataFrame(rows).T.round(4)

    def samples(self, gguf: Path, questions: Sequence[str], tokens: int, seed: int) -> list[str]:
        """One seeded answer to each question, as ``arianna-sample`` draws it by default, up to the
        next question."""
        said = []
        with Model(gguf) as model, Context(model, window=self.shape.context) as context:
            for number, question in enumerate(questions):
                texts = write(context, prompt(question), tokens, Sampling(seed=seed).nth(number))
                said.append("".join(until_question(texts)).strip())
        return said
