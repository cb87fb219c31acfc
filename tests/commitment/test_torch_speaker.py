"""How turns become tokens, and the probes' probabilities, against one-by-one evaluation.

The references below share no code with what they check: text and tokens are put together anew,
one prompt and one continuation at a time, without padding, batches or caches.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lablog import profiles
from lablog.commitment import engine_comparison, export, latent_sources, probes, qlora
from lablog.commitment.arms import ARMS, Asked, Experiment
from lablog.commitment.conversations import Conversations, ConversationSettings
from lablog.commitment.llama_cpp_speaker import LlamaCppSpeaker
from lablog.commitment.novelty import ProbeSet, probe_set
from lablog.commitment.qlora import CommittedModel, LoraSettings, Plan, Schedule
from lablog.commitment.readable import check_readable, longest_probe
from lablog.commitment.rendering import Prompt, Rendering, check_distinct, continuations
from lablog.commitment.torch_injection import injected
from lablog.commitment.torch_speaker import TorchSpeaker, name_values
from lablog.files import repository
from lablog.models.llama_cpp import Context, Model
from lablog.models.training import TrainingSettings
from lablog.text.datasets import DialogueDataset
from lablog.text.dialogues import Draw, Turn, generate, load_settings, trained_part
from lablog.text.tokenizer import Tokenizer

DIALOGUES = load_settings()
SPOKEN = ConversationSettings(DIALOGUES)
ITEMS = probes.make_items(DIALOGUES, 7, 6)
LLAMA2 = repository().parent / "shared" / "data" / "llama2-tokenizer.model"
PLAN = Plan(
    k=8, strength=3.0, layers=(1, 4), quantisation="none",
    lora=LoraSettings(r=4, alpha=8, dropout=0.0, targets="all-linear"),
    schedule=Schedule(beta=0.5, warmup=0, annealing=0, free_bits=0),
    training=TrainingSettings(
        steps=1, batch_size=12, learning_rate=1e-2, warmup_steps=0, schedule="cosine",
        betas=(0.9, 0.98), weight_decay=0.0, precision="f32", threads=1, checkpoint_every=10,
        log_every=1))
WORDS = {"yes": ("yes", "Yes"), "no": ("no", "No")}


@dataclass
class Slow:
    """Text, tokens and probabilities from scratch."""

    reader: TorchSpeaker

    def ids(self, turns, answer: str | None = None) -> list[int]:
        """Tokens of turns and, unless None, of an answer that has begun."""
        tokenizer = self.reader.tokenizer
        if self.reader.chat == "plain":
            text = "".join(f"{turn.speaker}: {turn.text}\n" for turn in turns)
            if answer is not None:
                text += f"A: {answer}" if answer else "A:"
            return [1, *tokenizer.encode(text)]
        ids, text = [1], ""
        for turn in turns:
            if turn.speaker == "U":
                text += f"[INST] {turn.text} [/INST]"
            else:
                text += f" {turn.text} " if text else f"{turn.text} "
                ids, text = [*ids, *tokenizer.encode(text), 2, 1], ""
        if answer:
            text += f" {answer}"
        return ids + tokenizer.encode(text) if text else ids

    def logs(self, ids, z=None):
        """log P of every token behind each of `ids`, z [k]."""
        model = self.reader.model
        with torch.no_grad():
            if z is None:
                rows = model.base(torch.tensor([ids]), use_cache=False).logits[0]
            else:
                settings = model.commitment.settings
                added = settings.strength * model.commitment.projection @ z
                with injected(model.base, added, settings.layers):
                    rows = model.base(torch.tensor([ids]), use_cache=False).logits[0]
        return rows.double().log_softmax(-1)

    def score(self, turns, stem: str, word: str, z=None) -> float:
        """log P(word | turns, stem), by all of its tokens."""
        start = self.ids(turns, stem)
        ids = self.ids(turns, f"{stem} {word}".strip())
        assert ids[: len(start)] == start
        assert len(ids) > len(start)
        rows = self.logs(ids, z)
        return sum(rows[i - 1, ids[i]].item() for i in range(len(start), len(ids)))

    def answer(self, turns, tokens: int, z=None) -> str:
        """Greedy."""
        ids, written = self.ids(turns, ""), []
        for _ in range(tokens):
            token = int(self.logs(ids + written, z)[-1].argmax())
            ends = self.reader.chat == "llama2" and token == 2
            if ends or "\n" in self.reader.tokenizer.decode([token]):
                break
            written.append(token)
        return self.reader.tokenizer.decode(written).strip()


def assert_forks_equal_one_by_one(reader: TorchSpeaker, material: ProbeSet, count: int,
                                  source: str) -> probes.ForkResult:
    """P(yes) and the named values of `count` hidden choices."""
    slow, found = Slow(reader), latent_sources.fork(reader, source, material)
    z = latent_sources.fork_latents(reader, source, material)
    for i, item in enumerate(material.items.fork[:count]):
        mine = None if z is None else z[i, 0]
        mass = []
        for x, guess in enumerate(item.guesses):
            turns = [*item.opening, guess]
            yes, no = (sum(np.exp(slow.score(turns, "", form, mine)) for form in forms)
                       for forms in WORDS.values())
            mass.append(yes + no)
            assert found.yes[i, x] == pytest.approx(yes / (yes + no), abs=1e-5)
        assert found.answer_mass[i] == pytest.approx(np.mean(mass), rel=1e-4)
        scores = np.array([slow.score([*item.opening, item.naming], item.stem, value, mine)
                           for value in item.values])
        named = np.exp(scores - scores.max())
        np.testing.assert_allclose(found.named[i], named / named.sum(), atol=1e-5)
    np.testing.assert_allclose(found.named.sum(axis=1), 1, atol=1e-9)
    return found


# --- turns and tokens -----------------------------------------------------------------------------


def former(tokenizer: Tokenizer, turns, stem=None, first=0):
    """The prompts of the first version: line by line, one token each for "U:" and "A:"."""
    ids, exchange, own = [tokenizer.bos], [first], [False]
    lines = [(turn.speaker, f"{turn.speaker}: {turn.text}\n") for turn in turns]
    if stem is not None:
        lines.append(("A", f"A: {stem}" if stem else "A:"))
    for index, (speaker, text) in enumerate(lines):
        tokens = tokenizer.encode(text)
        first += speaker == "U" and index > 0
        head = len(tokenizer.encode(f"{speaker}:"))
        ids += tokens
        exchange += [first] * len(tokens)
        own += [speaker == "A" and i >= head for i in range(len(tokens))]
    return np.array(ids), np.array(exchange), np.array(own)


@pytest.mark.parametrize("name", ["folder", "base"])
def test_plain_tokens_are_those_of_the_first_version(name, request):
    """Of prompts, of which tokens the model said, and of the weights in training."""
    tokenizer = Tokenizer(request.getfixturevalue(name) / "tokenizer.model")
    rendering = Rendering(tokenizer)
    asked = [([item.note, *item.opening, item.naming], item.stem, 0) for item in ITEMS.fork]
    asked += [([*item.opening, item.guesses[2]], "", 0) for item in ITEMS.fork]
    asked += [([*item.distractors, item.requestion], "", 1) for item in ITEMS.recall]
    asked += [(generate(DIALOGUES, 0, i).turns, None, 0) for i in range(50)]
    for turns, stem, first in asked:
        prompt = rendering.prompt(turns, stem, first)
        for found, expected in zip((prompt.ids, prompt.exchange, prompt.own),
                                   former(tokenizer, turns, stem, first), strict=True):
            np.testing.assert_array_equal(found, expected, strict=True)
    data = Conversations(SPOKEN, tokenizer, 0, 1, 1)
    by_line = DialogueDataset(DIALOGUES, tokenizer, 0, 0, 1, 0.0, 1 / data.word_weight).encode
    for index in range(50):
        turns = generate(DIALOGUES, 1, index).turns
        item, lines = data.item(turns, 0.7), [by_line(turn.speaker, turn.text) for turn in turns]
        np.testing.assert_array_equal(item.ids, np.concatenate([[1], *(ids for ids, _ in lines)]))
        weights = np.concatenate([np.zeros(1, np.float32), *(each for _, each in lines)])
        np.testing.assert_array_equal(item.weights, weights * np.float32(0.7 * data.word_weight),
                                      strict=True)


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    if not LLAMA2.is_file():
        pytest.skip("shared/data/llama2-tokenizer.model is not beside this clone")
    return Tokenizer(LLAMA2)


def test_llama2_tokens_have_each_exchange_between_bos_and_eos(llama2):
    turns = [Turn("U", "is it red?", "x"), Turn("A", "yes.", "x"), Turn("U", "sure?", "x")]
    text = "<s> ▁[ INST ] ▁is ▁it ▁red ? ▁[ / INST ] ▁yes . ▁ </s> <s> "
    pieces = f"{text}▁[ INST ] ▁sure ? ▁[ / INST ] ▁it ▁is".split()
    prompt = Rendering(llama2, "llama2").prompt(turns, "it is", first=3)
    assert [llama2.piece(token) for token in prompt.ids] == pieces
    said = {"▁yes", ".", "▁", "</s>"}
    assert [p in said for p in pieces[:17]] == prompt.own[:17].tolist()
    assert prompt.own[17:].tolist() == [False] * (len(pieces) - 19) + [True, True]
    assert prompt.exchange.tolist() == [3] * 17 + [4] * (len(pieces) - 17)


@pytest.mark.parametrize("chat", ["plain", "llama2"])
def test_training_and_probes_speak_the_same(llama2, chat):
    """Prefix, stem and forks of a training conversation are the probes' prompts, continued."""
    data = Conversations(replace(SPOKEN, recall_share=0.0), llama2, 0, 12, 12, chat)
    rendering, draw = Rendering(llama2, chat), Draw(DIALOGUES, 0, 0)
    openings, questions = (
        {topic: [draw.turn("U", role, topic, phrasing=n)
                 for n in range(len(getattr(DIALOGUES, role)))]
         for topic in DIALOGUES.topics} for role in ("opening", "what_is_it"))
    for index in range(12):
        one = data[index]
        prefix = generate(DIALOGUES, 0, index, "train", "compare", "simple", index).turns[:1]
        assert one.prefix.ids.tolist() == rendering.prompt(prefix).ids.tolist()
        fork = one.forks.ids[(one.fork == 0) | (one.fork == 1)].tolist()
        prompts = [
            rendering.prompt([asked, Turn("A", chosen, "chosen"), question], "").ids.tolist()
            for topic in DIALOGUES.topics for asked in openings[topic]
            for chosen in DIALOGUES.chosen for question in questions[topic]]
        (found,) = (prompt for prompt in prompts if fork[: len(prompt)] == prompt)
        answer = llama2.decode(fork[len(found):])
        assert probes.named_value(answer, [v for vs in DIALOGUES.topics.values() for v in vs])


