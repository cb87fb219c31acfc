"""The dialogue generator: schema, determinism, disjoint splits, answers that keep to the value."""

import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import pytest
import yaml

from lablog.files import data_file
from lablog.text.dialogues import (
    ASKED,
    FIRST,
    PHRASES,
    Draw,
    Form,
    Kind,
    Split,
    generate,
    load_settings,
    named_value,
    new_phrasings,
    prompt,
    render,
    says_yes,
    things,
    trained_part,
)

SETTINGS = load_settings()
KINDS: list[Kind] = ["favourite", "unstated", "hidden", "compare"]


def text_of(index: int, split: Split = "train", kind: Kind | None = None) -> str:
    return render(generate(SETTINGS, 5, index, split, kind).turns)


def test_settings_are_as_rich_as_the_specification_asks():
    assert len(SETTINGS.topics) >= 8
    assert all(len(values) >= 12 for values in SETTINGS.topics.values())
    assert all(len(getattr(SETTINGS, name)) >= 4 for name in PHRASES)
    assert len(SETTINGS.distractors) >= 30
    talk = " ".join(p for u, a in SETTINGS.distractors for p in [u, *(a if a != "ack" else [])])
    fillers = " ".join(word for words in SETTINGS.fillers.values() for word in words)
    values = {value for names in SETTINGS.topics.values() for value in names}
    assert not values & set(f"{talk} {fillers} {' '.join(SETTINGS.ack)}".split())


def test_text_has_one_turn_a_line_and_a_prompt_ends_where_the_assistant_speaks():
    turns = generate(SETTINGS, 0, 0, kind="favourite", form="probe").turns
    lines = render(turns).split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(turns)
    assert all(line[:3] in ("U: ", "A: ") for line in lines)
    assert prompt(turns[:-1]).endswith("?\nA:") or prompt(turns[:-1]).endswith(".\nA:")


