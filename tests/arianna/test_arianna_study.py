"""The study in miniature: the guards are in its way, and its intervals are paired."""

import json
from pathlib import Path

import numpy as np
import pytest

from lablog.arianna import results
from lablog.arianna.study import Arm, Study
from lablog.files import data_file
from lablog.models.training import ModelShape, TrainingSettings
from lablog.record import Run

SHAPE = ModelShape(width=16, layers=1, heads=2, kv_heads=2, feed_forward=32, context=48,
                   tied_embeddings=True, initializer_range=0.02)
PLAN = TrainingSettings(
    steps=20, batch_size=4, learning_rate=1e-2, warmup_steps=2, schedule="cosine",
    betas=(0.9, 0.95), weight_decay=0.1, precision="f32", threads=1, checkpoint_every=20,
    log_every=5,
)
LINES = data_file("arianna_conversations.jsonl").read_text().splitlines()[:24]


def few(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    text = folder / "own.txt"
    text.write_text("\n\n".join(f"Page {i}: silence has {i * i} rooms." for i in range(900)))
    made = Study(Run("06_arianna_finetune", "test", folder, folder / "artifacts", {}), SHAPE)
    made.corpus("none", [], [str(text)], 0, 340, 1)
    made.dialogues(few(folder / "talk.jsonl", LINES), False, 2, 0)
    made.base(PLAN)
    return made


def test_fine_tuning_refuses_another_batch_size_unless_asked(study: Study):
    with pytest.raises(ValueError, match="batch_size is 8, but 4 in the base run"):
        study.tune(Arm(1e-3, 8, 4), 0)
    tuned = study.tune(Arm(1e-3, 8, 4), 0, ["batch_size"])
    log = json.loads((tuned / "training.json").read_text())
    assert log["settings"]["batch_size"] == 8
    assert log["tokens"] == 4 * 8 * 48


def test_fine_tuning_refuses_a_base_of_another_shape(study: Study):
    other = Study(study.run, SHAPE.model_copy(update={"width": 32}))
    vars(other).update({n: v for n, v in vars(study).items() if n != "shape"})
    with pytest.raises(ValueError, match="width is 32, but 16 in the base run"):
        other.tune(Arm(1e-3, 4, 4), 0)


def test_a_dialogue_that_occurs_twice_is_refused_before_any_training(
    study: Study, tmp_path: Path
):
    run = Run("06_arianna_finetune", "test", tmp_path, tmp_path / "artifacts", {})
    other = Study(run, SHAPE)
    other.tokenizer = study.tokenizer
    lines = [*LINES[:8], LINES[0]]
    with pytest.raises(ValueError, match="1 of 1 held-out documents are training documents"):
        other.dialogues(few(tmp_path / "talk.jsonl", lines), False, 9, 0)


def test_every_answer_is_read_by_a_model_that_did_not_see_it(study: Study):
    table = study.before_and_after(Arm(3e-3, 4, 12))
    assert table.loc["after.qa", "bits/byte"] < table.loc["before.qa", "bits/byte"]
    for fold in (0, 1):
        training, held_out = study._sides(fold)
        packed = json.loads((study.folder / f"dialogues.fold{fold}/manifest.json").read_text())
        assert packed["documents"] == len(training) == 24 - len(held_out)
        assert packed["bytes"] == sum(len(text.encode()) for text in training)
    found = {m.name: m for m in study.run.record().metrics}
    change = found["after_minus_before.qa"]
    assert change.value == pytest.approx(found["after.qa"].value - found["before.qa"].value)
    low, high = change.interval
    assert low < change.value < high < 0
    wide = found["before.qa"].interval
    assert high - low < wide[1] - wide[0]  # pairing takes the dialogues' differences out
    assert f"{change.value:+.4f}" in study.said("after_minus_before.qa")


def test_intervals_over_dialogues_cover_as_often_as_they_say():
    """Of 200 samples of 60 texts, about 95 % of the intervals hold the true ratio."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        sizes = random.integers(200, 900, 60).astype(float)
        found = results.interval(sizes * (2 + random.normal(0, 0.3, 60)), sizes, 500)
        hits += found.low <= 2 <= found.high
    assert 180 <= hits <= 198
    assert results.interval(np.ones(1), np.ones(1)) is None
