"""The live page: its engine under Node and in a browser, against the native library.

Needs Emscripten once, for `make live PROFILE=smoke`; the smoke profile's models are asked.
"""

import base64
import http.server
import json
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, page

from lablog import layout
from lablog.arianna import chat
from lablog.arianna.exports import FILES
from lablog.commitment.sampler import sample
from lablog.files import repository
from lablog.models.llama_cpp import Commitment, Context, Model, Sampling, stream
from tools import pdf
from tools.live import call, packed

LIVE = layout.live(layout.results("smoke"))
STATIC = repository() / "book" / "_static"
LOGITS = 2e-3
"""Largest difference of a logit from the native library's: other instructions add in another
order, and the weights are in 16 bits on both sides."""


def arguments(script: Path) -> list[Any]:
    """What a script calls its function with."""
    text = script.read_text()
    return list(json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]"))


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """The page's table of contents."""
    if not (LIVE / "index.js").is_file():
        pytest.skip("nothing was compiled for the browser: `make live PROFILE=smoke` (Emscripten)")
    return dict(arguments(LIVE / "index.js")[0])


def model_file(told: dict[str, Any], name: str, folder: Path) -> Path:
    """A model out of its scripts."""
    path = folder / f"{name}.gguf"
    with path.open("wb") as file:
        for number in range(told["models"][name]["parts"]):
            file.write(base64.b64decode(arguments(LIVE / f"{name}.{number}.js")[2]))
    assert path.stat().st_size == told["models"][name]["bytes"]
    return path