@pytest.mark.parametrize("chat", ["plain", "llama2"])
def test_values_and_yes_weigh_in_full_behind_llama2s_tokenizer(llama2, chat):
    """Encoded by itself " yes" is two tokens there, in a line one."""
    data = Conversations(SPOKEN, llama2, 0, 1, 1, chat)
    item = data.item([Turn("U", "is it teal?", "x"), Turn("A", "yes, it is teal.", "x")])
    full = [llama2.piece(token) for token in item.ids[item.weights == 1]]
    assert full == ["▁yes", "▁te", "al"]
    rest = [llama2.piece(token) for token in item.ids[(item.weights > 0) & (item.weights < 1)]]
    assert rest == {"plain": [",", "▁it", "▁is", ".", "<0x0A>"],
                    "llama2": [",", "▁it", "▁is", ".", "▁", "</s>"]}[chat]


def test_an_answer_ends_at_a_line_end_and_in_llama2_at_eos(llama2, folder):
    assert llama2.encode("\n")[0] not in (2, 13)  # what stopped answers before
    assert Rendering(llama2).stops == {13}
    assert Rendering(llama2, "llama2").stops == {2, 13}
    own = Tokenizer(folder / "tokenizer.model")
    assert Rendering(own).stops == {own.encode("\n")[0]}


