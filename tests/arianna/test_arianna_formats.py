"""C4: one model in PyTorch, llama.cpp and C, and files that hold the same bits."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import LlamaConfig, LlamaForCausalLM

from lablog import layout
from lablog.arianna.exports import FILES, default_model
from lablog.files import repository
from lablog.models import llama2c as formats
from lablog.models import locate
from lablog.models.llama_cpp import Context, Model, generate_tokens
from lablog.record import Record
from lablog.text.tokenizer import Tokenizer, train_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
STORIES = SHARED / "stories260K.bin"
TOKENS = 160  # at least 128 are compared
CONTROL = {1: b"\n<s>\n", 2: b"\n</s>\n"}
"""How llama2.c writes the ends of texts, which are no text to llama.cpp."""


def with_torch(folder: Path, prompt: list[int]) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None  # go on after the end of a text
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=TOKENS, pad_token_id=0)
    return written[0, len(prompt) :].tolist()


def with_llama_cpp(gguf: Path, prompt: list[int]) -> tuple[list[int], str]:
    with Model(gguf) as model, Context(model, window=256) as context:
        written = generate_tokens(context, context.decode({0: prompt}), TOKENS)[0]
        text = b"".join(CONTROL.get(token) or model.piece(token) for token in written)
    return written, text.decode(errors="replace")


def with_c(program: Path, model: Path, tokenizer: Path, text: str,
           angles: str = "tables") -> tuple[list[int], list[int], str]:
    """Tokens of `text`, tokens that follow, and these as text."""
    run = subprocess.run([program, model, tokenizer, str(TOKENS), angles], input=text.encode(),
                         capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    prompt, written, said = run.stdout.split(b"\n", 2)
    return [*map(int, prompt.split())], [*map(int, written.split())], said.decode(errors="replace")


def same_words(program: Path, folder: Path, gguf: Path, model: Path, tokenizer: Path,
               text: str) -> str:
    """What PyTorch, llama.cpp and C all write after `text`."""
    prompt, written, said = with_c(program, model, tokenizer, text)
    assert with_c(program, model, tokenizer, text, "computed") == (prompt, written, said)
    assert Tokenizer(folder / "tokenizer.model").encode(text, bos=True) == prompt
    with Model(gguf) as engine:
        assert engine.tokenize(text, bos=True) == prompt
    assert with_torch(folder, prompt) == written
    assert with_llama_cpp(gguf, prompt) == (written, said)
    assert len(written) == TOKENS
    assert len(set(written)) > 10  # a loop of few tokens would prove little
    return said


# --- the same words -------------------------------------------------------------------------------


def test_the_model_says_the_same_in_pytorch_llama_cpp_and_c(llama2c, exports):
    said = same_words(llama2c, exports["huggingface"], exports["f32"], exports["llama2c"],
                      exports["tokenizer"], "Q: What is silence?\nA:")
    assert said.startswith(" A room that keeps what was said.\n\nQ: ")


def test_stories_say_the_same_in_pytorch_llama_cpp_and_c(llama2c, tmp_path: Path):
    if not STORIES.is_file():
        pytest.skip("shared/data/stories260K.bin is not beside this clone")
    tokenizer = STORIES.with_name("tok512.bin")
    folder = locate.hugging_face_folder(str(STORIES), tmp_path)
    said = same_words(llama2c, folder, locate.gguf_file(str(folder), tmp_path), STORIES, tokenizer,
                      "Zoo was")
    assert "Lily" in said
    # The export is the file that llama2.c's own programs wrote.
    formats.from_hugging_face(folder, tmp_path / "again.bin", tmp_path / "tokenizer.bin")
    assert (tmp_path / "again.bin").read_bytes() == STORIES.read_bytes()
    assert (tmp_path / "tokenizer.bin").read_bytes() == tokenizer.read_bytes()


def test_the_model_that_speaks_is_the_one_to_which_held_out_answers_are_least_surprising(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(layout, "results", lambda profile: tmp_path / profile)
    with pytest.raises(FileNotFoundError, match="make reproduce NOTEBOOKS=06"):
        default_model()
    published = (repository() / "book/records/laptop/06_arianna_finetune.json").read_text()
    record = Record.model_validate_json(published)
    for profile, bits, spoken in (("laptop", 2.4, "laptop"), ("study", 1.9, "study"),
                                  ("full", 2.1, "study"), ("smoke", 1.0, "study")):
        metrics = [metric.model_copy(update={"value": bits}) if metric.name == "after.qa" else
                   metric for metric in record.metrics]
        folder = tmp_path / profile
        record.model_copy(update={"metrics": tuple(metrics)}).write(
            folder / "records" / "06_arianna_finetune.json")
        model = folder / "artifacts" / "arianna" / FILES["f32"]
        model.parent.mkdir(parents=True)
        model.touch()
        assert default_model().relative_to(tmp_path).parts[0] == spoken


def test_the_trained_model_says_the_same_in_pytorch_llama_cpp_and_c(llama2c):
    try:
        gguf = default_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    files = {kind: gguf.with_name(name) for kind, name in FILES.items()}
    same_words(llama2c, files["huggingface"], gguf, files["llama2c"], files["tokenizer"],
               "Q: What is resonance?\nA:")


# --- the same bits --------------------------------------------------------------------------------


def test_the_files_have_the_sizes_that_the_log_tells(exports):
    assert exports["llama2c"].stat().st_size == 28_670_620
    assert {path.name for path in exports["f32"].parent.iterdir()} == set(FILES.values())
    sizes = [exports[dtype].stat().st_size for dtype in ("f32", "f16", "q8_0")]
    assert sizes[0] > 28e6 > 15e6 > sizes[1] > sizes[2] > 7e6
    with Model(exports["f32"]) as model:
        assert (model.parameters, model.window, model.vocabulary) == (7_155_360, 256, 4096)


def test_the_smaller_files_compute_nearly_the_same(exports):
    rows = {}
    for dtype in ("f32", "f16", "q8_0"):
        with Model(exports[dtype]) as model, Context(model, window=256) as context:
            ids = model.tokenize("Q: Do you remember?\nA: Only as a path", bos=True)
            rows[dtype] = context.decode({0: ids}, "all")[0]
    spread = rows["f32"].std()
    assert 0 < np.abs(rows["f16"] - rows["f32"]).max() < 0.02 * spread
    assert 0 < np.abs(rows["q8_0"] - rows["f32"]).max() < 0.2 * spread


def test_the_hugging_face_copy_is_the_model(folder: Path, exports):
    for path in folder.iterdir():
        assert (exports["huggingface"] / path.name).read_bytes() == path.read_bytes()


def small(folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A small random Llama in a Hugging Face folder."""
    torch.manual_seed(3)
    settings = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 64,
        "vocab_size": len(Tokenizer(tokenizer)), "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(dtype)
    for weight in model.parameters():  # the norms too are no longer one
        torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = ["the room hums and the hum answers", "Q: what is it?", "A: it is the other room, é."]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(lines, 320, path, add_prefix_space=True)
    return path


