"""How turns become tokens in a model's window, and how a commitment is injected meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lablog.commitment import rendering
from lablog.models.llama_cpp import Commitment, Context
from lablog.text.dialogues import Turn


@dataclass(frozen=True)
class Injection:
    """What is injected at each turn of a conversation: turn t gets ``commitments[t % n]``.

    One commitment is the experiment (sampled once); several are the control that draws a
    direction of the same norm anew for every turn and every forked question; none (or strength
    0) is the unmodified model.
    """

    commitments: tuple[Commitment, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether turns differ."""
        return len(self.commitments) > 1

    def turn(self, context: Context, number: int) -> None:
        """Set what turn `number` gets."""
        if not self.commitments:
            context.commit(None)
        elif number == 0 or self.changes:
            context.commit(self.commitments[number % len(self.commitments)])

    def questions(self, context: Context, numbers: Mapping[int, int]) -> None:
        """Give questions that are asked together, one a sequence, what their numbers get.

        Only an injection that changes does anything: each question is then a turn of its own.
        """
        if self.changes:
            for sequence, number in numbers.items():
                chosen = self.commitments[number % len(self.commitments)]
                context.commit(chosen, sequence=sequence)

    def asked(self, context: Context, sequences: Iterable[int]) -> None:
        """Take back what :meth:`questions` gave to `sequences`."""
        if self.changes:
            for sequence in sequences:
                context.commit(None, sequence=sequence)


class Speech:
    """A context together with the way in which its model is spoken to.

    chat: ``plain`` (one turn a line, ``U:`` and ``A:``, for any model) or ``llama2`` (the
    instruction format of Llama-2-Chat).
    """

    def __init__(self, context: Context, chat: str = "plain") -> None:
        rendering.check_chat(chat)
        self.context, self.model, self.chat = context, context.model, chat
        self._encode = lru_cache(maxsize=65536)(self._encode_uncached)

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        special = self.chat == "llama2"
        return tuple(self.model.tokenize(text, bos=True, special=special))

    def render(self, turns: Sequence[Turn]) -> str:
        """Turns as the text that the model reads."""
        return rendering.render(turns, self.chat)

    def history(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of finished turns."""
        return list(self._encode(self.render(turns)))

    def prompt(self, turns: Sequence[Turn], stem: str = "") -> list[int]:
        """Tokens up to where the assistant speaks (having begun with `stem`)."""
        return list(self._encode(rendering.asked(turns, self.chat, stem)))

    def word_probabilities(
        self, last: Mapping[int, np.ndarray], words: Sequence[str]
    ) -> dict[int, np.ndarray]:
        """P(word | content), lower-case or capitalised, for each sequence, float64 [words].

        `last` holds the logits [vocabulary] behind each sequence's content, a prompt. Words of
        several tokens are decoded behind all sequences together and forgotten again.
        """
        probe = [Turn("U", "is it?", "is_it")]
        first = dict(zip(last, _log_softmax(np.stack(list(last.values()))), strict=True))
        result = {s: np.zeros(len(words)) for s in last}
        for index, word in enumerate(words):
            for tokens in self.continuations(probe, "", (word, word.capitalize())):
                scores = {s: row[tokens[0]] for s, row in first.items()}
                if len(tokens) > 1:
                    lengths = {s: len(self.context.tokens[s]) for s in last}
                    rows = self.context.decode(dict.fromkeys(last, tokens[:-1]), "all")
                    for s in last:
                        steps = _log_softmax(rows[s])
                        scores[s] += steps[np.arange(len(steps)), tokens[1:]].sum()
                        self.context.rewind(s, lengths[s])
                for s, score in scores.items():
                    result[s][index] += np.exp(score)
        return result

    def continuations(self, turns: Sequence[Turn], stem: str,
                      values: Sequence[str]) -> list[list[int]]:
        """Tokens of each value behind the prompt with `stem`.

        Raises ValueError where the tokenizer joins the prompt's end with a value.
        """
        prompt = self.prompt(turns, stem)
        longer = [self.prompt(turns, f"{stem} {value}".strip()) for value in values]
        kept, tokens = rendering.continuations(prompt, longer)
        if kept < len(prompt):
            raise ValueError(f"this tokenizer joins {stem or 'the prompt'!r} with the word behind "
                             f"it ({', '.join(values)}): the window cannot be continued")
        return tokens

    def scores(
        self,
        last: Mapping[int, np.ndarray],
        continuations: Mapping[int, Sequence[Sequence[int]]],
    ) -> dict[int, np.ndarray]:
        """log P(continuation | content) for each sequence's continuations, float64 [n].

        `last` holds the logits [vocabulary] behind each sequence's content. Continuations of
        several tokens are decoded together, in the n sequences behind each, which then have its
        commitment for their own.
        """
        first = dict(zip(last, _log_softmax(np.stack(list(last.values()))), strict=True))
        result = {s: np.array([first[s][tokens[0]] for tokens in several])
                  for s, several in continuations.items()}
        longer = {}
        for sequence, several in continuations.items():
            for offset, tokens in enumerate(several):
                if len(tokens) > 1:
                    copy = sequence + 1 + offset
                    self.context.fork(sequence, [copy])
                    own = self.context.committed(sequence)
                    if own is not self.context.committed(copy):
                        self.context.commit(own, sequence=copy)
                    longer[copy] = (sequence, offset, tokens)
        rows = self.context.decode({s: tokens[:-1] for s, (_, _, tokens) in longer.items()}, "all")
        for copy, (sequence, offset, tokens) in longer.items():
            steps = _log_softmax(rows[copy])
            result[sequence][offset] += steps[np.arange(len(steps)), tokens[1:]].sum()
        return result


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))