@pytest.fixture(scope="module")
def gguf(told, tmp_path_factory) -> Path:
    return model_file(told, "dialogue", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def native(gguf) -> Iterator[Model]:
    with Model(gguf) as opened:
        yield opened


def ask(*commands: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the engine answers under Node."""
    if not shutil.which("node"):
        pytest.skip("there is no Node")
    program = [repository() / "native" / "live" / "node.js", LIVE / "engine.js"]
    done = subprocess.run(["node", *map(str, program)], input=json.dumps(commands), text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout))


def opening(path: Path, sequences: int = 3) -> tuple[str, dict[str, Any]]:
    return "open", {"model": {"file": str(path)}, "window": 256, "sequences": sequences}


# --- the engine -----------------------------------------------------------------------------------


def test_texts_become_the_tokens_of_the_native_library(gguf, native):
    texts = ["U: is it teal?\nA:", "", " two  spaces", "naïve – 漢字 \U0001f9ca", "</s><s>",
             "a" * 99]
    found = ask(opening(gguf), *(
        ("tokenize", {"text": text, "begin": True, "special": False}) for text in texts))
    assert [each["done"] for each in found[1:]] == [
        native.tokenize(text, bos=True) for text in texts]


def test_a_direction_is_that_of_the_native_sampler(gguf, native):
    (_, found) = ask(opening(gguf), ("direction", {"seed": 7, "k": 64}))
    assert found["done"] == sample(7, 64, native.width).direction.tolist()


@pytest.mark.parametrize(("strength", "layers"),
                         [(0.0, (0, 1)), (1.0, (0, 1)), (30.0, (1, 1)), (3.0, (0, 0))])
def test_logits_are_those_of_the_native_library(gguf, native, strength, layers):
    tokens = native.tokenize("U: what is your favorite color?\nA: it is", bos=True)
    direction = sample(7, 64, native.width).direction
    _, found = ask(opening(gguf), ("logits", {
        "tokens": tokens, "vector": {"floats": packed(direction)}, "strength": strength,
        "first": layers[0], "last": layers[1]}))
    with Context(native, window=256) as context:
        context.commit(Commitment(direction, strength, layers), 0)
        wanted = context.prefill({0: tokens}, "all")[0][-1]
    assert np.abs(np.array(found["done"]) - wanted).max() < LOGITS


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmoe", "mamba"])
def test_logits_are_those_of_the_unpatched_library(kind, tmp_path):
    """The reference of the native tests, on their models: a prompt, then tokens one by one."""
    tests = layout.native() / "tests"
    gguf, program = tests / "models" / f"{kind}.gguf", tests / "bin" / "lablog-reference"
    if not (gguf.is_file() and program.is_file()):
        pytest.skip("the native tests are not built: `make test-native`")
    segments = ((12, 1), (10, 0))
    schedule, out = tmp_path / "schedule", tmp_path / "logits"
    schedule.write_bytes(struct.pack("<Q", len(segments)) + b"".join(
        struct.pack("<iiiiQ", tokens, batched, -1, -1, 0) for tokens, batched in segments))
    subprocess.run([program, gguf, schedule, out], check=True)
    wanted = np.fromfile(out, np.float32).reshape(22, -1)
    tokens = [3 + (place * 7919 + 13) % 256 for place in range(22)]
    _, *found = ask(opening(gguf), *(("logits", {"tokens": tokens[:n]}) for n in (12, 22)))
    for answer, row in zip(found, wanted[[11, 21]], strict=True):
        assert np.abs(np.array(answer["done"]) - row).max() < LOGITS


@pytest.mark.usefixtures("told")
def test_words_are_those_that_the_native_library_draws():
    path = layout.artifacts(LIVE.parent) / "arianna" / FILES["f32"]
    text = chat.prompt("What is silence?")
    with Model(path) as model, Context(model, window=128) as context:
        prompt = model.tokenize(text, bos=True)
        context.prefill({0: prompt})
        wanted = b"".join(map(model.piece, stream(context, 40, Sampling(seed=3))))
    _, found = ask(opening(path, 1), ("write", {
        "prompt": prompt, "seed": 3, "temperature": 0.8, "topP": 0.9, "count": 40}))
    assert found["done"]["tokens"] == 40
    assert b"".join(bytes(each["bytes"]) for each in found["told"]) == wanted


def test_eight_bits_change_little(told, tmp_path):
    """The page's Arianna, whose products of eight bits are rounded otherwise in a browser."""
    path = model_file(told, "after", tmp_path)
    with Model(path) as model, Context(model, window=128) as context:
        prompt = model.tokenize(chat.prompt("What is silence?"), bos=True)
        wanted = context.prefill({0: prompt}, "all")[0][-1]
    _, found = ask(opening(path, 1), ("logits", {"tokens": prompt}))
    assert np.abs(np.array(found["done"]) - wanted).max() < 0.02 * np.ptp(wanted)


def test_at_lambda_zero_both_texts_are_one_and_nothing_diverges(gguf, native):
    common = {"prompt": native.tokenize("U: hello\nA:", bos=True), "first": 0, "last": 1, "seed": 5,
              "vector": {"floats": packed(sample(7, 64, native.width).direction)},
              "temperature": 0.8, "topP": 0.9, "count": 30}
    _, zero, many = ask(opening(gguf), ("compare", {**common, "strength": 0}),
                        ("compare", {**common, "strength": 30}))

    def written(found: dict[str, Any], side: int) -> list[Any]:
        return [each["bytes"] for each in found["told"] if each["side"] == side]

    assert written(zero, 0) == written(zero, 1) == written(many, 0) != written(many, 1)
    assert max(each["divergence"] for each in zero["told"]) == 0
    assert max(each["divergence"] for each in many["told"]) > 0.1


def test_many_strengths_leave_nothing_behind(gguf, native):
    """Graphs of other shapes make the memory grow at first; then it stays."""
    common = {"prompt": native.tokenize("U: hello\nA:", bos=True), "first": 0, "last": 1, "seed": 5,
              "vector": {"floats": packed(sample(7, 64, native.width).direction)},
              "temperature": 0, "topP": 1, "count": 6}
    turned = [("compare", {**common, "strength": strength}) for strength in [0, *range(1, 80), 0]]
    _, first, *rest = ask(opening(gguf), *turned)
    assert first["told"] == rest[-1]["told"]
    memory = [each["done"]["memory"] for each in rest]
    assert memory[40] == memory[-1]


def test_a_model_that_is_opened_again_takes_the_place_of_the_first(gguf):
    found = ask(*[opening(gguf)] * 8)
    assert found[3]["done"] == found[7]["done"]  # its memory with it


def test_the_probes_are_those_of_the_native_library(told, tmp_path):
    """P(yes) and P(value) of a topic under one draw of the prior."""
    choice = told["figures"]["choice"]
    paths = [model_file(told, name, tmp_path) for name in (choice["model"], choice["lora"])]
    directions = np.frombuffer(base64.b64decode(choice["directions"]), "<f4").reshape(
        len(choice["draws"]), -1)
    topic = choice["topics"][choice["topic"]]
    same = {name: choice[name] for name in ("yes", "no", "stops", "strength")}
    _, found = ask(("open", {"model": {"file": str(paths[0])}, "lora": {"file": str(paths[1])},
                             "window": 256, "sequences": 3}),
                   ("probe", {"topic": topic, "vector": {"floats": packed(directions[3])},
                              "first": choice["layers"][0], "last": choice["layers"][1], **same}))
    held = Commitment(directions[3], choice["strength"], tuple(choice["layers"]))
    with Model(paths[0], lora=paths[1]) as model, Context(model, window=256) as context:

        def logs(tokens: list[int], words: list[list[int]]) -> np.ndarray:
            totals = []
            for word in words:
                context.clear()
                context.commit(held, 0)
                rows = context.prefill({0: [*tokens, *word]}, "all")[0].astype(np.float64)
                rows -= np.logaddexp.reduce(rows, axis=1, keepdims=True)
                totals.append(sum(rows[len(tokens) - 1 + i, token] for i, token in enumerate(word)))
            return np.exp(totals)

        named = logs([*topic["opening"], *topic["naming"]], topic["values"])
        for guess, agreed in zip(topic["guesses"], found["done"]["agreed"], strict=True):
            yes, no = (logs([*topic["opening"], *guess], choice[word]).sum()
                       for word in ("yes", "no"))
            assert agreed == pytest.approx(yes / (yes + no), abs=1e-3)
    assert found["done"]["named"] == pytest.approx(list(named / named.sum()), abs=1e-3)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "counts"])
