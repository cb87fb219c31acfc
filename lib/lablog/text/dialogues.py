"""Self-consistency dialogues, generated from a seed: does a speaker keep to what it said?

A dialogue is plain text, one turn a line, ``U: ...`` for the user and ``A: ...`` for the
assistant, so any language model can read it. Four kinds exist (lab log, experiment A):

favourite  a favourite is stated, other talk follows, it is asked for again;
unstated   a favourite is asked for "again" though nobody stated it;
hidden     the assistant chooses in secret, then answers "is it X?" and "what is it?";
compare    the same after a first private line that states the choice inside the window.

Everything is drawn from ``data/dialogues.yaml``. A dialogue is a pure function of
(settings, seed, split, index), whatever process draws it. The held-out split is disjoint by
construction: a value v whose dialogue opens with phrasing p is held out if and only if
(index of v + index of p) is a multiple of the number of phrasings, and every dialogue names its
value, so no held-out text can occur in training although every word of it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from annotated_types import Len
from pydantic import Field, model_validator

from lablog.files import data_file
from lablog.strict import Strict, validated
from lablog.yaml_file import read_yaml

Speaker = Literal["S", "U", "A"]
Kind = Literal["favourite", "unstated", "hidden", "compare"]
Split = Literal["train", "held_out"]
Form = Literal["training", "probe", "simple"]

Word = Annotated[str, Field(pattern=r"^[a-z]+$")]
Share = Annotated[float, Field(ge=0, le=1)]
Span = Annotated[tuple[int, int], Field(description="least and most, inclusive")]
Four = Annotated[list[str], Len(4)]
T = TypeVar("T")

ASKED = ("question", "requestion", "opening", "private", "is_it", "what_is_it")
"""Lists whose last phrasings are held out: what the user asks, and the private line."""
FIRST: dict[Kind, str] = {  # the phrasings in which a dialogue's topic comes up
    "favourite": "question",
    "unstated": "requestion",
    "hidden": "opening",
    "compare": "private",
}
PHRASES = {  # every list of phrasings and the slots that each of its entries must have
    "question": {"topic"},
    "answer": {"value"},
    "requestion": {"topic"},
    "reanswer": {"value"},
    "opening": {"topic"},
    "private": {"value"},
    "is_it": {"value"},
    "it_is": {"value"},
    "chosen": set(),
    "yes": set(),
    "no": set(),
    "what_is_it": set(),
}


class HeldOut(Strict):
    """What the training of a commitment never meets: the last `phrasings` of every list in
    `ASKED`, the last values of some topics (their number, by topic), and whole topics."""

    phrasings: Annotated[int, Field(ge=1)]
    values: dict[Word, Annotated[int, Field(ge=1)]]
    topics: Annotated[list[Word], Len(1)]


class ChatSettings(Strict):
    """What only a model that was taught to chat is told: by the system (`system` always, the
    others in the controls that help by text), and how its answers begin and may name a value."""

    names: tuple[str, ...] = ()  # topics whose values are written with a capital
    system: str = ""
    keep: str = ""  # asks it to keep to what it said
    told_answer: str = ""  # repeats the {answer} that it gave
    told_choice: str = ""  # states its choice: {topic}, {a} (its article), {value}
    stem: str = ""  # of the answer that states a favourite: {topic}
    restem: str = ""  # of the answer that repeats it: {topic}
    forms: Annotated[tuple[str, ...], Len(1)] = ("{value}",)  # {value}, {Value}; {a}: its article

    def said(self, value: str) -> tuple[str, ...]:
        """The ways in which an answer may name `value`."""
        return tuple(form.format(value=value, Value=value.capitalize(), a=article(value))
                     for form in self.forms)


class DialogueSettings(Strict):
    """Contents of ``data/dialogues.yaml``; each field is explained there."""

    topics: Annotated[dict[Word, Annotated[list[Word], Len(12)]], Len(8)]
    question: Four
    answer: Four
    requestion: Four
    reanswer: Four
    opening: Four
    chosen: Four
    private: Four
    is_it: Four
    yes: Four
    no: Four
    what_is_it: Four
    it_is: Four
    ack: Four
    fillers: dict[Word, Annotated[list[str], Len(2)]]
    distractors: Annotated[list[tuple[str, Literal["ack"] | list[str]]], Len(30)]
    mix: dict[Kind, Share]
    restatements: Span
    gap: Span
    probe_gap: Span
    probe_share: Share
    guesses: Span
    true_guess: Share
    announced: Share
    held_out: HeldOut
    recipes: dict[str, dict[str, Any]]  # read by lablog.models.offline
    chat: ChatSettings = ChatSettings()

    @property
    def personas(self) -> int:
        """How many personas there are: number i holds value number i of every topic."""
        return max(map(len, self.topics.values()))

    @model_validator(mode="after")
    def _check(self) -> DialogueSettings:
        values = list(chain.from_iterable(self.topics.values()))
        if twice := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"topics: {sorted(twice)} occur twice; every value must be unique")
        usual = {"topic", "a", "value", "values"}
        for name, needed in PHRASES.items():
            for phrase in getattr(self, name):
                slots = _slots(phrase)
                if not needed <= slots <= usual:
                    raise ValueError(
                        f"{name}: {phrase!r} has slots {sorted(slots)}, expected at least "
                        f"{sorted(needed)} and no other than {sorted(usual)}"
                    )
        allowed = {"other", *self.fillers}
        for user, answers in self.distractors:
            for phrase in [user, *(answers if answers != "ack" else [])]:
                if not _slots(phrase) <= allowed:
                    raise ValueError(f"distractors: {phrase!r} has slots outside {sorted(allowed)}")
        for name in ("restatements", "gap", "probe_gap", "guesses"):
            least, most = getattr(self, name)
            if not 0 <= least <= most:
                raise ValueError(f"{name}: [{least}, {most}] is not [least, most]")
        held = self.held_out
        if wrong := sorted({*held.topics, *held.values} - set(self.topics)):
            raise ValueError(f"held_out: {wrong} are no topics; they are {sorted(self.topics)}")
        if both := sorted(set(held.topics) & set(held.values)):
            raise ValueError(f"held_out: {both} are held out whole and in part; choose one")
        for topic, count in held.values.items():
            if not count <= len(self.topics[topic]) - 2:
                raise ValueError(f"held_out: values: {topic} = {count} leaves fewer than two of "
                                 f"{len(self.topics[topic])} values to train on")
        for name in ASKED:
            if not held.phrasings < len(getattr(self, name)):
                raise ValueError(f"held_out: phrasings = {held.phrasings} leaves none of "
                                 f"{len(getattr(self, name))} in {name}")
        if not sum(self.mix.values()) > 0:
            raise ValueError(f"mix: {self.mix} leaves nothing to generate")
        return self


def trained_part(settings: DialogueSettings) -> DialogueSettings:
    """The settings without what is held out: all that the training of a commitment may meet."""
    held = settings.held_out
    topics = {topic: values[: len(values) - held.values.get(topic, 0)]
              for topic, values in settings.topics.items() if topic not in held.topics}
    phrases = {name: getattr(settings, name)[: -held.phrasings] for name in ASKED}
    return settings.model_copy(update={"topics": topics, **phrases})


def new_phrasings(settings: DialogueSettings) -> DialogueSettings:
    """The settings with the phrasings of `ASKED` that are held out, and no others."""
    phrases = {name: getattr(settings, name)[-settings.held_out.phrasings :] for name in ASKED}
    return settings.model_copy(update=phrases)


def things(settings: DialogueSettings, number: int) -> DialogueSettings:
    """`settings` with one topic, `thing`, of so many values of all topics, taken in turn.

    Talk that mentions a value of another topic is left out. Raises ValueError for more values
    than there are.
    """
    flat = [value for group in zip_longest(*settings.topics.values())
            for value in group if value is not None]
    if not 2 <= number <= len(flat):
        raise ValueError(f"values = {number}: the dialogues have 2 to {len(flat)} to choose from")
    talk = [line for line in settings.distractors if "{other}" not in str(line)]
    return settings.model_copy(update={"topics": {"thing": flat[:number]}, "distractors": talk})


def _slots(phrase: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(phrase) if name is not None}


@cache
def settings_for(chat: str) -> DialogueSettings:
    """What a model is asked that is spoken to in this way."""
    return load_settings(data_file("questions.yaml") if chat == "auto" else None)


def load_settings(path: Path | None = None) -> DialogueSettings:
    """Read and validate a settings file; by default ``data/dialogues.yaml``, which is read once.

    Raises FileNotFoundError, or ValueError naming file, key and value.
    """
    return _read_once() if path is None else _read(path)


@cache
def _read_once() -> DialogueSettings:
    return _read(data_file("dialogues.yaml"))


def _read(path: Path) -> DialogueSettings:
    return validated(DialogueSettings, read_yaml(path), str(path))


@dataclass(frozen=True, slots=True)
class Turn:
    """One line of a dialogue; `role` names the list of phrasings that it came from."""

    speaker: Speaker
    text: str
    role: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns that keep to one `value` of one `topic`; `opening` is the index of the phrasing
    with which the topic comes up, which together with the value decides the split."""

    kind: Kind
    topic: str
    value: str
    opening: int
    turns: tuple[Turn, ...]


