"""Does a model keep to what it said? The probe families (lab log A4), for any engine.

recall      a favourite is asked for, other talk follows, it is asked for again: does the second
            answer name the value that the first one named?
eviction    the same, but the window that is read for the second answer does not hold the first;
            it is encoded anew from text, so nothing survives in cached keys and values.
fork        the model says that it has chosen one of N things. The conversation is forked: "is it
            X?" for every X, and "what is it?". A model that holds a choice has
            Σ_X P(yes | is it X?) near 1 and the same X in both forms.
game        some guesses are answered before the conversation is forked: is there one answer?

The model writes both answers of the first two families itself: the first at temperature 1 from
random numbers that belong to the item (the same under every commitment), the second greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeVar

import numpy as np

from lablog.text.dialogues import (
    ChatSettings,
    DialogueSettings,
    Draw,
    Turn,
    article,
    named_value,
)

ANSWER_TOKENS = 16
Aid = Literal["note", "system", "instruction"]
"""Help by text, in place of a commitment. note, system: what was said or chosen, in a private line
of the model's at the head of the window or in the system's message; instruction: there, only the
wish that it keeps to it."""
STREAMS = {"recall": 101, "fork": 102}  # spawn keys apart from those of the dialogues' splits
Turns = Sequence[Turn]
Latents = TypeVar("Latents")
Under = TypeVar("Under", contravariant=True)


@dataclass(frozen=True)
class RecallItem:
    """A favourite to be stated, `distractors` in between, and the question for it."""

    values: tuple[str, ...]
    question: Turn
    distractors: tuple[Turn, ...]
    requestion: Turn
    uniforms: np.ndarray  # [ANSWER_TOKENS], picks the first answer
    stem: str  # how the first answer begins
    restem: str  # and the second
    chat: ChatSettings

    def head(self, aid: Aid | None, answer: Turn | None = None) -> list[Turn]:
        """What a window begins with; `answer`: that which it does not hold any more."""
        if aid == "instruction":
            return [Turn("S", self.chat.keep, "keep")]
        if aid is None or answer is None:
            return []
        return [answer if aid == "note" else Turn(
            "S", self.chat.told_answer.format(answer=answer.text), "told_answer")]


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
    ways: tuple[tuple[str, ...], ...]  # all values, in each form in which one may be said
    told: Turn  # the choice as the system states it
    keep: Turn  # the system's wish that it keeps to its choice

    def head(self, aid: Aid | None) -> list[Turn]:
        """What the window begins with."""
        return [] if aid is None else [
            {"note": self.note, "system": self.told, "instruction": self.keep}[aid]]


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
    topics, chat = list(material.topics or settings.topics), settings.chat
    spoken = settings.probe_gap if material.gap is None else (material.gap, material.gap)
    for index in range(count):
        draw = Draw(settings, seed, STREAMS["recall"], index)
        topic = draw.pick(topics)
        recall.append(RecallItem(
            tuple(settings.topics[topic]), draw.turn("U", "question", topic),
            tuple(draw.distractors(topic, draw.integer(*spoken))),
            draw.turn("U", "requestion", topic),
            np.array([draw.random() for _ in range(ANSWER_TOKENS)]),
            chat.stem.format(topic=topic), chat.restem.format(topic=topic), chat,
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
            tuple(zip(*map(chat.said, values), strict=True)),
            Turn("S", chat.told_choice.format(
                topic=topic, a=article(topic), value=draw.spelled(topic, values[noted])),
                "told_choice"),
            Turn("S", chat.keep, "keep"),
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
    named_mass: np.ndarray  # [items]: P(any value | what is it?)
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


class Speaker(Protocol[Under]):
    """A model that speaks, with whatever engine.

    under: the latents of all conversations of a call, in the engine's own terms: a direction or
    z* that is constant in a conversation, or drawn anew for every exchange and every forked
    question, or nothing. Results do not depend on earlier calls, but for rounding.
    """

    def say(self, conversations: Sequence[Turns], under: Under, tokens: int, first: int = 0,
            uniforms: np.ndarray | None = None, stems: Sequence[str] = ()) -> list[str]:
        """What it says, in at most `tokens` tokens, to the question that ends each conversation.

        first: number of the exchange with which the window begins. uniforms: float64
        [conversations, tokens] in [0, 1), which pick tokens at temperature 1; None is greedy.
        stems: how each answer begins, which it then does in what is returned too.
        """
        ...

    def agree(self, conversations: Sequence[Turns], under: Under) -> np.ndarray:
        """P(yes) and P(no), lower-case or capitalised, float64 [conversations, 2]."""
        ...

    def forks(self, histories: Sequence[Turns], items: Sequence[ForkItem],
              under: Under) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """The questions of each item behind its history, each question the only one: P(yes) and
        P(no) to every guess, float64 [values, 2], P(value | what is it?) among the values, and
        the probability of all values, said in any of the item's ways, together."""
        ...

    def read(self, texts: Sequence[Turns], under: Under) -> list[np.ndarray]:
        """Log probabilities of what follows each token of each text, float32 [tokens, vocabulary];
        of what follows the last, only if the engine computes it anyway."""
        ...


