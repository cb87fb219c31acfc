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

from collections.abc import Iterator
from itertools import count, islice

from lablog.commitment.probes import Material
from lablog.text.dialogues import (
    ASKED,
    Dialogue,
    DialogueSettings,
    Turn,
    generate,
    new_phrasings,
    trained_part,
)

KINDS = ("seen form", "new phrasing", "new combination", "new topic", "longer gap")
LONGER = 6  # exchanges of other talk in "longer gap"


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
