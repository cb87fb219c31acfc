"""Does a model keep to what it said? Three probe families (lab log A4).

recall      a favourite is asked for, other talk follows, it is asked for again: does the second
            answer name the value that the first one named?
eviction    the same, but the window that is read for the second answer does not hold the first;
            it is encoded anew from text, so nothing survives in cached keys and values.
fork        the model says that it has chosen one of N things. The conversation is forked: "is it
            X?" for every X, and "what is it?". A model that holds a choice has
            Σ_X P(yes | is it X?) near 1 and the same X in both forms.

The model writes both answers of the first two families itself: the first at temperature 1 from
random numbers that belong to the item (the same under every commitment), the second greedily.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from lablog.commitment.window import Injection, Speech
from lablog.models.llama_cpp import generate_tokens
from lablog.text.dialogues import DialogueSettings, Draw, Turn, named_value

ANSWER_TOKENS = 16
STREAMS = {"recall": 101, "fork": 102}  # spawn keys apart from those of the dialogues' splits
Note = Literal["none", "text"]


@dataclass(frozen=True)
class RecallItem:
    """A favourite to be stated, `distractors` in between, and the question for it."""

    values: tuple[str, ...]
    question: Turn
    distractors: tuple[Turn, ...]
    requestion: Turn
    uniforms: np.ndarray  # [ANSWER_TOKENS], picks the first answer


@dataclass(frozen=True)
class ForkItem:
    """A hidden choice among `values`, and the questions for it."""

    values: tuple[str, ...]
    opening: tuple[Turn, ...]  # and other talk behind it, if the probes ask for some
    guesses: tuple[Turn, ...]  # "is it X?" for each value, in one phrasing
    naming: Turn  # "what is it?"
    stem: str  # how the answer begins, up to the value
    note: Turn  # the choice as a line of text, for the text-only baseline
    noted: int  # index of the value in `note`


@dataclass(frozen=True)
class Items:
    """The probes of one seed."""

    recall: tuple[RecallItem, ...]
    fork: tuple[ForkItem, ...]


@dataclass(frozen=True)
class Material:
    """What probes are made of, where not everything in the dialogue settings is to occur.

    topics: those asked about (empty: all of `settings`); gap: number of exchanges of other talk
    between the opening of a guessing game and its questions, and between a favourite and the
    question for it (None: none there, and ``settings.probe_gap`` here); noted: the first index of
    the values that a private note may state.
    """

    settings: DialogueSettings
    topics: tuple[str, ...] = ()
    gap: int | None = None
    noted: int = 0


def make_items(material: DialogueSettings | Material, seed: int, count: int) -> Items:
    """`count` items of each family; a pure function of its arguments."""
    if isinstance(material, DialogueSettings):
        material = Material(material)
    settings, recall, fork = material.settings, [], []
    topics = list(material.topics or settings.topics)
    spoken = settings.probe_gap if material.gap is None else (material.gap, material.gap)
    for index in range(count):
        draw = Draw(settings, seed, STREAMS["recall"], index)
        topic = draw.pick(topics)
        recall.append(RecallItem(
            tuple(settings.topics[topic]), draw.turn("U", "question", topic),
            tuple(draw.distractors(topic, draw.integer(*spoken))),
            draw.turn("U", "requestion", topic),
            np.array([draw.random() for _ in range(ANSWER_TOKENS)]),
        ))
        draw = Draw(settings, seed, STREAMS["fork"], index)
        topic = draw.pick(topics)
        values = tuple(settings.topics[topic])
        phrasing = draw.integer(0, len(settings.is_it) - 1)
        answer = draw.pick(settings.it_is)
        noted = draw.integer(material.noted, len(values) - 1)
        opening = draw.exchange("opening", "chosen", topic)
        guesses = tuple(draw.turn("U", "is_it", topic, value, phrasing) for value in values)
        fork.append(ForkItem(
            values, (*opening, *draw.distractors(topic, material.gap or 0)), guesses,
            draw.turn("U", "what_is_it", topic),
            answer.split("{value}")[0].format(topic=topic).strip(),
            draw.turn("A", "private", topic, values[noted]), noted,
        ))
    return Items(tuple(recall), tuple(fork))


@dataclass(frozen=True)
class RecallResult:
    """For each item the index of the value named first and second (−1: none named)."""

    first: np.ndarray
    again: np.ndarray
    evicted: np.ndarray

    @property
    def answered(self) -> np.ndarray:
        """Whether the first answer names a value, bool [items]."""
        return self.first >= 0

    @property
    def recalled(self) -> np.ndarray:
        """Whether the second answer, in the window, names the same value, bool [items]."""
        return self.answered & (self.first == self.again)

    @property
    def recalled_after_eviction(self) -> np.ndarray:
        """The same when the first answer is no longer in the window, bool [items]."""
        return self.answered & (self.first == self.evicted)


@dataclass(frozen=True)
class ForkResult:
    """For each item and value P(yes | is it X?) among yes and no, and P(X | what is it?) among
    the values, float64 [items, values]; and how much probability the model gives those words."""

    yes: np.ndarray
    named: np.ndarray
    answer_mass: np.ndarray  # [items]: mean over X of P(yes) + P(no) before normalisation
    noted: np.ndarray  # [items]: the index that the text note states

    @cached_property
    def yes_sum(self) -> np.ndarray:
        """Σ_X P(yes | is it X?), [items]: 1 if one value is held."""
        return self.yes.sum(axis=1)

    @property
    def yes_named(self) -> np.ndarray:
        """P(yes | is it X?) of the X that is named, [items]: a held choice is confirmed."""
        confirmed: np.ndarray = self.yes[np.arange(len(self.yes)), self.named.argmax(axis=1)]
        return confirmed

    @property
    def kept(self) -> np.ndarray:
        """Whether the value named is the one that the private line states, bool [items]."""
        return self.named.argmax(axis=1) == self.noted

    @cached_property
    def same(self) -> np.ndarray:
        """Whether both question forms favour the same X, bool [items]."""
        return self.yes.argmax(axis=1) == self.named.argmax(axis=1)


def value_index(text: str, values: Sequence[str]) -> int:
    """Index of the value that `text` names first, −1 if none."""
    name = named_value(text, values)
    return values.index(name) if name is not None else -1


def run_recall(speech: Speech, items: Sequence[RecallItem], injection: Injection,
               note: Note = "none") -> RecallResult:
    """Recall in the window and after eviction, for all items together.

    With note ``text`` a line that repeats the first answer heads the evicted window: the
    text-only baseline of a commitment.
    """
    model, context = speech.model, speech.context
    firsts: list[str] = []
    again: list[str] = []
    evicted: list[str] = []
    for begin in range(0, len(items), context.sequences):
        group = list(enumerate(items[begin : begin + context.sequences]))
        context.clear()
        injection.turn(context, 0)
        logits = context.prefill({i: speech.prompt([item.question]) for i, item in group})
        uniforms = {i: item.uniforms for i, item in group}
        written = generate_tokens(context, logits, ANSWER_TOKENS, model.stops(), uniforms)
        first = {i: model.detokenize(tokens).strip() for i, tokens in written.items()}
        firsts += first.values()
        histories = {
            i: [item.question, Turn("A", first[i], "answer"), *item.distractors]
            for i, item in group
        }
        again += _ask(speech, histories, {i: item.requestion for i, item in group}, injection, 1)
        for i, item in group:  # the window after eviction starts behind the first exchange
            kept = [Turn("A", first[i], "note")] if note == "text" else []
            histories[i] = [*kept, *item.distractors]
        context.clear()
        evicted += _ask(speech, histories, {i: item.requestion for i, item in group}, injection, 1)
    named = [
        np.array([value_index(text, item.values) for text, item in zip(texts, items, strict=True)])
        for texts in (firsts, again, evicted)
    ]
    return RecallResult(*named)


def _ask(speech: Speech, histories: dict[int, list[Turn]], questions: dict[int, Turn],
         injection: Injection, turn: int) -> list[str]:
    """Greedy answers to `questions` after `histories`; turn by turn if the injection changes."""
    context = speech.context
    if injection.changes:
        longest = max(len(history) for history in histories.values())
        for end in range(2, longest + 1, 2):
            injection.turn(context, turn + end // 2)
            speech.context.prefill({
                i: speech.history(history[:end]) for i, history in histories.items()
                if end <= len(history)
            })
        turn += longest // 2 + 1
    injection.turn(context, turn)
    logits = context.prefill(
        {i: speech.prompt([*history, questions[i]]) for i, history in histories.items()}
    )
    written = generate_tokens(context, logits, ANSWER_TOKENS, speech.model.stops())
    return [speech.model.detokenize(written[i]) for i in histories]


def run_fork(speech: Speech, items: Sequence[ForkItem], injection: Injection,
             note: Note = "none") -> ForkResult:
    """Every fork of every hidden choice; with note ``text`` the choice heads the window.

    An injection that changes gives every question of every fork a direction of its own, and what
    is decoded to score an answer has that of its question.
    """
    context = speech.context
    widest = max(len(item.values) for item in items) + 1
    room = context.sequences // widest
    if not room:
        raise ValueError(f"forking {widest - 1} ways needs {widest} sequences, the context has "
                         f"{context.sequences}")
    count = len(items)
    yes, mass = np.zeros((count, widest - 1)), np.zeros(count)
    named = np.zeros((count, widest - 1))
    for begin in range(0, count, room):
        group = items[begin : begin + room]
        context.clear()
        injection.turn(context, 0)
        histories = [([item.note] if note == "text" else []) + [*item.opening] for item in group]
        bases = [slot * widest for slot in range(len(group))]
        context.prefill({
            base: speech.history(history)
            for base, history in zip(bases, histories, strict=True)
        })
        asked: dict[int, list[int]] = {}
        for base, history, item in zip(bases, histories, group, strict=True):
            context.fork(base, range(base + 1, base + 1 + len(item.values)))
            asked[base] = speech.prompt([*history, item.naming], item.stem)
            for offset, guess in enumerate(item.guesses):
                asked[base + 1 + offset] = speech.prompt([*history, guess])
        # Question q of item i is turn 1 + i · widest + q of what is injected: none is asked twice.
        injection.questions(context, {s: 1 + begin * widest + s for s in asked})
        last = context.prefill(asked)
        forks = {base + 1 + x for base, item in zip(bases, group, strict=True)
                 for x in range(len(item.values))}
        answers = speech.word_probabilities({s: last[s][0] for s in forks}, ("yes", "no"))
        scores = speech.scores(
            {base: last[base][0] for base in bases},
            {base: speech.continuations([*history, item.naming], item.stem, item.values)
             for base, history, item in zip(bases, histories, group, strict=True)},
        )
        injection.asked(context, range(len(group) * widest))
        for row, (base, item) in enumerate(zip(bases, group, strict=True), begin):
            size = len(item.values)
            pairs = np.array([answers[base + 1 + x] for x in range(size)])
            yes[row, :size] = pairs[:, 0] / pairs.sum(axis=1)
            mass[row] = pairs.sum(axis=1).mean()
            named[row, :size] = np.exp(scores[base] - np.logaddexp.reduce(scores[base]))
    return ForkResult(yes, named, mass, np.array([item.noted for item in items]))
