"""The key of what is stored changes with all that decides it, and with nothing else."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import save_file

from lablog import keys, provenance
from lablog.arianna.finetuning import train_base
from lablog.commitment import plots, sweep
from lablog.commitment.chats import chats_hash
from lablog.commitment.conversations import Conversations
from lablog.commitment.personas import PersonaConversations
from lablog.commitment.qlora import train_commitment
from lablog.files import repository
from lablog.keys import key
from lablog.models import convert
from lablog.models.locate import gguf_file
from lablog.models.offline import offline_model
from lablog.models.training import model_hash


@dataclass(frozen=True)
class Shape:
    width: int
    rate: float = 0.1


class Plan(BaseModel):
    steps: int
    layers: tuple[int, int] | None = None


class Named(BaseModel):
    topics: dict[str, int]


def make() -> None: ...
def make_other() -> None: ...


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=10)


@given(plain, plain)
def test_equal_settings_have_one_key_and_others_another(one, other):
    assert key(make, one) == key(make, one)
    same = repr(one) == repr(other)
    if not same and one != other:
        assert key(make, one) != key(make, other)


def test_a_setting_s_type_and_place_count():
    found = [key(make, *parts) for parts in (
        (1,), (1.0,), ("1",), (True,), (None,), ([1],), ([1], []), (1, None), ({"a": 1},),
        ({"a": [1]},), (Shape(1),), (Shape(1, 0.2),), (Plan(steps=1),),
        (Plan(steps=1, layers=(0, 1)),))]
    assert len(set(found)) == len(found)
    assert key(make, {"a": 1, "b": 2}) != key(make, {"b": 2, "a": 1})  # draws follow the order
    assert key(make, Named(topics={"a": 1, "b": 2})) != key(make, Named(topics={"b": 2, "a": 1}))
    assert key(make, 1) != key(make_other, 1)
    assert len(found[0]) == 16


def test_arrays_count_by_dtype_shape_and_bytes():
    values = np.arange(6, dtype=np.float32)
    arrays = (values, values.astype(np.float64), values.reshape(2, 3), values + 1,
              values.astype(np.int32))
    assert len({key(make, array) for array in arrays}) == len(arrays)
    assert key(make, values) == key(make, torch.arange(6, dtype=torch.float32))
    assert key(make, values[::2]) == key(make, values[::2].copy())


def test_files_count_by_contents_and_not_by_place(tmp_path: Path):
    def folder(name: str, **files: str) -> Path:
        for file, text in files.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return tmp_path / name

    one = key(make, folder("a", first="1", second="2"))
    assert key(make, folder("b", first="1", second="2")) == one
    for other in (folder("c", first="1"), folder("d", first="1", second="3"),
                  folder("e", first="1", third="2")):
        assert key(make, other) != one
    assert key(make, tmp_path / "a" / "first") == key(make, tmp_path / "b" / "first") != one
    with pytest.raises(FileNotFoundError, match="missing"):
        key(make, tmp_path / "nowhere")


def test_what_has_no_value_is_refused():
    with pytest.raises(TypeError, match="a function cannot be part of a key"):
        key(make, make)
    with pytest.raises(TypeError, match="object"):
        key(make, np.array([object()]))


# --- code -----------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of four modules: maker → reader → llama_cpp, and plots, which nobody needs."""
    package = tmp_path / "lib" / "lablog"
    for folder in (package, tmp_path / "data", tmp_path / "native" / "patches"):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "maker.py").write_text("import yaml\nimport lablog.reader\ndef make(): ...\n")
    (package / "reader.py").write_text('import numpy\nNAME = "words.yaml"\n')
    (package / "engine.py").write_text(
        "from lablog import reader\nimport llama_cpp\ndef make(): ...\n")
    (package / "plots.py").write_text("COLOUR = 'red'\n")
    (tmp_path / "data" / "words.yaml").write_text("- one\n")
    (tmp_path / "native" / "patches" / "0001.patch").write_text("+ a\n")
    for module in (keys, provenance):
        monkeypatch.setattr(module, "repository", lambda: tmp_path)
    return tmp_path


def key_in(clone: Path, module: str) -> str:
    """The key of a module's `make`, read afresh."""
    for cached in (keys._made_by, provenance._imports, provenance._packages,
                   provenance._imported_names):
        cached.cache_clear()
    path = clone / "lib" / "lablog" / f"{module}.py"
    names: dict = {}
    exec(compile("def make(): ...", str(path), "exec"), names)
    return key(names["make"], 1)


@pytest.mark.parametrize(("file", "maker", "engine"), [
    ("lib/lablog/maker.py", True, False),
    ("lib/lablog/reader.py", True, True),
    ("lib/lablog/__init__.py", True, True),
    ("data/words.yaml", True, True),
    ("lib/lablog/plots.py", False, False),
    ("native/patches/0001.patch", False, True),
])
def test_the_key_changes_with_what_the_function_imports(clone, file, maker, engine):
    before = key_in(clone, "maker"), key_in(clone, "engine")
    assert (key_in(clone, "maker"), key_in(clone, "engine")) == before
    path = clone / file
    path.write_text(path.read_text() + "# more\n")
    changed = [key_in(clone, name) != old
               for name, old in zip(("maker", "engine"), before, strict=True)]
    assert changed == [maker, engine]


