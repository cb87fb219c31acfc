"""Training small causal language models through the Hugging Face Trainer.

`train_causal_lm` is the one training function of the project: it checkpoints, resumes after a
kill to bit-identical weights, refuses checkpoints of another configuration, and leaves one
folder in Hugging Face format, complete or absent.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from filelock import FileLock
from pydantic import Field
from safetensors import SafetensorError
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from lablog.determinism import seed_everything
from lablog.files import atomic_write, sha256_of
from lablog.keys import key
from lablog.layout import MADE
from lablog.models.shape import ModelShape
from lablog.models.trainer import Fresh, WeightedTrainer, last_good, pad_items
from lablog.strict import Strict
from lablog.text.datasets import Item
from lablog.text.tokenizer import Tokenizer


class TrainingSettings(Strict):
    """How to train: one optimizer step sees ``batch_size * gradient_accumulation`` items."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    schedule: Literal["constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"]
    min_learning_rate: float | None = Field(None, gt=0)  # of cosine_with_min_lr
    betas: tuple[float, float]
    weight_decay: float = Field(ge=0)
    clip: float = Field(1.0, ge=0)  # largest gradient norm; 0 does not clip
    precision: Literal["f32", "bf16"]
    compiled: bool = False
    cpu: bool = True
    threads: int = Field(2, ge=1)
    seed: int = 0
    checkpoint_every: int = Field(ge=1)
    log_every: int = Field(ge=1)


def model_hash(folder: Path) -> str:
    """SHA-256 over all files of a Hugging Face folder that decide what the model computes, and how
    it is spoken to: weights, configuration, tokenizer, chat template, and whatever else is there.
    """
    files = [path for path in folder.rglob("*")
             if path.is_file() and path.relative_to(folder).parts[0] not in MADE]
    stamp = tuple(sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files))
    return _hash(folder, stamp)