@pytest.mark.parametrize("changes", [
    {}, {"num_key_value_heads": 2}, {"tie_word_embeddings": False, "num_key_value_heads": 1},
    {"dtype": torch.bfloat16}, {"num_hidden_layers": 1, "hidden_size": 12},
], ids=["tied", "grouped", "untied", "bfloat16", "one-layer"])
def test_an_import_of_an_export_has_the_same_bits(changes, tokenizer: Path, tmp_path: Path):
    folder = small(tmp_path / "model", tokenizer, **changes)
    files = tmp_path / "model.bin", tmp_path / "tokenizer.bin"
    assert formats.from_hugging_face(folder, *files) == files[0]
    imported = formats.to_hugging_face(*files, tmp_path / "imported")
    before = load_file(folder / "model.safetensors")
    after = load_file(imported / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.float().view(torch.int32), after[name].view(torch.int32)), name
    first, second = (LlamaConfig.from_pretrained(path) for path in (folder, imported))
    for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "head_dim",
                "rope_parameters", "tie_word_embeddings", "hidden_act", "vocab_size"):
        assert getattr(first, key) == getattr(second, key), key
    again = tmp_path / "again.bin", tmp_path / "tokenizer-again.bin"
    formats.from_hugging_face(imported, *again)
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


# --- the tokenizer --------------------------------------------------------------------------------


def test_any_text_survives_in_every_tokenizer(exports, tmp_path_factory: pytest.TempPathFactory):
    trained = Tokenizer(exports["huggingface"] / "tokenizer.model")
    pieces = formats.read_tokenizer(exports["tokenizer"], 4096)
    imported = SentencePieceProcessor(model_proto=formats.sentencepiece_model(pieces))
    with Model(exports["f32"]) as engine:

        @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
        def check(text: str) -> None:
            ids = trained.encode(text)
            assert trained.decode(ids) == text
            assert list(imported.encode(text)) == ids
            assert engine.tokenize(text) == ids
            assert b"".join(map(engine.piece, ids)) == (" " + text if text else "").encode()
            with_bos = [1, *ids]
            assert trained.encode(text, bos=True) == engine.tokenize(text, bos=True) == with_bos
            assert trained.decode(with_bos) == text

        check()


@pytest.mark.parametrize("text", ["猫", "🎻 é", "ß\x00\x7f", "Q: ∑?\nA:"])
def test_unknown_characters_fall_to_their_bytes(exports, text: str):
    with Model(exports["f32"]) as engine:
        ids = engine.tokenize(text)
        assert b"".join(bytes([i - 3]) if 3 <= i < 259 else engine.piece(i) for i in ids) == (
            " " + text).encode()
        assert {byte + 3 for byte in text.encode() if byte >= 128} <= set(ids)
        assert 0 not in ids  # never "unknown"


def test_begin_and_end_of_text_are_flagged(exports):
    with Model(exports["f32"]) as engine:
        assert engine.bos == 1
        assert [token for token in range(4096) if engine.ends_generation(token)] == [2]
        assert [engine.piece(token) for token in (1, 2)] == [b"", b""]
        assert engine.tokenize("</s>")[-1] != 2  # a user cannot write it