def test_an_unknown_chat_is_refused(folder):
    with pytest.raises(ValueError, match="chat = 'chatml': expected one of plain, llama2"):
        Rendering(Tokenizer(folder / "tokenizer.model"), "chatml")


def test_words_that_the_tokenizer_cannot_tell_apart_are_named():
    assert continuations([1, 5, 6], [[1, 5, 6, 7], [1, 5, 9]]) == (2, [[6, 7], [9]])
    check_distinct(("a", "b"), ([1, 2], [1, 3]))
    with pytest.raises(ValueError, match=r"'red' and 'blue' are the same tokens \[0\]"):
        check_distinct(("red", "teal", "blue"), ([0], [3], [0]))


# --- probabilities in plain -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["folder", "base"])
def reader(request) -> TorchSpeaker:
    """A committed model whose tokenizer has several tokens for some values, or one for each."""
    folder: Path = request.getfixturevalue(request.param)
    torch.manual_seed(0)
    model = qlora.committed_model(qlora.load_base(folder, "none", "f32"), PLAN)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return TorchSpeaker(model, Tokenizer(folder / "tokenizer.model"))


@pytest.mark.parametrize("source", ["none", "prior"])
def test_forks_equal_one_by_one_evaluation(reader, source):
    chosen = reader
    if source == "none":
        chosen = TorchSpeaker(CommittedModel(reader.model.base), reader.tokenizer)
    assert_forks_equal_one_by_one(chosen, probe_set(3, 4, 1), 2, source)