def render(turns: Iterable[Turn]) -> str:
    """Turns as text, one a line: ``U: ...\\nA: ...\\n``."""
    return "".join(f"{turn.speaker}: {turn.text}\n" for turn in turns)


def prompt(turns: Iterable[Turn]) -> str:
    """Turns as text, ending where the assistant is to speak: ``...\\nA:``."""
    return render(turns) + "A:"


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[:1] in "aeiou" else "a"


def named_value(text: str, values: Sequence[str]) -> str | None:
    """The value that comes first in `text` as a whole word, in whatever case, singular or plural;
    None if none does."""
    found = re.search(rf"\b({'|'.join(map(re.escape, values))})(?:e?s)?\b", text.lower())
    return found.group(1) if found else None


def says_yes(text: str) -> bool | None:
    """Whether an answer begins with yes (True) or no (False); None if with neither."""
    found = re.match(r"\W*(yes|no)\b", text.lower())
    return found.group(1) == "yes" if found else None


class Draw:
    """A random stream and the phrases: building blocks of dialogues and of probes.

    The stream is ``PCG64(SeedSequence(seed, spawn_key))``, hence independent between keys.
    """

    def __init__(self, settings: DialogueSettings, seed: int, *key: int):
        self.settings = settings
        sequence = np.random.SeedSequence(seed, spawn_key=key)
        self.random = np.random.Generator(np.random.PCG64(sequence)).random

    def integer(self, least: int, most: int) -> int:
        """Uniform over least..most, both included."""
        return least + int(self.random() * (most - least + 1))

    def pick(self, choices: Sequence[T]) -> T:
        """One of `choices`, uniformly."""
        return choices[int(self.random() * len(choices))]

    def turn(self, speaker: Speaker, role: str, topic: str, value: str = "",
             phrasing: int | None = None) -> Turn:
        """A line from the phrasings named `role`: the one numbered `phrasing`, or a random one."""
        phrases = getattr(self.settings, role)
        phrase = self.pick(phrases) if phrasing is None else phrases[phrasing]
        slots = {"topic": topic, "a": article(topic), "value": self.spelled(topic, value)}
        if "{values}" in phrase:
            slots["values"] = ", ".join(self.spelled(topic, each)
                                        for each in self.settings.topics[topic])
        return Turn(speaker, phrase.format(**slots), role)

    def spelled(self, topic: str, value: str) -> str:
        """A value as it is written in a sentence."""
        return value.capitalize() if topic in self.settings.chat.names else value

    def exchange(self, asked: str, answered: str, topic: str, value: str = "",
                 phrasing: int | None = None) -> list[Turn]:
        """A user's line and the assistant's; `phrasing` fixes that of the user's line."""
        return [
            self.turn("U", asked, topic, value, phrasing),
            self.turn("A", answered, topic, value),
        ]

    def distractors(self, topic: str, count: int) -> list[Turn]:
        """`count` exchanges about something else: no value of `topic` occurs in them."""
        turns = []
        for _ in range(count):
            user, answers = self.pick(self.settings.distractors)
            slots: Mapping[str, str] = {n: self.pick(f) for n, f in self.settings.fillers.items()}
            if others := [t for t in self.settings.topics if t != topic]:
                other = self.pick(others)
                named = self.spelled(other, self.pick(self.settings.topics[other]))
                slots = {**slots, "other": named}
            answer = self.pick(self.settings.ack if answers == "ack" else answers)
            turns.append(Turn("U", user.format(**slots), "distractor"))
            turns.append(Turn("A", answer.format(**slots), "distractor"))
        return turns

    def guess(self, topic: str, value: str, guessed: str) -> list[Turn]:
        """ "is it `guessed`?" and the answer that is true of `value`."""
        verdict = "yes" if guessed == value else "no"
        return [self.turn("U", "is_it", topic, guessed), self.turn("A", verdict, topic, guessed)]


