"""Dialogue sources, and GPT-2's tokenizer against its published files."""

import io
import json
import os
import subprocess
import sys
import tarfile
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
import torch
from dataset_hub import serve
from safetensors.torch import save
from tokenizers import ByteLevelBPETokenizer

from lablog.files import repository
from lablog.text.corpora import conversation, documents
from lablog.text.gpt2 import GPT2Tokenizer, gpt2_embedding

NAME = "models/ggml-vocab-gpt-2.gguf"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The file as llama.cpp's tree has it, from the tree or from the sdist that carries it."""
    tree = repository() / "build" / "native" / "llama.cpp" / NAME
    if tree.is_file():
        return tree
    for archive in (repository() / "build" / "source").glob("llama_cpp_python-*.tar.gz"):
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"{archive.name[:-7]}/vendor/llama.cpp/{NAME}")
            path = tmp_path_factory.mktemp("vocabulary") / "gpt2.gguf"
            path.write_bytes(member.read())
            return path
    pytest.skip(f"llama.cpp's {NAME} is neither in build/native nor in build/source")


def test_gpt2_tokenizer_against_the_published_files(vocabulary):
    shared = repository().parent / "shared" / "data"
    if not (shared / "gpt2-encoder.json").is_file():
        pytest.skip(f"{shared} has no gpt2-encoder.json")
    published = ByteLevelBPETokenizer(
        str(shared / "gpt2-encoder.json"), str(shared / "gpt2-vocab.bpe")
    )
    ours = GPT2Tokenizer(vocabulary)
    assert len(ours) == 50257
    texts = ["Hello, world!", "  two  spaces\n\nand\t", "naïve café 日本語 🙂", "it is 3.14", ""]
    texts += list(islice(documents("arianna", "train", 0), 20))
    for text in texts:
        ids = ours.encode(text)
        assert ids == published.encode(text).ids
        assert ours.decode(ids) == text


def test_gpt2_tokenizer_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="GPT-2's vocabulary"):
        GPT2Tokenizer(tmp_path / "none.gguf")
    path = tmp_path / "text.gguf"
    path.write_bytes(b"not a GGUF file at all")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        GPT2Tokenizer(path)


@pytest.mark.parametrize("source", ["arianna", "self_consistency"])
def test_splits_share_no_dialogue(source):
    train = set(islice(documents(source, "train", 1), 300))
    test = set(islice(documents(source, "test", 1), 300))
    assert len(train) > 100
    assert len(test) > 20
    assert not train & test
    assert all(text.startswith(("U: ", "A: ")) and text.endswith("\n") for text in train)


def parquet(texts):
    """Rows as UltraChat has them."""
    rows = [{"prompt": text, "messages": [{"role": "user", "content": text},
                                          {"role": "assistant", "content": "yes"}]}
            for text in texts]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def from_hub(endpoint, cache, program):
    """What `program` prints as JSON in a process whose Hub is `endpoint`."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", f"import json\n{program}"], env=env, check=True,
                          cwd=cache, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def test_ultrachat_comes_from_the_hub_by_its_own_splits(tmp_path):
    files = {f"data/{split}_{kind}-00000-of-00001.parquet": parquet(f"{split} {kind} {i}\n!"
                                                                     for i in range(3))
             for split in ("train", "test") for kind in ("sft", "gen")}
    with serve("HuggingFaceH4/ultrachat_200k", files) as endpoint:
        found = from_hub(endpoint, tmp_path, """
from lablog.text.corpora import documents
print(json.dumps([list(documents("ultrachat", split, 0)) for split in ("train", "test")]))""")
    assert found == [[f"U: {split} sft {i} !\nA: yes\n" for i in range(3)]
                     for split in ("train", "test")]


def test_gpt2_matrix_comes_from_the_hub_or_a_file(tmp_path):
    table = torch.arange(12.0).reshape(4, 3)
    content = save({"wte.weight": table.half(), "wpe.weight": torch.zeros(2, 3)})
    program = """
from lablog.text.gpt2 import gpt2_embedding
print(json.dumps(gpt2_embedding({source!r}).tolist()))"""
    with serve("openai-community/gpt2", {"model.safetensors": content}) as endpoint:
        source = "openai-community/gpt2"
        assert from_hub(endpoint, tmp_path, program.format(source=source)) == table.tolist()
    (tmp_path / "gpt2.safetensors").write_bytes(content)
    assert torch.equal(gpt2_embedding(str(tmp_path / "gpt2.safetensors")), table)
    (tmp_path / "other.safetensors").write_bytes(save({"weight": table}))
    with pytest.raises(ValueError, match=r"no tensor wte\.weight"):
        gpt2_embedding(str(tmp_path / "other.safetensors"))


def test_conversation_puts_a_turn_on_a_line():
    messages = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": " c "}]
    assert conversation(messages) == "U: a b\nA: c\n"
