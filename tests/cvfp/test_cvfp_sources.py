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
from dataset_hub import COMMIT, serve
from safetensors.torch import save
from tiny_gguf import write_tiny
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaForCausalLM

from lablog import layout
from lablog.cvfp.data import prepare
from lablog.cvfp.model import ModelConfig
from lablog.files import data_file, repository
from lablog.models import convert, locate
from lablog.text.bpe import GGUFTokenizer
from lablog.text.corpora import conversation, documents, user_documents
from lablog.text.pretrained import gguf_embedding, gpt2_embedding

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
    ours = GGUFTokenizer(vocabulary)
    assert len(ours) == 50257
    texts = ["Hello, world!", "  two  spaces\n\nand\t", "naïve café 日本語 🙂", "it is 3.14", ""]
    texts += list(islice(documents("arianna", "train", 0), 20))
    for text in texts:
        ids = ours.encode(text)
        assert ids == published.encode(text).ids
        assert ours.decode(ids) == text


def test_gpt2_tokenizer_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model file .*none\.gguf"):
        GGUFTokenizer(tmp_path / "none.gguf")
    path = tmp_path / "text.gguf"
    path.write_bytes(b"not a GGUF file at all")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        GGUFTokenizer(path)


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
from lablog.text.pretrained import gguf_embedding, gpt2_embedding
print(json.dumps(gpt2_embedding({source!r}).tolist()))"""
    with serve("openai-community/gpt2", {"model.safetensors": content}) as endpoint:
        for source in ("openai-community/gpt2", f"openai-community/gpt2@{COMMIT}"):
            assert from_hub(endpoint, tmp_path, program.format(source=source)) == table.tolist()
    (tmp_path / "gpt2.safetensors").write_bytes(content)
    assert torch.equal(gpt2_embedding(str(tmp_path / "gpt2.safetensors")), table)
    (tmp_path / "other.safetensors").write_bytes(save({"weight": table}))
    with pytest.raises(ValueError, match=r"no tensor wte\.weight"):
        gpt2_embedding(str(tmp_path / "other.safetensors"))


CHAT = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize("row", [
    CHAT, {"messages": CHAT}, {"id": 1, "conversations": CHAT},
    {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]},
])
def test_chats_of_a_users_file_in_every_layout(tmp_path, row):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row), encoding="utf-8")
    assert user_documents(path) == ["U: a b\nA: c\n"] * 2


def test_a_plain_text_is_cut_at_blank_lines_into_documents_of_some_length(tmp_path):
    path = tmp_path / "story.txt"
    long, short = "x" * 3000, "y" * 1500
    path.write_text(f"{long}\n\n{short}\n \n{short}\n\n\nz", encoding="utf-8")
    assert user_documents(path) == [long, f"{short}\n{short}", "z"]


def test_a_users_text_is_split_and_read_by_both_chapters_like_any_other(tmp_path, small):
    path = tmp_path / "chats.jsonl"
    lines = data_file("arianna_conversations.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    path.write_text("\n".join(lines), encoding="utf-8")
    train, test = (list(documents(str(path), split, 0)) for split in ("train", "test"))
    assert (len(train), len(test)) == (24, 6)
    found = prepare(
        tmp_path / "made", small, text_source=str(path), tokenizer="project", vocabulary=400,
        embedding="gaussian", window=2, corpus_documents=50, dialogues=10, dialogue_tokens=16,
        test_dialogues=2, val_data_source="text_file", seed=0, device="cpu",
    )
    assert {name: len(ids) for name, ids in found.ids.items()} == {
        "training": 160, "validation": 32, "test": 32, "dev": 32}
    assert found.files["text"] == path


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.jsonl", b"[1", r"a\.jsonl, line 1 is not JSON"),
    ("a.jsonl", b'[{"role": "user", "content": "x"}]\n{"text": "x"}', "line 2 is no chat"),
    ("a.jsonl", b"[]", "line 1 is no chat"),
    ("a.jsonl", b'[{"role": "narrator", "content": "x"}]', "line 1: .*narrator.* is no message"),
    ("a.jsonl", b'[{"role": "user", "content": 3}]', "is no message"),
    ("a.jsonl", b"[7]", "line 1: 7 is no message"),
    ("a.txt", b" \n\n", "holds no text"),
    ("a.txt", b"ab\xff", "not UTF-8 .* at byte 2"),
])
def test_a_users_file_is_refused_by_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        user_documents(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        user_documents(tmp_path / "none.txt")


def test_conversation_puts_a_turn_on_a_line():
    messages = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": " c "}]
    assert conversation(messages) == "U: a b\nA: c\n"


def test_the_embedding_of_a_model_is_that_of_pytorch(tmp_path):
    """In f32 to the last bit, in eight bits nearly; a vocabulary alone has none."""
    path = write_tiny(tmp_path / "tiny.gguf", size=1000)
    table = gguf_embedding(path)
    folder = locate.hugging_face_folder(str(path), tmp_path)
    network = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(table, network.get_input_embeddings().weight)
    rounded = gguf_embedding(convert.quantize(path, tmp_path / "small.gguf", "q8_0"))
    assert not torch.equal(rounded, table)
    torch.testing.assert_close(rounded, table, atol=0.01, rtol=0)
    alone = layout.native() / "llama.cpp" / "models" / "ggml-vocab-gpt-2.gguf"
    with pytest.raises(ValueError, match="is it a vocabulary without a model"):
        gguf_embedding(alone)


def test_a_models_own_tokens_and_embedding_are_read_by_both_chapters(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", size=1000)
    config = ModelConfig(context_dim=32, embed_dim=32, num_layers=2, layernorm_mix=1.0,
                         weight_std=0.1, bias_std=0.01)
    found = prepare(
        tmp_path / "made", config, text_source="arianna", tokenizer=str(path), vocabulary=0,
        embedding=str(path), window=2, corpus_documents=50, dialogues=5, dialogue_tokens=16,
        test_dialogues=1, val_data_source="text_file", seed=0, device="cpu")
    assert found.vocabulary == 1000
    expected = torch.nn.functional.layer_norm(gguf_embedding(path), (32,))
    assert torch.equal(found.tokens["training"], expected[found.ids["training"]])
