"""Documentation strings, splits, shards and windows."""

import importlib
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lablog.files import atomic_write
from lablog.text import docstrings, packing
from lablog.text.corpora import base_documents
from lablog.text.tokenizer import Tokenizer, train_tokenizer

SMALL = ["filelock", "PyYAML"]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return docstrings.documents(SMALL)


@pytest.fixture(scope="module")
def tokenizer(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = sorted({line for text in documents for line in text.splitlines() if line})
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(lines, 500, path, True, llama2c=True)


def test_a_module_s_documentation_is_what_inspect_reports(documents: list[str]):
    whole = "\n\n".join(documents)
    module = importlib.import_module("filelock")
    for thing in (module, module.BaseFileLock, module.BaseFileLock.acquire, module.Timeout):
        for paragraph in docstrings.PARAGRAPH.split(inspect.getdoc(thing) or ""):
            assert paragraph.rstrip() in whole


def test_no_paragraph_occurs_twice_and_the_order_is_fixed(documents: list[str]):
    parts = [part for text in documents for part in text.split("\n\n")]
    assert len(parts) == len(set(parts)) > 100
    assert docstrings.documents(SMALL, processes=1) == documents


def test_every_pinned_package_and_what_it_requires_is_named():
    names = docstrings.closure()
    assert {"torch", "transformers", "pytest", "pyyaml", "sympy", "networkx"} <= set(names)
    assert not {"uv", "scikit-build-core"} & set(names), "what only sets up is no part of a corpus"
    assert "sympy" not in docstrings.closure(SMALL)
    with pytest.raises(ValueError, match="'no-such-package' is not installed: run `make setup`"):
        docstrings.documents(["no-such-package"])


def test_code_of_every_kind_is_searched_and_other_text_passed_over(tmp_path: Path):
    source = tmp_path / "module.py"
    source.write_text(
        '"""One.\n\n    Two\\w."""\nif True:\n    class A:\n        """Three."""\n'
        '        async def f(self):\n            """Four \u2581."""\n            def g():\n'
        '                "Five"\ntry:\n    pass\nexcept OSError:\n    def h(): "Six"\n'
    )
    assert docstrings._paragraphs(source) == [
        ["One.", "Two\\w."], ["Three."], ["Four \u2581."], ["Five"], ["Six"]
    ]
    source.write_text("{% template %}")
    assert docstrings._paragraphs(source) == []


def test_user_files_are_documents_by_paragraph(tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_text("First\nline.\n\n \nSec\u2581ond.\n")
    assert base_documents("none", files=[path]) == ["First\nline.", "Sec ond."]
    path.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.txt is not UTF-8 \(.* at byte 3\)"):
        base_documents("none", files=[path])
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"own\.txt holds no text"):
        base_documents("none", files=[path])
    with pytest.raises(ValueError, match="hold no document"):
        base_documents("none")


def test_a_data_set_is_streamed_up_to_the_limit(tmp_path: Path):
    rows = [json.dumps({"text": f"Story {i}." + "x" * 90}) for i in range(50)]
    (tmp_path / "stories.jsonl").write_text("\n".join(rows))
    assert len(base_documents(str(tmp_path))) == 50
    some = base_documents(str(tmp_path), megabytes=0.001)
    assert [text[:8] for text in some] == [f"Story {i}." for i in range(10)][: len(some)]
    assert len(some) == 10


# --- split and shards -----------------------------------------------------------------------------


@given(texts=st.lists(st.text("ab ", max_size=6), max_size=40), every=st.integers(2, 5))
def test_no_document_is_on_both_sides_and_none_is_lost(texts: list[str], every: int):
    training, held_out = packing.split(texts, every)
    assert sorted(training + held_out) == sorted(texts)
    assert not {packing.digest(t) for t in training} & {packing.digest(t) for t in held_out}


def test_shards_hold_every_document_and_are_made_once(
    documents: list[str], tokenizer: Tokenizer, tmp_path: Path
):
    stream = packing.pack(documents, tokenizer, tmp_path / "corpus", shard=1000)
    expected = [i for text in documents for i in tokenizer.encode(text, bos=True)]
    assert stream.read(0, len(stream)).tolist() == expected
    assert stream.read(995, 2010).tolist() == expected[995:3005]
    manifest = stream.manifest
    assert len(manifest.shards) == -(-len(expected) // 1000)
    assert (manifest.documents, manifest.tokens) == (len(documents), len(expected))
    assert manifest.bytes == sum(len(text.encode()) for text in documents)
    stamp = (tmp_path / "corpus" / "manifest.json").stat().st_mtime_ns
    assert packing.pack(documents, tokenizer, tmp_path / "corpus", shard=1000).key == stream.key
    assert (tmp_path / "corpus" / "manifest.json").stat().st_mtime_ns == stamp
    packing.pack(documents[1:], tokenizer, tmp_path / "corpus", shard=1000)
    assert (tmp_path / "corpus" / "manifest.json").stat().st_mtime_ns != stamp


def test_many_at_once_pack_the_same_folder(
    documents: list[str], tokenizer: Tokenizer, tmp_path: Path
):
    """As the fine-tunings of one fold do, where a worker has the files of none."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: packing.pack(documents, tokenizer, tmp_path / "fold0"),
                              range(24)))
    assert len({stream.key for stream in found}) == 1


def test_changed_shards_and_another_tokenizer_are_refused(
    documents: list[str], tokenizer: Tokenizer, tmp_path: Path
):
    folder = tmp_path / "corpus"
    packing.pack(documents, tokenizer, folder)
    other = train_tokenizer(documents[0].splitlines(), 320, tmp_path / "tokenizer.model", True)
    with pytest.raises(ValueError, match=f"encoded with tokenizer {tokenizer.hash[:12]}, not"):
        packing.Stream(folder, other)
    shard = folder / "0000.u16"
    atomic_write(shard, shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"0000\.u16 has changed: delete .* and pack again"):
        packing.Stream(folder, tokenizer)
    with pytest.raises(ValueError, match="0 documents"):
        packing.pack([], tokenizer, folder)


def test_a_failed_packing_leaves_nothing(documents: list[str], tokenizer: Tokenizer,
                                         tmp_path: Path):
    with pytest.raises(ValueError, match="U\\+2581"):
        packing.pack([*documents, "a\u2581b"], tokenizer, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == [".corpus.lock"]


@given(context=st.integers(4, 60), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_predicts_each_token_at_most_once_and_all_but_the_ends(
    stream: packing.Stream, context: int, seed: int, epoch: int
):
    windows = packing.Windows(stream, context, 10 * len(stream), seed)
    starts = []
    for index in range(epoch * windows.each, (epoch + 1) * windows.each):
        item = windows[index]
        assert len(item.ids) == context
        assert item.weights.tolist() == [0] + [1] * (context - 1)
        starts.append(int(item.ids[0]))  # the stream counts
    assert np.diff(sorted(starts)).tolist() == [context - 1] * (len(starts) - 1)
    assert len(starts) * (context - 1) > len(stream) - 3 * context


@pytest.fixture(scope="module")
def stream(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> packing.Stream:
    found = packing.pack(["a"], tokenizer, tmp_path_factory.mktemp("stream") / "numbers")
    found.shards = [np.arange(start, start + 100, dtype=np.uint16) for start in (0, 100, 200)]
    found.ends = np.array([100, 200, 300])
    return found


def test_epochs_and_seeds_differ_and_too_little_text_is_refused(stream: packing.Stream):
    first, second = (packing.Windows(stream, 20, 100, seed) for seed in (0, 1))
    assert len(first) == 100
    orders = [[int(w[i].ids[0]) for i in rows] for w, rows in (
        (first, range(first.each)), (first, range(first.each, 2 * first.each)),
        (second, range(second.each)))]
    assert len({tuple(order) for order in orders}) == 3
    with pytest.raises(IndexError):
        first[100]
    with pytest.raises(ValueError, match="300 tokens; windows of 200 need at least 399"):
        packing.Windows(stream, 200, 1, 0)


def test_digits_are_split_and_spaces_may_be_pieces(tokenizer: Tokenizer):
    assert [tokenizer.piece(i) for i in tokenizer.encode("1234")][-4:] == list("1234")
    assert tokenizer.encode_all(["a 12", ""])[0].tolist() == tokenizer.encode("a 12", bos=True)
    assert tokenizer.encode_all(["a 12", ""])[1].tolist() == [tokenizer.bos]