def test_llama_2s_own_tokenizer_becomes_llama2cs_own_file():
    path = SHARED / "llama2-tokenizer.model"
    if not path.is_file():
        pytest.skip("shared/data/llama2-tokenizer.model is not beside this clone")
    pieces = formats.read_sentencepiece(path)
    assert len(formats.tokenizer_bin(pieces)) == 433_869  # as karpathy/llama2.c ships it
    imported = SentencePieceProcessor(model_proto=formats.sentencepiece_model(pieces))
    for text in ("What is resonance?", " two  spaces\n\tça 猫 1234", "Übergröße"):
        assert list(imported.encode(text)) == Tokenizer(path).encode(text)


# --- what is refused ------------------------------------------------------------------------------


def refused(folder: Path, tmp_path: Path, error: type[Exception] = ValueError) -> str:
    files = tmp_path / "out" / "model.bin", tmp_path / "out" / "tokenizer.bin"
    with pytest.raises(error) as caught:
        formats.from_hugging_face(folder, *files)
    assert not files[0].parent.exists()
    return str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06; .* only have 1e-05"),
    ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
     "rope_theta is 500000.0; .* only have 10000.0"),
    ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
     "rope_type is 'linear'; .* only have 'default'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; .* only have 'silu'"),
    ({"attention_bias": True}, "attention_bias is True; .* only have False"),
    ({"mlp_bias": True}, "mlp_bias is True; .* only have False"),
    ({"head_dim": 16}, "head_dim is 16; .* only have 8"),
    ({"vocab_size": 400}, "vocabulary of 400, its tokenizer one of 3"),
])
def test_what_the_format_cannot_hold_is_refused(changes, message, tokenizer: Path, tmp_path: Path):
    folder = small(tmp_path / "model", tokenizer, **changes)
    told = refused(folder, tmp_path)
    assert str(folder) in told
    assert re.search(message, told)


def test_another_kind_of_model_is_refused(tokenizer: Path, tmp_path: Path):
    folder = small(tmp_path / "model", tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    assert "model_type is 'mistral'; llama2.c holds a llama" in refused(folder, tmp_path)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    assert "has the shape (3, 80, 48); the configuration asks for (3, 96, 48)" in refused(
        folder, tmp_path)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "hold no tensor 'model.layers.3." in refused(folder, tmp_path)
    (folder / "config.json").unlink()
    assert "it has no config.json" in refused(folder, tmp_path, FileNotFoundError)


@pytest.mark.parametrize(("changes", "message"), [
    ({"add_dummy_prefix": False}, "puts a space in front of a text"),
    ({"model_type": "unigram"}, "is byte-pair encoding"),
    ({"byte_fallback": False}, "has <unk>, <s>, </s>, 256 bytes, then plain pieces"),
    ({"user_defined_symbols": ["Q:"]}, "has <unk>, <s>, </s>, 256 bytes, then plain pieces"),
    ({"unk_id": 2, "eos_id": 0}, "has <unk>, <s>, </s>, 256 bytes, then plain pieces"),
    ({"bos_id": 2, "eos_id": 1}, "begins a text with token 1 and ends it with 2"),
    ({"normalization_rule_name": "nfkc"}, "normalises nothing"),
    ({"remove_extra_whitespaces": True}, "keeps repeated spaces"),
    ({"treat_whitespace_as_suffix": True}, "has spaces in front of words"),
])
def test_a_tokenizer_that_c_would_read_differently_is_refused(changes, message, tmp_path: Path):
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False, "add_dummy_prefix": True, "vocab_size": 300}
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the room hums and the hum answers", "what is the other room"]),
        model_prefix=str(tmp_path / "tokenizer"), hard_vocab_limit=False, minloglevel=2,
        **(settings | changes),
    )
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        formats.read_sentencepiece(tmp_path / "tokenizer.model")
    assert "train the tokenizer that way, or export to GGUF" in str(caught.value)


def test_a_tokenizer_that_is_none_is_refused(tokenizer: Path, tmp_path: Path):
    folder = small(tmp_path / "model", tokenizer)
    (folder / "tokenizer.model").write_bytes(b"\xff\xfftext")
    assert "tokenizer.model is not a SentencePiece model" in refused(folder, tmp_path)
    (folder / "tokenizer.model").unlink()
    assert "there is no SentencePiece model" in refused(folder, tmp_path, FileNotFoundError)


@pytest.mark.parametrize("kind", ["llama2c", "tokenizer"])
def test_an_export_that_was_cut_short_is_refused(exports, kind: str, tmp_path: Path):
    for name in ("llama2c", "tokenizer"):
        shutil.copy(exports[name], tmp_path / FILES[name])
    cut = tmp_path / FILES[kind]
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated") as caught:
        locate.gguf_file(str(tmp_path / FILES["llama2c"]), tmp_path / "cache")
    assert str(cut) in str(caught.value)
