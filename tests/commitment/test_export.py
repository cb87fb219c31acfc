"""Exported files against PyTorch and unpatched llama.cpp; what is damaged or foreign is refused."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import gguf as gguf_format
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from lablog.commitment import export as exporting
from lablog.commitment.engine_comparison import ExportedSpeaker, agreement, compare
from lablog.commitment.export import reimport, write_control_vector
from lablog.commitment.latent_sources import draw_latents
from lablog.commitment.novelty import probe_set
from lablog.commitment.posterior import VariationalCommitment
from lablog.commitment.qlora import (
    LoraSettings,
    Plan,
    Schedule,
    base_hash,
    committed_model,
    load_base,
    load_committed,
)
from lablog.commitment.torch_injection import injected
from lablog.commitment.torch_speaker import TorchSpeaker
from lablog.files import repository
from lablog.models import convert
from lablog.models.llama_cpp import Commitment, Context, EngineError, Model
from lablog.models.training import TrainingSettings
from lablog.text.tokenizer import Tokenizer

TOKENS = [1, *range(260, 290)]
PLAN = Plan(
    k=8, strength=0.5, layers=(0, 4), quantisation="nf4",
    lora=LoraSettings(r=4, alpha=8, dropout=0, targets="all-linear"),
    schedule=Schedule(beta=1, warmup=0, annealing=0, free_bits=0),
    training=TrainingSettings(
        steps=1, batch_size=1, learning_rate=1, warmup_steps=0, schedule="linear", betas=(0, 0),
        weight_decay=0, precision="f32", checkpoint_every=1, log_every=1))
MATERIAL = probe_set(seed=3, items=4, texts=2)
STOCK = repository() / "build" / "native" / "lib-stock"


@pytest.fixture(scope="module")
def quantised(base):
    """The base in NF4 with a LoRA whose weights are far from zero."""
    torch.manual_seed(9)
    model = committed_model(load_base(base, "nf4", "f32"), PLAN)
    for name, weight in model.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


@pytest.fixture(scope="module")
def trained(base, quantised, tmp_path_factory) -> Path:
    """A training result, but for the training."""
    path = tmp_path_factory.mktemp("trained")
    quantised.model.save_pretrained(path / "adapter")
    (path / "plan.json").write_text(PLAN.model_dump_json())
    return quantised.commitment.save(path, base_hash(base))


@pytest.fixture(scope="module")
def exported(trained, base, tmp_path_factory):
    return exporting.export(trained, base, tmp_path_factory.mktemp("export") / "export")


@pytest.fixture(scope="module")
def reference(exported, base):
    return load_committed(base, exported.folder, exact=True)


@pytest.fixture(scope="module")
def gguf(exported) -> Path:
    return exported.base


@pytest.fixture(scope="module")
def native(exported):
    with Model(exported.base, lora=exported.lora) as opened:
        yield opened


@pytest.fixture(scope="module")
def commitments(exported, quantised):
    return exported.injected(quantised.commitment.prior(3, torch.Generator().manual_seed(1)))


# --- PyTorch and llama.cpp ------------------------------------------------------------------------


def test_the_exported_files_have_the_logits_of_pytorch(exported, reference, native, commitments):
    logits, ids = [], torch.tensor([TOKENS])
    with Context(native, 1, 256) as context:
        for commitment in (None, *commitments):
            context.clear()
            context.commit(commitment)
            ours = context.prefill({0: TOKENS}, "all")[0]
            vector = torch.zeros(64) if commitment is None else torch.from_numpy(
                commitment.strength * commitment.direction)
            with torch.no_grad(), injected(reference.base, vector, PLAN.layers):
                theirs = reference.base(ids).logits[0].numpy()
            assert np.abs(ours - theirs).max() <= 2e-3
            logits.append(theirs)
    assert np.abs(np.diff(logits, axis=0)).max(axis=(1, 2)).min() > 2e-2  # all differ


def test_hooks_in_the_quantised_model_inject_what_the_patch_injects(
    quantised, native, reference, commitments
):
    """Vectors, layers and positions one by one in NF4; residual norms against llama.cpp in f32."""
    commitment = commitments[0]
    addition = commitment.strength * torch.from_numpy(commitment.direction)
    ids = torch.tensor([TOKENS])

    def outputs(network, before):
        seen, handles = [], []

        def watch():
            handles.extend(layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
                           for layer in network.get_decoder().layers)

        if before:  # of the hooks that inject: sees what they are given
            watch()
        with torch.no_grad(), injected(network, addition, commitment.layers):
            if not before:
                watch()
            network(ids)
        for handle in handles:
            handle.remove()
        return torch.stack(seen)  # [layers, tokens, width]

    quantised.train()  # in f32; in evaluation bitsandbytes may compute in bf16
    added = outputs(quantised.base, before=False) - outputs(quantised.base, before=True)
    first, last = commitment.layers
    for layer, rows in enumerate(added):
        expected = addition if first <= layer <= last else torch.zeros(64)
        torch.testing.assert_close(rows, expected.expand_as(rows), rtol=0, atol=2e-6)

    with Context(native, 1, 256, watch_residual=True) as context:
        context.commit(commitment)
        context.prefill({0: TOKENS}, "all")
        ours = context.residual_norms()
    theirs = outputs(reference.base, before=False).norm(dim=2).mean(dim=1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_the_probes_agree_and_would_show_a_missing_adapter(exported, reference, base):
    found = compare(exported, base, MATERIAL)
    theirs = TorchSpeaker(reference, Tokenizer(base / "tokenizer.model"))
    with Model(exported.base) as plain, Context(plain, 1, 256) as context:
        other = agreement(ExportedSpeaker(theirs, context), theirs, MATERIAL, "prior")
    rounded = found.pop("q8_0")  # the base's weights in llama.cpp: close, and not the same
    assert 5e-3 < rounded.logits < other.logits
    assert rounded.yes_sum < other.yes_sum
    assert set(found) == {"prior", "prefix"}
    for same in found.values():
        assert same.logits <= 2e-3
        assert same.greedy.tolist() == [True] * 4
        assert same.named.tolist() == [True] * 12
        assert same.yes_sum <= 1e-3
    assert other.logits > 0.1
    assert not other.greedy.all()
    assert other.yes_sum > 1e-2


def test_a_latent_redrawn_every_turn_is_the_same_in_the_engine(native, reference, base):
    """Also over whole texts, and without any z*."""
    theirs = TorchSpeaker(reference, Tokenizer(base / "tokenizer.model"))
    prompts = [theirs.prompt(turns) for turns in MATERIAL.texts]
    with Context(native, 1, 256) as context:
        ours = ExportedSpeaker(theirs, context)
        seen = []
        for source in ("redrawn", "prior", "none"):
            z = None if source == "none" else draw_latents(
                theirs, source, MATERIAL.seed, 1, len(prompts))
            rows = [reader.log_probabilities(prompts, z) for reader in (ours, theirs)]
            for a, b in zip(*rows, strict=True):
                assert a.shape == b.shape
                assert (a - b).abs().max() <= 2e-3
            seen.append(rows[1][0])
    assert all((a - b).abs().max() > 1e-2 for a, b in combinations(seen, 2))


def test_what_prompts_begin_with_is_read_once(native, reference, base, monkeypatch):
    theirs = TorchSpeaker(reference, Tokenizer(base / "tokenizer.model"))
    item = MATERIAL.items.fork[0]
    prompts = [theirs.prompt([*item.opening, guess], "") for guess in item.guesses]
    z = draw_latents(theirs, "prior", 3, 1, 1).expand(len(prompts), -1, -1)
    told = []
    decode = Context.decode
    monkeypatch.setattr(Context, "decode", lambda self, additions, *rest: told.append(
        sum(map(len, additions.values()))) or decode(self, additions, *rest))
    with Context(native, 16, 256) as context:
        ours = ExportedSpeaker(theirs, context).logits(prompts, z)
    assert sum(told) < sum(len(prompt.ids) for prompt in prompts) / 2
    assert (ours - theirs.logits(prompts, z)).abs().max() <= 2e-3


def test_merged_and_separate_adapters_are_the_same_function(exported, base, reference, tmp_path):
    merged = exporting.write_dequantised(
        base, PLAN, tmp_path / "merged", exported.folder / "adapter")
    network = LlamaForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = (m(torch.tensor([TOKENS])).logits for m in (network, reference.base))
    assert (ours - theirs).abs().max() <= 1e-4
    assert (merged / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


# --- reimport and refusals ------------------------------------------------------------------------


def test_an_export_comes_back_whole(exported, base, trained):
    again = reimport(exported.folder, base)
    before = VariationalCommitment.load(trained).state_dict()
    after = VariationalCommitment.load(again.folder).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (again.folder / "adapter" / "adapter_model.safetensors").read_bytes() == (
        trained / "adapter" / "adapter_model.safetensors").read_bytes()


def test_another_base_model_is_refused(exported, trained, base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"trained on the base model with SHA-256"):
        reimport(exported.folder, other)
    with pytest.raises(ValueError, match=base_hash(other)):
        exporting.export(trained, other, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "base.gguf", "lora.gguf",
                                  "commitment.safetensors", "commitment.json", "export.json"])
def test_truncated_and_missing_files_are_named(exported, base, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(exported.folder, copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=Path(name).name):
        reimport(copy, base)
    (copy / name).write_text("[" * 100_000)  # deeper than Python follows
    with pytest.raises(ValueError, match=Path(name).name):
        reimport(copy, base)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=Path(name).name):
        reimport(copy, base)


def test_an_adapter_that_does_not_fit_is_refused(exported, base, gguf, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(exported.lora.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.gguf is not a whole GGUF file: "):
        Model(gguf, lora=cut)
    with pytest.raises(EngineError, match=f"cannot apply .*{gguf.name}"):  # a model, no adapter
        Model(gguf, lora=gguf)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        convert.lora_to_gguf(tmp_path, base, tmp_path / "lora.gguf")


# --- control vectors ------------------------------------------------------------------------------


def read_control_vector(path: Path) -> tuple[list[int], np.ndarray]:
    """The layers of a control vector, and what it adds to all of them."""
    found = {int(tensor.name.removeprefix("direction.")): np.array(tensor.data)
             for tensor in gguf_format.GGUFReader(path).tensors}
    (row,) = {row.tobytes() for row in found.values()}
    return sorted(found), np.frombuffer(row, np.float32)


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(0, 4), st.floats(-3, 3, width=32), st.integers(0, 99))
def test_a_control_vector_comes_back(tmp_path_factory, first, more, strength, seed):
    path = tmp_path_factory.mktemp("vector") / "z.gguf"
    direction = np.random.default_rng(seed).standard_normal(7).astype(np.float32)
    write_control_vector(path, Commitment(direction, strength, (first, first + more)), "llama")
    layers, added = read_control_vector(path)
    assert layers == list(range(first, first + more + 1))
    np.testing.assert_array_equal(added, np.float32(strength) * direction)


def test_a_trained_commitment_fits_into_a_control_vector_but_for_layer_0(exported, tmp_path):
    path, z = tmp_path / "z.gguf", torch.ones(8) / 8**0.5
    with pytest.raises(ValueError, match="cannot touch layer 0; train with layers from 1 on"):
        exported.control_vector(z, path)
    assert not path.exists()
    above = replace(exported, settings=exported.settings.model_copy(update={"layers": (1, 4)}))
    layers, added = read_control_vector(above.control_vector(z, path))
    (commitment,) = above.injected(z[None])
    assert layers == [1, 2, 3, 4]
    np.testing.assert_array_equal(added, np.float32(0.5) * commitment.direction)
    fields = gguf_format.GGUFReader(path).fields
    assert fields["controlvector.model_hint"].contents() == "llama"
    assert fields["controlvector.layer_count"].contents() == 4


PROGRAM = """
import ctypes, sys
import gguf, llama_cpp, numpy as np
model, vector, strength, first, last, out = sys.argv[1:]
llm = llama_cpp.Llama(model, n_ctx=256, n_threads=1, logits_all=True, verbose=False)
lib, ctx, floats = llama_cpp.llama_cpp._lib, llm._ctx.ctx, ctypes.POINTER(ctypes.c_float)
tensors = {t.name: t.data for t in gguf.GGUFReader(vector).tensors}
if hasattr(lib, "llama_set_commitment"):  # patched: the vector once, with its strength and range
    lib.llama_set_commitment.argtypes = [ctypes.c_void_p, floats, ctypes.c_size_t, ctypes.c_int32,
                                         ctypes.c_float, ctypes.c_int32, ctypes.c_int32]
    direction = np.load(out)
    code = lib.llama_set_commitment(ctx, direction.ctypes.data_as(floats), 64, 64, float(strength),
                                    int(first), int(last))