def test_logits_answers_and_log_probabilities_equal_one_by_one_evaluation(reader):
    slow, turns = Slow(reader), [generate(DIALOGUES, 2, i).turns for i in range(4)]
    z = reader.model.commitment.prior(4, torch.Generator().manual_seed(3))
    asked = [reader.prompt(told[:-1], "") for told in turns]
    logits = reader.logits(asked, z[:, None])
    answers = reader.answers(asked, z[:, None], 9)
    rows = reader.log_probabilities([reader.prompt(told) for told in turns], z[:, None])
    for i, told in enumerate(turns):
        ids = slow.ids(told[:-1], "")
        torch.testing.assert_close(logits[i].double().log_softmax(-1), slow.logs(ids, z[i])[-1],
                                   atol=1e-4, rtol=1e-4)
        assert answers[i] == slow.answer(told[:-1], 9, z[i])
        torch.testing.assert_close(rows[i].double(), slow.logs(slow.ids(told), z[i])[:-1],
                                   atol=1e-4, rtol=1e-4)


def test_values_of_one_token_cost_one_pass(reader, monkeypatch):
    read: list[int] = []
    scores = TorchSpeaker.scores

    def counted(self, prompts, z, targets):
        read.append(len(prompts))
        return scores(self, prompts, z, targets)

    monkeypatch.setattr(TorchSpeaker, "scores", counted)
    item = ITEMS.fork[0]
    prompt = reader.prompt([*item.opening, item.naming], item.stem)
    lengths = [len(ids) for ids in reader.rendering.continuations(prompt, item.values)[1]]
    name_values(reader, [(prompt, item.values)], None)
    longer = sum(length > 1 for length in lengths)
    assert read[0] == 1
    assert sum(read[1:]) <= longer
    assert bool(read[1:]) == bool(longer)


def test_words_that_are_all_improbable_are_read_to_their_ends(reader, monkeypatch):
    """What matters is not how probable a value is, but how probable beside the others."""
    scores = TorchSpeaker.scores
    slow, item = Slow(reader), ITEMS.fork[1]
    turns, values = [*item.opening, item.naming], item.values
    prompt = reader.prompt(turns, item.stem)
    firsts = len(prompt.ids)

    def doubtful(self, prompts, z, targets):  # as if all were e^30 times less probable
        return [found - 30 * (len(one.ids) == firsts)
                for one, found in zip(prompts, scores(self, prompts, z, targets), strict=True)]

    monkeypatch.setattr(TorchSpeaker, "scores", doubtful)
    found = name_values(reader, [(prompt, values)], None)[0].numpy()
    expected = np.exp([slow.score(turns, item.stem, value) for value in values])
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-5)


