"""A random Llama with the project's tokenizer, in PyTorch and as GGUF."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lablog.commitment import coherence, probes
from lablog.commitment.arms import Experiment
from lablog.commitment.conversations import ConversationSettings
from lablog.commitment.llama_cpp_speaker import LlamaCppSpeaker
from lablog.commitment.qlora import LoraSettings, Plan, Schedule
from lablog.models import convert
from lablog.models.llama_cpp import Context, Model
from lablog.models.training import TrainingSettings
from lablog.text.dialogues import generate, load_settings, render, trained_part
from lablog.text.tokenizer import Tokenizer, train_tokenizer


def random_llama(path: Path, vocabulary: int) -> Path:
    """Hugging Face folder of a Llama with six layers, wide enough a distribution to differ."""
    settings = load_settings()
    lines = {
        line for i in range(400) for line in render(generate(settings, 0, i).turns).splitlines()
    }
    tokenizer = train_tokenizer(sorted(lines), vocabulary, path / "tokenizer.model")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.12, bos_token_id=1, eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A model whose tokenizer cuts some values in several tokens."""
    return random_llama(tmp_path_factory.mktemp("random-llama"), 600)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A model whose tokenizer has a token for every value."""
    return random_llama(tmp_path_factory.mktemp("random-base"), 1000)


@pytest.fixture(scope="session")
def gguf(folder) -> Path:
    return convert.to_gguf(folder, folder.with_suffix(".gguf"))


@pytest.fixture(scope="session")
def torch_model(folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def model(gguf):
    with Model(gguf) as opened:
        yield opened


@pytest.fixture
def context(model):
    with Context(model, sequences=27, window=256) as opened:
        yield opened


@pytest.fixture
def speech(context) -> LlamaCppSpeaker:
    return LlamaCppSpeaker(context)


@pytest.fixture(scope="session")
def items() -> probes.Items:
    return probes.make_items(load_settings(), seed=3, count=8)


@pytest.fixture
def material() -> coherence.Material:
    return coherence.make_material(load_settings(), 0, texts=5, continuations=3, tokens=12)


@pytest.fixture(scope="session")
def tiny(folder, tmp_path_factory) -> Path:
    """A random Llama of two small layers, with the tokenizer of `folder`."""
    path = tmp_path_factory.mktemp("random-tiny")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    return path


@pytest.fixture(scope="session")
def experiment(tiny, tmp_path_factory) -> Experiment:
    """z*, LoRA and note, trained for three steps on `tiny`."""
    plan = Plan(
        k=6, strength=6.0, layers=(0, 1), quantisation="none",
        lora=LoraSettings(r=4, alpha=8, dropout=0, targets="all-linear"),
        schedule=Schedule(beta=0.01, warmup=0, annealing=0, free_bits=0, cells=0.5),
        training=TrainingSettings(
            steps=3, batch_size=12, learning_rate=3e-2, warmup_steps=0, schedule="linear",
            betas=(0.9, 0.98), weight_decay=0, precision="f32", threads=1, checkpoint_every=9,
            log_every=1))
    made = Experiment({1: tiny}, plan, "dialogues", ConversationSettings(
        trained_part(load_settings()), gap=(0, 1)), tmp_path_factory.mktemp("artifacts"))
    for name in ("commitment", "lora", "note"):
        made.train(1, 1, name)
    return made