@pytest.mark.parametrize(("distribution", "maker", "engine"), [
    ("PyYAML", True, False), ("numpy", True, True), ("llama-cpp-python", False, True),
    ("matplotlib", False, False),
])
def test_the_key_changes_with_the_packages_behind_it(clone, monkeypatch, distribution, maker,
                                                     engine):
    before = key_in(clone, "maker"), key_in(clone, "engine")
    real = keys.metadata.version
    monkeypatch.setattr(keys.metadata, "version",
                        lambda name: "0" if name.replace("_", "-") == distribution else real(name))
    changed = [key_in(clone, name) != old
               for name, old in zip(("maker", "engine"), before, strict=True)]
    assert changed == [maker, engine]


def test_the_key_is_the_same_in_another_process():
    program = ("from lablog.keys import key\nfrom lablog.commitment import plots\n"
               "print(key(plots.heat, {'a': [2.5], 'b': 1}))")
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True, cwd=repository(), env={"PYTHONHASHSEED": "7",
                                                             "PYTHONPATH": "lib"})
    assert told.stdout.strip() == key(plots.heat, {"a": [2.5], "b": 1})


# --- what the project stores ----------------------------------------------------------------------


def behind(function) -> set[str]:
    """Files whose change gives another key to what `function` makes."""
    source = Path(inspect.getsourcefile(function))
    return {str(path.relative_to(repository())) for path in keys.made_from(source)}


def test_a_sweep_s_rows_depend_on_the_patch_and_on_no_picture():
    files = behind(sweep.evaluate)
    assert {"native/patches/0001-commitment.patch", "lib/lablog/models/llama_cpp.py",
            "lib/lablog/commitment/probes.py", "data/dialogues.yaml"} <= files
    assert any(name.startswith("native/src/") for name in files)
    assert not {"lib/lablog/commitment/plots.py", "lib/lablog/commitment/sweep_metrics.py"} & files


def test_trainings_depend_on_what_makes_their_conversations():
    assert "lib/lablog/text/personas.py" in behind(PersonaConversations)
    assert "lib/lablog/commitment/rendering.py" in behind(Conversations)
    assert {"lib/lablog/commitment/torch_injection.py", "lib/lablog/commitment/posterior.py",
            "lib/lablog/models/training.py"} <= behind(train_commitment)
    assert {"lib/lablog/text/dialogues.py", "data/dialogues.yaml"} <= behind(offline_model)
    assert {"lib/lablog/models/training.py", "lib/lablog/text/packing.py"} <= behind(train_base)
    for function in (train_commitment, offline_model, train_base):
        assert not {name for name in behind(function) if "plots" in name or "results" in name}
        assert not any(name.startswith("native/") for name in behind(function))


def test_a_base_is_all_that_it_computes_with_and_how_it_is_spoken_to(tmp_path):
    folder = tmp_path / "model"
    (folder / "tensorboard").mkdir(parents=True)
    names = ("config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.model",
             "tokenizer.json", "chat_template.jinja")
    for name in (*names, "training.json", "tensorboard/events", "key"):
        (folder / name).write_text(name)
    keys = [model_hash(folder)]
    for name in names:
        (folder / name).write_text("other")
        keys.append(model_hash(folder))
    assert len(set(keys)) == 1 + len(names)
    for name in ("training.json", "tensorboard/events", "key"):  # how long its making took
        (folder / name).write_text("other")
    assert model_hash(folder) == keys[-1]


def test_a_training_depends_on_the_chats_in_a_folder(tmp_path):
    found = []
    for name, answer in (("a", "Yes."), ("b", "Yes."), ("c", "No.")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.jsonl").write_text(json.dumps(
            {"text": f"### Human: Is it teal?### Assistant: {answer}"}) + "\n")
        found.append(chats_hash(str(folder)))
    assert found[0] == found[1] != found[2]


def test_a_converted_model_depends_on_all_of_its_shards(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file({name: torch.zeros(1)}, folder / name)
    made = []
    monkeypatch.setattr(convert, "to_gguf", wraps(convert.to_gguf)(
        lambda folder, output, dtype: made.append(output) or output))
    gguf_file(str(folder), tmp_path / "artifacts")
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    gguf_file(str(folder), tmp_path / "artifacts")
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file({name: torch.ones(1)}, folder / name)
        gguf_file(str(folder), tmp_path / "artifacts")
    assert len(set(made)) == 4


def test_a_converted_model_is_named_by_what_it_is_and_not_by_how_long_its_training_took(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(convert, "to_gguf", wraps(convert.to_gguf)(
        lambda folder, output, dtype: output))
    found = []
    for seconds in ("1.0", "2.0"):
        folder = tmp_path / seconds / "model"
        folder.mkdir(parents=True)
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        for name, text in (("config.json", "{}"), ("training.json", seconds), ("key", seconds)):
            (folder / name).write_text(text)
        found.append(gguf_file(str(folder), tmp_path / "artifacts"))
    assert found[0] == found[1]