@st.composite
def families(draw) -> tuple[list[Prompt], list[np.ndarray], list[int]]:
    """Prompts of up to three families, each with stems of any length in common, the number of
    last tokens that are read off each, and the number of its z*."""
    token = st.integers(3, 300)
    prompts, targets, owners = [], [], []
    for family in range(draw(st.integers(1, 3))):
        stem = [1, *draw(st.lists(token, max_size=24))]
        turns = sorted(draw(st.lists(st.integers(0, 3), min_size=len(stem), max_size=len(stem))))
        for _ in range(draw(st.integers(1, 4))):
            kept = draw(st.integers(1, len(stem)))
            tail = draw(st.lists(token, min_size=1, max_size=6))
            ids = np.array([*stem[:kept], *tail], np.int64)
            last = turns[kept - 1] + draw(st.integers(0, 2))
            exchange = np.array([*turns[:kept], *[last] * len(tail)])
            prompts.append(Prompt(ids, exchange, np.zeros(len(ids), bool)))
            read = draw(st.integers(1, min(3, len(ids) - 1)))
            targets.append(np.array(draw(st.lists(
                st.lists(token, min_size=2, max_size=2), min_size=read, max_size=read))))
            owners.append(draw(st.sampled_from([family, 3])))
    return prompts, targets, owners


@settings(max_examples=40)
@given(families(), st.sampled_from([0, 1, 3]))
def test_forks_of_one_row_are_scored_as_each_prompt_by_itself(reader, family, exchanges):
    prompts, targets, owners = family
    model, z = reader.model, None
    if exchanges:
        drawn = model.commitment.prior(4 * exchanges, torch.Generator().manual_seed(1))
        z = drawn.view(4, exchanges, -1)[owners]
    found = reader.scores(prompts, z, targets)
    for i, (prompt, wanted) in enumerate(zip(prompts, targets, strict=True)):
        with torch.no_grad():
            if z is None:
                logits = model.base(torch.from_numpy(prompt.ids)[None], use_cache=False).logits[0]
            else:
                mine = z[i, prompt.exchange % exchanges]
                added = PLAN.strength * mine @ model.commitment.projection.T
                with injected(model.base, added[None], PLAN.layers):
                    logits = model.base(torch.from_numpy(prompt.ids)[None],
                                        use_cache=False).logits[0]
        rows = logits[-len(wanted) :].double().log_softmax(-1)
        expected = rows.gather(1, torch.from_numpy(wanted))
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


def test_prompts_are_read_together_only_under_the_same_z_and_exchange(reader):
    """What would fold the forks wrongly: another z*, or the same tokens in other exchanges."""
    ids, turn = np.arange(3, 23), np.zeros(20, np.int64)
    alike = [Prompt(np.append(ids, i), np.append(turn, 1), np.zeros(21, bool)) for i in range(3)]
    moved = Prompt(np.append(ids, 9), np.append(turn + 1, 2), np.zeros(21, bool))
    z = reader.model.commitment.prior(8).view(4, 2, -1)
    targets = [np.array([[5]])] * 4

    def rows(chosen) -> list[list[int]]:
        batches = reader._forked([*alike, moved], chosen, targets)
        return sorted(group.members for batch in batches for group in batch)

    assert rows(z[[0, 0, 0, 0]]) == [[0, 1, 2], [3]]
    assert rows(z[[0, 1, 1, 1]]) == [[0], [1, 2], [3]]
    assert rows(None) == [[0, 1, 2], [3]]


