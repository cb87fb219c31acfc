"""Training the commitment: the guards of lab log A5, resuming, and the log's configuration."""

import json
import math
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import in_two_processes
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lablog.commitment import diagnostics, qlora
from lablog.commitment.chats import Chats, exchanges, from_hub
from lablog.commitment.conversations import (
    Conversations,
    ConversationSettings,
    collate,
    padded,
)
from lablog.commitment.posterior import (
    MEMORY,
    NEAR,
    SIGMA_START,
    Cells,
    CommitmentSettings,
    Discriminant,
    Posterior,
    VariationalCommitment,
)
from lablog.commitment.qlora import CommittedModel, LoraSettings, Plan, Schedule
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.models.training import TrainingSettings
from lablog.text.dialogues import generate, load_settings, new_phrasings, trained_part
from lablog.text.tokenizer import Tokenizer

DIALOGUES = load_settings()
TRAINING = TrainingSettings(
    steps=6, batch_size=2, learning_rate=1e-2, warmup_steps=1, schedule="cosine",
    betas=(0.9, 0.98), weight_decay=0.0, precision="f32", threads=1, checkpoint_every=2,
    log_every=1,
)
PLAN = Plan(
    k=8, strength=3.0, layers=(1, 4), quantisation="nf4", training=TRAINING,
    lora=LoraSettings(r=4, alpha=8, dropout=0.0, targets="all-linear"),
    schedule=Schedule(beta=0.5, warmup=2, annealing=1, free_bits=0.1),
)
SPOKEN = ConversationSettings(DIALOGUES, word_weight=0.02, guesses=4, recall_share=0.5)
WITH_CELLS = PLAN.model_copy(update={
    "schedule": PLAN.schedule.model_copy(update={"cells": 0.5})})


DISCRIMINED = WITH_CELLS.model_copy(update={"reader": "discriminant", "compiled": True})


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture
def model(folder: Path) -> CommittedModel:
    torch.manual_seed(0)
    base = qlora.load_base(folder, "none", "f32")
    made = qlora.committed_model(base, PLAN)
    with torch.no_grad():  # a fresh adapter adds nothing
        for name, parameter in made.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return made


def conversations(tokenizer: Tokenizer, count: int = 12, batch: int = 2) -> Conversations:
    return Conversations(SPOKEN, tokenizer, 0, count, batch)


def batch(tokenizer: Tokenizer, side: str = "right", of: int = 4) -> dict[str, torch.Tensor]:
    data = conversations(tokenizer)
    return collate([data[i] for i in range(of)], side)


def loss(model: CommittedModel, inputs: dict[str, torch.Tensor], **options) -> float:
    torch.manual_seed(1)
    return model(**inputs, beta=0.5, **options)["loss"].item()


# --- the loss and the injection -------------------------------------------------------------------