def test_a_damaged_model_is_refused_and_the_next_one_opens(gguf, tmp_path, damage):
    data = gguf.read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "text": b"no model" * 99,
                     "counts": data[:8] + b"\xff" * 16 + data[24:]}[damage])
    refused, opened = ask(opening(bad), opening(gguf))
    assert refused["error"]
    assert opened["done"]["layers"] == 2


def test_wrong_calls_are_told_in_words(gguf):
    _, full, layer = ask(
        opening(gguf), ("logits", {"tokens": [5] * 257}),
        ("logits", {"tokens": [5], "vector": {"floats": packed(np.ones(64))}, "strength": 1,
                    "first": 0, "last": 9}))
    assert "the window of 256 tokens is full: shorten the text" in full["error"]
    assert "layer" in layer["error"]


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(told, tmp_path_factory) -> Path:
    """The live page without the book around it."""
    folder = tmp_path_factory.mktemp("site") / "below" / "a path"
    shutil.copytree(LIVE, folder / "live")
    shutil.copytree(STATIC, folder / "_static")
    places = "".join(f'<div class="lablog-live" data-figure="{name}"></div>'
                     for name in ("strength", "choice", "voice"))
    (folder / "live.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Live</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="_static/book.css">'
        f'<script src="_static/live.js"></script><body>{places}</body></html>')
    return folder