def test_what_follows_a_negligible_first_token_is_not_read_and_bounds_the_word(reader):
    """Words are exact but for those whose first token already rules them out."""
    slow, sharp = Slow(reader), reader.model.base.get_output_embeddings().weight
    before, exact, bounded, longest = sharp.detach().clone(), 0, 0, 1
    with torch.no_grad():
        sharp *= 8
    try:
        for item in ITEMS.fork[:3]:
            turns = [*item.opening, item.naming]
            asked = [(reader.prompt(turns, item.stem), item.values)]
            logs, (tokens,) = reader.log_likelihoods(asked, None)
            longest = max(longest, *map(len, tokens))
            start = slow.logs(slow.ids(turns, item.stem))[-1]
            for value, ids, log in zip(item.values, tokens, logs[0].tolist(), strict=True):
                whole = slow.score(turns, item.stem, value)
                if log == pytest.approx(whole, abs=2e-3):
                    exact += len(ids) > 1
                else:
                    bounded += 1
                    assert log == pytest.approx(start[ids[0]].item(), abs=1e-3)
                    assert whole < log <= logs.max().item() + np.log(1e-6)
    finally:
        with torch.no_grad():
            sharp.copy_(before)
    assert (bounded > 0) == (exact > 0) == (longest > 1)


class Joining(Tokenizer):
    """Joins a colon with the y behind it, as a tokenizer may that does not split at spaces."""

    def encode(self, text, bos=False):
        ids = super().encode(text, bos)
        joined, colon = len(self) - 1, super().encode("A:")[-1]
        first = super().encode(" yes")[0]
        out = []
        for token in ids:
            if out and out[-1] == colon and token == first:
                out[-1] = joined
            else:
                out.append(token)
        return out


def test_a_word_that_is_joined_with_the_prompts_end_is_read_from_before_it(reader):
    """All words are then read behind the same, shorter prompt."""
    joining = TorchSpeaker(reader.model, Joining(reader.tokenizer.path))
    turns = [*ITEMS.fork[0].opening, ITEMS.fork[0].guesses[0]]
    prompt = joining.prompt(turns, "")
    kept, tokens = joining.rendering.continuations(prompt, ("yes", "no"))
    assert kept == len(prompt.ids) - 1
    assert tokens[0][0] == len(joining.tokenizer) - 1
    assert tokens[1][0] == prompt.ids[-1]
    slow, found = Slow(joining), joining.log_likelihoods([(prompt, ("yes", "no"))], None)[0]
    for word, log in zip(("yes", "no"), found[0], strict=True):
        ids = slow.ids(turns, word)
        rows = slow.logs(ids)
        expected = sum(rows[i - 1, ids[i]].item() for i in range(kept, len(ids)))
        assert log.item() == pytest.approx(expected, abs=1e-4)


def test_a_prompt_can_be_shortened_and_continued():
    prompt = Prompt(np.array([1, 5, 6]), np.array([0, 0, 1]), np.array([False, False, True]))
    longer = prompt.to(2, [8, 9])
    assert longer.ids.tolist() == [1, 5, 8, 9]
    assert longer.exchange.tolist() == [0, 0, 1, 1]
    assert longer.own.tolist() == [False, False, True, True]


# --- before training ------------------------------------------------------------------------------


def check(folder: Path, plan: Plan = PLAN, settings=DIALOGUES, items=ITEMS) -> None:
    check_readable(folder, plan, settings, items, [generate(DIALOGUES, 0, 0).turns])


def test_what_cannot_be_probed_is_refused_before_anything_is_trained(folder):
    check(folder)
    wrong = PLAN.model_copy(update={"k": 65, "layers": (2, 6)})
    with pytest.raises(ValueError, match=r"k = 65 is larger than the model's width 64: choose a "
                                         r"smaller k\nfirst_layer = 2, last_layer = 6: .* layers "
                                         "0 to 5"):
        check(folder, wrong)
    chapter = (repository() / "notebooks" / "03_qlora_commitment.py").read_text()
    assert chapter.index("check_readable(folder, ") < chapter.index("Experiment.train")