def test_left_and_right_padding_give_the_same_loss(model, tokenizer):
    right, left = batch(tokenizer), batch(tokenizer, "left")
    assert (right["prefix_mask"] == 0).any()
    assert (right["mask"] == 0).any()
    assert loss(model, right) == pytest.approx(loss(model, left), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_at_padding_changes_nothing(model, tokenizer, side):
    inputs = batch(tokenizer, side)
    before = loss(model, inputs)
    for ids, mask in (("prefix_ids", "prefix_mask"), ("input_ids", "mask")):
        inputs[ids] = torch.where(inputs[mask] == 0, 77, inputs[ids])
    assert loss(model, inputs) == pytest.approx(before, rel=1e-6)


def test_the_commitment_reaches_every_real_position_and_no_other(model, tokenizer):
    """Behind every chosen layer the residual stream differs by λ W_c z*, at padding not at all."""
    inputs = batch(tokenizer, "left")
    z = model.commitment.prior(4)
    addition = model.commitment.addition(z, inputs["mask"])
    real = inputs["mask"].bool()
    expected = 3.0 * z @ model.commitment.projection.T
    assert torch.equal(addition[~real], torch.zeros_like(addition[~real]))
    torch.testing.assert_close(addition[real], expected.repeat_interleave(real.sum(1), dim=0))
    options = {"attention_mask": inputs["attention"], "position_ids": inputs["position_ids"]}
    streams: dict[bool, list[torch.Tensor]] = {}
    for committed in (False, True):
        seen = streams[committed] = []
        blocks = model.base.get_decoder().layers
        handles = [  # each layer's change of the stream, before what the hooks add
            block.register_forward_hook(lambda _m, x, out, seen=seen: seen.append(x[0]))
            for block in blocks
        ]
        with torch.no_grad():
            model.hidden(inputs["input_ids"], addition if committed else None, **options)
        for handle in handles:
            handle.remove()
    assert torch.equal(streams[True][1], streams[False][1])  # layer 0 is not chosen
    torch.testing.assert_close(streams[True][2] - streams[False][2], addition, atol=1e-4, rtol=1e-4)


def test_the_posterior_reads_the_last_real_token_of_the_prefix_alone(tokenizer):
    commitment = VariationalCommitment(
        CommitmentSettings(k=4, width=16, layers=(0, 1), strength=1.0))
    hidden = torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    expected = commitment.head(torch.stack([hidden[0, 2], hidden[1, 4]]))[:, :4]
    torch.testing.assert_close(commitment.posterior(hidden, mask).mean, expected)
    with pytest.raises(ValueError, match=r"row\(s\) \[1\] is empty"):
        commitment.posterior(hidden, mask * torch.tensor([[1], [0]]))


def clusters(groups: int, of: int = 40, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """States [groups * of, width] of a cluster for each commitment, long and off centre."""
    generator = torch.Generator().manual_seed(groups)
    centres = 30 * torch.randn(groups, width, generator=generator)
    number = torch.arange(groups).repeat(of)
    noise = torch.randn(len(number), width, generator=generator) * torch.linspace(1, 9, width)
    return 100 + centres[number] + noise, number


@pytest.mark.parametrize("groups", [2, 5, 12])
def test_a_discriminant_has_the_priors_moments_and_tells_commitments_apart(groups):
    """Blurred by the posterior's σ its coordinates have variance 1; N commitments span N - 1."""
    states, number = clusters(groups)
    found = Discriminant(24, 8)
    assert torch.equal(found(states), torch.zeros(len(states), 8)), "nothing before it is fitted"
    found.fit(states, number)
    read = found(states)
    rank = min(8, groups - 1)
    covariance = read.T @ read / len(read) + SIGMA_START**2 * torch.eye(8)
    torch.testing.assert_close(covariance[:rank, :rank], torch.eye(rank), atol=1e-3, rtol=0)
    torch.testing.assert_close(read.mean(dim=0), torch.zeros(8), atol=1e-3, rtol=0)
    assert torch.equal(read[:, rank:], torch.zeros(len(read), 8 - rank))
    centres = torch.stack([read[number == group].mean(dim=0) for group in range(groups)])
    nearest = torch.cdist(read, centres).argmin(dim=1)
    assert (nearest == number).float().mean() > 0.99


def test_a_discriminant_of_two_is_fishers():
    """Along S_w^-1 (m_1 - m_0), the textbook's answer."""
    states, number = clusters(2, of=4000)
    found = Discriminant(24, 1)
    found.fit(states, number)
    parts = [states[number == group].double() for group in (0, 1)]
    within = sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in parts)
    fisher = torch.linalg.solve(within, parts[1].mean(0) - parts[0].mean(0))
    cosine = torch.cosine_similarity(found.axes[0].double(), fisher, dim=0).abs()
    # The ridge draws it a little towards the difference of means, which is another direction.
    apart = torch.cosine_similarity(parts[1].mean(0) - parts[0].mean(0), fisher, dim=0).abs()
    assert apart < 0.9 < 0.98 < cosine


def test_a_discriminant_of_one_commitment_is_refused():
    with pytest.raises(ValueError, match=r"4 prefixes of 1 commitment\(s\): a discriminant needs"):
        Discriminant(24, 8).fit(torch.randn(4, 24), torch.zeros(4, dtype=torch.int64))


def test_a_discriminant_reads_the_base_without_its_adapter(folder, tokenizer):
    """So that what is trained elsewhere moves no posterior, and a prefix costs no gradient."""
    torch.manual_seed(0)
    data = conversations(tokenizer, 48, 12)
    made = qlora.committed_model(qlora.load_base(folder, "none", "f32"), DISCRIMINED, 12)
    qlora.fit_discriminant(made, data, 12)
    inputs = batch(tokenizer)
    before = made.posterior(inputs["prefix_ids"], inputs["prefix_mask"]).mean
    with torch.no_grad():
        for name, parameter in made.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    after = made.posterior(inputs["prefix_ids"], inputs["prefix_mask"])
    assert torch.equal(after.mean, before)
    after.mean.sum().backward()
    moved = {name for name, p in made.trainable().items() if p.grad is not None}
    assert moved == {"commitment.head.weight", "commitment.head.bias"}
    made.zero_grad(set_to_none=True)
    made(**inputs)["loss"].backward()
    assert all(p.grad is not None for p in made.trainable().values()), "the decoder is trained"


def test_compiled_layers_compute_the_same(folder, tokenizer):
    """Loss and gradients, with z* behind the layers and without; and they are compiled."""
    torch._dynamo.reset()
    counters.clear()
    inputs = batch(tokenizer)
    found = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        made = qlora.committed_model(qlora.load_base(folder, "none", "f32"), PLAN).train()
        if compiled:
            qlora.compile_layers(made)
        torch.manual_seed(1)
        parts = made(**inputs, beta=0.5)
        parts["loss"].backward()
        none = made(**inputs, z=torch.zeros(4, 8))["lm"]  # with gradients: the same graphs serve
        found[compiled] = [parts["loss"].detach(), none.detach(), *(
            p.grad for p in made.trainable().values())]
    assert found[False][0] != found[False][1]
    assert 0 < counters["stats"]["unique_graphs"] < made.base.config.num_hidden_layers
    for plain, fused in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-5)


