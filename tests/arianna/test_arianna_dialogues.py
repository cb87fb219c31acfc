"""Dialogues: strict loading, the form, folds, and bits per byte against an independent count."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lablog.arianna.bits_per_byte import bits, windows
from lablog.arianna.dialogues import (
    Dialogue,
    folds,
    last_questions,
    load_dialogues,
    ngram_overlap,
    sides,
)
from lablog.files import data_file
from lablog.models.shape import ModelShape
from lablog.text.datasets import Item
from lablog.text.tokenizer import Tokenizer, train_tokenizer

USER = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "It is 42 forks, naïvely."}


@pytest.fixture(scope="module")
def known() -> list[Dialogue]:
    return load_dialogues(data_file("arianna_conversations.jsonl"))


@pytest.fixture(scope="module")
def tokenizer(known, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = sorted({line for d in known for line in d.text().splitlines() if line})
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(lines, 600, path, True, llama2c=True)


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n" if texts else b"")
    return path


@pytest.mark.parametrize(("line", "problem"), [
    (b'[{"role": "user", "content": "a"', "delimiter|Expecting"),
    (b"", "Expecting value"),
    (b'[{"role": "user", "content": "caf\xe9"}]', "codec can't decode byte 0xe9"),
    ({"role": "user"}, "expected a list"),
    ([USER], "expected a list of a user's and an assistant's message"),
    ([USER, {"content": "x"}], "message 2 has role None, expected 'assistant'"),
    ([ANSWER, USER], "message 1 has role 'assistant', expected 'user'"),
    ([{"role": "system", "content": "x"}, ANSWER], "message 1 has role 'system'"),
    ([USER, {"role": "assistant", "content": " \n"}], "the assistant's message 2 is ' "),
    ([USER, {"role": "assistant"}], "the assistant's message 2 is None"),
    ([USER, ANSWER, USER], "the last user's message has no answer"),
])
def test_a_broken_line_stops_with_file_and_number(line, problem: str, tmp_path: Path):
    path = write(tmp_path / "talk.jsonl", [USER, ANSWER], line)
    with pytest.raises(ValueError, match=problem) as error:
        load_dialogues(path)
    assert str(error.value).startswith(f"{path}, line 2: ")


def test_a_file_without_a_dialogue_and_a_missing_file_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no dialogue"):
        load_dialogues(write(tmp_path / "empty.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl is missing"):
        load_dialogues(tmp_path / "none.jsonl")


def test_later_turns_are_left_out_aloud_or_taken_on_request(tmp_path: Path):
    path = write(tmp_path / "talk.jsonl", [USER, ANSWER], [USER, ANSWER, USER, ANSWER])
    with pytest.warns(UserWarning, match="1 of 2 dialogues in talk.jsonl go on"):
        first = load_dialogues(path)
    assert first[0] == first[1]
    assert load_dialogues(path, all_turns=True)[1].text() == (
        "Q: What is it?\nA: It is 42 forks, naïvely.\n" * 2 + "\n"
    )


def test_the_form_is_the_logs(known: list[Dialogue]):
    text = "".join(dialogue.text() for dialogue in known)
    assert text.startswith("Q: What is resonance?\nA: Set two tuning forks")
    assert text.count("\n\nQ: ") == len(known) - 1
    assert len(known) == 171


def test_weights_mark_exactly_the_answers(known: list[Dialogue], tokenizer: Tokenizer):
    both = Dialogue((known[0].exchanges[0], known[1].exchanges[0]))
    for dialogue in [*known[:20], both]:
        for form in ("qa", "bare"):
            item = dialogue.item(tokenizer, form)
            pieces = "".join(tokenizer.piece(i) for i, w in zip(item.ids.tolist(), item.weights,
                                                              strict=True) if w)
            answers = "".join(f" {answer}" for _, answer in dialogue.exchanges)
            assert pieces.replace("\u2581", " ") == answers
            text = "".join(part for part, _ in dialogue.parts(form))
            assert item.ids.tolist() == tokenizer.encode(text, bos=True)
    assert both.answer_bytes == known[0].answer_bytes + known[1].answer_bytes


@given(length=st.integers(1, 200), context=st.integers(2, 40))
def test_windows_weigh_every_token_once_with_half_a_window_before_it(length: int, context: int):
    item = Item(np.arange(length, dtype=np.int32), np.ones(length, np.float32))
    counts = np.zeros(length)
    for number, window in enumerate(windows(item, context)):
        assert len(window.ids) <= context
        np.add.at(counts, window.ids, window.weights)
        if number:
            assert not window.weights[: context // 2].any()
    assert (counts == 1).all()


def test_bits_are_those_of_single_predictions(known: list[Dialogue], tokenizer: Tokenizer):
    torch.manual_seed(0)
    shape = ModelShape(layers=1, width=16, heads=2, kv_heads=2, feed_forward=32, context=96,
                       tied_embeddings=True, initializer_range=0.3)
    model = shape.model(len(tokenizer)).eval()
    items = [known[i].item(tokenizer) for i in (0, 3)]
    short = Item(items[1].ids[:60], items[1].weights[:60])
    for item in (items[0], short):
        expected = 0.0
        for i in np.flatnonzero(item.weights):
            # the first window reaches position 95, each later one 48 further
            start = 0 if i < 96 else 48 * ((int(i) - 96) // 48 + 1)
            with torch.inference_mode():
                seen = torch.tensor([item.ids[start:i].tolist()])
                logits = model(input_ids=seen).logits[0, -1].double()
            expected -= torch.log_softmax(logits, 0)[int(item.ids[i])].item() / math.log(2)
        assert bits(model, [item, items[1]])[0] == pytest.approx(expected, rel=1e-5)


@given(count=st.integers(2, 60), data=st.data())
def test_folds_part_the_dialogues(count: int, data: st.DataObject):
    parts = data.draw(st.integers(2, count))
    found = folds(count, parts, data.draw(st.integers(0, 9)))
    assert sorted(np.concatenate(found)) == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_one_fold_and_more_folds_than_dialogues_are_refused():
    for parts in (1, 5):
        with pytest.raises(ValueError, match=f"{parts} folds of 4 dialogues"):
            folds(4, parts, 0)


def test_a_fold_has_its_sides_and_its_last_questions(known: list[Dialogue]):
    part = np.array([1, 2, 5])
    training, held_out = sides(known[:6], part)
    assert training == [known[i].text() for i in (0, 3, 4)]
    assert held_out == [known[i].text() for i in part]
    asked = [known[i].exchanges[0][0] for i in part]
    for count in range(4):
        assert last_questions(known, part, count) == asked[3 - count :]
    for count in (-1, 4):
        with pytest.raises(ValueError, match=f"{count} questions of a fold of 3 dialogues"):
            last_questions(known, part, count)


def test_shared_runs_of_words_are_counted(known: list[Dialogue]):
    assert ngram_overlap(["a b c d", "x"], ["z A b c"], 3) == (1, 2)
    texts = [dialogue.text() for dialogue in known]
    shared, total = ngram_overlap(texts[:10], texts[10:], 8)
    assert (shared, total > 500) == (0, True)  # the data card says: no 8-word run is shared
    assert ngram_overlap(texts[:10], texts, 8) == (total, total)
