"""The rows of chapter 3's table, measured a second time by code that shares nothing with them.

What is recomputed reads one prompt at a time with plain transformers: no batch, no padding, no
cache, no forks in one row, and hooks of its own. It shares the items, and the streams of random
numbers from which z* and first answers are drawn.
"""

import json
import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lablog.commitment import latent_sources, torch_speaker
from lablog.commitment.arms import ARMS, Asked
from lablog.commitment.novelty import probe_set
from lablog.commitment.posterior import CommitmentSettings, VariationalCommitment
from lablog.commitment.probes import Items
from lablog.commitment.qlora import CommittedModel, renamed
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.commitment.training_metrics import trained_on
from lablog.text.dialogues import Draw, Turn, load_settings, named_value
from lablog.text.tokenizer import Tokenizer

DIALOGUES = load_settings()
SEED, ITEMS, TEXTS, GUESSES = 4, 2, 2, 2
K, STRENGTH, LAYERS = 6, 6.0, (0, 1)  # as in the fixture `experiment`


# --- one prompt at a time -------------------------------------------------------------------------


@dataclass
class Plain:
    """A model and its tokenizer, and the weights of a commitment or None."""

    network: torch.nn.Module
    tokenizer: Tokenizer
    weights: dict[str, torch.Tensor] | None

    def tokens(self, turns, answer=None, first=0):
        """Ids, and the exchange of each: the user's second turn begins the second."""
        ids, exchange, number = [1], [first], first
        for index, turn in enumerate(turns):
            number += index > 0 and turn.speaker == "U"
            line = self.tokenizer.encode(f"{turn.speaker}: {turn.text}\n")
            ids, exchange = ids + line, exchange + [number] * len(line)
        if answer is not None:
            line = self.tokenizer.encode(f"A: {answer}" if answer else "A:")
            ids, exchange = ids + line, exchange + [number] * len(line)
        return ids, exchange

    def logs(self, ids, exchange, z):
        """log P of what follows each token, under z [exchanges, k] or None."""
        handles = []
        if z is not None:
            added = STRENGTH * z[[e % len(z) for e in exchange]] @ self.weights["projection"].T
            decoder = self.network.get_decoder() if not isinstance(
                self.network, PeftModel) else self.network.base_model.model.model
            handles = [decoder.layers[i].register_forward_hook(lambda _m, _i, out: out + added)
                       for i in range(LAYERS[0], LAYERS[1] + 1)]
        with torch.no_grad():
            found = self.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        return found.double().log_softmax(-1)

    def word(self, turns, stem, word, z, shift=0, first=0):
        """log P(word | turns, stem), the last exchange numbered `shift` further on."""
        head = len(self.tokens(turns, stem, first)[0])
        ids, exchange = self.tokens(turns, f"{stem} {word}".strip(), first)
        last = exchange[-1]
        exchange = [e + shift if e == last else e for e in exchange]
        rows = self.logs(ids, exchange, z)
        return sum(rows[i - 1, ids[i]].item() for i in range(head, len(ids)))

    def yes_no(self, turns, z, shift=0):
        """P(yes) and P(no)."""
        return [sum(math.exp(self.word(turns, "", form, z, shift)) for form in forms)
                for forms in (("yes", "Yes"), ("no", "No"))]

    def answer(self, turns, z, uniforms=None, first=0):
        """Up to the end of its line or 16 tokens; greedy, or from `uniforms`."""
        ids, exchange = self.tokens(turns, "", first)
        written = []
        for step in range(16):
            row = self.logs(ids + written, exchange + [exchange[-1]] * len(written), z)[-1].exp()
            if uniforms is None:
                token = int(row.argmax())
            else:
                token = int((row.cumsum(0) <= uniforms[step] * row.sum()).sum())
            if "\n" in self.tokenizer.decode([token]):
                break
            written.append(token)
        return self.tokenizer.decode(written).strip()

    def posterior(self, turns):
        """Mean and log variance of q, from the last token of the prefix."""
        decoder = self.network.base_model.model.model
        ids, _ = self.tokens(turns)
        with torch.no_grad():
            h = decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
            out = self.weights["head.weight"] @ h + self.weights["head.bias"]
        return out[:K], out[K:].clamp(-10, 4)


def noise(stream: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(1000 * SEED + stream))