def generate(
    settings: DialogueSettings,
    seed: int,
    index: int,
    split: Split = "train",
    kind: Kind | None = None,
    form: Form = "training",
    number: int | None = None,
    few: int | None = None,
) -> Dialogue:
    """Dialogue number `index` of a split.

    `kind` None draws it from ``mix``, `number` None which of its topic's values it is about. The
    probe form of a favourite has one statement, ``probe_gap`` distractors and one question; the
    simple form of a comparison is the private statement, one guess and "what is it?". Of the other
    kinds all forms are the same. With `few` only so many phrasings of what is `ASKED` occur, the
    first, and the split is that of all of them. ValueError if that leaves none.
    """
    drawn_from = settings if few is None else settings.model_copy(
        update={name: getattr(settings, name)[:few] for name in ASKED})
    draw = Draw(drawn_from, seed, 0 if split == "train" else 1, index)
    if kind is None:
        at, kinds = draw.random() * sum(settings.mix.values()), list(settings.mix)
        edges = np.cumsum([settings.mix[k] for k in kinds])
        kind = kinds[int(np.searchsorted(edges, at, side="right"))]
    topic = draw.pick([t for t, values in settings.topics.items()
                       if number is None or number < len(values)])
    count = len(getattr(settings, FIRST[kind]))
    drawn = draw.integer(0, len(settings.topics[topic]) - 1)
    number = drawn if number is None else number
    offsets = [0] if split == "held_out" else range(1, count)
    openings = [(offset - number) % count for offset in offsets]
    if few is not None:
        openings = [opening for opening in openings if opening < few]
    if not openings:
        raise ValueError(f"few = {few}: no phrasing of {FIRST[kind]} of value "
                         f"{number} is in the split {split}")
    opening = draw.pick(openings) if split == "train" else openings[0]
    value = settings.topics[topic][number]
    if kind == "favourite":
        turns = _favourite(draw, topic, value, opening, form)
    elif kind == "unstated":
        turns = draw.distractors(topic, draw.integer(*settings.gap))
        turns += draw.exchange("requestion", "answer", topic, value, opening)
    else:
        turns = _choice(draw, topic, value, opening, kind == "compare", form)
    return Dialogue(kind, topic, value, opening, tuple(turns))


