"""Which folders are read as a model: weights without pickle, and no code of a stranger's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lablog.models import convert, locate
from lablog.models.model_folder import checked_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random Llama."""
    torch.manual_seed(0)
    made = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )).save_pretrained(made)
    return made


@pytest.fixture
def hostile(folder: Path) -> Path:
    """The same with a tokenizer of its own; the file `ran` beside it tells that its code has run.

    llama.cpp's converter loads this class of tokenizer with `trust_remote_code`, of a plain Llama.
    """
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "HybridDNATokenizer", "auto_map": {"AutoTokenizer": ["tok.Tok", None]}}))
    (folder / "tok.py").write_text(
        f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n\nclass Tok: pass\n")
    return folder


def test_code_in_a_models_folder_is_not_run(hostile: Path, tmp_path: Path):
    for read in (lambda: locate.gguf_file(str(hostile), tmp_path / "artifacts"),
                 lambda: locate.hugging_face_folder(str(hostile), tmp_path / "artifacts"),
                 lambda: convert.to_gguf(hostile, tmp_path / "model.gguf")):
        with pytest.raises(ValueError, match=r"tokenizer_config\.json names code of its own"):
            read()
    assert not (hostile / "ran").exists()
    assert not list(tmp_path.glob("*.gguf"))


def test_the_converter_would_run_it(hostile: Path, tmp_path: Path, monkeypatch):
    """Else the test above shows nothing."""
    monkeypatch.setattr(convert, "checked_folder", lambda folder: folder)
    with pytest.raises(RuntimeError, match="converter failed"):
        convert.to_gguf(hostile, tmp_path / "model.gguf")
    assert (hostile / "ran").exists()


def test_code_of_a_base_is_not_run_for_an_adapter(hostile: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="names code of its own"):
        convert.lora_to_gguf(adapter, hostile, tmp_path / "adapter.gguf")
    assert not (hostile / "ran").exists()


@pytest.mark.parametrize("text", [
    '{"auto_map": {"AutoModel": "x.Y"}}', '{"auto_map": ["x.Y", null]}', '{"auto_map": "x.Y"}',
    r'{"auto\u005fmap": {}}', '{"auto_map": 1, "auto_map": {"AutoModel": "x.Y"}}'])
def test_code_is_found_in_every_configuration(folder: Path, text: str):
    assert checked_folder(folder) == folder
    (folder / "processor_config.json").write_text(text)
    with pytest.raises(ValueError, match="auto_map"):
        checked_folder(folder)


def test_a_token_of_that_name_is_no_code(folder: Path):
    (folder / "vocab.json").write_text('{"auto_map": 7, "a": 1}')
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"auto_map": 7}}}')
    assert checked_folder(folder) == folder


def test_pickled_weights_are_no_model(folder: Path, tmp_path: Path):
    """Nor could their change be seen: a GGUF file is named by the files that are read."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for beside in ({}, {"a": torch.ones(1)}):
        if beside:
            save_file(beside, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="pickled ones are not read"):
            locate.gguf_file(str(folder), tmp_path / "artifacts")
