"""A short part of ``make torture``, and what it has found."""

import dataclasses
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import write_tiny

from lablog.files import parsing
from lablog.models.gguf_file import check_gguf
from lablog.yaml_file import read_yaml
from torture import corrupt
from torture.mutations import BINARY, TEXT, mutated
from torture.readers import READERS

CASES = 5


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_by_name(name: str, tmp_path: Path):
    reader = READERS[name]
    path = reader.make(tmp_path)
    whole = path.read_bytes()
    for case in range(CASES):
        path.write_bytes(corrupt.corrupt(reader, whole, 1, case))
        assert corrupt.verdict(reader, path) in ("read", "refused"), case


def test_cases_are_what_their_numbers_say():
    reader, whole = READERS["text"], b"some text of several words\n" * 9
    one, two = ([corrupt.corrupt(reader, whole, seed, case) for case in range(50)]
                for seed in (0, 0))
    assert one == two
    assert len(set(one)) > 40
    assert one != [corrupt.corrupt(reader, whole, 1, case) for case in range(50)]


@pytest.mark.parametrize("mutation", list(dict.fromkeys([*BINARY, *TEXT])),
                         ids=lambda mutation: mutation.__name__)
@pytest.mark.parametrize("data", [b"", b"a", b"key: 17\n" * 3])
def test_every_mutation_takes_any_file(mutation, data):
    for seed in range(20):
        assert isinstance(mutation(data, np.random.default_rng(seed)), bytes)
    assert mutated(data, (mutation,), np.random.default_rng(0)) is not None


FAULTY = {
    "read": lambda path: path.read_bytes(),
    "refused": lambda path: (_ for _ in ()).throw(ValueError(f"{path} is no good")),
    "the file is not named: ValueError in ?": lambda _: int("x"),
    "KeyError in ?": lambda _: {}["x"],
}


@pytest.mark.parametrize("told", FAULTY)
def test_a_fall_is_told_from_a_refusal(told: str, tmp_path: Path):
    reader = dataclasses.replace(READERS["text"], read=FAULTY[told])
    path = reader.make(tmp_path)
    assert corrupt.verdict(reader, path) == told


def test_a_case_that_ends_its_process_is_counted_and_the_next_one_tried(monkeypatch):
    ends = iter([("0\n\"read\"\n1\n", -6), ("2\n\"refused\"\n3\n", -14), ("", 0)])

    def run(command, **_):
        assert command[4] in ("0", "2", "4")
        out, code = next(ends)
        return type("Done", (), {"stdout": out.encode(), "returncode": code})

    monkeypatch.setattr(corrupt.subprocess, "run", run)
    monkeypatch.setattr(corrupt, "BLOCK", 4)
    found = corrupt.tried("text", 4)
    assert (found.cases, found.read, found.refused) == (4, 1, 1)
    assert dict(found.fell) == {"the process ended: SIGABRT": [1], "took more than 10 s": [3]}


# --- what was found -------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "fault"), [
    ("a: 1\nb: 2\na: 3\n", "line 3: 'a' stands there twice"),
    ("a: &a [1, *a]\n", "an alias stands inside"),
    ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
                               for i in range(1, 10)), "its aliases written out are"),
    ("- " * 100_000, "recursion"),
    ("a: [\n", "expected"),
    ("a: \udce9", "utf-8"),
])
def test_yaml_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, fault: str):
    path = tmp_path / "some.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"(?s)some.yaml is not valid YAML: .*{fault}"):
        read_yaml(path)


def test_merged_keys_may_be_given_anew(tmp_path: Path):
    path = tmp_path / "some.yaml"
    path.write_text("one: &one {a: 1, b: 2}\ntwo: &two {<<: *one, a: 3}\nthree: {<<: *two, b: 4}")
    assert read_yaml(path)["three"] == {"a": 3, "b": 4}
    assert read_yaml(path, typed=False)["two"]["a"] == "3"
    path.write_text("")
    assert read_yaml(path) is None


def changed(path: Path, at: int, form: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)


def test_a_gguf_file_is_compared_with_its_own_size(tmp_path: Path):
    path = write_tiny(tmp_path / "tiny.gguf", size=600)
    whole = path.read_bytes()
    assert check_gguf(path) == path
    tensor = gguf.GGUFReader(path).tensors[1]
    info = whole.index(tensor.name.encode()) + len(tensor.name)  # dimensions, shape, type, offset
    for at, form, value, fault in (
        (8, "<Q", 1 << 40, "names 1099511627776 tensors"),
        (16, "<Q", 1 << 40, "names 1099511627776 keys"),
        (24, "<Q", 1 << 40, "bytes of a key"),
        (info, "<I", 9, "has 9 dimensions"),
        (info + 4, "<Q", 0, "shape \\[0"),
        (info + 4, "<Q", 1 << 40, "truncated|where none can be"),
        (info + 12, "<I", 99, "type 99"),
        (info + 16, "<Q", 0, "where none can be"),
        (info + 16, "<Q", 7, "where none can be"),
    ):
        path.write_bytes(whole)
        changed(path, at, form, value)
        with pytest.raises(ValueError, match=f"tiny.gguf is not a whole GGUF file: .*({fault})"):
            check_gguf(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated, fetch it again"):
        check_gguf(path)
    count = whole.index(b"llama.block_count") + len(b"llama.block_count") + 4
    for layers in (0, 513):
        path.write_bytes(whole)
        changed(path, count, "<I", layers)
        with pytest.raises(ValueError, match=f"it has {layers} layers; llama.cpp takes 1 to 512"):
            check_gguf(path)
    token = whole.index(struct.pack("<Q", 1) + b'"')
    path.write_bytes(whole[: token + 8] + b"#" + whole[token + 9 :])
    with pytest.raises(ValueError, match="a token of its vocabulary stands there twice"):
        check_gguf(path)


@pytest.mark.parametrize(("name", "right", "wrong"), [
    ("SentencePiece model to export", b"<unk>", b"<un\xc3>"),
    ("SentencePiece model", b"<0x8C>", b"<0x8\xff>"),
    ("GGUF tokenizer", "ħ".encode(), b"\xff\xa7"),
    ("GGUF tokenizer", b"ar d", b"d ra"),
    ("settings of a commitment", b'"width": 8', b'"width": 2147483648'),
    ("settings of a commitment", b'"width": 8', b'"width": 99999999999999999999999999'),
    ("Hugging Face configuration", b'"num_hidden_layers": 2', b'"num_hidden_layers": 2147483648'),
    ("Hugging Face configuration", b'"num_attention_heads": 4', b'"num_attention_heads": 0'),
])
def test_what_fell_is_refused(name: str, right: bytes, wrong: bytes, tmp_path: Path):
    reader = READERS[name]
    path = reader.make(tmp_path)
    whole = path.read_bytes()
    assert right in whole
    path.write_bytes(whole.replace(right, wrong, 1))
    assert corrupt.verdict(reader, path) == "refused"


def test_parsing_names_the_file_once(tmp_path: Path):
    path = tmp_path / "x.json"
    with pytest.raises(ValueError, match=r"x\.json is not a list: 'k'$"), \
            parsing(path, "a list", KeyError):
        raise KeyError("k")
    with pytest.raises(ValueError, match=r"^see .*x\.json$"), parsing(path, "a list"):
        raise ValueError(f"see {path}")
    with pytest.raises(KeyError), parsing(path, "a list"):
        raise KeyError("k")
