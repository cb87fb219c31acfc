"""arianna-sample and arianna-chat: what they say, how they are stopped, what they refuse."""

import importlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from arianna_exchanges import EXCHANGES
from hypothesis import given
from hypothesis import strategies as st

from lablog.arianna import __main__ as commands
from lablog.arianna.chat import Chat, answers, prompt, until_question, warn_of_form, write
from lablog.files import repository
from lablog.models.llama_cpp import Context, Model, Sampling, stream

GREEDY = Sampling(temperature=0)
WILD = Sampling(temperature=5, top_p=1, seed=3)  # a model that has learnt by heart is too sure


@pytest.fixture
def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Call a command with `typed` as its input; exit code, output and messages."""

    def run(*arguments: object, typed: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        try:
            code = commands.main([*map(str, arguments)])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(exports):
    with Model(exports["f32"]) as opened:
        yield opened


@pytest.fixture
def context(model):
    with Context(model, window=model.window) as opened:
        yield opened


# --- drawing tokens -------------------------------------------------------------------------------


def test_tokens_are_drawn_as_temperature_and_top_p_say(context):
    """Frequencies against the distribution, computed here: chi-square, 1 in 10^6 by chance."""
    logits = context.decode({0: context.model.tokenize("Q: What is", bos=True)})[0][0].astype(float)
    for sampling in (Sampling(3.0, 0.5), Sampling(2.0, 0.9)):
        weights = np.exp((logits - logits.max()) / sampling.temperature)
        order = np.argsort(-weights)
        p = weights[order] / weights.sum()
        nucleus = int((np.cumsum(p) < sampling.top_p).sum()) + 1
        kept = p[:nucleus] / p[:nucleus].sum()
        drawn = [next(stream(context, 1, sampling.nth(i))) for i in range(1500)]
        counts = np.array([drawn.count(token) for token in order[:nucleus]])
        assert counts.sum() == 1500  # none from beyond the nucleus
        common = kept * 1500 > 5
        observed = np.append(counts[common], counts[~common].sum())
        expected = np.append(kept[common], kept[~common].sum() + 1e-9) * 1500
        freedom = len(expected) - 1
        assert freedom > 1
        chi2 = ((observed - expected) ** 2 / expected).sum()
        assert chi2 < freedom + 7 * np.sqrt(2 * freedom) + 10


def test_a_seed_gives_one_text(context):
    texts = {seed: ["".join(write(context, "Q: x\nA:", 20, WILD.nth(seed))) for _ in range(2)]
             for seed in range(3)}
    assert all(first == second for first, second in texts.values())
    assert len({first for first, _ in texts.values()}) == 3


@pytest.mark.parametrize(("values", "message"), [
    ((-0.1,), "temperature = -0.1: expected 0 or more"), ((float("nan"),), "temperature = nan"),
    ((float("inf"),), "temperature = inf"), ((1, 0), "top_p = 0: expected more than 0"),
    ((1, 1.01), "top_p = 1.01: expected more than 0 and at most 1"),
    ((1, float("nan")), "top_p = nan"), ((1, 1, -1), "seed = -1: expected 0 to 4294967294"),
    ((1, 1, 2**32 - 1), "seed = 4294967295"),
])
def test_sampling_out_of_range_is_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(*values)


def test_generation_ends_with_the_window(context):
    text = "Q: x\nA:" + " way" * 200
    held = len(context.model.tokenize(text, bos=True))
    context.prefill({0: context.model.tokenize(text, bos=True)})
    assert len(list(stream(context, 1000, WILD))) == context.window - held + 1
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens .* holds 256: shorten it"):
        list(write(context, text * 2, 1, WILD))


@given(st.lists(st.text("Q:\n a", max_size=4)))
def test_an_answer_ends_at_the_next_question_however_it_arrives(parts):
    whole = "".join(parts)
    assert "".join(until_question(parts)) == re.split(r"\s*\nQ:", whole, maxsplit=1)[0].rstrip()


def test_characters_arrive_whole(context):
    hot = Sampling(50.0, 1.0)  # bytes among the tokens, most of them no UTF-8
    texts = list(write(context, "Q: x\nA:", 200, hot))
    context.prefill({0: context.model.tokenize("Q: x\nA:", bos=True)})
    pieces = [context.model.piece(token) for token in stream(context, 200, hot)]
    assert any(piece[0] >= 0xC0 for piece in pieces)
    assert "".join(texts) == b"".join(pieces).decode(errors="replace")
    context.prefill({0: context.model.tokenize("Q: x\nA: 猫é", bos=True)})
    assert b"".join(context.model.piece(t) for t in context.tokens[0][-5:]).decode() == "猫é"


def test_answers_to_single_questions_are_drawn_as_sample_draws_them(context, exports):
    asked = [question for question, _ in EXCHANGES]
    texts = [until_question(write(context, prompt(question), 20, Sampling(seed=5 + number)))
             for number, question in enumerate(asked)]
    assert answers(exports["f32"], asked, 20, 5) == ["".join(text).strip() for text in texts]


# --- the form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "Q: What is resonance?\nA:", "Q: a\nA: It is", "Q: a\nA: b\n\nQ: c\nA:",
])
def test_a_prompt_in_the_form_is_not_warned_of(text, recwarn: pytest.WarningsRecorder):
    assert warn_of_form(text)
    assert not recwarn


@pytest.mark.parametrize("text", [
    "", "What is resonance?", "Q: What is resonance?", "Q: a\nA: ", "Q: a\nA:\n", "Q:\nA:",
    "Q: a A:", "q: a\na:", "A: b\nQ: a",
])
def test_a_prompt_out_of_form_is_warned_of(text):
    with pytest.warns(UserWarning, match="is not of the form"):
        assert not warn_of_form(text)


# --- a conversation -------------------------------------------------------------------------------


def test_a_chat_gives_the_answers_that_were_learnt(context):
    chat = Chat(context, 60, GREEDY)
    assert ["".join(chat.ask(question)) for question, _ in EXCHANGES] == [
        f" {answer}" for _, answer in EXCHANGES]
    assert chat.exchanges == EXCHANGES


def test_the_oldest_exchanges_are_forgotten_first(context):
    chat = Chat(context, 60, GREEDY)
    tokens = context.model.tokenize
    for number in range(20):
        question = EXCHANGES[number % 3][0]
        before = list(chat.exchanges)
        answer = chat.ask(question)
        assert chat.exchanges == before[chat.forgotten :]
        text = "".join(f"{prompt(q)} {a}\n\n" for q, a in chat.exchanges) + prompt(question)
        assert len(tokens(text, bos=True)) + 60 <= 256
        if chat.forgotten:  # and no more than needed
            more = "".join(f"{prompt(q)} {a}\n\n" for q, a in before[chat.forgotten - 1 :])
            assert len(tokens(more + prompt(question), bos=True)) + 60 > 256
        "".join(answer)
        held = tokens(text, bos=True)
        assert context.tokens[0][: len(held)] == held
    assert len(chat.exchanges) < 20


def test_a_stopped_answer_leaves_a_sound_conversation(context, model):
    chat = Chat(context, 60, GREEDY)
    with closing(chat.ask(EXCHANGES[0][0])) as answer:
        begun = next(answer) + next(answer)
    assert chat.exchanges == [(EXCHANGES[0][0], begun.strip())]
    continued = "".join(chat.ask(EXCHANGES[1][0]))
    with Context(model, window=256) as fresh:
        other = Chat(fresh, 60, GREEDY)
        other.exchanges = [(EXCHANGES[0][0], begun.strip())]
        assert "".join(other.ask(EXCHANGES[1][0])) == continued


def test_a_question_that_is_too_long_changes_nothing(context):
    chat = Chat(context, 60, GREEDY)
    "".join(chat.ask(EXCHANGES[0][0]))
    with pytest.raises(ValueError, match=r"has \d+ tokens; .* holds 256, 60 of them for the ans"):
        chat.ask("why " * 300)
    assert chat.exchanges == EXCHANGES[:1]


# --- the commands ---------------------------------------------------------------------------------


def test_sample_prints_texts_by_seed(run, exports, context):
    code, out, err = run("sample", "--model", exports["f32"], "--question", "What?", "--seed", 5,
                         "--samples", 2, "--max-new-tokens", 20, "--temperature", 5, "--top-p", 1)
    assert (code, err) == (0, "")
    start = prompt("What?")
    texts = ["".join(write(context, start, 20, Sampling(5, 1, seed))) for seed in (5, 6)]
    assert out == f"{start}{texts[0]}\n{'-' * 15}\n{start}{texts[1]}\n"


def test_sample_reads_every_format(run, exports, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(exports["q8_0"].parent)  # paths are told from here
    for kind in ("f32", "q8_0"):
        code, out, _ = run("sample", "--model", exports[kind].name, "--samples", 1, "--temperature",
                           0, "--start", "Q: Do you remember?\nA: Only", "--max-new-tokens", 6)
        assert code == 0
        assert out.startswith("Q: Do you remember?\nA: Only as a path remembers feet.")


def test_sample_warns_and_says_when_the_window_is_full(run, exports):
    code, out, err = run("sample", "--model", exports["q8_0"], "--start", "Hello", "--samples", 1,
                         "--max-new-tokens", 999, "--temperature", 9, "--top-p", 1)
    assert code == 0
    assert out.startswith("Hello")
    assert "warning: the prompt 'Hello' is not of the form 'Q: …\\nA:'" in err
    assert err.endswith("(stopped: the window of 256 tokens is full)\n")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--temperature", "-1"], "error: temperature = -1.0: expected 0 or more"),
    (["--temperature", "nan"], "error: temperature = nan: expected 0 or more"),
    (["--top-p", "0"], "error: top_p = 0.0: expected more than 0 and at most 1"),
    (["--seed", "-1"], "error: seed = -1: expected 0 to 4294967294"),
    (["--max-new-tokens", "0"], "'0' is not a whole number of at least 1"),
    (["--samples", "x"], "'x' is not a whole number of at least 1"),
    (["--model", "no/such.gguf"], "error: model 'no/such.gguf': there is no file"),
    (["--model", "data"], "is no GGUF file, llama2.c .bin or Hugging Face folder"),
    (["--model", "README.md"], "is no GGUF file, llama2.c .bin or Hugging Face folder"),
    (["--start", "why " * 300], "tokens and the model's window holds 256: shorten it"),
    (["--start", "a", "--question", "b"], "not allowed with argument"),
])
def test_bad_input_ends_with_one_clear_line(run, exports, arguments, message):
    code, out, err = run("sample", "--model", exports["q8_0"], *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_file_that_was_cut_short_is_refused(run, exports, tmp_path: Path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(exports["q8_0"].read_bytes()[:-100_000])
    code, _, err = run("chat", "--model", cut)
    assert code == 2
    assert err.startswith(f"error: {cut} is not a whole GGUF file: ")


def test_without_a_model_the_command_that_makes_it_is_named(run, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("lablog.layout.repository", lambda: tmp_path)
    code, _, err = run("chat")
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/build/laptop/artifacts/arianna/arianna-f32.gguf is ")
    assert "`make reproduce NOTEBOOKS=06`" in err


def test_help_teaches(run):
    for command in ("sample", "chat"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"examples:\n  arianna-{command}" in out
        assert "the best that `make reproduce NOTEBOOKS=06` has trained" in " ".join(out.split())


def test_the_installed_commands_exist():
    scripts = tomllib.loads((repository() / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {"arianna-sample", "arianna-chat"}
    for target in scripts.values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_chat_reads_a_pipe(run, exports):
    typed = "\n".join(["What is silence?", "", "why " * 300, "   ", "Do you remember?"]).encode()
    code, out, err = run("chat", "--model", exports["f32"], "--temperature", 0,
                         "--max-new-tokens", 60, typed=typed + b"\n\xff\xfe what?\n")
    assert code == 0
    assert "Q: What is silence?\nA: A room that keeps what was said.\n" in out
    assert "Q: Do you remember?\nA: Only as a path remembers feet.\n" in out
    assert "Q: \ufffd\ufffd what?\nA:" in out
    assert out.endswith("Q: \n")
    assert re.search(r"^\(the question has 3\d\d tokens; .*: ask a shorter one\)$", err, re.M)


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: object):
        environment = os.environ | {"TERM": "dumb", "PYTHONPATH": str(repository() / "lib")}
        self.pid, self.file = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where tests run in background
            os.execve(sys.executable,
                      [sys.executable, "-m", "lablog.arianna", *map(str, arguments)], environment)
        self.seen = ""

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to and with `pattern`, which must come."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if select.select([self.file], [], [], 0.2)[0]:
                self.seen += os.read(self.file, 4096).decode(errors="replace")
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def type(self, keys: bytes) -> None:
        os.write(self.file, keys)

    def wait(self) -> int:
        """The exit code; what was shown last is then in `seen`."""
        try:
            while data := os.read(self.file, 4096):
                self.seen += data.decode(errors="replace")
        except OSError:  # Linux tells the end of a terminal so
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def ends_by(self, key: bytes) -> int:
        """The exit code after `key`, typed again where the prompt was not yet ready to take it."""
        for _ in range(30):
            self.type(key)
            end = time.monotonic() + 2
            while time.monotonic() < end:
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return self.wait()
                time.sleep(0.05)
        raise AssertionError(f"{key!r} does not end it: {self.seen}")

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.file)


@pytest.mark.parametrize("last_key", [b"\x03", b"\x04"], ids=["ctrl-c", "ctrl-d"])
def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_chat(exports, last_key):
    with closing(Terminal("chat", "--model", exports["f32"], "--max-new-tokens", 9999,
                          "--temperature", 9, "--top-p", 1)) as terminal:
        terminal.until("Q: ")
        terminal.type(b"What is resonance?\n")
        terminal.until(r"A: *\S{3}")
        terminal.type(b"\x03")
        assert "window" not in terminal.until("…\r?\n.*Q: ")  # before it had ended by itself
        terminal.type(b"What is silence?\n")
        terminal.until(r"A: *\S{3}")
        terminal.type(b"\x03")
        terminal.until("…\r?\n.*Q: ")
        assert terminal.ends_by(last_key) == 0
        assert "Traceback" not in terminal.seen


def test_ctrl_c_ends_sampling_without_a_traceback(exports):
    with closing(Terminal("sample", "--model", exports["f32"], "--samples", 9999, "--temperature",
                          9, "--question", os.fsdecode(b"What \xff?"))) as terminal:
        terminal.until("Q: What \ufffd\\?\r?\nA: *\\S{3}")
        terminal.type(b"\x03")
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.seen


def test_a_reader_that_goes_is_no_error(exports):
    run = subprocess.run(
        f"'{sys.executable}' -m lablog.arianna sample --model '{exports['f32']}' | head -c 1",
        shell=True, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(repository() / "lib")},
    )
    assert (run.stdout, run.stderr) == ("Q", "")
