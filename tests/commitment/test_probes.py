"""Probes and coherence, against slow one-by-one evaluation in PyTorch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lablog.commitment import coherence, probes
from lablog.commitment.llama_cpp_speaker import Engine, EngineSettings, Injection, LlamaCppSpeaker
from lablog.commitment.qlora import CommittedModel
from lablog.commitment.torch_injection import injected
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.models.llama_cpp import Commitment
from lablog.text.dialogues import Turn, load_settings, prompt, render
from lablog.text.tokenizer import Tokenizer


class Slow:
    """The same questions to the PyTorch model, one text at a time, nothing cached."""

    def __init__(self, folder, model, commitment=None):
        self.tokenizer, self.model = Tokenizer(folder / "tokenizer.model"), model
        self.commitment = commitment

    def log_probabilities(self, ids):
        with torch.inference_mode():
            if self.commitment is None:
                rows = self.model(torch.tensor([ids])).logits[0]
            else:
                addition = self.commitment.strength * torch.from_numpy(self.commitment.direction)
                with injected(self.model, addition, self.commitment.layers):
                    rows = self.model(torch.tensor([ids])).logits[0]
        return rows.double().log_softmax(-1).numpy()

    def answer(self, text, uniforms=None):
        ids, written = self.tokenizer.encode(text, bos=True), []
        for step in range(probes.ANSWER_TOKENS):
            p = np.exp(self.log_probabilities(ids + written)[-1])
            token = int(p.argmax() if uniforms is None
                        else np.searchsorted(p.cumsum(), uniforms[step], side="right"))
            if "\n" in self.tokenizer.decode([token]) or token == 2:
                break
            written.append(token)
        return self.tokenizer.decode(written).strip()

    def probability(self, text, continuation):
        start = self.tokenizer.encode(text, bos=True)
        ids = self.tokenizer.encode(text + continuation, bos=True)
        assert ids[: len(start)] == start
        rows = self.log_probabilities(ids)
        return math.exp(sum(rows[i - 1, ids[i]] for i in range(len(start), len(ids))))


@pytest.fixture(params=[None, 0.4])
def commitment(request, model):
    if request.param is None:
        return None
    direction = np.random.default_rng(1).standard_normal(model.width).astype(np.float32)
    return Commitment(direction, request.param, (0, 5))


def injection_of(commitment):
    return Injection((commitment,)) if commitment else Injection()


def index(text, values):
    named = probes.named_value(text, values)
    return values.index(named) if named else -1


def test_items_are_a_function_of_the_seed():
    settings = load_settings()
    one, two = (probes.make_items(settings, 4, 30) for _ in range(2))
    other = probes.make_items(settings, 5, 30)
    assert [i.requestion for i in one.recall] == [i.requestion for i in two.recall]
    assert [i.distractors for i in one.recall] != [i.distractors for i in other.recall]
    assert len({i.values for i in one.recall}) >= 5
    prefix = probes.make_items(settings, 4, 10)
    assert prefix.fork == one.fork[:10]


def test_no_distractor_names_a_value_of_the_topic():
    for item in probes.make_items(load_settings(), 0, 200).recall:
        assert index(render(item.distractors), item.values) == -1


def test_recall_equals_one_by_one_evaluation(speech, folder, torch_model, items, commitment):
    slow = Slow(folder, torch_model, commitment)
    result = probes.recall(speech, items.recall, injection_of(commitment))
    for i, item in enumerate(items.recall):
        first = slow.answer(prompt([item.question]), item.uniforms)
        said = [item.question, Turn("A", first, "answer"), *item.distractors, item.requestion]
        evicted = slow.answer(prompt([*item.distractors, item.requestion]))
        assert result.first[i] == index(first, item.values)
        assert result.again[i] == index(slow.answer(prompt(said)), item.values)
        assert result.evicted[i] == index(evicted, item.values)


def test_forks_equal_one_by_one_evaluation(speech, folder, torch_model, items, commitment):
    slow = Slow(folder, torch_model, commitment)
    result = probes.fork(speech, items.fork, injection_of(commitment))
    for i, item in enumerate(items.fork[:3]):
        for x, guess in enumerate(item.guesses):
            text = prompt([*item.opening, guess])
            yes, no = (
                slow.probability(text, f" {word}") + slow.probability(text, f" {word.title()}")
                for word in ("yes", "no")
            )
            assert result.yes[i, x] == pytest.approx(yes / (yes + no), abs=2e-3)
        text = prompt([*item.opening, item.naming])
        named = np.array([slow.probability(text, f" {item.stem} {v}".replace("  ", " "))
                          for v in item.values])
        np.testing.assert_allclose(result.named[i], named / named.sum(), atol=2e-3)


def test_results_do_not_depend_on_how_many_are_evaluated_together(model, items, commitment):
    from lablog.models.llama_cpp import Context

    results = []
    for sequences in (13, 40):
        with Context(model, sequences, 256) as context:
            speech = LlamaCppSpeaker(context)
            results.append((probes.recall(speech, items.recall, injection_of(commitment)),
                            probes.fork(speech, items.fork, injection_of(commitment))))
    (recall, fork), (other_recall, other_fork) = results
    np.testing.assert_array_equal(recall.again, other_recall.again)
    np.testing.assert_allclose(fork.yes, other_fork.yes, atol=1e-4)
    np.testing.assert_allclose(fork.named, other_fork.named, atol=1e-4)


def test_both_engines_give_one_answer_to_every_probe(speech, folder, torch_model, items):
    """The contract of `Speaker`, without a latent: no more than rounding lies between them."""
    torch_speech = TorchSpeaker(CommittedModel(torch_model), Tokenizer(folder / "tokenizer.model"))
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(12), (8, 1)), axis=1)[:, :2]
    for aid in (None, "note"):
        ours, theirs = (probes.recall(speaker, items.recall, nothing, aid=aid)
                        for speaker, nothing in ((speech, Injection()), (torch_speech, None)))
        for name in ("first", "again", "evicted"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        fork, other = (probes.fork(speaker, items.fork, nothing, aid)
                       for speaker, nothing in ((speech, Injection()), (torch_speech, None)))
        for name in ("yes", "named", "answer_mass", "named_mass", "noted"):
            np.testing.assert_allclose(getattr(fork, name), getattr(other, name), atol=2e-3)
        np.testing.assert_array_equal(
            probes.game(speech, items.fork, Injection(), orders, aid),
            probes.game(torch_speech, items.fork, None, orders, aid))
    asked = [[*item.opening, item.guesses[0]] for item in items.fork]
    np.testing.assert_allclose(speech.agree(asked, Injection()), torch_speech.agree(asked, None),
                               atol=2e-3)
    texts = [item.distractors for item in items.recall]
    for mine, rows in zip(speech.read(texts, Injection()), torch_speech.read(texts, None),
                          strict=True):
        np.testing.assert_allclose(mine[:-1], rows, atol=5e-3)


@pytest.mark.parametrize("changed", [False, True])
def test_a_conversation_that_goes_on_is_answered_as_if_it_were_read_anew(
        model, speech, items, commitment, changed):
    """From the caches, and not from those of another injection."""
    from lablog.models.llama_cpp import Context

    under = injection_of(commitment)
    before = Injection(tuple(directions(1))) if changed else under
    said = speech.say([[item.question] for item in items.recall], before, 16)
    later = [[item.question, Turn("A", text, "answer"), *item.distractors, item.requestion]
             for text, item in zip(said, items.recall, strict=True)]
    on = speech.say(later, under, 16)
    with Context(model, 27, 256) as other:
        assert LlamaCppSpeaker(other).say(later, under, 16) == on


def test_too_few_sequences_for_a_fork_are_refused(model, items):
    from lablog.models.llama_cpp import Context

    with Context(model, 5, 256) as context, pytest.raises(ValueError, match="needs 13 sequences"):
        probes.fork(LlamaCppSpeaker(context), items.fork, Injection())


def test_the_text_note_is_in_the_window(speech, items):
    """With the note, the evicted window holds the first answer again."""
    without = probes.recall(speech, items.recall, Injection())
    with_note = probes.recall(speech, items.recall, Injection(), aid="note")
    np.testing.assert_array_equal(without.again, with_note.again)
    fork, noted = (probes.fork(speech, items.fork, Injection(), aid) for aid in (None, "note"))
    assert np.abs(fork.named - noted.named).max() > 1e-3


def test_scores_count_what_they_say():
    recall = probes.RecallResult(np.array([3, -1, 2, 0]), np.array([3, -1, 1, 0]),
                                 np.array([1, -1, 2, 0]))
    assert recall.answered.tolist() == [True, False, True, True]
    assert recall.recalled.tolist() == [True, False, False, True]  # two blanks are no agreement
    assert recall.recalled_after_eviction.tolist() == [False, False, True, True]
    fork = probes.ForkResult(np.array([[0.9, 0.1], [0.6, 0.7]]), np.array([[0.8, 0.2], [0.9, 0.1]]),
                             np.ones(2), np.ones(2), np.zeros(2))
    assert fork.yes_sum.tolist() == pytest.approx([1.0, 1.3])
    assert fork.same.tolist() == [True, False]


def test_a_redrawn_direction_changes_exactly_at_the_turns(speech, folder, torch_model, items):
    """Positions of turn t carry direction t, as in PyTorch with one direction a position."""
    rng = np.random.default_rng(2)
    directions = [Commitment(rng.standard_normal(64).astype(np.float32), 0.4, (0, 5))
                  for _ in range(16)]
    text = items.recall[0].distractors[:4]
    rows = speech.read([text], Injection(tuple(directions)))[0]
    ids = speech.history(text)
    border = len(speech.history(text[:2]))
    addition = torch.zeros(1, len(ids), 64)
    addition[:, :border] = 0.4 * torch.from_numpy(directions[0].direction)
    addition[:, border:] = 0.4 * torch.from_numpy(directions[1].direction)
    with torch.inference_mode(), injected(torch_model, addition, (0, 5)):
        reference = torch_model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    assert np.abs(rows - reference).max() <= 5e-3


def directions(count, width=64, seed=2):
    rng = np.random.default_rng(seed)
    return [Commitment(rng.standard_normal(width).astype(np.float32), 0.4, (0, 5))
            for _ in range(count)]


def test_every_forked_question_is_read_under_a_direction_of_its_own(
        speech, folder, torch_model, items):
    """The opening under the first, question q of item i under number 1 + 13 i + q, as in PyTorch
    with one direction a position; values of several tokens too, which other sequences decode."""
    pool, tokenizer = directions(200), Tokenizer(folder / "tokenizer.model")
    result = probes.fork(speech, items.fork[:3], Injection(tuple(pool)))

    def probability(history, text, continuation, number):
        opening, start = (len(tokenizer.encode(t, bos=True)) for t in (render(history), text))
        ids = tokenizer.encode(text + continuation, bos=True)
        addition = torch.zeros(1, len(ids), 64)
        addition[:, :opening] = 0.4 * torch.from_numpy(pool[0].direction)
        addition[:, opening:] = 0.4 * torch.from_numpy(pool[number].direction)
        with torch.inference_mode(), injected(torch_model, addition, (0, 5)):
            rows = torch_model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return math.exp(sum(rows[i - 1, ids[i]] for i in range(start, len(ids))))

    pieces = set()
    for i in (0, 2):  # of two groups: two items fit into the context
        item = items.fork[i]
        for x, guess in enumerate(item.guesses[:4]):
            text = prompt([*item.opening, guess])
            yes, no = (sum(probability(item.opening, text, f" {w}", 2 + 13 * i + x)
                           for w in (word, word.title())) for word in ("yes", "no"))
            assert result.yes[i, x] == pytest.approx(yes / (yes + no), abs=2e-3)
        text = prompt([*item.opening, item.naming])
        answers = [f" {item.stem} {value}".replace("  ", " ") for value in item.values]
        pieces |= {len(tokenizer.encode(value)) for value in item.values}
        named = np.array([probability(item.opening, text, a, 1 + 13 * i) for a in answers])
        np.testing.assert_allclose(result.named[i], named / named.sum(), atol=2e-3)
    assert len(pieces) > 1  # some values are one token and some are more


def test_a_context_forgets_what_the_questions_were_read_under(speech, items):
    before = probes.fork(speech, items.fork, Injection())
    redrawn = probes.fork(speech, items.fork, Injection(tuple(directions(200))))
    after = probes.fork(speech, items.fork, Injection())
    np.testing.assert_array_equal(before.yes, after.yes)
    np.testing.assert_array_equal(before.named, after.named)
    assert np.abs(before.named - redrawn.named).max() > 1e-3


class Obedient(LlamaCppSpeaker):
    """A context and its speaker in one, of a model whose commitment decides by itself: it holds
    the value where the direction is largest and answers both question forms accordingly."""

    sequences = 27

    def __init__(self):
        self.context, self.everywhere, self.own, self._said = self, None, {}, None

    def commit(self, commitment, sequence=None):
        if sequence is None:
            self.everywhere = commitment
        else:
            self.own[sequence] = commitment

    def clear(self):
        pass

    def fork(self, source, targets):
        pass

    def history(self, turns):
        return list(turns)

    def prompt(self, turns, stem=""):
        return list(turns)

    def continuations(self, turns, stem, values):
        return values

    def prefill(self, contents):
        return {s: [(content[-1], int(np.argmax((self.own.get(s) or self.everywhere).direction)))]
                for s, content in contents.items()}

    def word_probabilities(self, last, words):
        return {s: np.array([0.9, 0.1] if value in turn.text.lower().split() else [0.1, 0.9])
                for s, (turn, held) in last.items() for value in [VALUES[held]]}

    def scores(self, last, continuations):
        return {s: np.where(np.arange(12) == held, -0.1, -5.0) for s, (_, held) in last.items()}


VALUES = [f"thing{x}" for x in range(12)]


def obedient_items(count):
    guesses = tuple(Turn("U", f"is it {value} ?", "is_it") for value in VALUES)
    note = Turn("A", "it is thing0", "private")
    told = Turn("S", "it is thing0", "told_choice")
    item = probes.ForkItem(tuple(VALUES), (Turn("U", "choose", "opening"),), guesses,
                           Turn("U", "what is it?", "what_is_it"), "", note, 0, (tuple(VALUES),),
                           told, Turn("S", "keep to it", "keep"))
    return [item] * count


def test_a_shared_direction_that_decides_makes_both_forms_agree_and_redrawn_ones_do_not():
    """The planted effect: agreement in every item, and in one of twelve when it is redrawn."""
    rng = np.random.default_rng(7)
    pool = tuple(Commitment(row.astype(np.float32), 1.0, (0, 0))
                 for row in rng.standard_normal((1024, 12)))
    count = 600
    shared = probes.fork(Obedient(), obedient_items(count), Injection(pool[:1]))
    assert shared.same.all()
    np.testing.assert_allclose(shared.yes_sum, 0.9 + 11 * 0.1)
    redrawn = probes.fork(Obedient(), obedient_items(count), Injection(pool))
    assert abs(redrawn.same.mean() - 1 / 12) < 3.5 * math.sqrt(11 / 144 / count)


def test_coherence_equals_pytorch(gguf, folder, torch_model, material, commitment):
    with Engine(EngineSettings(gguf, 27, 256)) as engine:
        unmodified = coherence.baseline(engine, material)
        base = unmodified.coherence
        assert base.kl_mean == base.kl_p95 == 0
        assert base.same_top == 1
        measured = coherence.coherence(engine.speaker, material, injection_of(commitment),
                                       unmodified)
    slow, plain = Slow(folder, torch_model, commitment), Slow(folder, torch_model)
    loss, kl = [], []
    for turns in material.texts:
        ids = slow.tokenizer.encode(render(turns), bos=True)
        mine, theirs = slow.log_probabilities(ids), plain.log_probabilities(ids)
        loss += [-mine[i, ids[i + 1]] for i in range(len(ids) - 1)]
        kl += (np.exp(mine) * (mine - theirs)).sum(axis=1).tolist()
    assert measured.perplexity == pytest.approx(math.exp(np.mean(loss)), rel=2e-3)
    assert measured.kl_mean == pytest.approx(np.mean(kl), rel=5e-3, abs=1e-6)
    assert measured.kl_p95 == pytest.approx(np.percentile(kl, 95), rel=5e-3, abs=1e-6)


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_counts_repeats(tokens):
    rate = coherence.repeated_ngrams(tokens)
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    repeats = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert rate == pytest.approx(repeats / len(grams) if grams else 0)


def test_words_follow_the_thresholds():
    limits = coherence.Thresholds()
    base = coherence.Coherence(4.0, 0, 0, 1, 0, 0, 0.2, 0.5, 0.5)

    def word(**changes):
        return replace(base, **changes).word(base, limits)

    assert word() == "coherent"
    assert word(perplexity=5.9, same_top=0.51, repeated_4grams=0.29) == "coherent"
    assert word(perplexity=6.1) == word(same_top=0.49) == "incoherent"
    assert word(repeated_4grams=0.31) == "coherent but repetitive"
    assert word(repeated_4grams=0.31, perplexity=100.0) == "incoherent"


def test_an_unknown_chat_is_refused(context):
    with pytest.raises(ValueError, match="plain, llama2"):
        LlamaCppSpeaker(context, "chatml")


def test_llama2_chat_marks_instructions(context):
    text = LlamaCppSpeaker(context, "llama2").render([Turn("U", "hi", "x"), Turn("A", "yes", "y")])
    assert text == "[INST] hi [/INST] yes </s><s>"
