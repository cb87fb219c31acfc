"""Dialogues with personas as conversations: what is learnt from, what is held out, and the gap."""

import csv
import json

import numpy as np
import pytest
import torch

from lablog.commitment.personas import (
    PersonaConversations,
    measure_personas,
    of_personas,
)
from lablog.commitment.qlora import LoraSettings, Plan, Schedule, load_committed
from lablog.models.training import TrainingSettings
from lablog.report import render, template
from lablog.run import Run
from lablog.text.personas import CONVERSATION, PERSONA, read_personas
from lablog.text.tokenizer import Tokenizer

PART = "Personas" + template("03_qlora_commitment", "en").partition("\nPersonas")[2]
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
PLAN = Plan(
    k=4, strength=1.0, quantisation="nf4",
    lora=LoraSettings(r=4, alpha=8, dropout=0, targets="all-linear"),
    schedule=Schedule(beta=0.1, warmup=1, annealing=1, free_bits=1),
    training=TrainingSettings(
        steps=3, batch_size=8, learning_rate=1e-2, warmup_steps=1, schedule="cosine",
        betas=(0.9, 0.98), weight_decay=0, precision="f32", threads=1, checkpoint_every=100,
        log_every=10))


@pytest.fixture
def path(tmp_path):
    """A small file in which a persona's colour decides what its owner says."""
    rows = [
        {PERSONA: f"I am number {i}. I like {colour}.",
         CONVERSATION: f"User 1: hello\nUser 2: {' '.join([colour] * 6)}\nUser 1: well\nUser 2: ok"}
        for i in range(10) for colour in COLOURS
    ]
    path = tmp_path / "personas.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [PERSONA, CONVERSATION])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_loss_is_on_the_second_speaker_and_the_persona_in_the_prefix_only(base, path):
    tokenizer = Tokenizer(base / "tokenizer.model")
    dialogues = read_personas(path)
    data = PersonaConversations(dialogues, tokenizer, 0, 300, window=50)
    first = data.conversations[0]
    assert tokenizer.decode(first.prefix.ids.tolist()) == "A: I am number 0. I like red.\n"
    learnt = first.forks.ids[first.forks.weights > 0].tolist()
    assert tokenizer.decode(learnt).split() == ["red"] * 6 + ["ok"]
    assert set(first.forks.weights) == {0, 1}
    assert "number" not in tokenizer.decode(first.forks.ids.tolist())
    assert max(len(c.forks.ids) for c in data.conversations) <= 50
    ids = [id(data[i]) for i in range(120)]  # two epochs: each conversation once in either
    assert set(ids[:60]) == set(ids[60:120])
    assert len(set(ids)) == 60
    assert ids[:60] != ids[60:120]


def test_what_cannot_be_learnt_from_is_refused(base, path):
    tokenizer, dialogues = Tokenizer(base / "tokenizer.model"), read_personas(path)
    with pytest.raises(ValueError, match="says nothing in the first 4 tokens"):
        PersonaConversations(dialogues, tokenizer, 0, 1, window=4)
    with pytest.raises(ValueError, match=r"1 dialogue\(s\) in this split"):
        PersonaConversations(dialogues[:1], tokenizer, 0, 1, window=64)


def test_the_likelihoods_are_those_of_personas_that_training_has_not_seen(base, path, tmp_path):
    result = measure_personas(path, [], base, PLAN, tmp_path)
    held = [d for d in read_personas(path) if d.split == "held_out"]
    assert result.trained == 60 - len(held)
    assert (result.kl > 0).all()
    assert np.abs(result.own - result.shuffled).max() > 1e-4  # z* reaches the decoder

    (control,) = (plan.parent for plan in tmp_path.glob("personas-*/plan.json")
                  if json.loads(plan.read_text())["k"] == 0)
    network, tokenizer = load_committed(base, control).base, Tokenizer(base / "tokenizer.model")
    for dialogue, reported in zip(held, result.without, strict=True):
        ids, loss = [1], []
        for turn in dialogue.turns:
            head = tokenizer.encode(f"{turn.speaker}:")
            line = tokenizer.encode(f"{turn.speaker}: {turn.text}\n")
            loss += [at for at in range(len(ids) + len(head), len(ids) + len(line))
                     if turn.speaker == "A"]
            ids += line
        with torch.no_grad():
            rows = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = -np.mean([rows[at - 1, ids[at]].item() for at in loss])
        assert reported == pytest.approx(expected, abs=1e-5)

    run = Run("03_qlora_commitment", "smoke", tmp_path, tmp_path, {})
    run.metrics(of_personas(result), under="personas")
    assert run.record().metric("personas.gap").value == pytest.approx(
        np.mean(result.without) - np.mean(result.own))
    report = render(run.record(), PART)
    assert f"{60 - len(held)} trained on, {len(held)} held out" in report


def test_no_file_is_reported_as_not_run(tmp_path):
    run = Run("03_qlora_commitment", "smoke", tmp_path, tmp_path, {})
    run.metrics(of_personas(None), under="personas")
    report = render(run.record(), PART)
    assert "undefined (not run: personas is empty)" in report
    assert "0 trained on, 0 held out" in report