def test_forks_in_one_row_do_not_see_each_other(model, tokenizer):
    """The packed loss is the sum over forks that are read one by one behind their stem."""
    data = conversations(tokenizer)
    for number in (0, 2):  # a choice and a recall
        one = data[number]
        z = model.commitment.prior(1)
        packed = model(**collate([one]), z=z)["lm"].item()
        total = 0.0
        for fork in range(1, one.fork.max() + 1):
            chosen = (one.fork == 0) | (one.fork == fork)
            ids = torch.from_numpy(one.forks.ids[chosen]).long()[None]
            weights = torch.from_numpy(one.forks.weights[chosen])
            weights[torch.from_numpy(one.fork[chosen] == 0)] *= 1 / one.fork.max()
            with torch.no_grad():
                addition = model.commitment.addition(z, torch.ones_like(ids))
                hidden = model.hidden(ids, addition).last_hidden_state
                logits = model.base.get_output_embeddings()(hidden)[0, :-1]
            each = cross_entropy(logits, ids[0, 1:], reduction="none")
            total += (each * weights[1:]).sum().item()
        assert packed == pytest.approx(total, rel=1e-4)


def test_guesses_weigh_as_if_every_value_were_guessed_once(tokenizer):
    data, found = conversations(tokenizer, 200), {"yes": 0.0, "no": 0.0}
    for index in (0, 1, 4, 5, 8, 9):
        conversation = data[index]
        for word in found:
            at = conversation.forks.ids == tokenizer.encode(f" {word}")[0]
            assert at.any()
            found[word] += conversation.forks.weights[at].sum()
    assert found["no"] / found["yes"] == pytest.approx(11)
    assert found["yes"] == pytest.approx(6)


