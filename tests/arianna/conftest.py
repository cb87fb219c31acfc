"""A model of Arianna's shape that has learnt three short exchanges by heart, in every format."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from arianna_exchanges import EXCHANGES

from lablog.arianna.exports import export
from lablog.files import data_file
from lablog.models.shape import ModelShape
from lablog.text.tokenizer import train_tokenizer

SHAPE = ModelShape(layers=6, width=288, heads=6, kv_heads=6, feed_forward=768, context=256,
                   tied_embeddings=True, initializer_range=0.04)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of the model."""
    path = tmp_path_factory.mktemp("arianna-model")
    dialogues = map(json.loads, data_file("arianna_conversations.jsonl").read_text().splitlines())
    lines = {f"{mark}: {turn['content']}" for dialogue in dialogues
             for mark, turn in zip("QA", dialogue, strict=True)}
    tokenizer = train_tokenizer(sorted(lines), 4096, path / "tokenizer.model",
                                add_prefix_space=True)
    torch.manual_seed(0)
    model = SHAPE.model(len(tokenizer))
    texts = [f"Q: {question}\nA: {answer}\n\n" for question, answer in EXCHANGES]
    rotations = ["".join(texts[i:] + texts[:i]) + texts[i] for i in range(3)]
    rows = [tokenizer.encode(text, bos=True) for text in rotations]
    length = min(map(len, rows))
    batch = torch.tensor([row[:length] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.9), fused=True)
    for _ in range(28):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.2
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def exports(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in all formats."""
    return export(folder, tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def llama2c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference program in C."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc)")
    program = tmp_path_factory.mktemp("c") / "llama2c"
    source = Path(__file__).with_name("llama2c.c")
    subprocess.run([compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", str(source),
                    "-o", str(program), "-lm"], check=True)
    return program
