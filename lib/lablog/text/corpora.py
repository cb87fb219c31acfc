"""Dialogues as plain text, by source: one document each, a turn a line (``U: ...``, ``A: ...``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Literal

from lablog.files import data_file
from lablog.text.dialogues import generate, load_settings, render

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
