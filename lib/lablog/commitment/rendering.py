"""How turns become tokens: one way for training, for the probes, and for both engines.

Three ways of speaking exist. ``plain``: one turn a line, ``U: …`` and ``A: …``, for any model.
``llama2``: the instruction format of Llama-2-Chat, ``<s>[INST] … [/INST] … </s>`` an exchange.
``auto``: the model's own chat template, which llama.cpp applies to :func:`messages` and
:class:`Template` takes apart into turns.

A tokenizer may encode a word by itself and the same word behind other text in different tokens
(Llama 2's puts a space in front of everything). So nothing is ever encoded by itself: the tokens
of an answer are those by which the prompt with the answer differs from the prompt alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lablog.text import dialogues
from lablog.text.chat_tokenizer import AnyTokenizer, ChatTokenizer
from lablog.text.dialogues import Turn

Chat = Literal["plain", "llama2", "auto"]
CHATS = ("plain", "llama2", "auto")
ROLES = {"S": "system", "U": "user", "A": "assistant"}

# What a token is to the loss.
HEARD, SAID, DECISIVE = 0, 1, 2
Part = tuple[str, int, int]  # text, what it is to the loss, number of its turn in the fragment


def check_chat(chat: str) -> None:
    """ValueError unless `chat` is a way of speaking."""
    if chat not in CHATS:
        raise ValueError(f"chat = {chat!r}: expected one of {', '.join(CHATS)}")


def messages(turns: Sequence[Turn], system: str = "") -> list[tuple[str, str]]:
    """Turns as (role, text), behind one message of the system: `system`, and what turns of it
    say. None where that is nothing."""
    said = told_by_system(turns, system)
    return [*([("system", said)] if said else []),
            *((ROLES[turn.speaker], turn.text) for turn in turns if turn.speaker != "S")]


def told_by_system(turns: Sequence[Turn], system: str) -> str:
    """All that the system says in a window, as one text: `system`, and its turns."""
    return " ".join(filter(None, [system, *(turn.text for turn in turns if turn.speaker == "S")]))


def render(turns: Iterable[Turn], chat: str) -> str:
    """Turns as the text that a model reads, behind BOS."""
    if chat == "plain":
        return dialogues.render(turns)
    text = ""
    for turn in turns:
        space = " " if text.endswith("[/INST]") else ""
        text += f"[INST] {turn.text} [/INST]" if turn.speaker == "U" else (
            f"{space}{turn.text} </s><s>")
    return text


def asked(turns: Iterable[Turn], chat: str, stem: str = "") -> str:
    """The text up to where the assistant speaks, having begun with `stem`."""
    text = render(turns, chat) + ("A:" if chat == "plain" else "")
    return f"{text} {stem}" if stem else text


def continuations(prompt: Sequence[int],
                  longer: Sequence[Sequence[int]]) -> tuple[int, list[list[int]]]:
    """How many tokens of `prompt` all of `longer` share with it, and what follows in each.

    Fewer than the prompt has only where a tokenizer joins its end with what follows.
    """
    cut = min((_common(prompt, ids) for ids in longer), default=len(prompt))
    return cut, [list(ids[cut:]) for ids in longer]


def check_distinct(words: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
    """ValueError naming two words that are the same tokens."""
    seen: dict[tuple[int, ...], str] = {}
    for word, ids in zip(words, tokens, strict=True):
        other = seen.setdefault(tuple(ids), word)
        if other is not word:
            raise ValueError(f"{other!r} and {word!r} are the same tokens {list(ids)} to this "
                             "tokenizer, so an answer cannot be told from the other: choose a "
                             "model whose tokenizer has bytes, or another word")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class Prompt:
    """Token ids, the number of the exchange that each belongs to, and whether the model said it.

    tail: the text of the tokens from number `start` on, which an answer is encoded with; joint:
    what stands between the two.
    """

    ids: np.ndarray
    exchange: np.ndarray
    own: np.ndarray
    tail: str = ""
    start: int = 0
    joint: str = " "

    def to(self, length: int, more: Sequence[int] = ()) -> Prompt:
        """The first `length` tokens, then `more`, which the model says in the same exchange."""
        return Prompt(np.concatenate([self.ids[:length], np.array(more, self.ids.dtype)]),
                      np.concatenate([self.exchange[:length],
                                      np.full(len(more), self.exchange[-1])]),
                      np.concatenate([self.own[:length], np.full(len(more), True)]))


    def shared(self, other: Prompt) -> int:
        """How many tokens both begin with, in the same exchanges."""
        size = min(len(self.ids), len(other.ids))
        differ = (self.ids[:size] != other.ids[:size]) | (
            self.exchange[:size] != other.exchange[:size])
        return int(differ.argmax()) if differ.any() else size

    def behind(self, length: int) -> Prompt:
        """What follows the first `length` tokens."""
        return Prompt(self.ids[length:], self.exchange[length:], self.own[length:])


@dataclass(frozen=True)
class Fragment:
    """Text that is encoded as one, and whether EOS and the next BOS follow it.

    first: number of the turn with which it begins.
    """

    parts: tuple[Part, ...]
    closed: bool
    first: int = field(default=0, compare=False)


class Template:
    """A model's chat template, as the pieces that it makes of turns.

    Of a turn: what stands before its text, and what stands behind. That these do not depend on
    the turns around is asked of the template once (ValueError if they do): forks and windows are
    put together from pieces.
    """

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        if not isinstance(tokenizer, ChatTokenizer):
            raise ValueError("chat = auto needs a model with a chat template and tokenizer.json: "
                             "choose chat=plain or chat=llama2")
        mark, tell = "\u241f", tokenizer.chat
        self.pieces: dict[str, tuple[str, str]] = {}
        told = [("system", mark)]
        self.system = _around(tell(told), mark)
        for speaker in ("U", "A", "U", "A"):
            before, whole = tell(told), tell([*told, (ROLES[speaker], mark)])
            piece = _around(whole.removeprefix(before), mark)
            if not whole.startswith(before) or self.pieces.setdefault(speaker, piece) != piece:
                raise ValueError("this model's chat template writes a turn differently depending "
                                 "on the turns before it: choose chat=plain")
            told.append((ROLES[speaker], mark))
        asked = [("system", mark), ("user", mark)]
        self.answer = tell(asked, answer=True).removeprefix(tell(asked))
        if self.answer != self.pieces["A"][0]:
            raise ValueError("this model's chat template begins an answer differently from a turn "
                             "of the assistant: choose chat=plain")

    def fragments(self, turns: Sequence[Turn], decisive: re.Pattern[str] | None,
                  stem: str | None, system: str | None) -> list[Fragment]:
        """A fragment for each turn; before them the system's (None: it does not speak here), behind
        them the beginning of an answer with `stem` (None: none)."""
        found = []
        if system is not None and (said := told_by_system(turns, system)):
            begin, end = self.system
            found.append(Fragment(((f"{begin}{said}{end}", HEARD, 0),), False))
        for number, turn in enumerate(turns):
            if turn.speaker == "U":
                begin, end = self.pieces["U"]
                found.append(Fragment(((f"{begin}{turn.text}{end}", HEARD, 0),), False, number))
            elif turn.speaker == "A":
                begin, end = self.pieces["A"]
                found.append(Fragment(
                    ((begin, HEARD, 0), *_said(turn.text, end, 0, decisive)), False, number))
        if stem is not None:
            parts: tuple[Part, ...] = ((self.answer, HEARD, 0),)
            found.append(Fragment(parts + (((stem, SAID, 0),) if stem else ()), False, len(turns)))
        return found


def _around(text: str, mark: str) -> tuple[str, str]:
    begin, _, end = text.partition(mark)
    return begin, end


class Rendering:
    """A tokenizer together with the way in which its model is spoken to.

    A token that spans the border between two speakers belongs to the second. system: what the
    system says at the head of every window, if `chat` has a system.
    """

    def __init__(self, tokenizer: AnyTokenizer, chat: str = "plain", system: str = "") -> None:
        check_chat(chat)
        self.tokenizer, self.chat, self.system = tokenizer, chat, system
        self.template = Template(tokenizer) if chat == "auto" else None
        self._encode = lru_cache(maxsize=1 << 16)(self._encode_uncached)

    @cached_property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer: those that hold a line end, and EOS, but in ``plain``."""
        lines = {token for token in range(len(self.tokenizer))
                 if "\n" in self.tokenizer.decode([token])}
        return frozenset(lines | (set() if self.chat == "plain" else {self.tokenizer.eos}))

    def tokens(self, turns: Sequence[Turn], decisive: re.Pattern[str] | None = None,
               bos: bool = True, last: bool = False,
               ) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        """Ids of finished turns and of each what it is: `HEARD`, `SAID`, or said and `DECISIVE`.

        bos: whether BOS begins them. last: nothing follows, so no BOS of a next exchange either.
        """
        ids, kinds, _ = self._joined(self._fragments(turns, decisive, head=bos), bos)
        if last and turns and self.chat == "llama2" and ids[-1] == self.tokenizer.bos:
            ids, kinds = ids[:-1], kinds[:-1]
        return ids, kinds

    def prompt(self, turns: Sequence[Turn], stem: str | None = None, first: int = 0) -> Prompt:
        """`turns` behind BOS; with `stem` up to where the model speaks, having begun with it.

        `first` numbers the first exchange; every user's turn but the first begins the next.
        """
        fragments = self._fragments(turns, None, stem, head=True)
        ids, kinds, turn = self._joined(fragments, bos=True)
        speaks = [index > 0 and each.speaker == "U" for index, each in enumerate(turns)]
        number = first + np.cumsum([*speaks, False])
        tail, start = "", len(ids)
        if stem is None:
            if turns and self.chat == "llama2" and ids[-1] == self.tokenizer.bos:
                ids, kinds, turn = ids[:-1], kinds[:-1], turn[:-1]
        elif fragments and not fragments[-1].closed:
            tail = "".join(text for text, _, _ in fragments[-1].parts)
            start -= len(self._encode(fragments[-1])[0])
        joint = "" if self.chat == "auto" and not stem else " "
        return Prompt(ids.astype(np.int64), number[turn], kinds > HEARD, tail, start, joint)

    def continuations(self, prompt: Prompt,
                      words: Sequence[str]) -> tuple[int, list[list[int]]]:
        """How much of `prompt` stays when it is continued by any of `words`, and the tokens that
        then follow in each case; the prompt ends where the model speaks."""
        behind = prompt.tail + prompt.joint if prompt.tail else ""
        kept = prompt.ids[: prompt.start].tolist()
        return continuations(prompt.ids.tolist(), [
            kept + self._encode(Fragment(((f"{behind}{word}", SAID, 0),), False))[0].tolist()
            for word in words])

    def _joined(self, fragments: Sequence[Fragment], bos: bool,
                ) -> tuple[NDArray[np.int32], NDArray[np.int8], NDArray[np.int64]]:
        """Ids, kinds, and number of the turn of each token; BOS belongs to the first turn."""
        found = [self._encode(fragment) for fragment in fragments]
        head = int(bos and self.template is None)  # a template begins a text itself
        return (np.concatenate([np.array([self.tokenizer.bos] * head, np.int32),
                                *(ids for ids, _, _ in found)]),
                np.concatenate([np.full(head, HEARD, np.int8), *(kinds for _, kinds, _ in found)]),
                np.concatenate([np.zeros(head, np.int64),
                                *(turn + fragment.first for (_, _, turn), fragment
                                  in zip(found, fragments, strict=True))]))

    def _fragments(self, turns: Sequence[Turn], decisive: re.Pattern[str] | None,
                   stem: str | None = None, head: bool = False) -> list[Fragment]:
        """What is encoded as one: in ``plain`` a line, in ``llama2`` an exchange, else a turn;
        with `head` the system's before."""
        if self.template is not None:
            return self.template.fragments(turns, decisive, stem, self.system if head else None)
        fragments: list[Fragment] = []
        parts: list[Part] = []
        first = 0

        def end(closed: bool, following: int) -> None:
            nonlocal first
            if parts:
                fragments.append(Fragment(tuple(parts), closed, first))
            parts.clear()
            first = following

        for number, turn in enumerate(turns):
            at = number - first
            if self.chat == "plain":
                if turn.speaker == "U":
                    parts.append((f"U: {turn.text}\n", HEARD, at))
                else:
                    parts += [("A:", HEARD, at), *_said(f" {turn.text}", "\n", at, decisive)]
                end(False, number + 1)
            elif turn.speaker == "U":
                parts.append((f"[INST] {turn.text} [/INST]", HEARD, at))
            else:
                said = _said(f" {turn.text}", " ", at, decisive)
                if not parts:  # nobody asked
                    said[0] = (said[0][0][1:], *said[0][1:])
                parts += said
                end(True, number + 1)
        at = len(turns) - first
        if stem is not None and self.chat == "plain":
            parts.append(("A:", HEARD, at))
        if stem:
            parts.append((f" {stem}" if parts else stem, SAID, at))
        end(False, 0)
        return fragments

    def _encode_uncached(self, fragment: Fragment,
                         ) -> tuple[NDArray[np.int32], NDArray[np.int8], NDArray[np.int64]]:
        """Ids, kinds, and numbers of the turns within the fragment."""
        text = "".join(part for part, _, _ in fragment.parts)
        ids = self.tokenizer.encode(text)
        kinds, turn = np.zeros(len(ids), np.int8), np.zeros(len(ids), np.int64)
        begin, so_far = 0, ""
        for part, kind, at in fragment.parts:
            so_far += part
            whole = len(so_far) == len(text)
            stop = len(ids) if whole else _common(self.tokenizer.encode(so_far), ids)
            turn[begin:] = at
            # A token that also holds what follows a decisive word is decisive.
            span = slice(begin, max(stop, begin + (kind == DECISIVE)))
            kinds[span] = np.maximum(kinds[span], kind)
            begin = stop
        ends = [self.tokenizer.eos, self.tokenizer.bos] if fragment.closed else []
        return (np.array([*ids, *ends], np.int32),
                np.array([*kinds, *(SAID, HEARD)[: len(ends)]], np.int8),
                np.array([*turn, *[fragment.parts[-1][2]] * len(ends)], np.int64))


def _said(text: str, end: str, at: int, decisive: re.Pattern[str] | None) -> list[Part]:
    """What the model says, cut where a decisive word begins and ends."""
    parts, begin = [], 0
    for found in decisive.finditer(text) if decisive else ():
        parts += [(text[begin : found.start()], SAID, at), (found.group(), DECISIVE, at)]
        begin = found.end()
    return [part for part in (*parts, (text[begin:] + end, SAID, at)) if part[0]]
