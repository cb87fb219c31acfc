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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, SequentialSampler
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from lablog.determinism import seed_everything
from lablog.files import atomic_write, sha256
from lablog.keys import key
from lablog.progress import progress
from lablog.text.datasets import Item
from lablog.text.tokenizer import Tokenizer


class Strict(BaseModel):
    """Settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelShape(Strict):
    """Shape of a Llama model; the vocabulary is the tokenizer's."""

    layers: int = Field(ge=1)
    width: int = Field(ge=2)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    feed_forward: int = Field(ge=1)
    context: int = Field(ge=2)
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool
    initializer_range: float = Field(gt=0)
    mimetic: bool = False

    @model_validator(mode="after")
    def _check(self) -> ModelShape:
        if self.mimetic and self.kv_heads != self.heads:
            raise ValueError(
                f"mimetic needs kv_heads = heads, got {self.kv_heads} and {self.heads}"
            )
        return self

    def model(self, vocabulary: int) -> LlamaForCausalLM:
        """A model of this shape with random weights from PyTorch's generator.

        With `mimetic` keys begin equal to queries and the output projection as the transpose of
        that of the values: every head begins by looking for equal tokens and copying them (after
        Trockman & Kolter, Mimetic Initialization of Self-Attention Layers, 2023). The two
        halves of the gated unit begin equal too, as detectors of energy: of two values added
        up in one state, equal ones have twice the energy of different ones.
        """
        model = LlamaForCausalLM(self.config(vocabulary))
        if self.mimetic:
            with torch.no_grad():
                for layer in model.model.layers:
                    attention = layer.self_attn
                    attention.k_proj.weight.copy_(attention.q_proj.weight)
                    attention.o_proj.weight.copy_(attention.v_proj.weight.T)
                    layer.mlp.up_proj.weight.copy_(layer.mlp.gate_proj.weight)
        return model

    def config(self, vocabulary: int) -> LlamaConfig:
        """The Hugging Face configuration."""
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.norm_eps,
            tie_word_embeddings=self.tied_embeddings,
            initializer_range=self.initializer_range,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )


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


class Progress(TrainerCallback):
    """A bar with rate, remaining time, tokens per second (padding included) and loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = progress(state.max_steps, "training", "step", done=state.global_step,
                            show=state.is_local_process_zero)
        self.start, self.before = time.monotonic(), state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            rate = (state.num_input_tokens_seen - self.before) / (time.monotonic() - self.start)
            loss = f"{float(logs['loss']):.3f}"
            self.bar.set_postfix(loss=loss, tokens_per_s=f"{rate:.0f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class Complete(TrainerCallback):
    """Marks a checkpoint once all of its files are written, unless a weight is not finite."""

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero and all(
            bool(weight.isfinite().all()) for weight in model.parameters()
        ):
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "complete").touch()


class Fresh(TrainerCallback):
    """Stops a run that carries on the counters of another: its learning rate would be zero.

    `step` is that of this run's own checkpoint, 0 without one.
    """

    def __init__(self, step: int):
        self.step = step

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        found = (state.global_step, lr_scheduler.last_epoch)
        old = not self.step and (len(optimizer.state) or state.best_metric is not None)
        if found != (self.step, self.step) or old:
            raise ValueError(
                f"training begins at step {found[0]} with the schedule at {found[1]}, optimizer "
                f"state of {len(optimizer.state)} tensors and best metric {state.best_metric}, "
                f"expected step {self.step} of this run: start from the weights alone"
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        if state.global_step < state.max_steps and not lr_scheduler.get_last_lr()[0] > 0:
            raise ValueError(
                f"the learning rate is {lr_scheduler.get_last_lr()[0]} at step "
                f"{state.global_step} of {state.max_steps}: the schedule is not that of this run"
            )


class GuardedTrainer(Trainer):
    """The Trainer that keeps the data's order and refuses to go on after a loss of NaN."""

    def __init__(self, *, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any):
        super().__init__(callbacks=[Progress(), Complete(), *callbacks], **kwargs)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # each micro-batch has a mean loss of its own

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        items: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(items)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower "
                "learning_rate, or lengthen warmup_steps; the last good checkpoint is "
                f"{last_good(Path(str(self.args.output_dir))) or 'the start'}"
            )
        return loss


class WeightedTrainer(GuardedTrainer):
    """Training with weighted cross-entropy."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
        targets, weights = inputs["input_ids"][:, 1:], inputs["weights"][:, 1:]
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        loss = (loss * weights.flatten()).sum() / weights.sum()
        return (loss, {"logits": logits}) if return_outputs else loss


def last_good(work: Path) -> Path | None:
    """The newest complete checkpoint below `work`."""
    marks = sorted(work.glob("checkpoint-*/complete"), key=lambda p: int(p.parent.name[11:]))
    return marks[-1].parent if marks else None


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


def collate(items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """Items padded on the right to the longest, as ``input_ids`` (int64) and ``weights`` (f32).

    Padding has weight 0 and, standing after every real token, is invisible to causal attention.
    """
    shape = (len(items), max(len(item.ids) for item in items))
    ids, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = torch.from_numpy(item.ids.astype(np.int64))
        weights[row, : len(item.ids)] = torch.from_numpy(item.weights)
    return {"input_ids": ids, "weights": weights}


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
    origin = (
        start.model_dump() if isinstance(start, ModelShape) else sha256(start / "model.safetensors")
    )
    made_of = key(train_causal_lm, settings, origin, data_key, vocabulary.hash)

    def build(arguments: TrainingArguments) -> Trainer:
        model = (
            start.model(len(vocabulary))
            if isinstance(start, ModelShape)
            else LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        )
        return WeightedTrainer(model=model, args=arguments, train_dataset=dataset,
                               data_collator=collate, callbacks=callbacks)

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
        if main:
            board = SummaryWriter(str(work / "tensorboard"), purge_step=resumed + 1)
            trainer.add_callback(TensorBoardCallback(board))
        trainer.add_callback(Fresh(resumed))
        wall, cpu = time.monotonic(), time.process_time()
        with _disk_full_named(work):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        if main:
            saved = last_good(work) or work
            state = [saved / name for name in ("model.safetensors", "optimizer.pt")]
            log = {
                "key": made_of,
                **(about or {}),
                "settings": settings.model_dump(),
                "processes": processes.num_processes,
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