def test_a_dialogue_depends_on_seed_split_and_index_only():
    expected = [text_of(i) for i in range(40)]
    assert [text_of(i) for i in reversed(range(40))] == expected[::-1]
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(text_of, range(40))) == expected
    assert len(set(expected)) > 35
    assert render(generate(SETTINGS, 6, 0).turns) != expected[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_dialogue_occurs_in_training(kind):
    train = [generate(SETTINGS, 5, i, "train", kind) for i in range(3000)]
    held = [generate(SETTINGS, seed, i, "held_out", kind) for seed in (0, 5) for i in range(500)]
    assert not {render(d.turns) for d in train} & {render(d.turns) for d in held}
    combinations = {(d.topic, d.value, d.opening) for d in train}
    assert not combinations & {(d.topic, d.value, d.opening) for d in held}
    assert {(d.topic, d.value) for d in train} >= {(d.topic, d.value) for d in held}
    assert {d.opening for d in train} >= {d.opening for d in held}


@pytest.mark.parametrize("kind", KINDS)
def test_dialogues_in_few_phrasings_keep_the_split_of_all(kind):
    few = [generate(SETTINGS, 5, i, "train", kind, "simple", few=3) for i in range(3000)]
    held = [generate(SETTINGS, 5, i, "held_out", kind) for i in range(500)]
    combinations = {(d.topic, d.value, d.opening) for d in few}
    assert not combinations & {(d.topic, d.value, d.opening) for d in held}
    assert {opening for _, _, opening in combinations} == {0, 1, 2}
    assert {value for _, value, _ in combinations} == set(chain(*SETTINGS.topics.values()))
    texts = {turn.text.replace(d.value, "X") for d in few for turn in d.turns
             if turn.role == "what_is_it"}
    assert len(texts) <= 3 * len(SETTINGS.topics)


def test_few_phrasings_that_leave_none_in_a_split_are_refused():
    with pytest.raises(ValueError, match=r"few = 1: no phrasing of private .* split held_out"):
        generate(SETTINGS, 5, 0, "held_out", "compare", number=1, few=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["training", "probe"])
def test_every_answer_keeps_to_the_value(kind: Kind, form: Form):
    for index in range(300):
        dialogue = generate(SETTINGS, 1, index, kind=kind, form=form)
        values = SETTINGS.topics[dialogue.topic]
        for asked, turn in pairwise(dialogue.turns):
            named = named_value(turn.text, values)
            if turn.role in ("answer", "reanswer", "it_is", "private"):
                assert named == dialogue.value
            elif turn.role in ("yes", "no"):
                assert says_yes(turn.text) == (turn.role == "yes")
                assert (named_value(asked.text, values) == dialogue.value) == (turn.role == "yes")
            elif turn.role != "is_it":
                assert named is None


def test_the_probe_form_has_one_statement_some_distractors_and_one_question():
    for index in range(200):
        turns = generate(SETTINGS, 2, index, "held_out", "favourite", "probe").turns
        roles = [turn.role for turn in turns]
        assert roles[:2] == ["question", "answer"]
        assert roles[-2:] == ["requestion", "reanswer"]
        assert set(roles[2:-2]) == {"distractor"}
        assert 2 <= len(roles[2:-2]) // 2 <= 4


def test_the_simple_form_of_a_comparison_is_statement_guess_and_reveal():
    for index in range(50):
        roles = [
            turn.role for turn in generate(SETTINGS, 2, index, "train", "compare", "simple").turns
        ]
        assert roles[0] == "private"
        assert roles[1] == "is_it"
        assert roles[2] in ("yes", "no")
        assert roles[3:] == ["what_is_it", "it_is"]


def test_kinds_follow_the_mix_and_yes_and_no_balance():
    dialogues = [generate(SETTINGS, 3, i) for i in range(4000)]
    kinds = Counter(d.kind for d in dialogues)
    for kind, share in SETTINGS.mix.items():
        assert abs(kinds[kind] / 4000 - share / sum(SETTINGS.mix.values())) < 0.03
    said = Counter(t.role for d in dialogues for t in d.turns if t.role in ("yes", "no"))
    assert abs(said["yes"] / said.total() - SETTINGS.true_guess) < 0.02


def test_values_are_uniform_given_the_split():
    for split in ("train", "held_out"):
        drawn = [generate(SETTINGS, 4, i, split, "favourite") for i in range(3000)]
        count = Counter(SETTINGS.topics[d.topic].index(d.value) for d in drawn)
        assert min(count.values()) > 190
        assert max(count.values()) < 310


def test_a_dialogue_may_be_asked_for_by_its_value():
    for index in range(60):
        drawn = generate(SETTINGS, 4, index, kind="compare")
        values = SETTINGS.topics[drawn.topic]
        number = values.index(drawn.value)
        assert generate(SETTINGS, 4, index, kind="compare", number=number) == drawn
        asked = generate(SETTINGS, 4, index, "held_out", "favourite", number=index % 12)
        assert asked.value == SETTINGS.topics[asked.topic][index % 12]


def test_building_blocks_take_a_phrasing_or_draw_one():
    draw = Draw(SETTINGS, 0, 9)
    user, assistant = draw.exchange("opening", "chosen", "animal", phrasing=0)
    assert user.text == SETTINGS.opening[0].format(a="an", topic="animal")
    assert assistant.text in SETTINGS.chosen
    assert draw.guess("city", "rome", "rome")[1].role == "yes"
    assert draw.guess("city", "rome", "oslo")[1].role == "no"
    assert len(draw.distractors("city", 3)) == 6


def test_values_and_verdicts_are_read_from_free_text():
    assert named_value("Well, it is Teal, not red.", ["red", "teal"]) == "teal"
    assert named_value("a reddish one", ["red", "teal"]) is None
    assert [says_yes(t) for t in (" Yes, it is.", "no.", "nobody knows")] == [True, False, None]


def test_what_a_commitment_may_meet_is_cut_by_phrasings_values_and_topics():
    part, new, held = trained_part(SETTINGS), new_phrasings(SETTINGS), SETTINGS.held_out
    assert held.phrasings >= 1
    for name in PHRASES:
        phrases = getattr(SETTINGS, name)
        kept = len(phrases) - (held.phrasings if name in ASKED else 0)
        assert getattr(part, name) == phrases[:kept]
        assert getattr(new, name) == (phrases[kept:] if name in ASKED else phrases)
    assert {*ASKED} == {*FIRST.values(), "is_it", "what_is_it"}  # all that the user asks
    assert new.topics == SETTINGS.topics
    assert part.topics.keys() == SETTINGS.topics.keys() - {*held.topics}
    for topic, values in part.topics.items():
        whole = SETTINGS.topics[topic]
        assert values == whole[: len(whole) - held.values.get(topic, 0)]
    assert 2 <= min(map(len, part.topics.values())) < part.personas == 12


def test_things_are_values_of_all_topics_in_turn():
    topics = list(SETTINGS.topics.values())
    for number in (2, 9, 96):
        made = things(SETTINGS, number)
        assert list(made.topics) == ["thing"]
        assert made.topics["thing"] == [topics[i % 8][i // 8] for i in range(number)]
        assert made.personas == number
    made, draw = things(SETTINGS, 96), Draw(things(SETTINGS, 96), 0, 9)
    talk = " ".join(turn.text for turn in draw.distractors("thing", 400))
    assert not set(made.topics["thing"]) & set(re.findall("[a-z]+", talk))
    for number in (1, 97):
        with pytest.raises(ValueError, match=f"values = {number}: the dialogues have 2 to 96"):
            things(SETTINGS, number)


BAD = [
    ("topics.color", ["red"], "topics.color"),
    ("topics.animal", ["red", *"abcdefghijkl"], "'red'"),
    ("answer", ["a", "b", "c", "d"], "answer: 'a'"),
    ("opening", ["{topik}"] * 4, "topik"),
    ("true_guess", 1.5, "true_guess = 1.5"),
    ("gap", [3, 1], "gap: [3, 1]"),
    ("mix", {"favorite": 1.0}, "mix.favorite"),
    ("guess", 1, "guess = 1"),
    ("distractors", [["hello {nobody}", "ack"]] * 30, "hello {nobody}"),
    ("held_out.phrasings", 7, "held_out: phrasings = 7 leaves none of 7 in opening"),
    ("held_out.phrasings", 0, "held_out.phrasings = 0"),
    ("held_out.values", {"sport": 11}, "held_out: values: sport = 11 leaves fewer than two of 12"),
    ("held_out.values", {"colour": 2}, "held_out: ['colour'] are no topics; they are ['animal'"),
    ("held_out.values", {"sport": 0}, "held_out.values.sport = 0"),
    ("held_out.topics", ["music"], "held_out: ['music'] are no topics"),
    ("held_out.topics", ["sport"], "held_out: ['sport'] are held out whole and in part"),
    ("held_out.topics", [], "held_out.topics = []"),
    ("held_out.kinds", 1, "held_out.kinds = 1"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD)
def test_a_bad_setting_is_refused_naming_file_key_and_value(
    key: str, value: object, expected: str, tmp_path: Path
):
    data = yaml.safe_load(data_file("dialogues.yaml").read_text())
    *path, last = key.split(".")
    place = data
    for name in path:
        place = place[name]
    place[last] = value
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        load_settings(file)
    assert str(file) in str(error.value)


def test_a_missing_or_unreadable_settings_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_settings(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("topics: [")
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        load_settings(tmp_path / "broken.yaml")


def test_the_projects_own_settings_are_read_once():
    assert load_settings() is load_settings()
