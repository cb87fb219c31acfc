"""Where generated things lie: everything below ``build/``, of which nothing is committed."""

from __future__ import annotations

import re
from pathlib import Path

from lablog.files import repository

MADE = ("training.json", "tensorboard", "key")
"""What the folder of a trained model holds of its making, which may differ between equal models."""


def built(*names: str) -> Path:
    """A path below ``build/``."""
    return repository().joinpath("build", *names)


def results(profile: str) -> Path:
    """The folder of a profile's results, with ``notebooks``, ``records``, ``figures`` in it."""
    return built(profile)


def artifacts(results_folder: Path) -> Path:
    """Trained models and other stored things, beside the results that were made with them."""
    return results_folder / "artifacts"


def interactive() -> Path:
    """Where results go of a notebook that is run by hand."""
    return built("interactive")


def verified(profile: str, run: str) -> Path:
    """Results of one of the two runs that `make verify` compares."""
    return built("verify", f"{profile}-{run}")


def book() -> Path:
    """The built book."""
    return built("book", "html")


def benchmark() -> Path:
    """What `make bench` has measured on this machine."""
    return built("bench.json")


def torture() -> Path:
    """What `make torture` has tried on this machine."""
    return built("torture.json")


def long_run() -> Path:
    """What `make long` has seen on this machine."""
    return built("long.json")


def measured() -> tuple[Path, ...]:
    """The records of what is measured beside the chapters, where they have been made."""
    return tuple(path for path in (benchmark(), torture(), long_run()) if path.is_file())


def cache() -> Path:
    """Models that the commands have converted for themselves."""
    return built("cache")


def live_engine() -> Path:
    """The engine of the book's live page, as Emscripten built it."""
    return built("native-live", "bin")


def live(results_folder: Path) -> Path:
    """What the live page of a book of these results loads."""
    return results_folder / "live"


def certificates() -> Path:
    """Certificates of a cluster whose machines speak to each other over a network."""
    return built("certificates")


def lent_artifacts() -> Path:
    """What a worker keeps for clients whose files it does not see."""
    return built("worker", "artifacts")


def fetched() -> Path:
    """Models from package indexes, as their publishers made them."""
    return built("fetched")


def fetched_package(name: str) -> Path:
    """Where the files of one package lie, or will."""
    return fetched() / re.sub(r"[^A-Za-z0-9.]+", "-", name)


def native() -> Path:
    """The patched llama.cpp: its tree in ``llama.cpp``, its libraries in ``lib``."""
    return built("native")


def native_stamp() -> Path:
    """What the Makefile touches after the native library was built; results depend on it."""
    return native() / ".built"
