"""The Hugging Face Trainer, in the data's order and with guards against what goes wrong silently.

A run that carries on the counters of another, a learning rate that is zero before the end, and a
loss that is not a number stop the training; a checkpoint counts once it is whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from lablog.progress import progress
from lablog.text.datasets import Item


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


def pad_items(items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """Items padded on the right to the longest, as ``input_ids`` (int64) and ``weights`` (f32).

    Padding has weight 0 and, standing after every real token, is invisible to causal attention.
    """
    shape = (len(items), max(len(item.ids) for item in items))
    ids, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = torch.from_numpy(item.ids.astype(np.int64))
        weights[row, : len(item.ids)] = torch.from_numpy(item.weights)
    return {"input_ids": ids, "weights": weights}