def test_held_out_conversations_share_no_prefix_with_training(tokenizer):
    def prefixes(dialogues):
        data = Conversations(replace(SPOKEN, dialogues=dialogues), tokenizer, 0, 400, 2)
        return {tuple(data[i].prefix.ids.tolist()) for i in range(400)}

    assert not prefixes(trained_part(DIALOGUES)) & prefixes(new_phrasings(DIALOGUES))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_head_and_projection_and_adapter_but_not_the_base(
    folder, tokenizer, checkpointing
):
    torch.manual_seed(0)
    plan = PLAN.model_copy(update={"gradient_checkpointing": checkpointing})
    model = qlora.committed_model(qlora.load_base(folder, "nf4", "f32"), plan).train()
    torch.manual_seed(1)
    model(**batch(tokenizer), beta=0.5)["loss"].backward()
    k = PLAN.k
    head = model.commitment.head.weight.grad
    assert head[:k].norm() > 0
    assert head[k:].norm() > 0
    assert model.commitment.projection.grad.norm() > 0
    adapter = [p.grad.norm() for n, p in model.trainable().items() if "lora_B" in n]
    assert len(adapter) == 7 * 6
    assert min(adapter) > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_recomputing_activations_changes_no_gradient(folder, tokenizer):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        plan = PLAN.model_copy(update={"gradient_checkpointing": checkpointing})
        model = qlora.committed_model(qlora.load_base(folder, "nf4", "f32"), plan).train()
        torch.manual_seed(1)
        model(**batch(tokenizer), beta=0.5)["loss"].backward()
        found.append({n: p.grad for n, p in model.trainable().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


# --- the latent -----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_kl_is_that_to_the_prior_of_variance_one_over_k(k: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    mean, log_variance = torch.randn(2, 3, k, generator=generator, dtype=torch.float64)
    posterior = Posterior(mean, log_variance)
    scale = math.sqrt(k)
    reference = kl_divergence(Normal(mean / scale, (0.5 * log_variance).exp() / scale),
                              Normal(0.0, 1 / scale))
    torch.testing.assert_close(posterior.kl(), reference)


def test_samples_have_the_posteriors_moments_and_the_priors():
    torch.manual_seed(0)
    mean, log_variance = torch.tensor([[2.0, -1.0]]), torch.tensor([[-2.0, 0.5]])
    posterior = Posterior(mean.expand(200_000, 2), log_variance.expand(200_000, 2))
    z = posterior.sample() * math.sqrt(2)
    torch.testing.assert_close(z.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0), log_variance[0].exp(), atol=0.02, rtol=0)
    commitment = VariationalCommitment(
        CommitmentSettings(k=32, width=64, layers=(0, 0), strength=1.0))
    assert commitment.prior(20_000).var().item() == pytest.approx(1 / 32, rel=0.02)
    assert commitment.projection.var().item() == pytest.approx(2 / 96, rel=0.1)


def cells_of(mean: torch.Tensor, log_variance: torch.Tensor) -> tuple[Cells, Posterior]:
    """Cells that have seen one batch, and the batch."""
    posterior, cells = Posterior(mean, log_variance), Cells(*mean.shape)
    cells.follow(posterior, torch.arange(len(mean)))
    return cells, posterior


def test_draws_from_the_priors_cells_belong_to_their_rows():
    torch.manual_seed(0)
    cells, posterior = cells_of(4 * torch.eye(5), torch.zeros(5, 5))
    for _ in range(20):
        z = cells.sample(posterior, torch.arange(5), 1.0) * math.sqrt(5)
        distance = torch.cdist(z, posterior.mean)
        assert distance.argmin(dim=1).tolist() == list(range(5))
    cells, far = cells_of(torch.tensor([[0.0], [1e3]]), torch.zeros(2, 1))
    assert cells.sample(far, torch.arange(2), 1.0)[1] > 9e2  # no draw falls into the second cell
    cells, many = cells_of(torch.full((500, 1), 3.0), torch.full((500, 1), -4.0))
    assert cells.sample(many, torch.arange(500), 0.0).mean().item() == pytest.approx(3, abs=0.01)


def test_cells_are_cut_along_running_means_not_along_a_batch():
    """A prefix that differs from its commitment's others moves no border."""
    torch.manual_seed(0)
    cells, usual = cells_of(torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1))
    for _ in range(2 * MEMORY):
        cells.follow(usual, torch.arange(2))
    odd = Posterior(torch.tensor([[-1.0], [-0.5]]), torch.zeros(2, 1))
    cells.follow(odd, torch.arange(2))
    assert cells.mean.flatten().tolist() == pytest.approx([-1.0, 1.0 - 1.5 / MEMORY])
    drawn = torch.cat([cells.sample(odd, torch.arange(2), 1.0) for _ in range(200)], dim=1)
    assert drawn[0].max() < 0.02
    assert drawn[1].min() > -0.02
    for numbers in ([0, 1, 2], [0, 1, -1]):
        with pytest.raises(ValueError, match="cells are cut for 0 to 1; these data list no"):
            cells.follow(Posterior(torch.zeros(3, 1), torch.zeros(3, 1)), torch.tensor(numbers))


def test_cells_follow_by_the_number_of_the_commitment():
    """A batch need hold neither all commitments nor each once."""
    cells = Cells(4, 1)

    def follow(means, numbers):
        means = torch.tensor(means, dtype=torch.float32)[:, None]
        cells.follow(Posterior(means, means - 10), torch.tensor(numbers))

    follow([1.0, 3.0, 5.0], [2, 0, 2])
    assert cells.seen.tolist() == [1, 0, 2, 0]
    assert cells.mean.flatten().tolist() == pytest.approx([3, 0, 3, 0])  # 2: mean of 1 and 5
    assert cells.log_variance.flatten().tolist() == pytest.approx([-7, 0, -7, 0])
    follow([9.0], [3])
    follow([9.0], [2])
    assert cells.mean.flatten().tolist() == pytest.approx([3, 0, 5, 9])
    for _ in range(3 * MEMORY):
        follow([5.0], [2])
    follow([0.0], [2])  # the memory reaches back over MEMORY batches, not over all
    assert cells.mean[2].item() == pytest.approx(5 * (1 - 1 / MEMORY), abs=1e-4)


def test_draws_are_from_the_cells_that_the_batch_names():
    torch.manual_seed(0)
    cells, _ = cells_of(3 * torch.eye(5)[:4], torch.zeros(4, 5))
    numbers = torch.tensor([3, 0, 3, 1])
    posterior = Posterior(torch.full((4, 5), 50.0), torch.zeros(4, 5))  # not these
    for _ in range(20):
        z = cells.sample(posterior, numbers, 1.0) * math.sqrt(5)
        assert cells.owner(z)[0].tolist() == numbers.tolist()
    mixed = torch.cat([cells.sample(posterior, numbers, 0.25) for _ in range(500)])
    from_prior = (mixed.abs() < 20 / math.sqrt(5)).all(dim=1).float().mean().item()
    assert from_prior == pytest.approx(0.25, abs=0.04)