else:  # stock: the table of its own --control-vector loader, rows from layer 1 on
    table = np.zeros((5, 64), np.float32)
    for name, row in tensors.items():
        table[int(name.split(".")[1]) - 1] = row
    code = llama_cpp.llama_set_adapter_cvec(ctx, table.ctypes.data_as(floats), table.size, 64, 1, 5)
assert code == 0
llm.eval(list(map(int, range(260, 290))))
np.save(out, llm.scores[:30])
llm.close()
"""


@pytest.mark.skipif(not STOCK.is_dir(), reason=f"{STOCK} is not built: run `make test-native`")
@pytest.mark.parametrize(("strength", "layers"), [(0.7, (1, 5)), (0.05, (3, 4))])
def test_unpatched_llama_cpp_gives_the_same_bits_with_the_control_vector(
    gguf, tmp_path, strength, layers
):
    direction = np.random.default_rng(4).standard_normal(64).astype(np.float32)
    commitment = Commitment(direction, strength, layers)
    vector = write_control_vector(tmp_path / "z.gguf", commitment, "llama")
    logits = {}
    for library in (STOCK, STOCK.with_name("lib")):
        out = tmp_path / f"{library.name}.npy"
        np.save(out, direction)
        subprocess.run(
            [sys.executable, "-c", PROGRAM, gguf, vector, str(strength), *map(str, layers), out],
            env={**os.environ, "LLAMA_CPP_LIB_PATH": str(library)}, check=True, timeout=120,
        )
        logits[library.name] = np.load(out)
    np.testing.assert_array_equal(logits["lib-stock"], logits["lib"])
    assert logits["lib"].std() > 0
