"""Documents by source: dialogues as plain text (a turn a line), and prose for a base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

from lablog.files import data_file, repository
from lablog.text import docstrings
from lablog.text.dialogues import generate, load_settings, render
from lablog.text.tokenizer import SPACE

SPEAKERS = {"user": "U", "human": "U", "assistant": "A", "gpt": "A", "system": "S"}
CHAT_COLUMNS = ("messages", "conversations")  # where a data set's row keeps its chat
SUFFIXES = (".jsonl", ".txt")
ULTRACHAT = "8049631c405ae6576f93f445c6b8166f76f5505a"  # the commit that is read
LONG = 2000  # characters from which a part of a plain text is a document of its own


def documents(source: str, split: Literal["train", "test"], seed: int) -> Iterator[str]:
    """Dialogues of a source; the two splits never share one.

    arianna           the project's hand-written prose dialogues, every fifth of them for test;
    self_consistency  generated without end from `seed` (lablog.text.dialogues);
    ultrachat         HuggingFaceH4/ultrachat_200k from the Hub, its own splits, streamed;
    a path            :func:`user_documents`, every fifth of them for test.

    Raises ValueError for another name.
    """
    if source == "arianna" or source.endswith(SUFFIXES):
        path = data_file("arianna_conversations.jsonl") if source == "arianna" else (
            repository() / source)
        for index, document in enumerate(user_documents(path)):
            if (index % 5 == 4) == (split == "test"):
                yield document
    elif source == "self_consistency":
        settings = load_settings()
        for index in count():
            held = generate(settings, seed, index, "train" if split == "train" else "held_out")
            yield render(held.turns)
    elif source == "ultrachat":
        from datasets import load_dataset  # heavy, and needed by the full profile only

        rows = load_dataset("HuggingFaceH4/ultrachat_200k", split=f"{split}_sft", streaming=True,
                            revision=ULTRACHAT)
        for row in rows:
            yield conversation(row["messages"])
    else:
        raise ValueError(f"source = {source!r}, expected arianna, self_consistency, ultrachat, or "
                         f"a file ending in {' or '.join(SUFFIXES)}")


def user_documents(path: Path) -> list[str]:
    """The documents of a file: chats, one in each line of a ``.jsonl``, or a plain ``.txt``.

    A chat is a list of messages, or an object that has one in `CHAT_COLUMNS`; a message holds
    ``role`` and ``content``, or ``from`` and ``value``. A plain text is cut at blank lines; short
    parts are joined until a document has `LONG` characters.
    Raises FileNotFoundError for a missing file, and ValueError naming file and line for what is
    none of these, not UTF-8, or empty.
    """
    text = _read(path)
    if path.suffix == ".jsonl":
        found = [_chat(f"{path}, line {number}", line)
                 for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        found = []
        for part in _paragraphs(text):
            if found and len(found[-1]) < LONG:
                found[-1] += f"\n{part}"
            else:
                found.append(part)
    if not found:
        raise ValueError(f"{path} holds no text")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert "
                         "it") from error


def _paragraphs(text: str) -> list[str]:
    parts = (part.strip() for part in docstrings.PARAGRAPH.split(text))
    return [part for part in parts if part]


def _chat(where: str, line: str) -> str:
    """A line of chats as plain text; ValueError names `where` it stands."""
    try:
        chat: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number may be too long, brackets too deep
        raise ValueError(f"{where} is not JSON: {error}") from error
    if isinstance(chat, dict):
        chat = next((chat[name] for name in CHAT_COLUMNS if name in chat), None)
    if not isinstance(chat, list) or not chat:
        raise ValueError(f"{where} is no chat: expected a list of messages, alone or as "
                         f"{' or '.join(CHAT_COLUMNS)}")
    messages = []
    for message in chat:
        told = message if isinstance(message, dict) else {}
        role, content = told.get("role", told.get("from")), told.get("content", told.get("value"))
        if role not in SPEAKERS or not isinstance(content, str):
            raise ValueError(f"{where}: {message!r:.80} is no message: expected role and content "
                             f"(or from and value), a role being one of {', '.join(SPEAKERS)}")
        messages.append({"role": role, "content": content})
    return conversation(messages)


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
        parts = _paragraphs(_read(path))
        if not parts:
            raise ValueError(f"{path} holds no text")
        found += parts
    if not found:
        raise ValueError(f"source {source!r} and {len(files)} files hold no document")
    return [text.replace(SPACE, " ") for text in found]  # as what it looks like