def test_half_of_the_draws_lie_nearer_to_a_border_than_chance():
    """The nearest of n is below the lower quartile with probability 1 - 0.75^n."""
    torch.manual_seed(0)
    mean = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    cells, posterior = cells_of(mean, torch.zeros(2, 2))
    usual = cells.owner(torch.randn(20_000, 2))[1]
    quartile = usual.quantile(0.25)
    drawn = torch.cat([cells.sample(posterior, torch.arange(2), 1.0) for _ in range(1500)])
    near = (cells.owner(drawn * math.sqrt(2))[1] < quartile).float().mean().item()
    assert near == pytest.approx((0.25 + 1 - 0.75**NEAR) / 2, abs=0.04)


def test_cells_follow_in_training_alone(folder, tokenizer):
    torch.manual_seed(0)
    model = qlora.committed_model(qlora.load_base(folder, "none", "f32"), WITH_CELLS, 12).eval()
    inputs = batch(tokenizer, of=PLAN.training.batch_size)
    model(**inputs, cells=0.5)
    assert model.commitment.cells.seen.sum() == 0
    model.train()(**inputs, cells=0.5)
    assert model.commitment.cells.seen.tolist() == [1, 1, *[0] * 10]
    assert "cells.mean" in model.state().keys() - model.trainable().keys()


@pytest.mark.parametrize("change", [
    {"schedule": WITH_CELLS.schedule}, {"code": "label", "schedule": PLAN.schedule},
    {"reader": "discriminant"}])
def test_cells_labels_and_a_discriminant_for_data_without_numbers_are_refused(
    folder, tokenizer, tmp_path, change
):
    plan = PLAN.model_copy(update=change)
    with pytest.raises(ValueError, match=r"cells, labels and a discriminant need .* set cells to"):
        qlora.train_commitment(folder, Chats([GUANACO], tokenizer, 99), plan, tmp_path / "run", "c")
    independent = Conversations(replace(SPOKEN, independent=2), tokenizer, 0, 12, 2)
    with pytest.raises(ValueError, match=f"reader = {plan.reader}: cells, labels and a"):
        qlora.train_commitment(folder, independent, plan, tmp_path / "run", "c")
    assert not (tmp_path / "run").exists()


def test_what_decides_the_weights_is_in_their_key(folder, monkeypatch):
    """Else a finished run of other code or of another base would pass for the one asked for."""
    other = PLAN.model_copy(update={"strength": PLAN.strength + 1})
    keys = [qlora.training_key(folder, PLAN, "a"), qlora.training_key(folder, PLAN, "b"),
            qlora.training_key(folder, other, "a")]
    assert qlora.training_key(folder, PLAN, "a") == keys[0]
    for name in ("lablog.commitment.qlora.model_hash", "lablog.keys._made_by"):
        with monkeypatch.context() as changed:
            changed.setattr(name, lambda _: "other")
            keys.append(qlora.training_key(folder, PLAN, "a"))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("asked", "got"), [
    (None, (0, 5)), ((0, -1), (0, 5)), ((2, -1), (2, 5)), ((1, 4), (1, 4))])
def test_the_last_layer_may_be_counted_from_the_end(asked, got):
    assert qlora.layers_of(PLAN.model_copy(update={"layers": asked}), 6) == got


def test_a_batch_holds_every_persona_once(tokenizer):
    data = conversations(tokenizer, 24, 12)
    topics = [list(values) for values in DIALOGUES.topics.values()]
    found = []
    for index in range(24):
        words = re.findall("[a-z]+", tokenizer.decode(data[index].prefix.ids.tolist()))
        found += [values.index(v) for values in topics for v in values if v in words]
    assert found == [*range(12), *range(12)]


def test_a_collapsed_posterior_is_seen(model, tokenizer):
    """No active unit, no gap to a shuffled z*; a posterior that varies has both."""
    data = conversations(tokenizer, 8, 4)
    found = diagnostics.diagnose(model, data, 4)
    assert found["active_units"] == 8
    assert found["nll_shuffled"] != found["nll_true"]
    with torch.no_grad():
        model.commitment.head.weight.zero_()
        model.commitment.head.bias.zero_()
        model.commitment.projection.zero_()
    found = diagnostics.diagnose(model, data, 4)
    assert found["active_units"] == 0
    assert sum(found["kl_per_dimension"]) == 0
    assert found["nll_shuffled"] == found["nll_true"] == found["nll_zero"]