@dataclass
class Again:
    """An arm, measured by `Plain`."""

    plain: Plain
    before: Plain  # the base
    arm: str
    items: Items
    texts: list

    def z(self, stream, count, prefixes=None):
        """z* of each item [exchanges, k]."""
        source = ARMS[self.arm].source
        if self.plain.weights is None:
            return [None] * count
        if source == "prefix" and prefixes is not None:
            e, found = noise(stream, count), []
            for row, turns in enumerate(prefixes):
                mean, log_variance = self.plain.posterior(turns)
                found.append(((mean + (log_variance / 2).exp() * e[row]) / K**0.5)[None])
            return found
        each = 64 if source == "redrawn" else 1
        return list((noise(stream, count * each) / K**0.5).view(count, each, K))

    def recall(self):
        found = {"answered": [], "recall": [], "eviction": []}
        items, firsts = self.items.recall, []
        for item, z in zip(items, self.z(1, ITEMS), strict=True):
            said = self.plain.answer([item.question], z, item.uniforms)
            firsts.append([item.question, Turn("A", said, "answer")])
        for item, first, z in zip(items, firsts, self.z(1, ITEMS, firsts), strict=True):
            rest = [*item.distractors, item.requestion]
            kept = [first[1]] if ARMS[self.arm].source == "text" else []
            name = named_value(first[1].text, item.values)
            again = named_value(self.plain.answer([*first, *rest], z), item.values)
            evicted = named_value(self.plain.answer([*kept, *rest], z, first=1), item.values)
            found["answered"].append(name is not None)
            found["recall"].append(name is not None and again == name)
            found["eviction"].append(name is not None and evicted == name)
        return found

    def forked(self, history, item, z):
        """P(yes | is it X?) for every X, and P(X | what is it?)."""
        yes = []
        for x, guess in enumerate(item.guesses):
            agreed, denied = self.plain.yes_no([*history, guess], z, 1 + x)
            yes.append(agreed / (agreed + denied))
        named = np.array([self.plain.word([*history, item.naming], item.stem, value, z)
                          for value in item.values])
        return np.array(yes), np.exp(named - np.logaddexp.reduce(named))

    def hidden(self):
        items = self.items.fork
        for item, z in zip(items, self.z(2, ITEMS, [[i.note] for i in items]), strict=True):
            note = [item.note] if ARMS[self.arm].source == "text" else []
            yield item, z, [*note, *item.opening]

    def fork(self):
        rows = [(item, *self.forked(history, item, z)) for item, z, history in self.hidden()]
        return {
            "same_choice": [y.argmax() == n.argmax() for _, y, n in rows],
            "yes_sum": [y.sum() for _, y, _ in rows],
            "yes_named": [y[n.argmax()] for _, y, n in rows],
            "yes_largest": [y.max() for _, y, _ in rows],
            "kept": [n.argmax() == item.noted for item, _, n in rows],
        }

    def hangman(self):
        found = []
        for i, (item, z, told) in enumerate(self.hidden()):
            draw, history, verdicts = Draw(DIALOGUES, SEED, 107, i), list(told), []
            order = np.argsort([draw.random() for _ in item.values])[:GUESSES]
            for guess in order:
                turns = [*history, item.guesses[guess]]
                agreed, denied = self.plain.yes_no(turns, z)
                verdicts.append(agreed > denied)
                history = [*turns, Turn("A", self.plain.answer(turns, z), "verdict")]
            yes, named = self.forked(history, item, z)
            one = named.argmax()
            found.append([x for x in range(12) if yes[x] > 0.5] == [one]
                         and verdicts == [guess == one for guess in order])
        return {"hangman": found}

    def language(self):
        found = {"nll": [], "own_tokens": [], "kl_base": []}
        latents = self.z(3, TEXTS, [turns[:2] for turns in self.texts])
        for turns, z in zip(self.texts, latents, strict=True):
            ids, exchange = self.plain.tokens(turns)
            mine, base = self.plain.logs(ids, exchange, z), self.before.logs(ids, exchange, None)
            own, at = [], 1
            for number, turn in enumerate(turns):
                head = len(self.plain.tokenizer.encode(f"{turn.speaker}:"))
                size = len(self.plain.tokenizer.encode(f"{turn.speaker}: {turn.text}\n"))
                # The first two turns are what a prefix is read from.
                own += range(at + head, at + size) if turn.speaker == "A" and number > 1 else ()
                at += size
            found["nll"].append(-sum(mine[i - 1, ids[i]].item() for i in own))
            found["own_tokens"].append(len(own))
            found["kl_base"].append(sum(
                (mine[i - 1].exp() * (mine[i - 1] - base[i - 1])).sum().item() for i in own))
        return found


