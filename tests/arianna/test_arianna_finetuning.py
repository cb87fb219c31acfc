"""Fine-tuning in miniature: the guards are in its way, and its intervals are paired."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lablog.arianna.bits_per_byte import BitsPerByte, estimate, evenly, gap, read_bits, text_items
from lablog.arianna.dialogues import Dialogue, folds, load_dialogues, sides
from lablog.arianna.finetuning import (
    Base,
    Tuning,
    adopt_base,
    base_tokenizer,
    feed_forward_width,
    train_base,
    training_log,
    tune,
)
from lablog.files import data_file
from lablog.models.shape import ModelShape
from lablog.models.training import TrainingSettings
from lablog.text.packing import pack
from lablog.text.tokenizer import Tokenizer

SHAPE = ModelShape(width=16, layers=1, heads=2, kv_heads=2, feed_forward=32, context=48,
                   tied_embeddings=True, initializer_range=0.02)
PLAN = TrainingSettings(
    steps=20, batch_size=4, learning_rate=1e-2, warmup_steps=2, schedule="cosine",
    betas=(0.9, 0.95), weight_decay=0.1, precision="f32", threads=1, checkpoint_every=20,
    log_every=5,
)
DOCUMENTS = [f"Page {i}: silence has {i * i} rooms." for i in range(900)]


@pytest.fixture(scope="module")
def known() -> list[Dialogue]:
    return load_dialogues(data_file("arianna_conversations.jsonl"))[:24]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return base_tokenizer(DOCUMENTS, 340, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Base:
    runs = tmp_path_factory.mktemp("runs")
    return train_base(SHAPE, PLAN, pack(DOCUMENTS, tokenizer, runs / "corpus"), tokenizer, runs)


def test_what_was_packed_by_other_code_is_packed_again(tokenizer, tmp_path, monkeypatch):
    first = pack(DOCUMENTS, tokenizer, tmp_path / "corpus").key
    made = (tmp_path / "corpus" / "manifest.json").stat().st_mtime_ns
    assert pack(DOCUMENTS, tokenizer, tmp_path / "corpus").key == first
    assert (tmp_path / "corpus" / "manifest.json").stat().st_mtime_ns == made
    monkeypatch.setattr("lablog.keys._made_by", lambda _: "other code")
    assert pack(DOCUMENTS, tokenizer, tmp_path / "corpus").key != first


def test_tokenizers_of_other_texts_or_sizes_lie_beside_each_other(tmp_path):
    made = {base_tokenizer(documents, size, tmp_path).path
            for documents in (DOCUMENTS, DOCUMENTS[:99]) for size in (330, 340)}
    assert len(made) == 4


# --- training -------------------------------------------------------------------------------------


def test_a_training_is_made_once(base: Base, tokenizer: Tokenizer):
    runs = base.folder.parent
    before = (base.folder / "model.safetensors").stat().st_mtime_ns
    stream = pack(DOCUMENTS, tokenizer, runs / "corpus")
    assert train_base(SHAPE, PLAN, stream, tokenizer, runs) == base
    assert (base.folder / "model.safetensors").stat().st_mtime_ns == before
    assert training_log(base.folder)["tokens"] == 20 * 4 * 48


def test_a_base_from_elsewhere_is_tuned_like_one_of_its_own(
    base: Base, known: list[Dialogue], tmp_path: Path
):
    """The same weights, once trained here and once adopted, give the same fine-tuning."""
    texts, arm = sides(known, np.arange(12)), Tuning(1e-2, 4, 4)
    adopted = adopt_base(base.folder, SHAPE.context, PLAN, tmp_path)
    assert adopted.shape == base.shape
    ours, theirs = (load_file(tune(which, arm, texts, 0) / "model.safetensors")
                    for which in (base, adopted))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[name])
    assert adopt_base(base.folder, SHAPE.context, PLAN, tmp_path).folder == adopted.folder
    with pytest.raises(ValueError, match="batch_size is 8, but 4 in the base run"):
        tune(adopted, Tuning(1e-3, 8, 4), texts, 0)


def test_a_shorter_window_than_the_base_model_has(
    base: Base, known: list[Dialogue], tmp_path: Path
):
    adopted = adopt_base(base.folder, 24, PLAN, tmp_path)
    tuned = tune(adopted, Tuning(1e-3, 4, 3), sides(known, np.arange(12)), 0)
    assert training_log(tuned)["tokens"] == 3 * 4 * 24


def test_what_cannot_be_a_base_model_is_refused(base: Base, tmp_path: Path):
    with pytest.raises(ValueError, match=r"context = 49: .* has a window of 48 tokens"):
        adopt_base(base.folder, 49, PLAN, tmp_path)
    copy = shutil.copytree(base.folder, tmp_path / "copy")
    (copy / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.model: choose"):
        adopt_base(copy, 48, PLAN, tmp_path)


def test_fine_tuning_refuses_another_batch_size_unless_asked(base: Base, known: list[Dialogue]):
    texts, arm = sides(known, np.arange(12)), Tuning(1e-3, 8, 4)
    with pytest.raises(ValueError, match="batch_size is 8, but 4 in the base run"):
        tune(base, arm, texts, 0)
    log = training_log(tune(base, arm, texts, 0, ["batch_size"]))
    assert log["settings"]["batch_size"] == 8
    assert log["tokens"] == 4 * 8 * 48


@pytest.mark.parametrize(("changes", "message"), [
    ({"shape": SHAPE.model_copy(update={"width": 32})}, "width is 32, but 16 in the base run"),
    ({"settings": PLAN.model_copy(update={"precision": "bf16"})},
     "precision is 'bf16', but 'f32' in the base run"),
    ({"settings": PLAN.model_copy(update={"gradient_accumulation": 2})},
     "gradient_accumulation is 2, but 1"),
])
def test_fine_tuning_refuses_what_the_base_model_was_not_trained_with(
    base: Base, known: list[Dialogue], changes: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        tune(replace(base, **changes), Tuning(1e-3, 4, 4), sides(known, np.arange(12)), 0)


def test_fine_tuning_refuses_a_held_out_dialogue_among_its_texts(base: Base,
                                                                 known: list[Dialogue]):
    texts = sides([*known, known[0]], np.array([24]))
    with pytest.raises(ValueError, match="1 of 1 held-out documents are training documents"):
        tune(base, Tuning(1e-3, 4, 4), texts, 0)


def test_a_tokenizer_learns_from_a_sample_of_the_documents(tokenizer: Tokenizer, tmp_path: Path):
    part = base_tokenizer(DOCUMENTS, 340, tmp_path / "part" / "tokenizer.model", 0.01)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    sample = DOCUMENTS[:: round(size / 1e4)]
    same = base_tokenizer(sample, 340, tmp_path / "same" / "tokenizer.model")
    assert part.hash == same.hash != tokenizer.hash
    with pytest.raises(ValueError, match="of 0 MB of text: expected more than 0"):
        base_tokenizer(DOCUMENTS, 340, tmp_path / "tokenizer.model", 0)


def test_the_feed_forward_width_follows_llamas_rule():
    assert [feed_forward_width(width) for width in (64, 288)] == [172, 768]
    assert feed_forward_width(288, 256) == 768
    assert feed_forward_width(4096, 256) == 11008
    for values in ((0, 4), (64, 0)):
        with pytest.raises(ValueError, match="expected at least 1"):
            feed_forward_width(*values)


# --- reading --------------------------------------------------------------------------------------


def test_answers_that_were_held_out_get_cheaper_and_the_interval_is_paired(
    base: Base, known: list[Dialogue]
):
    items = [each.item(base.tokenizer) for each in known]
    sizes = np.array([each.answer_bytes for each in known], float)
    before, after = read_bits(base.folder, items), np.empty(24)
    for fold, part in enumerate(folds(24, 2, 0)):
        training, held_out = sides(known, part)
        folder = tune(base, Tuning(3e-3, 4, 12), (training, held_out), fold)
        after[part] = read_bits(folder, [items[i] for i in part])
        manifest = base.folder.parent / f"dialogues.fold{fold}" / "manifest.json"
        packed = json.loads(manifest.read_text())
        assert packed["documents"] == len(training) == 24 - len(held_out)
        assert packed["bytes"] == sum(len(text.encode()) for text in training)
    change, wide = estimate(after - before, sizes), estimate(before, sizes)
    assert change.value == pytest.approx(estimate(after, sizes).value - wide.value)
    assert change.interval.low < change.value < change.interval.high < 0
    # pairing takes the dialogues' differences out
    assert change.interval.high - change.interval.low < wide.interval.high - wide.interval.low


def test_of_a_document_all_tokens_count(tokenizer: Tokenizer):
    (item,) = text_items(["Page 12"], tokenizer)
    assert item.ids.tolist() == tokenizer.encode("Page 12", bos=True)
    assert item.weights.tolist() == [0, *[1] * (len(item.ids) - 1)]


def test_texts_are_chosen_at_equal_distances():
    assert list(range(10))[evenly(10, 3)] == [0, 3, 6]
    assert list(range(2))[evenly(2, 5)] == [0, 1]
    with pytest.raises(ValueError, match="0 of 10 texts: expected at least 1"):
        evenly(10, 0)


# --- intervals ------------------------------------------------------------------------------------


def test_intervals_over_dialogues_cover_as_often_as_they_say():
    """Of 200 samples of 60 texts, about 95 % of the intervals hold the true ratio."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        sizes = random.integers(200, 900, 60).astype(float)
        found = estimate(sizes * (2 + random.normal(0, 0.3, 60)), sizes, 500).interval
        hits += found.low <= 2 <= found.high
    assert 180 <= hits <= 198


def test_a_single_text_has_no_interval_and_none_no_value():
    one = estimate(np.array([3.0]), np.array([2.0]))
    assert one == BitsPerByte(1.5, None, 1)
    assert one.row == {"bits/byte": 1.5, "low": 1.5, "high": 1.5}
    for bits, sizes in ((np.ones(0), np.ones(0)), (np.ones(3), np.ones(2))):
        with pytest.raises(ValueError, match=f"bits of {len(bits)} texts, bytes of {len(sizes)}"):
            estimate(bits, sizes)


def test_a_gap_of_two_sets_resamples_both():
    sizes, random = np.full(400, 100.0), np.random.default_rng(1)
    one, other = (sizes * random.normal(mean, 0.5, 400) for mean in (2.0, 2.3))
    found = gap((one, sizes), (other, sizes))
    assert found.n == 800
    assert found.value == pytest.approx((one.sum() - other.sum()) / sizes.sum())
    width = found.interval.high - found.interval.low
    assert width == pytest.approx(2 * 1.96 * 0.5 * (2 / 400) ** 0.5, rel=0.1)