@pytest.fixture(params=["file", "server"])
def live(request, site, tmp_path) -> Iterator[Page]:
    """The page, opened as a file and under a path of a server; it complains of nothing."""
    try:
        program = pdf.browser()
    except FileNotFoundError:
        pytest.skip("there is no browser of the Chromium family")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(Quiet, directory=str(site.parent.parent))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/below/a%20path"
        with page(program, tmp_path / "browser") as opened:
            opened.visit(f"{site.as_uri() if request.param == 'file' else root}/live.html")
            opened.until("document.querySelectorAll('.lablog-live-begin').length === 3")
            yield opened
            assert opened.complaints == []
            own = (site.as_uri(), root, "blob:", "data:")
            assert [each for each in opened.requests if not each.startswith(own)] == []
        server.shutdown()


def state(name: str) -> str:
    return f"document.querySelector('[data-figure={name}] .lablog-live-state').textContent"


def idle(name: str) -> str:
    return f"!document.querySelector('[data-figure={name}]').hasAttribute('aria-busy')"


def begin(live: Page, name: str) -> None:
    """Start a figure by pointer."""
    live.click(f"[data-figure={name}] .lablog-live-begin")
    live.until(f"{state(name)}.startsWith('ready') && {idle(name)}")


def test_lambda_is_turned_by_pointer_and_by_keys(live):
    begin(live, "strength")
    place = "document.querySelector('[data-figure=strength]')"
    live.click("[data-figure=strength] .lablog-live-strip button:last-child")
    assert live.see(f"[...{place}.querySelectorAll('.lablog-live-strip button')]"
                    ".map(b => b.getAttribute('aria-pressed')).join()") == "false,true"
    live.see(f"{place}.querySelector('input[type=range]').focus()")
    live.press("Home")
    assert live.see(f"{place}.querySelector('output').textContent") == "0"
    live.until(f"{state('strength')}.endsWith('a second') && {idle('strength')}")
    texts = f"[...{place}.querySelectorAll('.lablog-live-text')].map(p => p.textContent)"
    one, other = live.see(texts)
    assert one == other != ""
    live.press("End")
    live.until(f"{place}.querySelectorAll('.lablog-live-text')[1].textContent !== {json.dumps(one)}"
               f" && {idle('strength')}")
    assert live.see(texts)[0] == one
    assert live.see(f"{place}.querySelector('.lablog-live-mean').textContent").startswith("mean KL")
    assert float(live.see(f"{place}.querySelectorAll('.lablog-live-text')[1].querySelector('span')"
                          ".style.getPropertyValue('--kl')")) > 0


def test_a_strength_that_is_chosen_while_it_writes_comes_next(live):
    begin(live, "strength")
    place = "document.querySelector('[data-figure=strength]')"
    live.see(f"{place}.querySelectorAll('input[type=number]')[1].value = '150'")
    live.see(f"""(async () => {{
        const slider = {place}.querySelector('input[type=range]');
        const turn = (power) => {{
            slider.value = power;
            slider.dispatchEvent(new Event('input'));
            slider.dispatchEvent(new Event('change'));
        }};
        turn(2);
        while (!{place}.querySelector('.lablog-live-text').textContent)
            await new Promise((resolve) => setTimeout(resolve));
        turn(-3.1);  // where both texts are one
    }})()""")
    live.until(f"{state('strength')}.endsWith('a second') && {idle('strength')}")
    one, other = live.see(
        f"[...{place}.querySelectorAll('.lablog-live-text')].map(p => p.textContent)")
    assert one == other != ""


def test_a_model_that_is_damaged_leaves_the_page_alive(live, gguf, tmp_path):
    begin(live, "strength")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(gguf.read_bytes()[:5000])
    live.see("document.querySelector('[data-figure=strength] details').open = true")
    live.choose_file("[data-figure=strength] input[type=file]", bad)
    live.until(f"{state('strength')}.startsWith('bad.gguf: ') && {idle('strength')}")
    live.see("document.querySelector('[data-figure=strength] input[type=number]').value = '-1'")
    write = ("[...document.querySelectorAll('[data-figure=strength] button')]"
             ".find(b => b.textContent === 'Write').click()")
    live.see(write)
    live.until(f"{state('strength')}.startsWith('Seed: expected a number') && {idle('strength')}")
    live.choose_file("[data-figure=strength] input[type=file]", gguf)
    live.until(f"{state('strength')}.includes('is open: 2 layers') && {idle('strength')}")
    live.see(write)
    live.until(f"{state('strength')}.endsWith('a second') && {idle('strength')}")


