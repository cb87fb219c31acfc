"""What the tests hand to workers."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from lablog.models.shape import ModelShape
from lablog.models.training import TrainingSettings, train_causal_lm
from lablog.progress import progress
from lablog.text.datasets import DialogueDataset
from lablog.text.dialogues import load_settings
from lablog.text.tokenizer import Tokenizer


def threads() -> int:
    return torch.get_num_threads()


def loaded(module: str) -> bool:
    return module in sys.modules


def process() -> int:
    return os.getpid()


def lock_of_a_bar(total: int) -> str:
    """Show a bar; the name in shared memory of the lock that bars have."""
    progress(total, "bar", "unit").close()
    return str(tqdm.get_lock().mp_lock._semlock.name)


def copied(source: Path, target: Path) -> Path:
    """Write a folder with the text of `source`, twice as long."""
    target.mkdir(parents=True)
    (target / "inner").mkdir()
    (target / "inner" / "text").write_text(2 * source.read_text())
    return target


def slow(folder: Path, seconds: float) -> int:
    """Note the process, and wait."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(seconds)
    return os.getpid()


def once_slow(folder: Path) -> int:
    """Wait for ever at first; the second time, end. Returns how often it was begun."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.pid").touch()
    begun = len(list(folder.glob("*.pid")))
    if begun == 1:
        time.sleep(600)
    return begun


def train(folder: Path, output: Path, tokenizer: Path) -> Path:
    """Note the process, and train a tiny model with many checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.pid").touch()
    shape = ModelShape(layers=1, width=16, heads=2, kv_heads=1, feed_forward=32, context=512,
                       tied_embeddings=True, initializer_range=0.02)
    plan = TrainingSettings(
        steps=150, batch_size=4, learning_rate=3e-3, warmup_steps=4, schedule="cosine",
        betas=(0.9, 0.98), weight_decay=0.01, precision="f32", threads=1, checkpoint_every=10,
        log_every=50)
    data = DialogueDataset(load_settings(), Tokenizer(tokenizer), 0, 600, 4, user_weight=0.1,
                           value_weight=3)
    return train_causal_lm(shape, data, plan, output, tokenizer=tokenizer, data_key="d")


def worker_of(process: int) -> psutil.Process:
    """The worker whose server of processes has begun `process`."""
    return psutil.Process(process).parent().parent()


def kill_the_worker(what: str) -> None:
    worker_of(os.getpid()).send_signal(signal.SIGKILL)
    time.sleep(600)