@pytest.fixture(scope="module")
def again(experiment):
    base, tokenizer = experiment.bases[1], Tokenizer(experiment.bases[1] / "tokenizer.model")
    probes = probe_set(SEED, ITEMS, TEXTS)

    def made(arm: str) -> Again:
        plain = Plain(LlamaForCausalLM.from_pretrained(base).eval(), tokenizer, None)
        before = Plain(LlamaForCausalLM.from_pretrained(base).eval(), tokenizer, None)
        if ARMS[arm].training != "base":
            folder: Path = experiment.folder(1, 1, ARMS[arm].training)
            with renamed():
                plain.network = PeftModel.from_pretrained(plain.network, folder / "adapter").eval()
            if (folder / "commitment.safetensors").is_file():
                plain.weights = load_file(folder / "commitment.safetensors")
        return Again(plain, before, arm, probes.items, probes.texts)

    return made


@pytest.mark.parametrize("arm", ["prefix", "prior", "redrawn", "lora", "note"])
def test_every_measure_equals_one_prompt_at_a_time(experiment, again, arm):
    second = again(arm)
    (found,) = experiment.measure(1, 1, arm, Asked(
        SEED, ITEMS, TEXTS, guesses=GUESSES,
        families=("fork", "recall", "language", "hangman", "reached")))
    expected = second.recall() | second.fork() | second.hangman() | second.language()
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.array(values, float), abs=2e-4), name
    extra = {"prefix": {"kl"}, "prior": {"reached"}}.get(arm, set())
    assert found.keys() == expected.keys() | extra
    if arm == "prefix":
        for item, kl in zip(second.items.fork, found["kl"], strict=True):
            mean, log_variance = second.plain.posterior([item.note])
            own = (mean**2 + log_variance.exp() - 1 - log_variance).sum().item() / 2
            assert kl == pytest.approx(own, rel=1e-4)
    assert np.std(found["yes_sum"]) > 1e-3


def test_the_arms_differ_where_they_should(experiment):
    """Else the comparison above could not see one taken for another."""
    asked = Asked(SEED, ITEMS, TEXTS, families=("fork", "recall", "language", "hangman"),
                  guesses=GUESSES)
    found = {arm: experiment.measure(1, 1, arm, asked)[0]
             for arm in ("prefix", "prior", "redrawn", "lora", "note")}
    sums = np.array([row["yes_sum"] for row in found.values()])
    for i in range(len(sums)):
        for j in range(i):
            assert np.abs(sums[i] - sums[j]).max() > 1e-3
    kept = {path.read_text() for path in (experiment.artifacts / "measured").glob("*.json")}
    assert {json.dumps(row) for row in found.values()} <= kept


# --- redrawn --------------------------------------------------------------------------------------


class Decided(TorchSpeaker):
    """Says what z* says, a one-hot vector: that it is its value, and yes to no other."""

    def _value(self, prompt, z, values):
        held = int(z[int(prompt.exchange[-1]) % len(z)].argmax())
        return values[held]

    def log_likelihoods(self, asked, z):
        rows, tokens = [], []
        for (prompt, words), mine in zip(asked, z, strict=True):
            line = self.tokenizer.decode(prompt.ids.tolist()).splitlines()[-2]
            if "yes" in words:
                mentioned = set(re.findall("[a-z]+", line))
                (guess, values), = ((v, vs) for vs in DIALOGUES.topics.values()
                                    for v in vs if v in mentioned)
                agreed = self._value(prompt, mine, values) == guess
                weights = [0.9 if (word.lower() == "yes") == agreed else 0.1 for word in words]
            else:
                held = self._value(prompt, mine, words)
                weights = [0.9 if word == held else 0.1 for word in words]
            rows.append(torch.tensor(weights, dtype=torch.float64).log())
            tokens.append(self.rendering.continuations(prompt, words)[1])
        return torch.stack(rows), tokens

    def answers(self, prompts, z, tokens, uniforms=None):
        said = []
        for prompt, mine in zip(prompts, z, strict=True):
            line = self.tokenizer.decode(prompt.ids.tolist()).splitlines()[-2]
            words = set(re.findall("[a-z]+", line))
            topic = words & DIALOGUES.topics.keys()
            values = DIALOGUES.topics[topic.pop()] if topic else next(
                vs for vs in DIALOGUES.topics.values() if words & set(vs))
            held = self._value(prompt, mine, values)
            guess = words & set(values)
            said.append(f"it is {held}." if not guess else
                        "yes." if guess == {held} else "no.")
        return said


@pytest.fixture(scope="module")
def decided(folder) -> Decided:
    base = LlamaForCausalLM.from_pretrained(folder)
    commitment = VariationalCommitment(CommitmentSettings(
        k=12, width=64, layers=(0, 5), strength=1.0, code="label"))
    return Decided(CommittedModel(base, commitment), Tokenizer(folder / "tokenizer.model"))