def test_a_model_too_large_for_a_page_is_chosen_as_a_file(live, site, told, gguf):
    """As of profile `pretrained`; the marks of its calibration stay."""
    own = json.loads(json.dumps(told))
    own["figures"]["strength"] |= {"model": None, "file": "large.gguf"}
    index = (site / "live" / "index.js").read_text()
    (site / "live" / "index.js").write_text(call("index", own))
    try:
        live.visit(live.see("location.href"))
        live.until("document.querySelectorAll('.lablog-live-begin').length === 3")
    finally:
        (site / "live" / "index.js").write_text(index)
    live.click("[data-figure=strength] .lablog-live-begin")
    live.until(f"{state('strength')}.includes('large.gguf') && {idle('strength')}")
    live.choose_file("[data-figure=strength] input[type=file]", gguf)
    live.until(f"{state('strength')}.includes('is open: 2 layers') && {idle('strength')}")
    marks = [m for m in told["figures"]["strength"]["marks"] if 1e-3 <= m["strength"] <= 100]
    assert live.see("document.querySelectorAll('.lablog-live-marks button').length") == len(marks)


def test_a_choice_is_held_by_pointer_and_by_keys(live, told):
    begin(live, "choice")
    live.see("document.querySelector('.lablog-live-plane').focus()")
    live.press("ArrowRight", "ArrowDown", "Enter")
    live.until(f"{state('choice')}.startsWith('with z*: names') && {idle('choice')}")
    first = live.see(state("choice"))
    live.press("Enter")
    live.until(f"{idle('choice')} && {state('choice')}.startsWith('with z*: names')")
    assert live.see(state("choice")) == first
    shares = live.see(
        "[...document.querySelectorAll('.lablog-live-bars tbody tr')].map(r => "
        "[...r.querySelectorAll('td')].map(c => Number(c.style.getPropertyValue('--share'))))")
    assert len(shares) == 12
    assert np.array(shares)[:, :2].sum(axis=0) == pytest.approx([1, 1], abs=0.01)
    live.click(f"#lablog-live-draw-{len(told['figures']['choice']['draws']) - 1}")
    live.until(f"{idle('choice')}")
    assert live.see("document.querySelectorAll('.lablog-live-plane [aria-selected=true]').length"
                    ) == 1


def test_arianna_answers_twice_the_same_and_stops(live, told):
    begin(live, "voice")
    assert live.see("document.activeElement.type") == "text"
    live.press(" and silence", "Enter")
    answers = ("[...document.querySelectorAll('.lablog-live-log')]"
               ".map(l => l.querySelector('.lablog-live-text').textContent)")
    live.until(f"{state('voice')}.endsWith('tokens a second') && {idle('voice')}")
    first = live.see(answers)
    assert first[0] != first[1]
    live.press("Enter")
    live.until("document.querySelector('.lablog-live-log').children.length === 4"
               f" && {idle('voice')}")
    assert live.see(answers) == first


def test_the_page_fits_a_phone_and_has_a_name_for_every_control(live):
    live.size(390, 844)
    for name in ("strength", "choice", "voice"):
        begin(live, name)
    assert live.see("document.documentElement.scrollWidth") <= 390
    unnamed = live.see("[...document.querySelectorAll('.lablog-live :is(input, select, textarea)')]"
                       ".filter(e => !e.labels.length).map(e => e.outerHTML)")
    assert unnamed == []
