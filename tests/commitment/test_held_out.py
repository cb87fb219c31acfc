"""What training meets, and what it never meets: conversations, and the five kinds of new."""

import re
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from lablog.commitment.arms import Experiment
from lablog.commitment.conversations import Conversation, Conversations, ConversationSettings
from lablog.commitment.novelty import (
    KINDS,
    LONGER,
    held_out_texts,
    material,
    probe_set,
    whole_topics,
)
from lablog.commitment.qlora import LoraSettings, Plan, Schedule
from lablog.models.training import TrainingSettings
from lablog.text.dialogues import (
    ASKED,
    PHRASES,
    DialogueSettings,
    generate,
    load_settings,
    render,
    trained_part,
)
from lablog.text.tokenizer import Tokenizer

DIALOGUES = load_settings()
TRAINED = trained_part(DIALOGUES)
HELD = DIALOGUES.held_out
GAP = (0, 2)
PLAN = Plan(
    k=4, strength=1.0, quantisation="none",
    lora=LoraSettings(r=4, alpha=8, dropout=0, targets="all-linear"),
    schedule=Schedule(beta=0.1, warmup=0, annealing=0, free_bits=0),
    training=TrainingSettings(
        steps=200, batch_size=12, learning_rate=1e-2, warmup_steps=0, schedule="cosine",
        betas=(0.9, 0.98), weight_decay=0, precision="f32", threads=1, checkpoint_every=300,
        log_every=1))


def said(settings: DialogueSettings, names=PHRASES) -> set[str]:
    """Every line that the phrasings `names` make of the topics and values."""
    lines = set()
    for name in names:
        speaker = "U" if name in ASKED and name != "private" else "A"
        for phrase in getattr(settings, name):
            for topic, values in settings.topics.items():
                article = "an" if topic[0] in "aeiou" else "a"
                lines |= {f"{speaker}: {phrase.format(topic=topic, a=article, value=value)}"
                          for value in values}
    return lines


KNOWN = said(TRAINED)
WITHHELD = said(DIALOGUES.model_copy(update={
    name: getattr(DIALOGUES, name)[-HELD.phrasings :] for name in ASKED}), ASKED)


def spoken(conversation: Conversation, tokenizer: Tokenizer) -> list[str]:
    """The lines of a conversation, fork by fork."""
    ids, fork = conversation.forks.ids, conversation.fork
    parts = [conversation.prefix.ids, *(ids[fork == n] for n in range(fork.max() + 1))]
    return [line.strip() for part in parts
            for line in tokenizer.decode(part.tolist()).splitlines() if line.strip()]


def met(lines) -> dict[str, set[str]]:
    """What of the held-out phrasings, values and topics occurs in `lines`."""
    words = set(re.findall("[a-z]+", " ".join(lines)))
    values = {v for topic, n in HELD.values.items() for v in DIALOGUES.topics[topic][-n:]}
    topics = {*HELD.topics, *chain(*(DIALOGUES.topics[topic] for topic in HELD.topics))}
    return {"phrasings": set(lines) & WITHHELD, "values": words & values, "topics": words & topics}


def experiment(base: Path, settings: DialogueSettings = TRAINED, **changes) -> Experiment:
    return Experiment({1: base}, PLAN, "dialogues",
                      ConversationSettings(settings, gap=GAP, **changes), base.parent / "unused")


@pytest.fixture(scope="module")
def training(base) -> list[Conversation]:
    data = experiment(base).dataset(1, 1, "commitment")
    assert len(data) == 2400
    return [data[i] for i in range(len(data))]


@pytest.fixture(scope="module")
def lines(base, training) -> set[str]:
    tokenizer = Tokenizer(base / "tokenizer.model")
    return {line for one in training for line in spoken(one, tokenizer)}


# --- what training meets --------------------------------------------------------------------------


def test_nothing_that_is_held_out_occurs_in_training(base, training, lines):
    assert met(lines) == {"phrasings": set(), "values": set(), "topics": set()}
    asked = {line for line in lines if line.startswith("U:")} & said(DIALOGUES, ASKED)
    assert len(asked) > 500
    assert asked <= said(TRAINED, ASKED)
    for name in ASKED:  # and all of the rest does occur
        for phrase in getattr(TRAINED, name):
            assert said(TRAINED.model_copy(update={name: [phrase]}), [name]) & lines, phrase
    data = experiment(base, DIALOGUES).dataset(1, 1, "commitment", count=600)
    tokenizer = Tokenizer(base / "tokenizer.model")
    found = met({line for i in range(600) for line in spoken(data[i], tokenizer)})
    assert min(map(len, found.values())) > 3  # of the whole settings this test would see it