def test_beta_waits_and_rises_and_free_bits_cost_nothing(model, tokenizer):
    schedule = Schedule(beta=2.0, warmup=3, annealing=3, free_bits=0.0)
    assert [schedule.at(step) for step in range(8)] == [0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]
    inputs = batch(tokenizer)
    torch.manual_seed(1)
    parts = model(**inputs, beta=0.0)
    spent = parts["kl"].item()
    assert loss(model, inputs, free_bits=0.0) == pytest.approx(parts["lm"] + 0.5 * spent)
    assert loss(model, inputs, free_bits=spent + 1) == pytest.approx(
        parts["lm"].item() + 0.5 * (spent + 1))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["adapted", "discriminant"])
def test_a_commitment_survives_its_files(tmp_path: Path, reader: str):
    made = VariationalCommitment(
        CommitmentSettings(k=4, width=16, layers=(0, 2), strength=2.5, reader=reader))
    if made.discriminant:
        made.discriminant.fit(torch.randn(30, 16), torch.arange(30) % 5)
    made.save(tmp_path, "ab" * 32)
    read = VariationalCommitment.load(tmp_path)
    assert read.settings.base_sha256 == "ab" * 32
    assert read.settings.model_copy(update={"base_sha256": None}) == made.settings
    for name, tensor in made.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


@pytest.mark.parametrize(("change", "fault"), [
    ({"k": 17}, "k = 17 is larger than the model's width 16"),
    ({"k": 5}, "does not fit commitment.json"),
    ({"layers": [2, 1]}, "expected 0 <= first <= last"),
    ({"strength": "much"}, "is not a description of a commitment"),
    ({"colour": 1}, "Extra inputs are not permitted"),
])
def test_wrong_files_are_refused(tmp_path: Path, change, fault: str):
    VariationalCommitment(
        CommitmentSettings(k=4, width=16, layers=(0, 2), strength=2.5)).save(tmp_path, "00")
    path = tmp_path / "commitment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=fault):
        VariationalCommitment.load(tmp_path)
    path.write_text("[" * 100_000)  # deeper than Python follows
    with pytest.raises(ValueError, match=r"commitment\.json is not a description"):
        VariationalCommitment.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="train the commitment first"):
        VariationalCommitment.load(tmp_path / "elsewhere")


# --- training -------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return (load_file(folder / "adapter" / "adapter_model.safetensors")
            | load_file(folder / "commitment.safetensors"))


class Interrupted(Conversations):
    """Ends the run as a kill would, while the sixth of six steps' data is read."""

    def __getitem__(self, index: int):
        if index == 11:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def finished(folder: Path, tokenizer: Tokenizer, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("qlora") / "run"
    return qlora.train_commitment(folder, conversations(tokenizer), WITH_CELLS, output, "data")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_killed_run_resumes_to_the_same_bits(
    folder, tokenizer, tmp_path, finished, compiled, monkeypatch
):
    """Compiled too, by a process that had compiled nothing and saw other shapes first."""
    plan = DISCRIMINED if compiled else WITH_CELLS
    monkeypatch.setattr(qlora, "READ", 10)  # what is read first comes before the kill
    if compiled:
        finished = qlora.train_commitment(
            folder, conversations(tokenizer), plan, tmp_path / "whole", "data")
    data = Interrupted(SPOKEN, tokenizer, 0, 12, 2)
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        qlora.train_commitment(folder, data, plan, output, "data")
    assert not output.exists()
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "fresh"))
    qlora.train_commitment(folder, conversations(tokenizer), plan, output, "data")
    log, whole = (json.loads((p / "training.json").read_text()) for p in (output, finished))
    assert log["resumed_from"] == 4
    assert log["history"] == whole["history"]
    expected, found = weights(finished), weights(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bf16_copies_no_input_of_an_adapter_and_gives_the_same_bits(
    folder, tokenizer, tmp_path, monkeypatch
):
    read = set()
    training = TRAINING.model_copy(update={"steps": 3, "precision": "bf16"})
    plan = WITH_CELLS.model_copy(update={"training": training})

    def trained(name: str) -> dict[str, torch.Tensor]:
        data = conversations(tokenizer, 6)
        return weights(qlora.train_commitment(folder, data, plan, tmp_path / name, "data"))

    def watched(model, *rest):
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_pre_hook(lambda _, inputs: read.add(inputs[0].dtype))
        return model

    made = qlora.committed_model
    monkeypatch.setattr(qlora, "committed_model", lambda *given: watched(made(*given)))
    without = trained("without")
    assert read == {torch.bfloat16}
    read.clear()
    monkeypatch.setattr(qlora, "disable_input_dtype_casting", lambda *_, **__: nullcontext())
    copied = trained("copied")
    assert read == {torch.float32}
    assert all(torch.equal(copied[name], without[name]) for name in without)


def test_attention_is_step_by_step_where_that_is_faster_and_computes_the_same(folder, tokenizer):
    one = qlora.load_base(folder, "none", "bf16")
    assert one.config._attn_implementation == "eager"
    fused = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16,
                                             attn_implementation="sdpa")
    ids = batch(tokenizer)["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(one(ids).logits, fused(ids).logits, atol=0.1, rtol=0.05)
    assert qlora.load_base(folder, "none", "f32").config._attn_implementation == "sdpa"


def test_a_model_without_some_of_its_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.other"] = tensors.pop("model.norm.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model has other weights than its config\.json says: "
                                         r"model\.norm\.other, model\.norm\.weight"):
        qlora.load_base(tmp_path / "model", "none", "f32")


