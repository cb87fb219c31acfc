"""Every bad input of the CVFP experiment is refused with what was wrong and what to do."""

import ast
import inspect
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from lablog.cvfp import data
from lablog.cvfp import phase1 as training
from lablog.cvfp.convergence import main as convergence_command
from lablog.cvfp.model import CVFPBlock, ModelConfig, TokenEmbedding
from lablog.cvfp.passes import iterate_passes
from lablog.cvfp.phase1 import Phase1Config, train
from lablog.cvfp.phase2 import FixedText, train_phase2, window_contexts
from lablog.cvfp.rollout import exact_shares, rollout
from lablog.files import repository
from lablog.text.corpora import documents
from lablog.text.embeddings import gaussian_embedding, ppmi_embedding
from lablog.text.pretrained import gpt2_embedding


class Letters:
    """A tokenizer of single characters."""

    def __len__(self):
        return 128

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_widths_and_settings_by_name(small, phase1, phase2):
    assert small.hidden_dim == 22, "context and token side by side"
    for settings in (small, phase1, phase2):
        with pytest.raises(TypeError, match="positional"):
            type(settings)(*vars(settings).values())
    with pytest.raises(ValueError, match="at least 1"):
        replace(small, embed_dim=0)
    with pytest.raises(ValueError, match="layernorm_mix"):
        replace(small, layernorm_mix=1.1)


def test_swapped_arguments(network, embeddings):
    context, token = embeddings(3, 12), embeddings(3)
    block = network()
    block(context, token)
    with pytest.raises(ValueError, match="arguments swapped"):
        block(token, context)
    # At equal widths only the types tell: they are distinct, in this order, and mypy reads them.
    hints = list(get_type_hints(CVFPBlock.forward).items())
    assert [(name, kind.__name__) for name, kind in hints[:2]] == [
        ("context", "Context"), ("token", "Token"),
    ]
    equal = network(context_dim=11, embed_dim=11)
    a, b = embeddings(3, 11, seed=1), embeddings(3, 11, seed=2)
    assert not torch.allclose(equal(a, b)[0], equal(b, a)[0])


def test_a_swapped_call_does_not_type_check(tmp_path, monkeypatch):
    from mypy import api


    path = tmp_path / "swapped.py"
    path.write_text(
        textwrap.dedent("""
        from lablog.cvfp.model import Context, CVFPBlock, Token
        def right(b: CVFPBlock, c: Context, t: Token) -> None:
            b.forward(c, t)
        def wrong(b: CVFPBlock, c: Context, t: Token) -> None:
            b.forward(t, c)
    """)
    )
    monkeypatch.chdir(repository())  # the project's own settings, and its cache
    monkeypatch.setenv("MYPYPATH", "lib")
    out, err, code = api.run([str(path)])
    assert code == 1, out + err
    assert 'swapped.py:6: error: Argument 1 to "forward"' in out
    assert ":4:" not in out


def test_embedding_of_another_width_or_vocabulary(small):
    with pytest.raises(ValueError, match="choose a source of that width"):
        TokenEmbedding(torch.randn(5, 11), small)
    embedding = TokenEmbedding(torch.randn(5, 10), small)
    for bad in ([0, 5], [-1, 2]):
        with pytest.raises(IndexError, match=r"outside the embedding's 0\.\.4"):
            embedding(torch.tensor(bad))
    normed = embedding(torch.arange(5))
    assert torch.allclose(normed.mean(1), torch.zeros(5), atol=1e-6)
    assert not list(embedding.parameters()), "frozen"


def test_validation_source(tmp_path):
    path = tmp_path / "val.txt"
    with pytest.raises(ValueError, match="'auto_split': only 'text_file'"):
        data.read_validation("auto_split", path, Letters())
    with pytest.raises(FileNotFoundError, match="write_validation"):
        data.read_validation("text_file", path, Letters())
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        data.read_validation("text_file", path, Letters())
    path.write_text('"abc"\nnot json\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON string"):
        data.read_validation("text_file", path, Letters())
    path.write_text("[" * 100_000)  # deeper than Python follows
    with pytest.raises(ValueError, match="line 1 is not a JSON string"):
        data.read_validation("text_file", path, Letters())
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="is list"):
        data.read_validation("text_file", path, Letters())


