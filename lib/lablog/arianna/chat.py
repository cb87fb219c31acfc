"""Speaking with the model in its form: ``Q: {user}\\nA: {assistant}``, a blank line between two."""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

from lablog.models.llama_cpp import Context, Model, Sampling, stream

Text = Generator[str, None, None]  # as it comes; closing it stops the model
FORM = re.compile(r"Q: \S.*\nA:(?: .*\S)?", re.DOTALL)  # the answer may have begun
NEXT_QUESTION = re.compile(r"\s*\nQ:")
MAYBE_NEXT = re.compile(r"\s*(?:\nQ?)?\Z")


def prompt(question: str) -> str:
    """The prompt that asks `question`."""
    return f"Q: {question}\nA:"


def warn_of_form(text: str) -> bool:
    """Warn (UserWarning) if a prompt is not of the form that fine-tuning taught; say if it is."""
    fits = FORM.fullmatch(text) is not None
    if not fits:
        shown = text if len(text) <= 60 else text[:60] + "…"
        warnings.warn(f"the prompt {shown!r} is not of the form 'Q: …\\nA:' (no space at its end), "
                      "which is all that fine-tuning taught: expect worse text", stacklevel=3)
    return fits


def write(context: Context, text: str, count: int, sampling: Sampling) -> Text:
    """Stream up to `count` tokens after the prompt `text`, in pieces that are whole characters.

    Ends early with the text or with the window. At once warns of a prompt that is not of the
    form, and raises ValueError for one that the window does not hold.
    """
    warn_of_form(text)
    tokens = context.model.tokenize(text, bos=True)
    if not 0 < len(tokens) <= context.window:  # none: a model without BOS, and no text
        raise ValueError(f"the prompt has {len(tokens)} tokens and the model's window holds "
                         f"{context.window}: {'shorten it' if tokens else 'write something'}")
    return _written(context, tokens, count, sampling)


def _written(context: Context, tokens: list[int], count: int, sampling: Sampling) -> Text:
    context.prefill({0: tokens})
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in stream(context, count, sampling):
        yield decoder.decode(context.model.piece(token))
    yield decoder.decode(b"", final=True)


def until_question(texts: Iterable[str]) -> Text:
    """Pass on `texts` as they come, up to the next ``Q:`` and the white space before it."""
    held = ""
    for text in texts:
        held += text
        if end := NEXT_QUESTION.search(held):
            yield held[: end.start()]
            return
        maybe = MAYBE_NEXT.search(held)
        safe = maybe.start() if maybe else len(held)
        yield held[:safe]
        held = held[safe:]
    yield held.rstrip()


def answers(gguf: Path, questions: Sequence[str], count: int, seed: int) -> list[str]:
    """An answer of up to `count` tokens to each question, by itself, up to the next question.

    Drawn as ``arianna-sample`` does by default, the first with `seed`, each next with one more.
    Errors are those of :func:`write`.
    """
    said = []
    with Model(gguf) as model, Context(model, window=model.window) as context:
        for number, question in enumerate(questions):
            texts = write(context, prompt(question), count, Sampling(seed=seed).nth(number))
            said.append("".join(until_question(texts)).strip())
    return said


class Chat:
    """A conversation. Each question is asked after all exchanges so far; when these leave too
    little room for an answer, the oldest are forgotten first."""

    def __init__(self, context: Context, count: int, sampling: Sampling) -> None:
        """Answers have up to `count` tokens; half a window at most is kept free for each."""
        self.context, self.count, self.sampling = context, count, sampling
        self.room = min(count, context.window // 2)
        self.exchanges: list[tuple[str, str]] = []
        self.asked = self.forgotten = 0

    def ask(self, question: str) -> Text:
        """Stream the answer; `forgotten` then says how many exchanges were dropped for it.

        An answer that is not read to its end (close the iterator) remains as far as it was read.
        ValueError, and nothing is forgotten, for a question that is too long by itself.
        """
        for first in range(len(self.exchanges) + 1):
            kept = [f"{prompt(q)} {a}".rstrip() for q, a in self.exchanges[first:]]
            text = "\n\n".join([*kept, prompt(question)])
            size = len(self.context.model.tokenize(text, bos=True))
            if size + self.room <= self.context.window:
                self.forgotten, self.exchanges = first, self.exchanges[first:]
                return self._answer(question, text)
        raise ValueError(
            f"the question has {size} tokens; the model's window holds {self.context.window}, "
            f"{self.room} of them for the answer: ask a shorter one"
        )

    def _answer(self, question: str, text: str) -> Text:
        answer, self.asked = "", self.asked + 1
        written = write(self.context, text, self.count, self.sampling.nth(self.asked - 1))
        try:
            for part in until_question(written):
                answer += part
                yield part
        except BaseException:  # stopped, perhaps amid decoding: what the caches hold is unknown
            self.context.clear()
            raise
        finally:
            self.exchanges.append((question, answer.strip()))
