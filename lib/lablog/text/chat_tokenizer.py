"""Tokenizers of models that were taught to chat: ``tokenizer.json``, and the model's template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer

from lablog.files import parsing, sha256_of
from lablog.text.tokenizer import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class ChatTokenizer:
    """The tokenizer of a Hugging Face folder, with the operations of `Tokenizer`, and its template.

    bos and eos are those of the folder; in most chat models they begin and end a turn.
    """

    def __init__(self, folder: Path) -> None:
        """Load it; FileNotFoundError without ``tokenizer.json``. No code of the folder is run."""
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json")
        self.folder = folder
        # The Rust library raises bare Exception for what it cannot read.
        with parsing(folder / "tokenizer.json", "a tokenizer that can be read", Exception):
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False)

    def __len__(self) -> int:
        """Number of token ids."""
        return len(self._tokenizer)

    @property
    def bos(self) -> int:
        """Id of the token that begins every text; ValueError if there is none."""
        return self._known(self._tokenizer.bos_token_id, "bos_token")

    @property
    def eos(self) -> int:
        """Id of the token that ends a text; ValueError if there is none."""
        return self._known(self._tokenizer.eos_token_id, "eos_token")

    def _known(self, token: int | None, name: str) -> int:
        if token is None:
            raise ValueError(f"{self.folder / 'tokenizer_config.json'} names no {name}: choose "
                             "chat=auto, or add it there")
        return int(token)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the files: equal hashes tokenise equally."""
        files = [self.folder / name for name in FILES if (self.folder / name).is_file()]
        return sha256_of(files, self.folder)

    def encode(self, text: str) -> list[int]:
        """Token ids of any text, in which control tokens may be written out."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, control tokens nothing."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Sequence[tuple[str, str]], answer: bool = False) -> str:
        """Messages, (role, text) each, in the model's template; with `answer` up to where the
        assistant speaks. ValueError if the model has no template."""
        if self._tokenizer.chat_template is None:
            raise ValueError(f"{self.folder} holds no chat template: choose chat=plain or "
                             "chat=llama2, or a model that was taught to chat")
        try:
            return str(self._tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in messages], tokenize=False,
                add_generation_prompt=answer))
        except TemplateError as error:
            raise ValueError(f"the chat template of {self.folder} refuses {[*messages]!r:.120} "
                             f"({error}): choose chat=plain") from error


AnyTokenizer = Tokenizer | ChatTokenizer


def tokenizer_of(folder: Path) -> AnyTokenizer:
    """The tokenizer of a model's folder, SentencePiece's if it has one."""
    if (folder / "tokenizer.model").is_file():
        return Tokenizer(folder / "tokenizer.model")
    return ChatTokenizer(folder)
