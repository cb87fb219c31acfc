"""The tokenizer: exact round trips, determinism, and the same ids in llama.cpp."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lablog.files import repository
from lablog.models.convert import to_gguf
from lablog.models.shape import ModelShape
from lablog.text.dialogues import generate, load_settings, render
from lablog.text.tokenizer import Tokenizer, train_tokenizer

SETTINGS = load_settings()
TEXTS = [render(generate(SETTINGS, 0, i).turns) for i in range(1000)]
LINES = sorted({line for text in TEXTS for line in text.splitlines()})
NATIVE = repository() / "build" / "native"
AWKWARD = [
    "",
    " ",
    " lead",
    "two  spaces ",
    "\n\nA:",
    "tab\tnul\x00",
    "<s> </s> <0x0A>",
    "naïve 🎉 日本語",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(LINES, 1000, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, bos=True) == [tokenizer.bos, *tokenizer.encode(text)]


def test_the_mark_of_a_space_is_refused(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="U\\+2581 at 1"):
        tokenizer.encode("a\u2581b")


def test_every_value_and_verdict_is_one_token(tokenizer: Tokenizer):
    for value in [v for values in SETTINGS.topics.values() for v in values] + ["yes", "no"]:
        assert len(tokenizer.encode(f" {value}")) == 1


def test_a_text_encodes_as_its_lines_do(tokenizer: Tokenizer):
    for text in TEXTS[:50]:
        lines = [tokenizer.encode(line) for line in text.splitlines(keepends=True)]
        assert tokenizer.encode(text) == [token for line in lines for token in line]


def test_the_same_sentences_give_the_same_file(tokenizer: Tokenizer, tmp_path: Path):
    assert train_tokenizer(LINES, 1000, tmp_path / "a" / "tokenizer.model").hash == tokenizer.hash
    assert train_tokenizer(LINES, 900, tmp_path / "b" / "tokenizer.model").hash != tokenizer.hash


def test_what_cannot_be_a_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.model"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken\.model is not a SentencePiece model"):
        Tokenizer(tmp_path / "broken.model")
    with pytest.raises(ValueError, match="no tokenizer of 260 pieces"):
        train_tokenizer(LINES, 260, tmp_path / "tokenizer.model")


@pytest.mark.skipif(not (NATIVE / "lib").is_dir(), reason="llama.cpp is not built: make setup")
def test_llama_cpp_and_transformers_tokenise_identically_and_the_logits_agree(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import numpy as np
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(NATIVE / "lib"))
    import llama_cpp

    shape = ModelShape(layers=2, width=64, heads=2, kv_heads=2, feed_forward=128, context=512,
                       tied_embeddings=True, initializer_range=0.1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape.config(len(tokenizer))).eval()
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer.path.parent / name).read_bytes())
    automatic = AutoTokenizer.from_pretrained(tmp_path)
    engine = llama_cpp.Llama(
        str(to_gguf(tmp_path, tmp_path / "model.gguf")), n_ctx=512, n_threads=1, logits_all=True,
        verbose=False, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )
    try:
        for text in [*TEXTS[:50], *AWKWARD]:
            ids = tokenizer.encode(text, bos=True)
            assert engine.tokenize(text.encode(), add_bos=True, special=False) == ids
            if not set("<>\x00") & set(text):  # transformers reads "<s>" in a text as the token
                assert automatic(text).input_ids == ids
        ids = tokenizer.encode(TEXTS[0], bos=True)
        engine.eval(ids)
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(np.array(engine.scores[: len(ids)]) - expected).max() < 2e-3
    finally:
        engine.close()


def test_the_tokenizer_carries_the_settings_that_the_loaders_need(tokenizer: Tokenizer):
    config = json.loads((tokenizer.path.parent / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is False
    assert config["add_bos_token"] is True
