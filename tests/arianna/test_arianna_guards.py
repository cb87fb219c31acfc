"""Every guard of lab log C3 fires when its fault is planted, and is silent without it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from lablog.arianna import guards
from lablog.models.shape import ModelShape
from lablog.models.training import TrainingSettings, check_schedule, train_causal_lm
from lablog.text.packing import Windows, pack, refuse_overlap
from lablog.text.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"Number {i} of the forks rings {i * i} times.\nThen silence." for i in range(300)]
SHAPE = ModelShape(layers=1, width=16, heads=2, kv_heads=2, feed_forward=32, context=32,
                   tied_embeddings=True, initializer_range=0.02)
PLAN = TrainingSettings(
    steps=12, batch_size=2, learning_rate=3e-3, warmup_steps=2, schedule="cosine",
    betas=(0.9, 0.95), weight_decay=0.1, precision="f32", threads=1, checkpoint_every=4,
    log_every=1,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = sorted({line for text in TEXTS for line in text.splitlines()})
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(lines, 400, path, True, llama2c=True)


def train(output: Path, tokenizer: Tokenizer, start: ModelShape | Path = SHAPE,
          plan: TrainingSettings = PLAN, data=None, callbacks=()) -> Path:
    stream = pack(TEXTS, tokenizer, output.parent / "texts")
    data = data or Windows(stream, 32, plan.steps * plan.batch_size, 0)
    return train_causal_lm(start, data, plan, output, tokenizer=tokenizer.path,
                           data_key=stream.key, callbacks=callbacks)


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("base") / "base", tokenizer)


# --- 1: what must match the base run --------------------------------------------------------------


def test_parameters_are_read_from_the_base_checkpoint(base: Path, tokenizer: Tokenizer):
    found = guards.base_parameters(base)
    assert found["tokenizer"] == tokenizer.hash
    assert (found["width"], found["context"], found["batch_size"]) == (16, 32, 2)
    assert (found["vocabulary"], found["precision"]) == (len(tokenizer), "f32")
    guards.check_base(base, found)


@pytest.mark.parametrize(("name", "value", "shown"), [
    ("batch_size", 16, "batch_size is 16, but 2 in the base run"),
    ("precision", "bf16", "precision is 'bf16', but 'f32' in the base run"),
    ("width", 288, "width is 288, but 16 in the base run"),
    ("layers", 6, "layers is 6, but 1"), ("vocabulary", 4096, "vocabulary is 4096, but"),
    ("tokenizer", "0123", "tokenizer is '0123', but '"),
    ("gradient_accumulation", 4, "gradient_accumulation is 4, but 1"),
])
def test_a_mismatch_names_both_values_and_passes_as_an_ablation(
    base: Path, name: str, value, shown: str
):
    with pytest.raises(ValueError, match=shown):
        guards.check_base(base, {name: value})
    with pytest.raises(ValueError, match=shown):
        guards.check_base(base, {name: value}, ["context"])
    guards.check_base(base, {name: value}, [name])


def test_what_is_no_base_checkpoint_or_no_parameter_is_refused(base: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"is no base checkpoint: it has no config\.json"):
        guards.base_parameters(tmp_path)
    with pytest.raises(ValueError, match=r"'batchsize'.* are no parameters of a base run"):
        guards.check_base(base, {"batchsize": 2})


@pytest.mark.parametrize(("name", "wrong"), [
    ("config.json", "["), ("config.json", "{}"), ("config.json", "[" * 100_000),
    ("training.json", '{"settings": {}}'), ("training.json", "[]")])
def test_a_base_whose_files_say_nothing_is_refused_by_name(
    base: Path, tmp_path: Path, name: str, wrong: str
):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / name).write_text(wrong)
    with pytest.raises(ValueError, match=rf"{name} is not "):
        guards.base_parameters(tmp_path / "base")


# --- 2: weights changed ---------------------------------------------------------------------------


class CopiedWeights(TrainerCallback):
    """The log's first attempt: what is saved at the end are the weights of the beginning."""

    def on_train_begin(self, args, state, control, model=None, **_):
        self.start = [weight.detach().clone() for weight in model.parameters()]

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **_):
        for weight, start in zip(model.parameters(), self.start, strict=True):
            weight.copy_(start)


def test_weights_that_were_only_copied_are_refused(base: Path, tokenizer: Tokenizer,
                                                   tmp_path: Path):
    with pytest.raises(ValueError, match="no weight has changed"):
        train(tmp_path / "copied", tokenizer, base, callbacks=[CopiedWeights()])
    assert not (tmp_path / "copied").exists()
    tuned = train(tmp_path / "tuned", tokenizer, base)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    change = sum(float((after[n] - before[n]).double().square().sum()) for n in before)
    size = sum(float(before[n].double().square().sum()) for n in before)
    log = json.loads((tuned / "training.json").read_text())
    assert log["relative_update"] == pytest.approx((change / size) ** 0.5, rel=1e-6)
    assert log["tokens"] == 12 * 2 * 32
    assert log["checkpoint_bytes"] > 3 * 4 * log["parameters"]  # weights and Adam's two moments
    assert log["tokenizer_sha256"] == tokenizer.hash