def test_validation_round_trip_and_absent_tokens(tmp_path):
    training = [[ord(c) for c in text] for text in ("ab\nc", 'cdä"', "efgh", "hiab", "a\\nb")]
    path = data.write_validation(training, Letters(), tmp_path / "val.txt", 0.4)
    flat = [i for ids in training for i in ids]
    assert data.read_validation("text_file", path, Letters(), flat, 8) == flat[-8:]
    with pytest.raises(ValueError, match="has 8 tokens, 9 were asked for"):
        data.read_validation("text_file", path, Letters(), flat, 9)
    with pytest.raises(ValueError, match=r"do not occur in training, for example \['h'\]"):
        data.read_validation("text_file", path, Letters(), set(flat) - {ord("h")})
    with pytest.raises(ValueError, match="is 0 dialogues"):
        data.write_validation(training, Letters(), path, 0.0)


def test_fewer_tokens_than_asked_for():
    texts = ["abcdef", "ab", "ghijkl"]
    assert data.cut(texts, Letters(), 2, 4) == [[97, 98, 99, 100], [103, 104, 105, 106]]
    with pytest.raises(ValueError, match=r"3 dialogues of 4 tokens.*only 2 of 3"):
        data.cut(texts, Letters(), 3, 4)


def test_unknown_names(tmp_path, phase1, phase2, network, embeddings):
    with pytest.raises(ValueError, match="expected arianna"):
        next(documents("other", "train", 0))
    with pytest.raises(ValueError, match=r"expected a SentencePiece \.model"):
        data.tokenizer_from(tmp_path / "x.json")
    for changes in ({"variant": "both"}, {"diversity_weight": 1.5}, {"iterations": 1},
                    {"variant": "sequential", "autocast": True}, {"reading": "shooting"},
                    {"variant": "true_pass", "reading": "twice"}, {"ema_start": "one"},
                    {"ema_start": "first_pass"}):
        with pytest.raises(ValueError, match=r"variant|diversity_weight|ema_start"):
            replace(phase1, **changes)
    with pytest.raises(ValueError, match=r"expected 'v2\.0'"):
        replace(phase2, version="v3")
    with pytest.raises(ValueError, match="expected one of sequential, jacobi"):
        rollout(network(), embeddings(3), method="newton")
    with pytest.raises(ValueError, match="0 < tolerance < 1"):
        rollout(network(), embeddings(3), tolerance=0.0)
    with pytest.raises(ValueError, match=r"guess of shape \(2, 12\)"):
        rollout(network(), embeddings(3), guess=torch.zeros(2, 12))
    with pytest.raises(ValueError, match="expected 'sequential' or 'parallel'"):
        iterate_passes(network(), embeddings(3), 2, "jacobi", 0.1)
    with pytest.raises(ValueError, match="at least 1 pass"):
        iterate_passes(network(), embeddings(3), 0, "parallel", 0.1)
    with pytest.raises(ValueError, match="3 tokens and 2 contexts"):
        exact_shares(network(), embeddings(3), torch.ones(2, 12).double(), 2)
    with pytest.raises(ValueError, match="does not divide"):
        window_contexts(torch.randn(9, 10), torch.arange(5), 12, 5, torch.arange(5))
    with pytest.raises(ValueError, match="same number"):
        FixedText(torch.arange(4), torch.zeros(4, 2), torch.zeros(3, 2))


def test_shuffled_rows_are_the_same_rows_in_an_order_of_the_seed():
    rows, order = torch.arange(40).view(20, 2), torch.Generator()
    once, twice = (data.shuffled(rows, order.manual_seed(3)) for _ in range(2))
    assert torch.equal(once, twice)
    assert not torch.equal(once, rows)
    assert torch.equal(once.sort(0).values, rows)
    assert not torch.equal(data.shuffled(rows, order), once), "the generator goes on"


@pytest.mark.parametrize("variant", ["parallel", "sequential", "true_pass"])
def test_nan_in_a_loss(network, embeddings, phase1, variant):
    tokens = embeddings(6)
    initial = torch.zeros(6, 12).double()
    tokens[3] = float("nan")
    said = "contexts are not finite" if variant == "true_pass" else "iteration 1: lower learning_r"
    with pytest.raises(FloatingPointError, match=said):
        train(network(), tokens, replace(phase1, variant=variant), initial=initial)
    with pytest.raises(FloatingPointError, match="not finite"):
        rollout(network(), tokens)
    with pytest.raises(FloatingPointError, match="not finite"):
        rollout(network(), tokens, method="jacobi")


def test_nan_in_phase2(network, embeddings, phase2):
    contexts = torch.zeros(6, 12).double()
    contexts[2] = float("inf")
    text = FixedText(torch.arange(6), embeddings(6), contexts)
    with pytest.raises(FloatingPointError, match=r"epoch 1: lower"):
        train_phase2(network(dtype=torch.float32), 6,
                     *[FixedText(text.ids, text.tokens.float(), text.contexts.float())] * 2,
                     phase2)


