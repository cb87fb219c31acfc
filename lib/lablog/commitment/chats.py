"""Chats from the Hub (Guanaco and its like) as conversations with a prefix (lab log A5)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from torch.utils.data import Dataset

from lablog.commitment.conversations import Conversation, conversation
from lablog.commitment.rendering import SAID, Rendering
from lablog.text.chat_tokenizer import AnyTokenizer
from lablog.text.datasets import Item
from lablog.text.dialogues import Turn, settings_for

TURN = re.compile(r"### (Human|Assistant):|(<s>)?\s*\[INST\]|\[/INST\]|</s>")


def exchanges(text: str) -> list[tuple[str, str]]:
    """Questions and answers of a chat in Guanaco's (``### Human: … ### Assistant: …``) or Llama
    2's form (``[INST] … [/INST] …``); a last question without an answer is left out."""
    parts: list[tuple[bool, str]] = []
    marks = list(TURN.finditer(text))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        said = text[mark.end() : following.start() if following else None].strip()
        if said:
            parts.append((mark.group().endswith(("Human:", "[INST]")), said))
    return [(asked, answered) for (human, asked), (other, answered)
            in pairwise(parts) if human and not other]


class Chats(Dataset[Conversation]):
    """Chats of two exchanges and more: the first is the prefix, the decoder sees the others.

    A chat's weights add up to 1 (mean cross-entropy of the assistant's tokens). Chats that do not
    fit `window` tokens are left out; ValueError when none is left.
    """

    def __init__(self, texts: Iterable[str], tokenizer: AnyTokenizer, window: int,
                 chat: str = "llama2") -> None:
        self.rendering = Rendering(tokenizer, chat, settings_for(chat).chat.system)
        chats = (exchanges(text) for text in texts)
        made = [(self.item(told[:1]), self.item(told[1:])) for told in chats if len(told) > 1]
        self.chats = [pair for pair in made if max(len(item.ids) for item in pair) <= window]
        if not self.chats:
            raise ValueError(f"none of the chats has two exchanges or more, and at most {window} "
                             "tokens: choose another data set")

    def item(self, chat: list[tuple[str, str]]) -> Item:
        """Tokens of some exchanges, and weights of the answers."""
        turns = [Turn("U" if number == 0 else "A", text, "chat")
                 for exchange in chat for number, text in enumerate(exchange)]
        ids, kinds = self.rendering.tokens(turns, last=True)
        own = (kinds == SAID).astype(np.float32)
        return Item(ids, own / own.sum())

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> Conversation:
        prefix, rest = self.chats[index]
        return conversation(prefix, [rest])


def from_hub(name: str, tokenizer: AnyTokenizer, window: int, split: str,
             chat: str = "llama2") -> Chats:
    """The column ``text`` of a data set on the Hub, or of a local folder of Parquet or JSON files.

    Raises ValueError when it cannot be loaded or has no such column.
    """
    return Chats(texts(name, split), tokenizer, window, chat)


@cache
def chats_hash(name: str) -> str:
    """SHA-256 over the texts of a data set that is trained on; read once in a process."""
    digest = hashlib.sha256()
    for text in texts(name, "train"):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def texts(name: str, split: str) -> Sequence[str]:
    """The column ``text``, as `from_hub` has it."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the data set {name!r} ({split}) cannot be loaded: {error}; check its "
                         "name and the network, or give the path of a local copy") from error
    if "text" not in rows.column_names:
        raise ValueError(f"the data set {name!r} has no column `text`, only {rows.column_names}")
    return list(rows["text"])