def test_a_commitment_that_decides_is_the_same_in_every_fork_and_a_redrawn_one_is_chance(
    decided, monkeypatch
):
    probes = probe_set(6, 40, 0)
    once, redrawn = (latent_sources.fork(decided, source, probes)
                     for source in ("prior", "redrawn"))
    assert once.same.all()
    assert once.yes_sum == pytest.approx(np.full(40, 0.9 + 11 * 0.1))
    assert redrawn.same.mean() < 0.3
    assert np.std(redrawn.yes_sum) > 0.3  # as many yes as questions happen to draw their own value
    assert np.abs(redrawn.yes_sum.mean() - 2.0) < 0.5  # … one on average
    recall, changed = (latent_sources.recall(decided, source, probes)
                       for source in ("prior", "redrawn"))
    assert recall.recalled.all()
    assert recall.recalled_after_eviction.all()
    assert changed.recalled.mean() < 0.3
    assert changed.recalled_after_eviction.mean() < 0.3
    assert latent_sources.game(decided, "prior", probes, 3).all()
    assert latent_sources.game(decided, "redrawn", probes, 3).mean() < 0.1
    # Were all questions of one fork the same exchange, they would share a draw and agree:
    monkeypatch.setattr(torch_speaker, "asked_as", lambda prompt, number: prompt)
    assert latent_sources.fork(decided, "redrawn", probes).same.all()


def test_a_label_from_the_prefix_is_told_and_kept(decided):
    probes = probe_set(6, 30, 0)
    told = latent_sources.fork(decided, "prefix", probes)
    assert told.same.all()
    assert told.kept.all()
    assert latent_sources.fork(decided, "prior", probes).kept.mean() < 0.4
    assert latent_sources.recall(decided, "prefix", probes).recalled_after_eviction.all()


# --- trainings from another machine ---------------------------------------------------------------


@pytest.fixture
def elsewhere(experiment, tmp_path):
    """An experiment that takes over copies of the trainings, with results of its own."""
    there = tmp_path / "there"
    for name in ("commitment", "lora", "note"):
        folder = experiment.folder(1, 1, name)
        shutil.copytree(folder, there / f"qlora-{name}-1-1-0123456789abcdef")
    return replace(experiment, artifacts=tmp_path / "here", elsewhere=there)


def test_trainings_from_elsewhere_are_read_as_ones_own(experiment, elsewhere):
    assert elsewhere.train(1, 1, "commitment").parent == elsewhere.elsewhere
    asked = Asked(SEED, ITEMS)
    assert elsewhere.measure(1, 1, "prior", asked) == experiment.measure(1, 1, "prior", asked)
    assert not list(elsewhere.artifacts.glob("qlora-*"))


def test_where_a_training_ran_is_no_part_of_its_plan(elsewhere):
    training = elsewhere.plan.training.model_copy(update={"cpu": False, "threads": 7})
    plan = elsewhere.plan.model_copy(update={"training": training})
    assert replace(elsewhere, plan=plan).train(1, 1, "lora").is_dir()


@pytest.mark.parametrize(("part", "name", "value"), [
    ("training", "steps", 4), ("schedule", "beta", 0.5), ("lora", "r", 5), ("", "strength", 7.0)])
def test_a_training_by_another_plan_is_refused(elsewhere, part, name, value):
    change = {name: value}
    if part:
        change = {part: getattr(elsewhere.plan, part).model_copy(update=change)}
    other = replace(elsewhere, plan=elsewhere.plan.model_copy(update=change))
    named = f"{part}.{name}" if part else name
    with pytest.raises(ValueError, match=f"with {named} = .*, and this experiment has {value}"):
        other.train(1, 1, "commitment")


def test_trainings_that_are_not_there_are_asked_for(elsewhere):
    with pytest.raises(FileNotFoundError, match="holds 0 folders qlora-commitment-1-2-"):
        elsewhere.train(1, 2, "commitment")
    again = elsewhere.elsewhere / "qlora-lora-1-1-fedcba9876543210"
    shutil.copytree(elsewhere.folder(1, 1, "lora"), again)
    with pytest.raises(FileNotFoundError, match="holds 2 folders qlora-lora-1-1-"):
        elsewhere.train(1, 1, "lora")


def test_a_training_says_what_it_ran_on(experiment):
    folders = {0: experiment.folder(1, 1, "lora")}
    assert trained_on(folders) == "cpu"
