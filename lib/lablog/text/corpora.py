"""Documents by source: dialogues as plain text (a turn a line), and prose for a base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

from lablog.files import data_file
from lablog.text import docstrings
from lablog.text.dialogues import generate, load_settings, render
from lablog.text.tokenizer import SPACE

SPEAKERS = {"user": "U", "assistant": "A", "system": "S"}


def documents(source: str, split: Literal["train", "test"], seed: int) -> Iterator[str]:
    """Dialogues of a source; the two splits never share one.

    arianna           the project's hand-written prose dialogues, every fifth of them for test;
    self_consistency  generated without end from `seed` (lablog.text.dialogues);
    ultrachat         HuggingFaceH4/ultrachat_200k from the Hub, its own splits, streamed.

    Raises ValueError for another name.
    """
    if source == "arianna":
        lines = data_file("arianna_conversations.jsonl").read_text(encoding="utf-8").splitlines()
        for index, line in enumerate(lines):
            if (index % 5 == 4) == (split == "test"):
                yield conversation(json.loads(line))
    elif source == "self_consistency":
        settings = load_settings()
        for index in count():
            held = generate(settings, seed, index, "train" if split == "train" else "held_out")
            yield render(held.turns)
    elif source == "ultrachat":
        from datasets import load_dataset  # heavy, and needed by the full profile only

        rows = load_dataset("HuggingFaceH4/ultrachat_200k", split=f"{split}_sft", streaming=True)
        for row in rows:
            yield conversation(row["messages"])
    else:
        raise ValueError(f"source = {source!r}, expected arianna, self_consistency or ultrachat")


def conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """Chat messages (role, content) as plain text, a turn a line."""
    return "".join(f"{SPEAKERS[m['role']]}: {' '.join(m['content'].split())}\n" for m in messages)


def base_documents(
    source: str, packages: Sequence[str] = (), files: Sequence[Path] = (), megabytes: float = 0
) -> list[str]:
    """Documents of a base corpus, then those of the user's text files (a paragraph each).

    `source` is ``docstrings`` (:func:`lablog.text.docstrings.documents` of `packages`), ``none``,
    or what `datasets.load_dataset` reads: a Hub name or a local folder with a ``text`` column,
    streamed up to `megabytes` (0: all). Raises ValueError for a file that is not UTF-8 or empty,
    and if there is no text at all.
    """
    if source == "docstrings":
        found = docstrings.documents(packages)
    elif source == "none":
        found = []
    else:
        from datasets import load_dataset  # heavy, and needed by this source only

        found, room = [], 1e6 * megabytes or float("inf")
        for row in load_dataset(source, split="train", streaming=True):
            room -= len(row["text"].encode())
            if room < 0:
                break
            found.append(row["text"])
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert "
                             "it") from error
        parts = [part.strip() for part in docstrings.PARAGRAPH.split(text)]
        if not any(parts):
            raise ValueError(f"{path} holds no text")
        found += [part for part in parts if part]
    if not found:
        raise ValueError(f"source {source!r} and {len(files)} files hold no document")
    return [text.replace(SPACE, " ") for text in found]  # as what it looks like