def small_copy(folder: Path, path: Path, **changes) -> Path:
    path.mkdir()
    LlamaConfig.from_pretrained(folder, **changes).save_pretrained(path)
    (path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    return path


def test_a_window_or_vocabulary_that_is_too_small_is_refused(folder, tmp_path):
    tokenizer = Tokenizer(folder / "tokenizer.model")
    texts = [generate(DIALOGUES, 0, 0).turns]
    longest = longest_probe(Rendering(tokenizer), ITEMS, texts)
    check(small_copy(folder, tmp_path / "enough", max_position_embeddings=longest))
    with pytest.raises(ValueError, match=rf"longest probe has {longest} tokens .* only 50: lower"):
        check(small_copy(folder, tmp_path / "short", max_position_embeddings=50))
    with pytest.raises(ValueError, match=r"has \d+ tokens, the model only 99: give the tokenizer"):
        check(small_copy(folder, tmp_path / "few", vocab_size=99))


@pytest.mark.parametrize(("pair", "fault"), [
    (("teal", "gold"), "color: 'teal' and 'gold' are the same tokens"),
    (("yes", "no"), "'yes' and 'no' are the same tokens"),
])
def test_words_with_the_same_tokens_are_refused(folder, monkeypatch, pair, fault):
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, bos=False: encode(
        self, text.replace(f" {pair[0]}", " x").replace(f" {pair[1]}", " x"), bos))
    with pytest.raises(ValueError, match=fault):
        check(folder)


# --- the configuration of the profile `full` ------------------------------------------------------


@dataclass(frozen=True)
class Full:
    """What the profile `full` makes of a Llama of two small layers."""

    base: Path
    plan: Plan
    experiment: Experiment

    def reader(self, arm: str) -> TorchSpeaker:
        """Read in f32, where a batch makes no difference."""
        trained = self.experiment.folder(1, 1, ARMS[arm].training)
        return TorchSpeaker(qlora.load_committed(self.base, trained, exact=True),
                            Tokenizer(self.base / "tokenizer.model"), self.plan.chat)


@pytest.fixture(scope="module")
def full(llama2, tmp_path_factory) -> Full:
    """z* and its controls, trained for one step."""
    values = profiles.load("full").parameters["03_qlora_commitment"]
    plan = Plan(
        k=values["k"], strength=values["strength"], chat=values["chat"],
        quantisation=values["quantisation"], gradient_checkpointing=values["checkpointing"],
        lora=LoraSettings(r=values["lora_rank"], alpha=values["lora_alpha"],
                          dropout=values["lora_dropout"], targets=values["targets"]),
        schedule=Schedule(beta=values["beta"], warmup=0, annealing=0,
                          free_bits=values["free_bits"], cells=values["cells"]),
        training=PLAN.training.model_copy(update={
            name: values[name] for name in ("batch_size", "gradient_accumulation",
                                            "learning_rate", "precision")}))
    base, artifacts = (tmp_path_factory.mktemp(name) for name in ("llama-2", "full"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, initializer_range=0.12,
        bos_token_id=1, eos_token_id=2,
    )).to(torch.bfloat16).save_pretrained(base, max_shard_size="3MB")
    (base / "tokenizer.model").write_bytes(llama2.path.read_bytes())
    experiment = Experiment({1: base}, plan, values["data"], ConversationSettings(
        trained_part(DIALOGUES), gap=(values["gap_least"], values["gap_most"])), artifacts)
    for name in ("commitment", "lora", "note"):
        experiment.train(1, 1, name)
    return Full(base, plan, experiment)


def test_the_profile_full_has_the_logs_setting_and_the_mechanism_on(full):
    assert full.plan.chat == "llama2"
    assert (full.plan.k, full.plan.schedule.beta) == (64, 0.1)
    assert (full.plan.lora.r, full.plan.lora.alpha) == (8, 16)
    assert full.plan.lora.targets == ["q_proj", "v_proj"]
    assert full.plan.schedule.cells > 0