@pytest.mark.parametrize("name", ["note", "no_gaps", "steering"])
def test_nothing_that_is_held_out_occurs_in_the_trainings_beside_it(base, name):
    data, tokenizer = experiment(base).dataset(1, 1, name, count=240), Tokenizer(
        base / "tokenizer.model")
    found = {line for i in range(240) for line in spoken(data[i], tokenizer)}
    assert met(found) == {"phrasings": set(), "values": set(), "topics": set()}


def test_no_gap_is_longer_than_asked_for_and_a_batch_has_one(base, training):
    end, gaps = Tokenizer(base / "tokenizer.model").encode("\n")[-1], []
    for begin in range(0, len(training), 12):
        lengths = set()
        for one in training[begin : begin + 12]:
            lengths.add(int((one.forks.ids[one.fork == 0] == end).sum()))
        assert len(lengths) == 1
        if lengths != {0}:  # a game, not a recall
            (length,) = lengths
            gaps.append(length // 2 - 1)
    assert sorted(set(gaps)) == [0, 1, 2]
    assert min(gaps.count(gap) for gap in (0, 1, 2)) > len(gaps) / 6
    changed = experiment(base).dataset(1, 1, "no_gaps", count=240)
    stems = {(changed[i].fork == 0).sum() for i in range(240)}
    assert max(stems) < max((one.fork == 0).sum() for one in training)


def test_held_out_conversations_are_in_new_phrasings_of_what_was_trained(base, lines):
    """Those on which the latent is diagnosed."""
    data, tokenizer = experiment(base).dataset(1, 1, "commitment", True, 240), Tokenizer(
        base / "tokenizer.model")
    found = {line for i in range(240) for line in spoken(data[i], tokenizer)}
    prefixes = {line for i in range(240)
                for line in tokenizer.decode(data[i].prefix.ids.tolist()).splitlines()[:1]}
    asked = (found & said(DIALOGUES, ASKED) & {line for line in found if line[:2] == "U:"})
    assert len(asked) > 100
    assert not (asked | prefixes) & lines
    assert met(found)["values"] == met(found)["topics"] == set()


@pytest.mark.parametrize("name", ["values_4", "values_96", "independent_2"])
def test_conversations_of_every_size_can_be_held_out_too(base, name):
    data = experiment(base).dataset(1, 1, name, True, 48)
    assert [len(data[i].prefix.ids) > 3 for i in range(48)] == [True] * 48


# --- conversations --------------------------------------------------------------------------------


def conversations(base: Path, size: int = 48, **changes) -> tuple[Conversations, Tokenizer]:
    tokenizer = Tokenizer(base / "tokenizer.model")
    return Conversations(ConversationSettings(TRAINED, **changes), tokenizer, 3, size,
                         12), tokenizer


def forks(one: Conversation, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(one.forks.ids[one.fork == n].tolist()).strip()
            for n in range(1, one.fork.max() + 1)]


def test_a_fork_of_one_exchange_ends_with_the_word_that_decides(base):
    data, tokenizer = conversations(base, gap=(0, 1))
    recalls = 0
    for i in range(48):
        one, told = data[i], forks(data[i], tokenizer)
        prefix = tokenizer.decode(one.prefix.ids.tolist())
        recall = (one.fork == 0).sum() == 1  # BOS alone
        recalls += recall
        for text in told[:2] if recall else told:
            (asked, answer), last = text.split("\nA: "), re.findall("[a-z]+", text)[-1]
            at = one.forks.weights[one.fork == 1 + told.index(text)]
            assert at[-1] == at.max() > 0  # the loss ends there too
            if "yes" in answer or "no" in answer.split()[0]:
                assert last == answer == ("yes" if re.findall("[a-z]+", asked)[-1] in
                                          re.findall("[a-z]+", prefix) else last)
            else:
                assert answer.endswith(last)
                assert last in {values[one.commitment] for values in TRAINED.topics.values()
                                if one.commitment < len(values)}
    assert recalls == 12


def test_a_statement_in_the_window_of_a_recall_is_another_s_and_only_heard(base):
    """The window says another value than z* does, the answer is the window's, and nothing is to be
    learnt of the statement; where it was evicted, the answer is that of the prefix."""
    data, tokenizer = conversations(base, 240)
    topics, seen = list(TRAINED.topics.values()), {True: 0, False: 0}
    for i in range(240):
        one = data[i]
        if (one.fork == 0).sum() > 1:
            continue
        rest = one.fork == one.fork.max()
        turns = tokenizer.decode(one.forks.ids[rest].tolist()).strip().splitlines()
        pieces = np.cumsum(one.forks.ids[rest] == tokenizer.encode("\n")[-1])
        weights = one.forks.weights[rest]
        named = next(n for values in topics for n, v in enumerate(values)
                     if re.search(rf"\b{v}\b", turns[-1]))
        stated = [n for values in topics for n, v in enumerate(values)
                  if re.search(rf"\b{v}\b", turns[1])]
        window = turns[0] in said(TRAINED, ["question"])
        seen[window] += 1
        assert weights.max() == weights[pieces == len(turns) - 1].max() > 0
        if window:
            assert named == stated[0] != one.commitment
            assert weights[pieces < 2].max() == 0
        else:
            assert named == one.commitment
    assert min(seen.values()) > 20


def test_a_conversation_has_the_number_of_the_value_that_it_is_about(base):
    data, tokenizer = conversations(base)
    topics = list(TRAINED.topics.values())
    assert data.commitments == 12
    for i in range(48):
        one = data[i]
        assert one.commitment == i % 12
        words = set(re.findall("[a-z]+", tokenizer.decode(one.prefix.ids.tolist())))
        (held,) = {values.index(v) for values in topics for v in values if v in words}
        named = forks(one, tokenizer)[0].split()[-1]
        (told,) = {values.index(v) for values in topics for v in values if v == named}
        assert held == told == one.commitment


def test_a_note_puts_what_the_model_says_in_the_prefix_into_its_window(base):
    plain, tokenizer = conversations(base)
    noted, _ = conversations(base, note=True)
    for i in range(48):
        stems = [tokenizer.decode(one.forks.ids[one.fork == 0].tolist()).strip()
                 for one in (plain[i], noted[i])]
        line = tokenizer.decode(noted[i].prefix.ids.tolist()).strip().splitlines()[-1]
        assert line.startswith("A: ")
        assert stems[1] == f"{line}\n{stems[0]}".strip()
        assert forks(plain[i], tokenizer) == forks(noted[i], tokenizer)


def test_independent_topics_are_drawn_by_themselves(base):
    """A prefix that states a value of each of three topics, and no value tells another."""
    data, tokenizer = conversations(base, 600, independent=3, recall_share=0)
    topics, drawn = list(TRAINED.topics.values())[:3], []
    assert data.commitments == 0
    for i in range(600):
        assert data[i].commitment == -1
        told = tokenizer.decode(data[i].prefix.ids.tolist()).strip().splitlines()
        words = [re.findall("[a-z]+", line) for line in told]
        drawn.append([next(values.index(v) for v in values if v in line)
                      for values, line in zip(topics, words, strict=True)])
        named = forks(data[i], tokenizer)[0].split()[-1]
        assert any(named in line for line in words)  # the game is about one of the three
    a, b, c = np.array(drawn).T
    for one, other in ((a, b), (b, c), (a, c)):
        assert 20 < (one == other).sum() < 90  # 50 expected
        table = np.zeros((12, 12))
        np.add.at(table, (one, other), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0) / 600
        assert ((table - expected) ** 2 / expected).sum() < 200  # χ² of 121 degrees of freedom


# --- how new the probes are -----------------------------------------------------------------------


def probed(kind: str, gap: int | None = None) -> list[dict[str, list[str]]]:
    """For each item of either family what is asked, what the model is told that it chose, and the
    lines in between."""
    items = probe_set(11, 150, 0, kind, gap).items
    shown = [{"asked": [i.question, i.requestion], "told": [], "between": i.distractors}
             for i in items.recall]
    shown += [{"asked": [i.opening[0], *i.guesses, i.naming], "told": [i.note],
               "between": i.opening[2:]} for i in items.fork]
    return [{name: render(turns).splitlines() for name, turns in each.items()} for each in shown]


def bare(line: str) -> bool:
    """Whether a line names neither a topic nor a value, so that it is the same for all."""
    words = {*DIALOGUES.topics, *chain(*DIALOGUES.topics.values())}
    return not words & set(re.findall("[a-z]+", line))


def test_seen_forms_are_lines_of_the_training_and_new_phrasings_are_not(lines):
    for item in probed("seen form"):
        assert {*item["asked"], *item["told"]} <= KNOWN
        assert len(item["between"]) in (0, 4, 6, 8)
    for item in probed("new phrasing"):
        assert not {*item["asked"], *item["told"]} & (KNOWN | lines)
    assert len({line for i in probed("seen form") for line in i["asked"]} & lines) > 300


def test_new_combinations_and_topics_are_asked_for_in_known_words(lines):
    phrased = DIALOGUES.model_copy(update={name: getattr(TRAINED, name) for name in ASKED})
    known = said(phrased)
    for item in probed("new combination"):
        assert {*item["asked"], *item["told"]} <= known
        for line in item["told"]:
            assert met([line])["values"]
            assert line not in lines
    for item in probed("new topic"):
        assert {*item["asked"], *item["told"]} <= known
        assert not {line for line in (*item["asked"], *item["told"]) if not bare(line)} & lines
        assert met([*item["asked"], *item["told"]])["topics"]
    forked = probe_set(11, 60, 0, "new combination").items.fork
    assert {item.values for item in forked} == {tuple(DIALOGUES.topics["sport"])}
    assert {item.noted for item in forked} == {8, 9, 10, 11}


def test_a_longer_gap_is_longer_than_any_in_training(training):
    assert max(GAP[1], DIALOGUES.probe_gap[1]) < LONGER
    for item in probed("longer gap"):
        assert len(item["between"]) == 2 * LONGER
        assert {*item["asked"], *item["told"]} <= KNOWN
    for item in probed("seen form", 9) + probed("longer gap", 9):
        assert len(item["between"]) == 18


def test_what_is_whole_is_what_nothing_is_held_out_of():
    assert {*whole_topics(DIALOGUES)} == DIALOGUES.topics.keys() - {"sport", "instrument"}
    for kind in KINDS:
        topics = {"new combination": ("sport",), "new topic": ("instrument",)}
        assert material(DIALOGUES, kind).topics == topics.get(kind, whole_topics(DIALOGUES))
    with pytest.raises(ValueError, match="kind = 'newer': expected one of seen form, new phrasing"):
        material(DIALOGUES, "newer")


def test_held_out_texts_begin_with_an_exchange_that_nobody_was_trained_on(lines):
    def exchanges(turns) -> set[str]:
        return {render(pair) for pair in pairwise(turns)}

    texts = held_out_texts(DIALOGUES, 11, 60)
    first = {render(turns[:2]) for turns in texts}
    assert len(first) > 30
    met_by_base = {pair for seed in (0, 1) for i in range(3000)
                   for pair in exchanges(generate(DIALOGUES, seed, i).turns)}
    assert not first & met_by_base
    assert not {text.splitlines()[0] for text in first} & lines
    trained = {render(generate(DIALOGUES, 11, i, "train", "favourite", "probe").turns[:2])
               for i in range(400)}
    assert len(trained & met_by_base) > 20  # others the base has read
    assert held_out_texts(DIALOGUES, 11, 60) == texts
    assert held_out_texts(DIALOGUES, 12, 60) != texts


@pytest.mark.parametrize("topics", [1, 3])
def test_independent_topics_are_probed_as_they_were_trained(base, topics):
    """A prefix with a line about each topic that training had, and questions about no other."""
    data, tokenizer = conversations(base, 240, independent=topics, recall_share=0)
    trained = {shape(tokenizer.decode(data[i].prefix.ids.tolist())) for i in range(240)}
    material = probe_set(11, 60, 0, "seen form", independent=topics)
    names = list(TRAINED.topics)[:topics]
    assert {item.values for item in material.items.fork} == {
        tuple(TRAINED.topics[name]) for name in names}
    for item, prefix in zip(material.items.fork, material.prefixes, strict=True):
        assert shape(render(prefix)) in trained
        at = prefix.index(item.note)
        assert tuple(TRAINED.topics[names[at]]) == item.values
    assert [[item.note] for item in probe_set(11, 9, 0).items.fork] == list(
        probe_set(11, 9, 0).prefixes)


def shape(text: str) -> str:
    """Which topics the lines of a text are about, in order."""
    return " ".join(topic for line in text.splitlines() for topic, values in TRAINED.topics.items()
                    if set(values) & set(re.findall("[a-z]+", line)))