@lru_cache(maxsize=16)
def _hash(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    return sha256_of([Path(path) for path, _, _ in stamp], folder)


def check_schedule(settings: TrainingSettings) -> None:
    """Raise ValueError if the warm-up is not shorter than the run."""
    if settings.warmup_steps >= settings.steps:
        raise ValueError(
            f"warmup_steps = {settings.warmup_steps} of steps = {settings.steps}: the learning "
            "rate would never be reached; the warm-up must be shorter than the run"
        )


def relative_update(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> float:
    """Euclidean norm of the change of all weights over that of `before`.

    ValueError if nothing has changed: the weights were copied, not trained.
    """
    change = sum(
        (after[n].to(w.device) - w).double().square().sum().item() for n, w in before.items()
    )
    if not change:
        raise ValueError("no weight has changed in training: they were copied, not trained")
    return float((change / sum(w.double().square().sum().item() for w in before.values())) ** 0.5)


@contextmanager
def _disk_full_named(work: Path) -> Iterator[None]:
    """One OSError for all the ways in which a checkpoint can meet a full disk."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        words = ("No space left", "File too large", "PytorchStreamWriter", "file write failed")
        if getattr(error, "errno", None) in codes or any(word in str(error) for word in words):
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: no checkpoint was written in {work}; the last good one is "
                f"{last_good(work) or 'the start'}: free some space and run again to resume",
            ) from error
        raise


def train_causal_lm(
    start: ModelShape | Path,
    dataset: Dataset[Item],
    settings: TrainingSettings,
    output: Path,
    *,
    tokenizer: Path,
    data_key: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train and return `output`: safetensors, config, tokenizer and ``training.json``.

    `start` is a shape (random weights from ``settings.seed``) or the folder of a trained model.
    `dataset` holds `Item`s in the order in which they are to be seen, ``steps * batch_size *
    gradient_accumulation`` of them (fewer are repeated); `data_key` names its contents. The
    folder appears whole or not at all; until then checkpoints lie in ``.<name>.work`` beside it
    and a call with the same arguments resumes from the last complete one, to the same bits.

    Raises ValueError if `output` or the checkpoints belong to other settings, data or
    tokenizer, if the schedule does not fit the run, if counters of another run are carried on,
    and if no weight has changed; FloatingPointError naming the step if the loss is NaN or
    infinite; OSError if the disk is full. The last good checkpoint stays.
    """
    vocabulary = Tokenizer(tokenizer)
    origin = start.model_dump() if isinstance(start, ModelShape) else model_hash(start)
    made_of = key(train_causal_lm, settings, origin, data_key, vocabulary.hash)

    def build(arguments: TrainingArguments) -> Trainer:
        model = (
            start.model(len(vocabulary))
            if isinstance(start, ModelShape)
            else LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        )
        return WeightedTrainer(model=model, args=arguments, train_dataset=dataset,
                               data_collator=pad_items, callbacks=callbacks)

    def save(trainer: Trainer, folder: Path) -> None:
        model: Any = trainer.model
        model.save_pretrained(folder)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(tokenizer.parent / name, folder / name)

    about = {"start": origin, "data": data_key, "tokenizer_sha256": vocabulary.hash}
    return train_to_folder(output, made_of, settings, build, save, about)


def train_to_folder(
    output: Path, made_of: str, settings: TrainingSettings,
    build: Callable[[TrainingArguments], Trainer], save: Callable[[Trainer, Path], None],
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Train what `build` makes and `save` it; `output` appears whole or not at all.

    Under ``accelerate launch`` every process calls it; the first one alone writes. A step then sees
    the micro-batches of all processes.

    `made_of` is the key of everything that decides the result; see `train_causal_lm` for
    checkpoints, resuming and errors. ``training.json`` (with `about`) and TensorBoard's events are
    added to what `save` writes.
    """
    check_schedule(settings)
    work = output.parent / f".{output.name}.work"
    output.parent.mkdir(parents=True, exist_ok=True)
    processes = PartialState(cpu=settings.cpu)
    main = processes.is_main_process
    with FileLock(output.parent / f".{output.name}.lock") if main else nullcontext():
        if main:
            _refuse_foreign(made_of, output, work)
        processes.wait_for_everyone()
        if output.is_dir():
            return output
        processes.wait_for_everyone()
        if main:
            atomic_write(work / "key", made_of)
            for partial in set(work.glob("checkpoint-*")):
                if not (partial / "complete").is_file():
                    shutil.rmtree(partial)
        processes.wait_for_everyone()
        disable_progress_bar()  # those of reading and writing weights, of no use in a log
        seed_everything(settings.seed, settings.threads)
        trainer = build(_arguments(settings, work))
        if not main:  # one start for all, but noise of its own for each process
            torch.manual_seed(settings.seed + processes.process_index)
        model: Any = trainer.model
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()
                  if weight.requires_grad}
        last = last_good(work)
        resumed = int(last.name[11:]) if last else 0
        board = (SummaryWriter(str(work / "tensorboard"), purge_step=resumed + 1) if main
                 else nullcontext())
        wall, cpu = time.monotonic(), time.process_time()
        with _disk_full_named(work), board as writer:  # closed when training fails, too
            if main:
                trainer.add_callback(TensorBoardCallback(writer))
            trainer.add_callback(Fresh(resumed))
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        if main:
            saved = last_good(work) or work
            state = [saved / name for name in ("model.safetensors", "optimizer.pt")]
            log = {
                "key": made_of,
                **(about or {}),
                "settings": settings.model_dump(),
                "processes": processes.num_processes,
                "device": device_name(settings.cpu),
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": trainer.state.num_input_tokens_seen,
                "relative_update": relative_update(before, dict(model.named_parameters())),
                "checkpoint_bytes": sum(path.stat().st_size for path in state if path.is_file()),
                "resumed_from": resumed,
                "wall_seconds": time.monotonic() - wall,
                "cpu_seconds": time.process_time() - cpu,
                # Without times, so that a resumed run has the history of an uninterrupted one.
                "history": [
                    {n: value for n, value in entry.items() if not n.startswith("train_")}
                    for entry in trainer.state.log_history if "loss" in entry
                ],
            }
            done = work / "done"
            shutil.rmtree(done, ignore_errors=True)
            save(trainer, done)
            shutil.move(work / "tensorboard", done / "tensorboard")
            atomic_write(done / "training.json", json.dumps(log, indent=1) + "\n")
            atomic_write(done / "key", made_of)
            done.replace(output)
            shutil.rmtree(work)
        processes.wait_for_everyone()
    return output


def device_name(cpu: bool) -> str:
    """What a training runs on, for readers."""
    return "cpu" if cpu or not torch.cuda.is_available() else torch.cuda.get_device_name()


def _refuse_foreign(made_of: str, *folders: Path) -> None:
    """Raise ValueError if one of `folders` was made from other settings, data or tokenizer."""
    for folder in folders:
        found = folder / "key"
        if found.is_file() and found.read_text() != made_of:
            raise ValueError(
                f"{folder} was made with other settings, data or tokenizer (key "
                f"{found.read_text()}, expected {made_of}): delete it or choose another output"
            )


def _arguments(settings: TrainingSettings, work: Path) -> TrainingArguments:
    minimum = settings.min_learning_rate
    return TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.schedule,
        lr_scheduler_kwargs={} if minimum is None else {"min_lr": minimum},
        optim="adamw_torch_fused",
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        bf16=settings.precision == "bf16",
        torch_compile=settings.compiled,
        use_cpu=settings.cpu,
        seed=settings.seed,
        save_steps=settings.checkpoint_every,
        save_total_limit=2,  # the newest may be incomplete when the process is killed
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
