"""Reading dialogues with personas: what is kept, what is refused, how it is split."""

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lablog.files import repository
from lablog.text.personas import CONVERSATION, PERSONA, PersonaDialogue, read_personas

PUBLIC = repository().parent / "shared" / "data" / "persona-chat-test.csv"
HEADER = ("user 1 personas", PERSONA, CONVERSATION)
GOOD = ("I am old.", "I like tea.\nI have a dog.",
        "User 1: Hello!\nUser 2: Hi, do you like tea?\n\nUser 1: No: coffee.\nUser 2: Oh.\nWell.")


def table(path: Path, *rows: tuple[str, ...]) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    path.write_bytes(text.getvalue().encode())
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "personas.csv"


def test_a_dialogue_is_read(path):
    (read,) = read_personas(table(path, HEADER, GOOD))
    assert read.prefix.text == "I like tea. I have a dog."
    assert [(turn.speaker, turn.text) for turn in read.turns] == [
        ("U", "Hello!"), ("A", "Hi, do you like tea?"), ("U", "No: coffee."), ("A", "Oh. Well.")]


def test_a_byte_order_mark_and_other_columns_do_no_harm(path):
    table(path, ("more", *HEADER), ("x", *GOOD))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_personas(path)) == 1


@pytest.mark.parametrize(("row", "fault"), [
    (("I am old.", " \n ", GOOD[2]), "row 3: 'user 2 personas' is empty"),
    (("I am old.",), "row 3: 'user 2 personas' is empty"),
    ((*GOOD[:2], ""), "row 3: no line begins with 'User 2:'"),
    ((*GOOD[:2], "User 1: Hello?\nUser 1: Anybody?"), "row 3: no line begins with 'User 2:'"),
    ((*GOOD[:2], "User 1: Hi\nUser 2: \u2581"), "row 3: holds U+2581"),
])
def test_a_row_that_cannot_be_learnt_from_is_named_with_the_file(path, row, fault):
    table(path, HEADER, GOOD, row, GOOD)
    with pytest.raises(ValueError, match=re.escape(f"{path}, {fault}") + ".*personas_leave_out"):
        read_personas(path)
    assert len(read_personas(path, leave_out=[3])) == 2


def test_all_bad_rows_are_named_at_once(path):
    table(path, HEADER, ("", "", GOOD[2]), GOOD, (*GOOD[:2], "User 1: Hello?"))
    with pytest.raises(ValueError, match=r"row 2: .*; row 4: "):
        read_personas(path)


@pytest.mark.parametrize("column", [PERSONA, CONVERSATION])
def test_a_missing_column_is_named(path, column):
    table(path, [name for name in HEADER if name != column], GOOD[:2])
    with pytest.raises(ValueError, match=f"row 1: no column '{column}'"):
        read_personas(path)


def test_what_is_not_utf_8_or_not_csv_is_refused_with_its_line(path):
    table(path, HEADER, GOOD)
    path.write_bytes(path.read_bytes().replace(b"No: coffee", b"No: caf\xe9"))
    with pytest.raises(ValueError, match=rf"{path}, line 6: byte 0xe9 is not UTF-8"):
        read_personas(path)
    path.write_text(",".join(HEADER) + '\n"a","b","User 2: c')
    with pytest.raises(ValueError, match=rf"{path}, after line 1: not CSV"):
        read_personas(path)
    with pytest.raises(FileNotFoundError, match=r"there is no dialogue file .*nowhere\.csv"):
        read_personas(path.with_name("nowhere.csv"))


@given(st.lists(st.text(max_size=20), min_size=1, max_size=30))
def test_the_split_depends_on_the_persona_alone(personas):
    splits = [PersonaDialogue(text, ()).split for text in personas]
    assert splits == [PersonaDialogue(text, GOOD).split for text in personas]
    many = {PersonaDialogue(f"{text} {i}", ()).split for text in personas[:1] for i in range(99)}
    assert many == {"train", "held_out"}


@pytest.mark.skipif(not PUBLIC.is_file(), reason=f"{PUBLIC} is not here")
def test_the_published_file_is_read_but_for_three_rows():
    with pytest.raises(ValueError, match=r"row 269: .*; row 322: .*; row 512: "):
        read_personas(PUBLIC)
    read = read_personas(PUBLIC, leave_out=[269, 322, 512])
    assert len(read) == 965
    assert {d.persona for d in read if d.split == "train"}.isdisjoint(
        d.persona for d in read if d.split == "held_out")
    assert all(any(turn.speaker == "A" for turn in d.turns) for d in read)