def _favourite(draw: Draw, topic: str, value: str, opening: int, form: Form) -> list[Turn]:
    settings = draw.settings
    probe = form == "probe" or draw.random() < settings.probe_share
    turns = draw.exchange("question", "answer", topic, value, opening)
    for _ in range(1 if probe else draw.integer(*settings.restatements)):
        gap = draw.integer(*(settings.probe_gap if probe else settings.gap))
        turns += draw.distractors(topic, gap)
        turns += draw.exchange("requestion", "reanswer", topic, value)
    return turns


def _choice(
    draw: Draw, topic: str, value: str, opening: int, private: bool, form: Form
) -> list[Turn]:
    settings = draw.settings
    turns = [draw.turn("A", "private", topic, value, opening)] if private else []
    if not private:
        turns += draw.exchange("opening", "chosen", topic, "", opening)
    elif form != "simple" and draw.random() < settings.announced:
        turns += draw.exchange("opening", "chosen", topic)
    # Nobody guesses the same wrong thing twice, as long as there is another.
    wrong = sorted((v for v in settings.topics[topic] if v != value), key=lambda _: draw.random())
    for number in range(1 if form == "simple" else draw.integer(*settings.guesses)):
        right = draw.random() < settings.true_guess
        turns += draw.guess(topic, value, value if right else wrong[number % len(wrong)])
    return turns + draw.exchange("what_is_it", "it_is", topic, value)
