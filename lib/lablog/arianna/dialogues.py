"""The dialogues that fine-tuning reads: strict loading, the Q/A form, folds, shared words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lablog.text.datasets import Item
from lablog.text.tokenizer import Tokenizer

Form = Literal["qa", "bare"]
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Dialogue:
    """Exchanges (question, answer) in order; the log's form has one."""

    exchanges: tuple[tuple[str, str], ...]

    def parts(self, form: Form = "qa") -> list[tuple[str, float]]:
        """Text in consecutive parts, each with 1 if it is (part of) an answer, else 0.

        qa: ``Q: {user}\\nA: {assistant}``, the answer with its leading space; bare: the question
        and the same answer after it, without the marks.
        """
        parts = []
        for number, (question, answer) in enumerate(self.exchanges):
            start = "\n" if number else ""
            head = f"{start}Q: {question}\nA:" if form == "qa" else start + question
            parts += [(head, 0.0), (f" {answer}", 1.0)]
        return parts

    def text(self) -> str:
        """The whole in the Q/A form, ending in the blank line that joins dialogues."""
        return "".join(text for text, _ in self.parts()) + "\n\n"

    def item(self, tokenizer: Tokenizer, form: Form = "qa") -> Item:
        """Ids of the text after BOS, weight 1 for the answers' tokens and 0 for the others."""
        text, ids, weights = "", [tokenizer.bos], [0.0]
        for part, weight in self.parts(form):
            text += part
            longer = tokenizer.encode(text, bos=True)
            if longer[: len(ids)] != ids:  # no piece may span the border of an answer
                raise ValueError(f"a token spans the end of {text[: -len(part)][-20:]!r}")
            weights += [weight] * (len(longer) - len(ids))
            ids = longer
        return Item(np.array(ids, np.int32), np.array(weights, np.float32))

    @property
    def answer_bytes(self) -> int:
        """UTF-8 bytes of the answers, without the space in front."""
        return sum(len(answer.encode()) for _, answer in self.exchanges)


def _exchanges(line: str) -> list[tuple[str, str]]:
    turns = json.loads(line)
    if not isinstance(turns, list) or len(turns) < 2:
        raise ValueError("expected a list of a user's and an assistant's message, or more of them")
    for number, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, dict) else None
        if role != ROLES[number % 2]:
            raise ValueError(f"message {number + 1} has role {role!r}, expected "
                             f"{ROLES[number % 2]!r}")
        content = turn.get("content")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"the {role}'s message {number + 1} is {content!r}, expected text")
    if len(turns) % 2:
        raise ValueError("the last user's message has no answer")
    said = [turn["content"].strip() for turn in turns]
    return list(zip(said[::2], said[1::2], strict=True))


def load_dialogues(path: Path, all_turns: bool = False) -> list[Dialogue]:
    """Read a JSONL file of dialogues, all of them or none.

    Of longer dialogues the first exchange is taken, with a warning that says of how many, or
    every one with `all_turns`. Raises FileNotFoundError; ValueError with file and line number for
    a line that is no UTF-8, no JSON, lacks a role, answers nothing or is empty, and for a file
    without any dialogue.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it holds the dialogues to fine-tune on")
    dialogues, longer = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            exchanges = _exchanges(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # of JSON and UTF-8 too
            raise ValueError(f"{path}, line {number}: {error}") from error
        longer += len(exchanges) > 1
        dialogues.append(Dialogue(tuple(exchanges if all_turns else exchanges[:1])))
    if not dialogues:
        raise ValueError(f"{path} holds no dialogue: expected one JSON list per line")
    if longer and not all_turns:
        warnings.warn(f"{longer} of {len(dialogues)} dialogues in {path.name} go on after the "
                      "first answer: only the first exchange is used (all_turns takes all)",
                      stacklevel=2)
    return dialogues


def folds(count: int, parts: int, seed: int) -> list[NDArray[np.int64]]:
    """Indices 0..count-1 in `parts` random disjoint sets of nearly equal size, each sorted."""
    if not 2 <= parts <= count:
        raise ValueError(f"{parts} folds of {count} dialogues: need 2 to {count}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    return [np.sort(part) for part in np.array_split(order, parts)]


def sides(dialogues: Sequence[Dialogue], fold: NDArray[np.int64]) -> tuple[list[str], list[str]]:
    """(training, held out): the texts of the dialogues outside and inside a fold, as indices."""
    here = set(fold.tolist())
    texts = [dialogue.text() for dialogue in dialogues]
    return ([text for i, text in enumerate(texts) if i not in here],
            [text for i, text in enumerate(texts) if i in here])


def last_questions(dialogues: Sequence[Dialogue], fold: NDArray[np.int64], count: int) -> list[str]:
    """First questions of the last `count` dialogues of a fold; ValueError if it has fewer."""
    if not 0 <= count <= len(fold):
        raise ValueError(f"{count} questions of a fold of {len(fold)} dialogues: need 0 to "
                         f"{len(fold)}")
    return [dialogues[i].exchanges[0][0] for i in fold[len(fold) - count :]]


def ngram_overlap(texts: Sequence[str], known: Sequence[str], n: int) -> tuple[int, int]:
    """(runs of `n` words of `texts` that occur in a text of `known`, all runs of `texts`)."""
    def runs(text: str) -> list[tuple[str, ...]]:
        words = text.casefold().split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    seen = {run for text in known for run in runs(text)}
    found = [run in seen for text in texts for run in runs(text)]
    return sum(found), len(found)
