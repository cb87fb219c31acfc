"""What of notebook 06 goes into its record, and Arianna's mandated report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lablog.arianna.bits_per_byte import BitsPerByte
from lablog.arianna.dialogues import ngram_overlap
from lablog.arianna.finetuning import Base, training_log
from lablog.run import Run
from lablog.text.datasets import Item
from lablog.text.packing import Stream
from lablog.text.tokenizer import Tokenizer


def record_corpus(run: Run, stream: Stream, held_out: Sequence[str], tokenizer: Tokenizer) -> None:
    """Size of the base corpus, and what of it is held out."""
    manifest = stream.manifest
    run.file(stream.folder / "manifest.json")
    for name in ("documents", "bytes", "tokens"):
        run.metric(f"corpus.{name}", manifest[name], "count")
    run.metric("corpus.held_out_documents", len(held_out), "count")
    run.metric("tokenizer.pieces", len(tokenizer), "count")
    run.metric("tokenizer.bytes_per_token", manifest["bytes"] / manifest["tokens"], "")


def record_dialogues(run: Run, items: Sequence[Item], folds: int, context: int) -> None:
    """Count and tokens of the dialogues, and how many outgrow a window of `context` tokens."""
    lengths = [len(item.ids) for item in items]
    longer = sum(length > context for length in lengths)
    run.metric("dialogues.count", len(lengths), "count")
    run.metric("dialogues.tokens", sum(lengths), "count")
    run.metric("dialogues.folds", folds, "count")
    run.metric("dialogues.longer_than_window", longer, "count", numerator=longer,
               denominator=len(lengths))


def record_base(run: Run, base: Base) -> None:
    """Size and length of the base run."""
    log = training_log(base.folder)
    run.metric("base.parameters", log["parameters"], "count")
    run.metric("base.tokens", log["tokens"], "count")
    run.metric("base.steps", base.settings.steps, "count")
    run.metric("base.checkpoint.bytes", log["checkpoint_bytes"], "count")
    run.file(base.folder / "model.safetensors")


def record_updates(run: Run, folders: Sequence[Path]) -> None:
    """Mean relative change of the weights in some fine-tunings, and the tokens of each."""
    logs = [training_log(folder) for folder in folders]
    updates = [log["relative_update"] for log in logs]
    run.metric("after.relative_update", float(np.mean(updates)), "", n=len(updates))
    run.metric("after.tokens", logs[-1]["tokens"], "count")


def record_bits(run: Run, found: Mapping[str, BitsPerByte]) -> None:
    """Bits per byte, or differences of it, by the name of their metric."""
    for name, each in found.items():
        run.metric(name, each.value, "bits/byte", interval=each.interval, n=each.n)


def record_overlap(run: Run, name: str, texts: Sequence[str], known: Sequence[str],
                   words: int) -> None:
    """Share of runs of `words` words in `texts` that occur in a text of `known`."""
    shared, total = ngram_overlap(texts, known, words)
    run.metric(name, shared / max(total, 1), "fraction", numerator=shared, denominator=total)


def record_sizes(run: Run, exported: Mapping[str, Path]) -> None:
    """Bytes of each export; of the Hugging Face folder, of its weights."""
    for kind, path in exported.items():
        file = path if path.is_file() else path / "model.safetensors"
        run.metric(f"export.{kind}.bytes", file.stat().st_size, "count")