@pytest.mark.parametrize("arm", [name for name in ARMS if "." not in name])
def test_every_probe_of_every_arm_can_be_read_in_the_profile_full(full, arm):
    asked = Asked(5, 2, 1, guesses=1,
                  families=("fork", "recall", "language", "hangman", "reached"))
    (found,) = full.experiment.measure(1, 1, arm, asked)
    for name in ("answered", "recall", "eviction", "same_choice", "kept", "hangman"):
        assert len(found[name]) == 2
        assert set(found[name]) <= {0, 1}
    assert all(0 < value < 12 for value in found["yes_sum"])
    assert found["nll"][0] > 0
    assert found["kl_base"][0] == pytest.approx(0, abs=1e-4) if ARMS[arm].training == "base" \
        else found["kl_base"][0] > 0
    if arm == "prefix":
        assert min(found["kl"]) > 0
    if arm == "prior":
        assert 0 < min(found["reached"]) <= max(found["reached"]) <= 1


def test_the_probes_of_the_profile_full_equal_one_by_one_evaluation(full):
    found = assert_forks_equal_one_by_one(
        full.reader("prior"), probe_set(5, 2, 1), 1, "prior")
    assert found.yes.std() > 1e-3  # not one half everywhere
    reader = full.reader("lora")
    slow = Slow(reader)
    item = ITEMS.recall[0]
    turns = [*item.distractors, item.requestion]
    assert reader.prompt(turns, "").ids.tolist() == slow.ids(turns, "")
    assert reader.answers([reader.prompt(turns, "")], None, 6) == [slow.answer(turns, 6)]


def test_an_answer_in_llama2_ends_at_eos(full):
    reader = full.reader("lora")
    prompt = reader.prompt([ITEMS.recall[0].question], "")
    head = reader.model.base.get_output_embeddings().weight
    with torch.no_grad():  # EOS always wins
        hidden = reader.model.hidden(torch.from_numpy(prompt.ids)[None], None).last_hidden_state
        head[2] = 100 * hidden[0, -1] / hidden[0, -1].norm()
    assert reader.answers([prompt], None, 6) == [""]


@pytest.fixture(scope="module")
def exported(full) -> export.Export:
    made = full.experiment.artifacts / "export"
    export.export(full.experiment.folder(1, 1, "commitment"), full.base, made)
    return export.reimport(made, full.base)


def test_what_was_trained_in_bf16_is_read_in_bf16(full):
    assert full.plan.training.precision == "bf16"
    for arm in ("base", "lora", "random", "prior"):
        assert full.experiment.model(1, 1, ARMS[arm]).base.dtype == torch.bfloat16
    exact = full.plan.model_copy(update={"training": full.plan.training.model_copy(
        update={"precision": "f32"})})
    assert qlora.load_to_read(full.base, exact).dtype == torch.float32


def test_llama_cpp_reads_the_profile_full_as_pytorch_does(full, exported, monkeypatch):
    # As many threads as so small a model needs.
    monkeypatch.setattr(engine_comparison, "usable_threads", lambda: 1)
    found = engine_comparison.compare(exported, full.base, probe_set(5, 3, 0))
    assert found.pop("q8_0").logits < 0.5
    for one in found.values():
        assert one.logits <= 2e-3
        assert one.greedy.all()
        assert one.named.all()
        for ours, theirs in ((one.fork[0].yes, one.fork[1].yes),
                             (one.fork[0].named, one.fork[1].named)):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)
            assert ours.std() > 1e-3


def test_chapters_1_and_2_speak_to_llama_cpp_in_the_same_tokens(full, exported):
    rendering = Rendering(Tokenizer(full.base / "tokenizer.model"), "llama2")
    with Model(exported.base) as model, Context(model, 27, 256) as context:
        speech = LlamaCppSpeaker(context, "llama2")
        for item in ITEMS.fork:
            for turns, stem in ([*item.opening, item.naming], item.stem), (
                    [item.note, *item.opening, item.guesses[0]], ""):
                prompt = rendering.prompt(turns, stem)
                assert speech.prompt(turns, stem) == prompt.ids.tolist()
                kept, tokens = rendering.continuations(prompt, item.values)
                assert kept == len(prompt.ids)
                assert speech.continuations(turns, stem, item.values) == tokens
        assert model.stops() == rendering.stops
