"""Training: kill and resume, refusals, atomic results, recipes, conversion errors."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import in_two_processes
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lablog import layout
from lablog.determinism import seed_everything
from lablog.models import convert
from lablog.models.evaluation import answers, comparison_accuracy, recall_accuracy
from lablog.models.offline import Recipe, offline_model, recipe
from lablog.models.shape import ModelShape
from lablog.models.trainer import pad_items
from lablog.models.training import TrainingSettings, train_causal_lm
from lablog.text.datasets import FEW, DialogueDataset, Item
from lablog.text.dialogues import generate, load_settings, prompt, render
from lablog.text.tokenizer import Tokenizer, train_tokenizer

SETTINGS = load_settings()
SHAPE = ModelShape(layers=1, width=16, heads=2, kv_heads=1, feed_forward=32, context=512,
                   tied_embeddings=True, initializer_range=0.02)
PLAN = TrainingSettings(
    steps=40, batch_size=4, gradient_accumulation=2, learning_rate=3e-3, warmup_steps=4,
    schedule="cosine", betas=(0.9, 0.98), weight_decay=0.01, precision="f32", threads=1,
    checkpoint_every=5, log_every=5,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [render(generate(SETTINGS, 0, i).turns) for i in range(300)]
    lines = sorted({line for text in texts for line in text.splitlines()})
    return train_tokenizer(lines, 700, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def dataset(tokenizer: Tokenizer, plan: TrainingSettings = PLAN) -> DialogueDataset:
    count = plan.steps * plan.batch_size * plan.gradient_accumulation
    return DialogueDataset(SETTINGS, tokenizer, 0, count, 4, user_weight=0.1, value_weight=3)


def train(tokenizer: Tokenizer, output: Path, plan: TrainingSettings = PLAN, **kwargs) -> Path:
    return train_causal_lm(
        SHAPE, dataset(tokenizer), plan, output, tokenizer=tokenizer.path, data_key="d", **kwargs
    )


@pytest.fixture(scope="module")
def trained(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tokenizer, tmp_path_factory.mktemp("trained") / "model")


def test_the_result_is_a_whole_hugging_face_folder(trained: Path, tokenizer: Tokenizer):
    model = LlamaForCausalLM.from_pretrained(trained)
    assert model.config.vocab_size == len(tokenizer)
    assert Tokenizer(trained / "tokenizer.model").hash == tokenizer.hash
    log = json.loads((trained / "training.json").read_text())
    assert log["parameters"] == sum(p.numel() for p in model.parameters())
    assert [entry["step"] for entry in log["history"]] == list(range(5, 41, 5))
    assert log["history"][-1]["loss"] < log["history"][0]["loss"]
    left = {path.name for path in trained.parent.iterdir()}
    assert left == {"model", ".model.lock"}  # no checkpoints, no temporary folder


def test_the_same_arguments_give_the_same_bits_and_another_seed_others(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
):
    first = (trained / "model.safetensors").read_bytes()
    again = train(tokenizer, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == first
    other = train(tokenizer, tmp_path / "other", PLAN.model_copy(update={"seed": 1}))
    assert (other / "model.safetensors").read_bytes() != first


CHILD = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from transformers import TrainerCallback
import test_training as t

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print(state.global_step, flush=True)
        if state.global_step == 17:
            import time; time.sleep(60)

t.train(t.Tokenizer(Path(sys.argv[1])), Path(sys.argv[2]), callbacks=[Slow()])
"""


LAUNCHED = """
import sys
from pathlib import Path
import test_training as t

tokenizer, output = t.Tokenizer(Path(sys.argv[1])), Path(sys.argv[2])
plan = t.PLAN.model_copy(update={"gradient_accumulation": 1})
t.train_causal_lm(t.SHAPE, t.dataset(tokenizer), plan, output, tokenizer=tokenizer.path,
                  data_key="d")
assert (output / "training.json").is_file()  # in every process, when the call returns
"""


