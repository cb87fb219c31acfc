"""How new a probe is to a commitment that was trained: five kinds, each with items of its own.

seen form        phrasings, topics and values of the training, recombined; the words of the single
                 lines occur there
new phrasing     every question is put in words that the training never met
new combination  values that it never met, in a topic of which it met the others
new topic        a topic of which it met no value
longer gap       more talk between the opening and the question than it ever had

The base model has read all of these words; what is new is new to adapter, head and W_c. The split
is ``held_out`` of ``data/dialogues.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

from lablog.commitment.probes import ForkItem, Items, Material, Turns, make_items
from lablog.text.dialogues import (
    ASKED,
    Dialogue,
    DialogueSettings,
    Draw,
    Turn,
    generate,
    new_phrasings,
    settings_for,
    things,
    trained_part,
)

KINDS = ("seen form", "new phrasing", "new combination", "new topic", "longer gap")
HEADLINE = "new phrasing"  # the kind of probe on which the chapter's table stands
LONGER = 6  # exchanges of other talk in "longer gap"
PREFIX = 109  # a spawn key, apart from those of dialogues, probes, conversations


def whole_topics(settings: DialogueSettings) -> tuple[str, ...]:
    """The topics of which nothing is held out."""
    held = settings.held_out
    return tuple(t for t in settings.topics if t not in held.topics and t not in held.values)


def material(settings: DialogueSettings, kind: str, gap: int | None = None) -> Material:
    """What the probes of a kind are made of; `gap` changes the talk in between."""
    trained, held = trained_part(settings), settings.held_out
    phrased = settings.model_copy(update={name: getattr(trained, name) for name in ASKED})
    if kind == "seen form":
        return Material(trained, whole_topics(settings), gap)
    if kind == "longer gap":
        return Material(trained, whole_topics(settings), LONGER if gap is None else gap)
    if kind == "new phrasing":
        return Material(new_phrasings(settings), whole_topics(settings), gap)
    if kind == "new topic":
        return Material(phrased, tuple(held.topics), gap)
    if kind == "new combination":
        first = min(len(settings.topics[t]) - n for t, n in held.values.items())
        return Material(phrased, tuple(held.values), gap, first)
    raise ValueError(f"kind = {kind!r}: expected one of {', '.join(KINDS)}")


def held_out_texts(settings: DialogueSettings, seed: int, number: int) -> list[tuple[Turn, ...]]:
    """Dialogues about a favourite, of which neither base nor commitment met the first exchange:
    held out from the base's training, and begun by a phrasing held out from the commitment's."""
    least = len(settings.question) - settings.held_out.phrasings

    def dialogues() -> Iterator[Dialogue]:
        for index in count():
            yield generate(settings, seed, index, "held_out", "favourite", "probe")

    topics = whole_topics(settings)
    return list(islice((d.turns for d in dialogues() if d.opening >= least and d.topic in topics),
                       number))


@dataclass(frozen=True)
class ProbeSet:
    """The probes of one kind of new, what fixes the commitment of each hidden choice
    (`prefixes`), and the texts that every arm is measured on; `seed` made them all."""

    settings: DialogueSettings
    seed: int
    items: Items
    prefixes: tuple[Turns, ...]
    texts: tuple[Turns, ...]


def probe_set(seed: int, items: int, texts: int, kind: str = HEADLINE, gap: int | None = None,
              values: int = 0, independent: int = 0, chat: str = "plain") -> ProbeSet:
    """As many `items` of each family and `texts`; a pure function of its arguments. chat: how the
    model is spoken to, which decides in whose words it is asked.

    values: as many things to choose from in one topic, instead of the topics. independent: so many
    topics are asked about, and a prefix states a value of each, as in the training that has them.
    """
    settings = settings_for(chat)
    of_kind = material(settings, kind, gap)
    if values:
        whole = of_kind.settings.model_copy(update={"topics": settings.topics})
        of_kind = Material(things(whole, values), (), gap)
    stated = list(trained_part(settings).topics)[:independent]
    if independent:
        of_kind = replace(of_kind, topics=tuple(stated))
    made = make_items(of_kind, seed, items)
    prefixes = tuple(_prefix(Draw(of_kind.settings, seed, PREFIX, index), item, stated)
                     for index, item in enumerate(made.fork))
    return ProbeSet(settings, seed, made, prefixes, tuple(held_out_texts(settings, seed, texts)))


def _prefix(draw: Draw, item: ForkItem, topics: Sequence[str]) -> list[Turn]:
    """The private line of a hidden choice, among such lines about the other `topics`."""
    if not topics:
        return [item.note]
    values = draw.settings.topics
    return [item.note if tuple(values[topic]) == item.values
            else draw.turn("A", "private", topic, draw.pick(values[topic])) for topic in topics]
