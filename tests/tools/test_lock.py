"""The lock holds what pyproject.toml leads to, and is what is installed."""

import re
import site
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lablog.files import repository
from tools import install, lock

ROOT = repository()
TEXT = (ROOT / "requirements.lock").read_text()
ENTRIES = [entry for entry in re.split(r"(?m)^(?=\S)", TEXT) if "==" in entry.split("\n")[0]]
MANIFEST = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = MANIFEST["project"]["optional-dependencies"]


def locked() -> list[Requirement]:
    return [Requirement(entry.split("\\")[0]) for entry in ENTRIES]


def here() -> dict[str, str]:
    """What the lock installs under this Python on this platform: versions by name."""
    return {r.name: str(r.specifier).removeprefix("==") for r in locked()
            if r.marker is None or r.marker.evaluate()}


def test_every_pin_is_locked_but_pytorch_and_the_locks_own_tool():
    pins = [*MANIFEST["project"]["dependencies"], *EXTRAS["test"], *EXTRAS["build"],
            *MANIFEST["build-system"]["requires"]]
    versions = here()
    for name, pin in (requirement.split("==") for requirement in pins):
        if name != lock.UNLOCKED:
            assert versions.get(canonicalize_name(name)) == pin, f"{name}: run `make lock`"
    assert lock.UNLOCKED not in versions


def test_every_entry_has_a_hash_and_no_address():
    assert len(ENTRIES) > 150
    for entry in ENTRIES:
        assert re.search(r"(?m)^    --hash=sha256:[0-9a-f]{64}", entry), entry
    assert "://" not in TEXT


def test_what_is_installed_is_what_is_locked():
    """In the environment's own folders: setuptools puts packages of its own on Python's path."""
    versions, seen = here(), set()
    for found in metadata.distributions(path=site.getsitepackages()):
        name = canonicalize_name(found.name)
        if name in versions:
            assert found.version == versions[name], name
            seen.add(name)
    assert "numpy" in seen


def test_all_that_the_installed_packages_need_is_locked():
    """A package that the lock lacks would come without a hash, or not at all."""
    versions = here()
    for name in versions:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of an extra that is not installed
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                known = canonicalize_name(need.name)
                assert known == lock.UNLOCKED or known in versions, f"{name} needs {known}"


def test_what_every_build_of_pytorch_needs_is_declared_and_locked():
    (declared,) = (entry["requires-dist"] for entry in MANIFEST["tool"]["uv"]["dependency-metadata"]
                   if entry["name"] == lock.UNLOCKED)
    own = [need for need in map(Requirement, metadata.requires(lock.UNLOCKED) or [])
           if not re.match("nvidia|cuda|triton", need.name)
           and (need.marker is None or need.marker.evaluate({"extra": ""}))]
    assert {str(Requirement(text)) for text in declared} == {str(need) for need in own}
    assert {canonicalize_name(need.name) for need in own} <= here().keys()


def test_the_bindings_are_taken_out_of_the_lock_to_be_built():
    name = "llama_cpp_python-{}.tar.gz".format(here()["llama-cpp-python"])
    rest, bindings = install.split(TEXT, name)
    assert bindings.startswith("llama-cpp-python==")
    assert "--hash" in bindings
    assert "llama-cpp-python==" not in rest
    assert rest.count("==") == TEXT.count("==") - 1
    with pytest.raises(SystemExit, match="run `make lock`"):
        install.split(TEXT, "llama_cpp_python-0.0.1.tar.gz")


def test_tools_that_read_the_source_take_the_oldest_python():
    oldest = MANIFEST["project"]["requires-python"].split(",")[0].removeprefix(">=")
    assert MANIFEST["tool"]["mypy"]["python_version"] == oldest
    assert MANIFEST["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