def test_checkpoint_of_another_configuration(network, embeddings, phase1, tmp_path):
    path, tokens = tmp_path / "phase1.pt", embeddings(20)
    first = train(network(), tokens, phase1, checkpoint=path)
    again = train(network(), tokens, phase1, checkpoint=path)
    assert again.history == first.history
    assert torch.equal(again.contexts, first.contexts)
    for changed, word in ((replace(phase1, diversity_weight=0.5), "diversity_weight"),
                          (replace(phase1, seed=7), "seed")):
        with pytest.raises(ValueError, match=f"another configuration.*{word}"):
            train(network(), tokens, changed, checkpoint=path)
    with pytest.raises(ValueError, match="start and tokens"):
        train(network(), tokens + 1, phase1, checkpoint=path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a Phase 1 checkpoint"):
        train(network(), tokens, phase1, checkpoint=path)


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_cvfp_refusals import train_until_killed
train_until_killed(sys.argv[1], sys.argv[3], int(sys.argv[4]))
"""


def train_until_killed(checkpoint, variant, iterations):
    """A small training whose weights depend on nothing but its arguments."""
    torch.set_num_threads(1)
    training.KEPT_EVERY = 0.0  # in a process of its own, or the test's
    shape = ModelConfig(context_dim=64, embed_dim=64, num_layers=3, layernorm_mix=1.0,
                        weight_std=0.1, bias_std=0.01)
    block = CVFPBlock(shape, 0)
    tokens = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    config = Phase1Config(
        variant=variant, diversity_weight=0.7, iterations=iterations, learning_rate=0.002,
        clip_norm=1.0, convergence_threshold=0.1, early_stop_fraction=1.0, early_stop_from=2,
        ema_decay=0.9, seed=0,
    )
    train(block, tokens, config, checkpoint=Path(checkpoint))
    return block.state_dict()


@pytest.mark.parametrize(("variant", "iterations"), [
    ("parallel", 200), ("sequential", 20), ("true_pass", 40)])
def test_sigkill_then_resume_gives_bit_identical_weights(tmp_path, variant, iterations):
    checkpoint, seen = tmp_path / "killed", set()
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(checkpoint), here, variant, str(iterations)]
    )
    deadline = time.monotonic() + 120
    while len(seen) < 3 and time.monotonic() < deadline:  # some iterations in, not at the first
        if checkpoint.is_file():
            seen.add(checkpoint.stat().st_mtime_ns)
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    state = torch.load(checkpoint, weights_only=True)
    assert not state["done"]
    assert 0 < len(state["history"]) < iterations - 1
    resumed = train_until_killed(checkpoint, variant, iterations)
    whole = train_until_killed(tmp_path / "whole", variant, iterations)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_checkpoint_is_kept_so_often_and_no_oftener(
    network, embeddings, phase1, tmp_path, monkeypatch
):
    """A minute an iteration: each is kept at 50 s, every second at 90 s; the end always is."""
    kept, minutes = [], iter(range(0, 100_000, 60))
    write = training.atomic_write
    monkeypatch.setattr(training, "atomic_write", lambda path, data: kept.append(write(path, data)))
    monkeypatch.setattr(training, "monotonic", lambda: next(minutes))
    for seconds, expected in ((50, 4), (90, 2), (1e9, 1)):
        kept.clear()
        monkeypatch.setattr(training, "KEPT_EVERY", seconds)
        train(network(), embeddings(20), phase1, tmp_path / f"{seconds}.pt")
        assert len(kept) == expected


def test_no_synchronisation_with_the_host_inside_token_loops():
    """No .item(), .tolist(), float() or bool() of a tensor in the bodies that run per token."""
    from lablog.cvfp import lyapunov, memory, phase1
    from lablog.cvfp import rollout as module

    loops = (phase1.SequentialStep.__call__, phase1.sequential_iteration,
             module.Recurrence.read, lyapunov.lyapunov_exponent, memory.memory_curve)
    whole = (module.Recurrence.prepare, module.Recurrence.step, module.Recurrence.advance,
             lyapunov._pushed, lyapunov._normed)
    for function in (*loops, *whole):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        bodies = [tree] if function in whole else [
            node for node in ast.walk(tree) if isinstance(node, ast.For)]
        assert bodies
        for body in bodies:
            called = {
                c.func.attr if isinstance(c.func, ast.Attribute) else getattr(c.func, "id", "")
                for c in ast.walk(body) if isinstance(c, ast.Call)
            }
            assert not called & {"item", "tolist", "float", "int", "bool", "numpy", "cpu"}


def test_embedding_sources(tmp_path):
    with pytest.raises(ValueError, match="cannot fill 12"):
        ppmi_embedding([[0, 1]], 5, 12, 2)
    with pytest.raises(ValueError, match=r"need 0\.\.19"):
        ppmi_embedding([[0, 20]], 20, 12, 2)
    # Tokens in the same surroundings are alike: 3 and 4 both stand between 1 and 2.
    rows = [[1, 3, 2, 5, 6, 7, 8, 9], [1, 4, 2, 10, 11, 7, 12, 8]] * 5
    table = ppmi_embedding(rows, 20, 10, 1)
    assert torch.equal(table, ppmi_embedding(rows, 20, 10, 1))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(table[3], table[4], 0) > 0.9 > cosine(table[3], table[9], 0) + 0.3
    assert not table[0].any()
    assert torch.equal(gaussian_embedding(9, 4, 1), gaussian_embedding(9, 4, 1))
    with pytest.raises(FileNotFoundError, match="GPT-2's weights"):
        gpt2_embedding(str(tmp_path / "model.safetensors"))
    from safetensors.torch import save_file

    save_file({"wte.weight": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    assert gpt2_embedding(str(tmp_path / "model.safetensors")).shape == (4, 2)
    save_file({"other": torch.ones(4, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"wte\.weight"):
        gpt2_embedding(str(tmp_path / "model.safetensors"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    config = ModelConfig(context_dim=32, embed_dim=32, num_layers=2, layernorm_mix=1.0,
                         weight_std=0.1, bias_std=0.01)
    return config, folder, data.prepare(
        folder, config, text_source="self_consistency", tokenizer="project", vocabulary=600,
        embedding="ppmi", window=3, corpus_documents=60, dialogues=10, dialogue_tokens=40,
        test_dialogues=3, val_data_source="text_file", seed=1, device="cpu",
    )


def test_prepared_texts(prepared):
    config, _, texts = prepared
    assert {name: len(ids) for name, ids in texts.ids.items()} == {
        "training": 400, "validation": 80, "test": 120, "dev": 80,
    }
    pieces = {name: set(map(tuple, ids.view(-1, 40).tolist())) for name, ids in texts.ids.items()}
    assert not pieces["dev"] & (pieces["test"] | pieces["training"])
    assert not pieces["test"] & pieces["training"]
    assert texts.ids["validation"].tolist() == texts.ids["training"][-80:].tolist()
    assert texts.tokens["training"].shape == (400, 32)
    assert texts.vocabulary == len(texts.embedding.table)
    with pytest.raises(ValueError, match="only 'text_file'"):
        data.prepare(
            prepared[1], config, text_source="self_consistency", tokenizer="project",
            vocabulary=600, embedding="gaussian", window=3, corpus_documents=60, dialogues=10,
            dialogue_tokens=40, test_dialogues=2, val_data_source="auto_split", seed=1,
            device="cpu",
        )


def test_chapters_with_other_settings_have_files_of_their_own(tmp_path):
    config = ModelConfig(context_dim=8, embed_dim=8, num_layers=1, layernorm_mix=1.0,
                         weight_std=0.1, bias_std=0.01)
    settings = {"text_source": "self_consistency", "tokenizer": "project", "embedding": "gaussian",
                "window": 3, "corpus_documents": 60, "dialogues": 5, "dialogue_tokens": 40,
                "test_dialogues": 1, "val_data_source": "text_file", "device": "cpu"}
    files = data.prepare(tmp_path, config, vocabulary=600, seed=1, **settings).files.values()
    before = [path.read_bytes() for path in files]
    others = data.prepare(tmp_path, config, vocabulary=500, seed=2, **settings).files.values()
    assert [path.read_bytes() for path in files] == before
    assert all(path.read_bytes() != old for path, old in zip(others, before, strict=True))
    again = data.prepare(tmp_path, config, vocabulary=600, seed=1, **settings).files.values()
    assert list(again) == list(files)
    assert not list(tmp_path.rglob(".*")), "no scratch file stays"


def test_convergence_command(prepared, phase1, capsys):
    config, folder, texts = prepared
    train(CVFPBlock(config, 0), texts.tokens["training"], phase1, checkpoint=folder / "p.pt")
    code = convergence_command([
        "--num_trials", "5", "--network", str(folder / "p.pt"),
        "--embedding", str(texts.files["embedding"]), "--tokenizer", str(texts.files["tokenizer"]),
        "--validation", str(texts.files["validation"]),
    ])
    out = capsys.readouterr().out
    assert code == 0
    assert "80 validation tokens, 5 trials" in out
    assert "trial 1: loss N/A" in out
    assert "trial 5: loss" in out
    assert "slope" in out