def recall(speaker: Speaker[Latents], items: Sequence[RecallItem], under: Latents,
           told: Callable[[list[Turns], np.ndarray], Latents] | None = None,
           aid: Aid | None = None) -> RecallResult:
    """Recall in the window and after eviction.

    told: the latents once the first exchange was said, from these exchanges and the index of the
    value that each names; None: as before. aid: help by text; what repeats the first answer heads
    the evicted window: what a commitment would have to equal.
    """
    def named(texts: Sequence[str]) -> np.ndarray:
        return np.array([value_index(text, item.values)
                         for text, item in zip(texts, items, strict=True)])

    begin = [item.head(aid) for item in items]
    said = speaker.say([[*head, item.question] for head, item in zip(begin, items, strict=True)],
                       under, ANSWER_TOKENS, uniforms=np.stack([item.uniforms for item in items]),
                       stems=[item.stem for item in items])
    begun: list[Turns] = [[*head, item.question, Turn("A", text, "answer")]
                          for head, item, text in zip(begin, items, said, strict=True)]
    first = named(said)
    if told is not None:
        under = told(begun, first)
    rest = [[*item.distractors, item.requestion] for item in items]
    stems = [item.restem for item in items]
    again = speaker.say([[*opened, *turns] for opened, turns in zip(begun, rest, strict=True)],
                        under, ANSWER_TOKENS, stems=stems)
    # The window after eviction starts behind the first exchange.
    evicted = speaker.say([[*item.head(aid, opened[-1]), *turns]
                           for item, opened, turns in zip(items, begun, rest, strict=True)],
                          under, ANSWER_TOKENS, first=1, stems=stems)
    return RecallResult(first, named(again), named(evicted))


def _histories(items: Sequence[ForkItem], aid: Aid | None) -> list[Turns]:
    """What the window of each hidden choice begins with."""
    return [[*item.head(aid), *item.opening] for item in items]


def fork(speaker: Speaker[Latents], items: Sequence[ForkItem], under: Latents,
         aid: Aid | None = None) -> ForkResult:
    """Every fork of every hidden choice, with help by text or without."""
    return _forked(speaker, _histories(items, aid), items, under)


def _forked(speaker: Speaker[Latents], histories: Sequence[Turns], items: Sequence[ForkItem],
            under: Latents) -> ForkResult:
    widest = max(len(item.values) for item in items)
    yes, named = np.zeros((len(items), widest)), np.zeros((len(items), widest))
    mass, naming = np.zeros(len(items)), np.zeros(len(items))
    for row, (pairs, chances, any_value) in enumerate(speaker.forks(histories, items, under)):
        yes[row, : len(pairs)] = pairs[:, 0] / pairs.sum(axis=1)
        mass[row] = pairs.sum(axis=1).mean()
        named[row, : len(chances)] = chances
        naming[row] = any_value
    return ForkResult(yes, named, mass, naming, np.array([item.noted for item in items]))


def game(speaker: Speaker[Latents], items: Sequence[ForkItem], under: Latents,
         guesses: np.ndarray, aid: Aid | None = None) -> np.ndarray:
    """Whether a game of several turns has exactly one answer, bool [items].

    After the fork protocol of Baldelli et al. (2026, arXiv 2601.06973): the model answers some
    different guesses, `guesses` int [items, turns]; then the conversation is forked into "what is
    it?" and "is it X?" for every X. Consistent: exactly the named value is confirmed in the forks,
    and the guesses before were answered as is true of it.
    """
    histories = _histories(items, aid)
    confirmed = np.zeros(guesses.shape, bool)
    for turn, chosen in enumerate(guesses.T):
        asked = [[*history, item.guesses[guess]]
                 for history, item, guess in zip(histories, items, chosen, strict=True)]
        pairs = speaker.agree(asked, under)
        confirmed[:, turn] = pairs[:, 0] > pairs[:, 1]
        said = speaker.say(asked, under, ANSWER_TOKENS)
        histories = [[*turns, Turn("A", text, "verdict")]
                     for turns, text in zip(asked, said, strict=True)]
    result = _forked(speaker, histories, items, under)
    named = result.named.argmax(axis=1)[:, None]
    one = (result.yes > 0.5) == (np.arange(result.yes.shape[1]) == named)
    earlier = confirmed == (guesses == named)
    found: np.ndarray = one.all(axis=1) & earlier.all(axis=1)
    return found