# --- 3 and 4: counters and schedule ---------------------------------------------------------------


class ResumedCounters(TrainerCallback):
    """The log's second: the schedule of a base run of `steps` steps goes on, at its end."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_begin(self, args, state, control, lr_scheduler=None, **_):
        for _number in range(self.steps):
            lr_scheduler.step()


def test_counters_of_another_run_are_refused(base: Path, tokenizer: Tokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"with the schedule at 12, .* start from the weights"):
        train(tmp_path / "a", tokenizer, base, callbacks=[ResumedCounters(12)])

    class Used(TrainerCallback):  # moments of the base run
        def on_train_begin(self, args, state, control, optimizer=None, **_):
            weight = optimizer.param_groups[0]["params"][0]
            optimizer.state[weight]["exp_avg"] = torch.ones_like(weight)

    with pytest.raises(ValueError, match="optimizer state of 1 tensors"):
        train(tmp_path / "b", tokenizer, base, callbacks=[Used()])


def test_a_learning_rate_that_vanishes_early_is_refused(tokenizer: Tokenizer, tmp_path: Path):
    class Jump(TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler=None, **_):
            if state.global_step == 5:
                while lr_scheduler.last_epoch < 12:
                    lr_scheduler.step()

    with pytest.raises(ValueError, match=r"the learning rate is 0\.0 at step 5 of 12"):
        train(tmp_path / "model", tokenizer, callbacks=[Jump()])


def test_a_warm_up_as_long_as_the_run_is_refused(tokenizer: Tokenizer, tmp_path: Path):
    plan = PLAN.model_copy(update={"warmup_steps": 12})
    with pytest.raises(ValueError, match="warmup_steps = 12 of steps = 12"):
        train(tmp_path / "model", tokenizer, plan=plan)
    check_schedule(PLAN.model_copy(update={"warmup_steps": 11}))


# --- 6: a loss that is no number, a full disk -----------------------------------------------------


def test_nan_keeps_the_last_good_checkpoint_and_names_the_step(tokenizer: Tokenizer,
                                                               tmp_path: Path):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 8:  # before the checkpoint of this step is written
                with torch.no_grad():
                    next(model.parameters()).fill_(np.nan)

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 9.*checkpoint-4") as error:
        train(tmp_path / "model", tokenizer, callbacks=[Poison()])
    assert "lower learning_rate" in str(error.value)
    kept = tmp_path / ".model.work" / "checkpoint-4"
    assert all(weight.isfinite().all() for weight in load_file(kept / "model.safetensors").values())
    resumed = train(tmp_path / "model", tokenizer)
    assert json.loads((resumed / "training.json").read_text())["resumed_from"] == 4


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from transformers import TrainerCallback
import test_arianna_guards as t

class Full(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

try:
    t.train(Path(sys.argv[2]), t.Tokenizer(Path(sys.argv[1])), callbacks=[Full()])
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_leaves_the_last_good_checkpoint_to_resume_from(
    base: Path, tokenizer: Tokenizer, tmp_path: Path
):
    """A limit on the size of files stands in for the disk: writing past it fails."""
    child = subprocess.run(
        [sys.executable, "-c", FULL.format(tests=str(Path(__file__).parent)),
         str(tokenizer.path), str(tmp_path / "model")],
        capture_output=True, text=True, check=False, timeout=120,
    )
    assert "the disk is full: no checkpoint was written" in child.stdout, child.stderr[-2000:]
    assert "checkpoint-4: free some space" in child.stdout
    resumed = train(tmp_path / "model", tokenizer)
    assert json.loads((resumed / "training.json").read_text())["resumed_from"] == 4
    one, other = (load_file(folder / "model.safetensors") for folder in (base, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- overlap --------------------------------------------------------------------------------------


def test_held_out_text_that_was_trained_on_is_refused():
    refuse_overlap(TEXTS[:200], TEXTS[200:])
    with pytest.raises(ValueError, match=r"100 of 100 held-out documents .* begins 'Number 0 of"):
        refuse_overlap(TEXTS, TEXTS[:100])
    with pytest.raises(ValueError, match="1 of 2 held-out documents"):
        refuse_overlap(TEXTS[:9], [TEXTS[20], TEXTS[8].replace(" ", "\n ") + "\n"])
    with pytest.raises(ValueError, match="0 held-out documents: need both"):
        refuse_overlap(TEXTS, [])


def test_the_bar_shows_tokens_per_second(
    base: Path, tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    train(tmp_path / "model", tokenizer, base)
    assert re.search(r"12/12 .*loss=\d\.\d+, tokens_per_s=[1-9]", capfd.readouterr().err)


def test_training_leaves_events_for_tensorboard_beside_the_weights(base: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(base / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    history = json.loads((base / "training.json").read_text())["history"]
    assert losses == pytest.approx([entry["loss"] for entry in history])