def test_two_processes_train_what_one_does_with_twice_the_accumulation(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
):
    output = tmp_path / "room" / "model"
    printed = in_two_processes(LAUNCHED, tmp_path / "script.py", tokenizer.path, output)
    assert "step/s" in printed
    logs = [json.loads((path / "training.json").read_text()) for path in (output, trained)]
    assert [log["processes"] for log in logs] == [2, 1]
    assert logs[0]["tokens"] == logs[1]["tokens"], "those that both processes have read"
    assert {path.name for path in output.parent.iterdir()} == {"model", ".model.lock"}
    found, expected = (load_file(path / "model.safetensors") for path in (output, trained))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_a_killed_training_resumes_to_identical_weights(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=str(Path(__file__).parent)), str(tokenizer.path),
         str(tmp_path / "model")],
        stdout=subprocess.PIPE, text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "17":
            break
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    work = tmp_path / ".model.work"
    assert not (tmp_path / "model").exists()
    # A kill while a checkpoint is written leaves one without its mark: it must not be used.
    (work / "checkpoint-20").mkdir()
    (work / "checkpoint-20" / "model.safetensors").write_bytes(b"half")
    resumed = train(tokenizer, tmp_path / "model")
    log = json.loads((resumed / "training.json").read_text())
    assert log["resumed_from"] == 15
    expected = load_file(trained / "model.safetensors")
    found = load_file(resumed / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_another_configuration_made_is_refused(trained: Path, tokenizer: Tokenizer):
    other = PLAN.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(ValueError, match="made with other settings, data or tokenizer"):
        train(tokenizer, trained, other)
    stamp = (trained / "model.safetensors").stat().st_mtime_ns
    assert train(tokenizer, trained) == trained
    assert (trained / "model.safetensors").stat().st_mtime_ns == stamp


def test_checkpoints_of_another_configuration_are_refused(tokenizer: Tokenizer, tmp_path: Path):
    (tmp_path / ".model.work").mkdir()
    (tmp_path / ".model.work" / "key").write_text("0123")
    with pytest.raises(ValueError, match=r"\.model\.work was made with other settings.*delete it"):
        train(tokenizer, tmp_path / "model")


def test_a_loss_of_nan_stops_and_names_the_step(tokenizer: Tokenizer, tmp_path: Path):
    class Poisoned(DialogueDataset):
        def __getitem__(self, index: int) -> Item:
            item = super().__getitem__(index)
            return Item(item.ids, item.weights * np.nan) if index >= 24 else item

    data = Poisoned(SETTINGS, tokenizer, 0, 320, 4, user_weight=0.1, value_weight=3)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4"):
        train_causal_lm(
            SHAPE, data, PLAN, tmp_path / "model", tokenizer=tokenizer.path, data_key="p"
        )
    assert not (tmp_path / "model").exists()
    assert not [thread for thread in threading.enumerate()
                if type(thread).__module__.startswith("tensorboard")], "a kernel keeps them open"


def test_training_can_start_from_a_trained_model_in_bf16(
    trained: Path, tokenizer: Tokenizer, tmp_path: Path
):
    plan = PLAN.model_copy(update={"steps": 2, "warmup_steps": 1, "precision": "bf16"})
    tuned = train_causal_lm(
        trained, dataset(tokenizer, plan), plan, tmp_path / "tuned", tokenizer=tokenizer.path,
        data_key="d",
    )
    before, after = (load_file(p / "model.safetensors") for p in (trained, tuned))
    assert all(after[name].dtype == torch.float32 for name in before)
    change = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < change < 0.05


def test_a_smoke_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begin = time.process_time()
    folder = offline_model("smoke", tmp_path)
    assert time.process_time() - begin < 60
    assert folder.name.startswith("dialogue-smoke-")
    monkeypatch.setattr(
        "lablog.models.offline.train_causal_lm", lambda *a, **k: pytest.fail("trained again")
    )
    assert offline_model("smoke", tmp_path) == folder
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    text = render(generate(SETTINGS, 0, 0, "held_out").turns)
    ids = torch.tensor([tokenizer.encode(text, bos=True)])
    with torch.inference_mode():
        assert math.exp(model(input_ids=ids, labels=ids).loss) < 200


@pytest.mark.parametrize("evicted", [False, True])
def test_accuracies_are_shares_of_right_answers_to_held_out_questions(monkeypatch, evicted):
    """Of answers that are right in every second, or every third, dialogue alone."""
    def answering(texts):
        def said(model, tokenizer, prompts, tokens=16):
            assert [p for p, _ in texts] == list(prompts)
            return [answer for _, answer in texts]
        monkeypatch.setattr("lablog.models.evaluation.answers", said)

    favourites = [generate(SETTINGS, 0, i, "held_out", "favourite", "probe") for i in range(8)]
    answering([(prompt(d.turns[2 if evicted else 0 : -1]),
                d.turns[-1].text if i % 2 else "i do not know.") for i, d in enumerate(favourites)])
    assert recall_accuracy(None, None, SETTINGS, 8, evicted) == 0.5
    texts, right = [], {"yes": [], "no": [], "it_is": []}
    for i in range(9):
        turns = generate(SETTINGS, 0, i, "held_out", "compare").turns
        for at, turn in enumerate(turns):
            if turn.role in right:
                wrong = {"yes": "no.", "no": "yes.", "it_is": "it is nothing."}[turn.role]
                right[turn.role].append(i % 3 > 0)
                texts.append((prompt(turns[:at]), turn.text if i % 3 else wrong))
    answering(texts)
    assert comparison_accuracy(None, None, SETTINGS, 9) == pytest.approx(
        {role: np.mean(found) for role, found in right.items()})
    assert 0 < np.mean(right["yes"]) < 1


def test_greedy_answers_do_not_depend_on_the_batch(trained: Path, tokenizer: Tokenizer):
    model = LlamaForCausalLM.from_pretrained(trained)
    prompts = ["A:", "U: what is it?\nA:", "U: is it teal?\nA: no.\nU: what is it?\nA:"]
    assert answers(model, tokenizer, prompts) == [
        answers(model, tokenizer, [p])[0] for p in prompts
    ]


def test_batches_hold_whole_dialogues_with_the_weights_of_their_speakers(tokenizer: Tokenizer):
    data = dataset(tokenizer)
    for index in range(20):
        item, turns = data.item(index), generate(SETTINGS, 0, index).turns
        assert item.ids.tolist() == tokenizer.encode(render(turns), bos=True)
        pieces = [
            tokenizer.decode([i])
            for i, w in zip(item.ids.tolist(), item.weights, strict=True)
            if w == 3
        ]
        said = sum(turn.speaker == "A" for turn in turns if turn.role != "distractor")
        assert bool(pieces) == bool(said)
        assert set(np.unique(item.weights)) <= {np.float32(w) for w in (0, 0.1, 1, 3)}
        assert item.weights[0] == 0
    items = [data[i] for i in range(len(data))]
    assert sorted(map(len, (i.ids for i in items))) == sorted(
        len(data.item(i).ids) for i in range(len(data))
    )
    batches = [pad_items(items[i : i + 4]) for i in range(0, len(items), 4)]
    padded = sum(b["input_ids"].numel() for b in batches) / sum(len(i.ids) for i in items)
    assert padded < 1.15
    assert all((b["weights"][b["input_ids"] == 0] == 0).all() for b in batches)


def test_training_may_begin_with_simple_comparisons(tokenizer: Tokenizer):
    data = DialogueDataset(SETTINGS, tokenizer, 0, 40, 4, user_weight=0, value_weight=3, simple=20)
    lengths = [len(data[i].ids) for i in range(40)]
    for index in range(20):  # and in few phrasings
        turns = generate(SETTINGS, 0, index, "train", "compare", "simple", few=FEW).turns
        assert data.item(index).ids.tolist() == tokenizer.encode(render(turns), bos=True)
    assert data.item(20).ids.tolist() == tokenizer.encode(
        render(generate(SETTINGS, 0, 20).turns), bos=True
    )
    assert np.mean(lengths) > 30


def test_mimetic_heads_look_for_equal_tokens():
    shape = SHAPE.model_copy(update={"kv_heads": 2, "mimetic": True, "initializer_range": 0.2})
    attention = shape.model(300).model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
    assert torch.equal(attention.o_proj.weight, attention.v_proj.weight.T)
    with pytest.raises(ValueError, match="mimetic needs kv_heads = heads, got 1 and 2"):
        ModelShape.model_validate(SHAPE.model_dump() | {"mimetic": True})


def test_recipes_are_checked(tmp_path: Path):
    assert {"smoke", "laptop"} <= SETTINGS.recipes.keys()
    assert isinstance(recipe("laptop", SETTINGS), Recipe)
    with pytest.raises(ValueError, match=r"no recipe 'labtop': expected one of \[.*'laptop'"):
        recipe("labtop", SETTINGS)
    wrong = {**SETTINGS.recipes["smoke"], "vocabulary": "many", "vocabluary": 3}
    changed = SETTINGS.model_copy(update={"recipes": {"smoke": wrong}})
    with pytest.raises(ValueError, match=r"recipes\.smoke: vocabulary = 'many'") as error:
        recipe("smoke", changed)
    assert "vocabluary = 3" in str(error.value)


def test_conversion_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        convert.to_gguf(tmp_path, tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(layout, "repository", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="run `make setup`"):
        convert.to_gguf(tmp_path, tmp_path / "model.gguf")
    tree = tmp_path / "build" / "native" / "llama.cpp"
    tree.mkdir(parents=True)
    (tree / "convert_hf_to_gguf.py").write_text("import sys; sys.exit('no such architecture')")
    with pytest.raises(RuntimeError, match=r"exit status 1\):\nno such architecture"):
        convert.to_gguf(tmp_path, tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "build", "config.json", "model.safetensors"]


def test_a_seeded_run_does_not_fill_the_memory_that_it_will_write(monkeypatch):
    # What lies in memory that nobody filled is anybody's: the switch is what can be told.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    seed_everything(1)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is False