LAUNCHED = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[3]).parent))
import test_qlora as t

folder, output = Path(sys.argv[1]), Path(sys.argv[2])
data = t.conversations(t.Tokenizer(folder / "tokenizer.model"), 24)
t.qlora.train_commitment(folder, data, t.WITH_CELLS, output, "data")
"""


def test_the_commitment_trains_in_two_processes(folder, tmp_path):
    output = tmp_path / "run"
    in_two_processes(LAUNCHED, tmp_path / "script.py", folder, output, Path(__file__))
    log = json.loads((output / "training.json").read_text())
    assert log["processes"] == 2
    assert [entry["step"] for entry in log["history"]] == list(range(1, 7))
    data = conversations(Tokenizer(folder / "tokenizer.model"), 24)
    assert sum(entry["tokens"] for entry in log["history"]) == sum(
        len(data[i].prefix.ids) + len(data[i].forks.ids) for i in range(24))
    assert qlora.load_committed(folder, output).commitment.settings.layers == PLAN.layers


def test_training_reports_what_shows_a_collapse(finished):
    history = json.loads((finished / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert [entry["beta"] for entry in history] == [0, 0, 0.25, 0.5, 0.5, 0.5]
    for entry in history:
        kl = max(entry["kl"], PLAN.schedule.free_bits)
        assert entry["loss"] == pytest.approx(entry["lm"] + entry["beta"] * kl, rel=1e-5)
        assert entry["kl"] > PLAN.schedule.free_bits
        assert entry["active_units"] > 1  # no collapse, in a batch of two


@pytest.mark.parametrize(("every", "logged"), [(4, [4, 6]), (3, [3, 6]), (9, [6])])
def test_the_last_step_is_logged_and_every_token_is_counted_once(
    tiny, tokenizer, tmp_path, every, logged
):
    training = TRAINING.model_copy(update={"log_every": every, "gradient_accumulation": 2})
    plan = PLAN.model_copy(update={"training": training, "layers": None, "quantisation": "none"})
    data = conversations(tokenizer, 24)
    output = qlora.train_commitment(tiny, data, plan, tmp_path / "run", "data")
    history = json.loads((output / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history] == logged
    assert sum(entry["tokens"] for entry in history) == sum(
        len(data[i].prefix.ids) + len(data[i].forks.ids) for i in range(24))
    assert history[-1]["beta"] == PLAN.schedule.beta


def test_a_finished_run_is_loaded_on_its_own_base_only(folder, finished, tokenizer, tmp_path):
    model = qlora.load_committed(folder, finished)
    assert model.commitment.settings.layers == PLAN.layers
    LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=2,
    )).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was trained on another base"):
        qlora.load_committed(tmp_path, finished)


def test_a_loss_of_nan_stops_the_run(folder, tokenizer, tmp_path):
    class Poisoned(Conversations):
        def __getitem__(self, index: int):
            found = super().__getitem__(index)
            if index >= 4:
                found.forks.weights[:] *= float("nan")
            return found

    data = Poisoned(SPOKEN, tokenizer, 0, 12, 2)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        qlora.train_commitment(folder, data, PLAN, tmp_path / "run", "data")
    assert not (tmp_path / "run").exists()


def test_refusals_name_the_value_and_the_remedy(folder, model, tokenizer, tmp_path, monkeypatch):
    wide = PLAN.model_copy(update={"k": 65})
    with pytest.raises(ValueError, match="k = 65 is larger than the model's width 64"):
        qlora.committed_model(qlora.load_base(folder, "none", "f32"), wide)
    with pytest.raises(ValueError, match=r"schedule\.warmup = 6 is no shorter than the run of 6"):
        Plan.model_validate(PLAN.model_dump() | {"schedule": {
            "beta": 1, "warmup": 6, "annealing": 0, "free_bits": 0}})
    long = torch.ones((1, 513), dtype=torch.int64)
    with pytest.raises(ValueError, match="513 tokens does not fit the model's window of 512"):
        model.posterior(long, long)
    with pytest.raises(ValueError, match="is empty: nothing fixes a commitment"):
        model.posterior(long[:, :3], 0 * long[:, :3])
    high = PLAN.model_copy(update={"layers": (0, 6)})
    with pytest.raises(ValueError, match="the model has layers 0 to 5"):
        qlora.train_commitment(folder, conversations(tokenizer), high, tmp_path / "run", "data")
    monkeypatch.setattr(qlora, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="set quantisation=none to train unquantised"):
        qlora.load_base(folder, "nf4", "f32")


# --- reading --------------------------------------------------------------------------------------


def test_reading_in_batches_equals_reading_one_by_one(model, tokenizer):
    reader = TorchSpeaker(model, tokenizer)
    dialogues = [generate(DIALOGUES, 0, i).turns for i in range(5)]
    prompts = [reader.prompt(turns[:-1], "") for turns in dialogues]
    z = model.commitment.prior(5)[:, None]
    together = reader.logits(prompts, z)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(together[i], reader.logits([prompt], z[[i]])[0], atol=1e-4,
                                   rtol=1e-4)
    rows = reader.log_probabilities(prompts, z)
    assert [len(row) for row in rows] == [len(p.ids) - 1 for p in prompts]
    same = reader.logits(prompts, z.expand(5, 3, 8))
    torch.testing.assert_close(same, together)
    other = reader.logits(prompts, model.commitment.prior(5 * 3).view(5, 3, 8))
    assert (other - together).abs().max() > 1e-2


def test_answers_are_those_of_hugging_face(model, tokenizer):
    reader = TorchSpeaker(model, tokenizer)
    prompts = [reader.prompt(generate(DIALOGUES, 1, i).turns[:-1], "") for i in range(4)]
    answers = reader.answers(prompts, None, 9)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.from_numpy(prompt.ids)[None]
        out = model.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                                   max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert answer == tokenizer.decode(out[0, ids.shape[1]:].tolist()).split("\n")[0].strip()


# --- the log's own configuration ------------------------------------------------------------------

GUANACO = ("### Human: What is a fox?### Assistant: An animal.### Human: Is it red?"
           "### Assistant: Often.### Human: Thanks")
LLAMA2 = "<s>[INST] What is a fox? [/INST] An animal. </s><s>[INST] Is it red? [/INST] Often. </s>"


@pytest.mark.parametrize("text", [GUANACO, LLAMA2])
def test_chats_of_both_forms_are_read(text: str):
    assert exchanges(text) == [("What is a fox?", "An animal."), ("Is it red?", "Often.")]


def test_the_logs_configuration_trains_one_step(tokenizer, tmp_path):
    """Llama's layout in shards, chats from a folder, NF4, r = 8 on q and v, k = 64, β = 0.1."""
    base = tmp_path / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )).to(torch.bfloat16).save_pretrained(base, max_shard_size="300KB")
    (base / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert len(list(base.glob("model-*.safetensors"))) > 1
    chats = tmp_path / "chats"
    chats.mkdir()
    lines = [json.dumps({"text": text}) for text in (GUANACO, LLAMA2, "### Human: alone")]
    (chats / "train.jsonl").write_text("\n".join(lines))
    data = from_hub(str(chats), tokenizer, 256, "train")
    assert len(data) == 2
    assert data[0].forks.weights.sum() == pytest.approx(1)
    plan = Plan(
        k=64, strength=1.0, quantisation="nf4", gradient_checkpointing=True, window=256,
        lora=LoraSettings(r=8, alpha=16, dropout=0.05, targets=["q_proj", "v_proj"]),
        schedule=Schedule(beta=0.1, warmup=0, annealing=0, free_bits=0.0),
        training=TRAINING.model_copy(update={"steps": 1, "precision": "bf16",
                                             "gradient_accumulation": 2, "warmup_steps": 0}),
    )
    output = qlora.train_commitment(base, data, plan, tmp_path / "out", "chats")
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "v_proj"}
    assert all(p.isfinite().all() for p in weights(output).values())
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["r"] == 8


def test_chats_that_cannot_be_used_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="at most 3 tokens"):
        Chats([GUANACO], tokenizer, 3)
    (tmp_path / "train.jsonl").write_text(json.dumps({"words": "no"}))
    with pytest.raises(ValueError, match="has no column `text`, only"):
        from_hub(str(tmp_path), tokenizer, 64, "train")
    with pytest.raises(ValueError, match="cannot be loaded"):
        from_hub(str(tmp_path / "nothing"), tokenizer, 64, "train")


def test_padding_is_on_the_side_that_was_asked_for():
    rows = [torch.tensor([1, 2, 3]).numpy(), torch.tensor([4]).numpy()]
    assert padded(rows, "right", -1).tolist() == [[1, 2, 3], [4, -1, -1]]
    assert padded(rows, "left").tolist() == [[1, 2, 3], [0, 0, 4]]
