"""What a result depends on (read from the source) and what it was made with."""

from __future__ import annotations

import ast
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from lablog.files import repository, sha256, sha256_of
from lablog.strict import Name, Strict

PACKAGES = ("accelerate", "bitsandbytes", "datasets", "gguf", "huggingface_hub", "llama-cpp-python",
            "matplotlib", "numpy", "pandas", "papermill", "peft", "safetensors", "scipy",
            "sentencepiece", "torch", "transformers")


class FileHash(Strict):
    """A file that the run read."""

    path: str
    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path, artifacts: Path) -> FileHash:
        """Hash a file; its path is told from `artifacts`, the repository, or by name alone."""
        shown = path.name
        for base, prefix in ((repository(), ""), (artifacts, "artifacts/")):
            if path.is_relative_to(base):
                shown = prefix + str(path.relative_to(base))
        return cls(path=shown, sha256=sha256(path), bytes=path.stat().st_size)


class CloneState(Strict):
    """The state of the clone: commit, uncommitted changes, hashes of library and patch."""

    commit: Name
    dirty: bool
    library_sha256: Name
    patch_sha256: Name


class Machine(Strict):
    """Where the run took place.

    `instructions`: the vector instructions that PyTorch's kernels use, such as AVX2 or AVX512. Sums
    are taken in another order with others, so that equal digits can be expected only where these
    are the same, whatever the processor's name.
    """

    python: Name
    platform: Name
    cpu: Name
    instructions: Name = ""
    threads: int
    device: Name
    packages: dict[Name, Name]

    @property
    def processor(self) -> str:
        """Name and vector instructions, for readers."""
        return f"{self.cpu} ({self.instructions})" if self.instructions else self.cpu


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=repository(), capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else ""


def source_state() -> CloneState:
    """Commit and hashes of the clone; commit is ``unknown`` outside git (a source archive)."""
    root = repository()
    return CloneState(
        commit=_git("rev-parse", "HEAD") or "unknown",
        dirty=bool(_git("status", "--porcelain", "--untracked-files=no")),
        library_sha256=sha256_of((root / "lib" / "lablog").rglob("*.py"), root),
        patch_sha256=sha256_of((root / "native" / "patches").glob("*.patch"), root),
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_threads() -> int:
    """CPUs that this process may use (respects affinity masks and containers' quotas)."""
    from dask.system import cpu_count

    return int(cpu_count())


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int:
    """Memory that a process can still have without swapping, at most what a container may have."""
    from distributed.system import memory_limit

    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, int(memory_limit()))
    return int(memory_limit())


def machine() -> Machine:
    """Describe this machine and the versions of the packages that numbers depend on."""
    import torch

    cuda = torch.cuda.is_available()
    return Machine(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=usable_threads(),
        device=torch.cuda.get_device_name() if cuda else "cpu",
        packages={name: metadata.version(name) for name in PACKAGES},
    )


def _module_file(name: str) -> Path | None:
    base = repository() / "lib" / Path(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def packages_imported(paths: Iterable[Path]) -> set[str]:
    """Top-level names of the packages outside ``lablog`` that the files import anywhere."""
    return set().union(*(_packages(path) for path in paths if path.suffix == ".py"))


@cache
def _packages(path: Path) -> frozenset[str]:
    names = {name.split(".")[0] for name in _imported_names(path)}
    return frozenset(names - {"lablog", *sys.stdlib_module_names})


@cache
def _imported_names(path: Path) -> frozenset[str]:
    """Modules that a file imports, and what it takes from them, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


@cache
def _imports(path: Path) -> frozenset[Path]:
    """Files of this package that one file imports, anywhere in it (also inside functions)."""
    found = set()
    for name in _imported_names(path):
        if name.split(".")[0] != "lablog":
            continue
        parts = name.split(".")
        for length in range(1, len(parts) + 1):  # a package's __init__ runs before its module
            file = _module_file(".".join(parts[:length]))
            if file:
                found.add(file)
    return frozenset(found)


@cache
def _data_named_in(path: Path) -> frozenset[Path]:
    """Files of ``data/`` whose name stands in a string of the source."""
    folder = repository() / "data"
    strings = (
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return frozenset(
        folder / text
        for text in strings
        if re.fullmatch(r"[\w.-]{1,100}", text) and (folder / text).is_file()
    )


def source_dependencies(notebook: Path) -> list[Path]:
    """The notebook, every ``lablog`` module that it imports, transitively, and their data files.

    Reads the sources, runs nothing. Relative imports are not followed: the library does not
    use them (a test asserts it).
    """
    modules: set[Path] = set()
    queue = [notebook]
    while queue:
        fresh = _imports(queue.pop()) - modules
        modules |= fresh
        queue.extend(fresh)
    sources = {notebook} | modules
    data = set().union(*(_data_named_in(path) for path in sources))
    return sorted(sources | data)
