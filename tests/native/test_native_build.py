"""The native build's handling of its inputs, and what the patch may touch. Nothing is compiled."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "native"
BUILD = ROOT / "build" / "native"
PATCHES = sorted((NATIVE / "patches").glob("*.patch"))

API = {
    "llama_set_commitment",
    "llama_set_commitment_lambda",
    "llama_set_commitment_range",
    "llama_clear_commitment",
    "llama_set_commitment_seq",
    "llama_clear_commitment_seq",
    "llama_commitment_error",
}

needs_build = pytest.mark.skipif(
    not (BUILD / "lib").exists(), reason=f"{BUILD} is not built: run 'make setup' first"
)
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def cmake(*arguments: object) -> tuple[int, str]:
    """Exit code and everything printed, each run of white space (CMake wraps lines) as a space."""
    done = subprocess.run(
        ["cmake", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


@pytest.fixture(scope="session")
def sdist() -> Path:
    """The sdist that build/native was configured with."""
    cache = BUILD / "CMakeCache.txt"
    if not cache.exists():
        pytest.skip(f"{BUILD} is not configured: run 'make setup' first")
    found = re.search(r"^LLAMA_SDIST:\w+=(.+)$", cache.read_text(), re.MULTILINE)
    if not found or not Path(found[1]).exists():
        pytest.skip("the sdist that build/native was configured with is gone")
    return Path(found[1])


def locked_hash() -> str:
    """SHA-256 of the sdist that the lock file names."""
    lines = (ROOT / "requirements.lock").read_text().split("\nllama-cpp-python==")[1].splitlines()
    return lines[1].split("sha256:")[1].strip(" \\")


# --- bad input is reported before any compiler is looked for


@needs_cmake
def test_no_sdist_says_how_to_get_it(tmp_path: Path) -> None:
    code, said = cmake("-S", NATIVE, "-B", tmp_path)
    assert code != 0
    assert "LLAMA_SDIST is not set" in said
    assert "pip download --no-deps --no-binary :all: llama-cpp-python==" in said
    assert "compiler" not in said


@needs_cmake
def test_missing_sdist_is_named(tmp_path: Path) -> None:
    code, said = cmake("-S", NATIVE, "-B", tmp_path, f"-DLLAMA_SDIST={tmp_path}/none.tar.gz")
    assert code != 0
    assert f"there is no file '{tmp_path}/none.tar.gz'" in said
    assert "pip download" in said


@needs_cmake
def test_hash_mismatch_names_both_hashes_and_the_remedy(tmp_path: Path) -> None:
    fake = tmp_path / "llama_cpp_python.tar.gz"
    fake.write_bytes(b"half a download")
    code, said = cmake("-S", NATIVE, "-B", tmp_path / "build", f"-DLLAMA_SDIST={fake}")
    assert code != 0
    assert hashlib.sha256(b"half a download").hexdigest() in said
    assert locked_hash() in said
    assert "Delete it" in said
    assert "pip download" in said
    assert "compiler" not in said


@needs_cmake
def test_one_version_everywhere(tmp_path: Path) -> None:
    """The tree that is built is the one that the pinned bindings were written for."""
    pinned = re.search(r"llama-cpp-python==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    script = tmp_path / "version.cmake"
    script.write_text(f"""
        include("{NATIVE}/cmake/LlamaSource.cmake")
        message("built from ${{LLAMA_SDIST_VERSION}}, ${{LLAMA_SDIST_SHA256}}")
    """)
    code, said = cmake("-P", script)
    assert code == 0
    assert f"built from {pinned[1]}, {locked_hash()}" in said


# --- unpacking and patching


@needs_cmake
def test_the_tree_is_patched_exactly_once(tmp_path: Path, sdist: Path) -> None:
    # as in a clone: the build folder lies inside a repository, which git apply must not see
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    patches = tmp_path / "patches"
    shutil.copytree(NATIVE / "patches", patches)
    script = tmp_path / "tree.cmake"
    script.write_text(f"""
        include("{NATIVE}/cmake/LlamaSource.cmake")
        file(GLOB PATCHES "{patches}/*.patch")
        llama_tree("{sdist}" "{tmp_path}/tree" MEMBERS include src PATCHES ${{PATCHES}})
    """)
    header = tmp_path / "tree" / "include" / "llama.h"

    code, said = cmake("-P", script)
    assert code == 0, said
    for patch in PATCHES:
        assert f"Applying {patch.name}" in said
    assert header.read_text().count("LLAMA_API int32_t llama_clear_commitment(") == 1
    before = header.stat().st_mtime_ns

    code, said = cmake("-P", script)
    assert (code, said) == (0, ""), "a second configure does nothing"
    assert header.stat().st_mtime_ns == before

    # nor is the sdist needed again (CMake forgets its -D options when the compiler changes)
    forgetful = tmp_path / "forgetful.cmake"
    forgetful.write_text(script.read_text().replace(str(sdist), ""))
    assert cmake("-P", forgetful) == (0, "")

    # a changed patch starts over from the unpatched tree, and dates the files it touches
    last = patches / PATCHES[-1].name
    last.write_text(last.read_text().replace("The sequence uses the", "This sequence uses the"))
    untouched = tmp_path / "tree" / "src" / "llama-vocab.cpp"
    date = untouched.stat().st_mtime_ns
    code, said = cmake("-P", script)
    assert code == 0, said
    assert "This sequence uses the" in header.read_text()
    assert header.stat().st_mtime_ns > before
    assert untouched.stat().st_mtime_ns == date, "what did not change is not compiled again"

    # a patch that does not apply is an error that leaves the last good tree alone
    text = last.read_text()
    context = "\n     // What a llama_commitment_status means"
    assert context in text
    last.write_text(text.replace(context, "\n     // nothing like it"))
    code, said = cmake("-P", script)
    assert code != 0
    assert f"native/patches/{last.name} does not apply" in said
    assert "Rebasing the patches" in said
    assert "This sequence uses the" in header.read_text()


@needs_cmake
def test_what_one_would_send_upstream_applies_to_the_unpatched_tree(
    tmp_path: Path, sdist: Path
) -> None:
    patches = sorted((NATIVE / "upstream").glob("*.patch"))
    assert [patch.name[:4] for patch in patches] == ["0001", "0002"]
    for patch in patches:
        assert patch.name in (NATIVE / "UPSTREAM.md").read_text()
    script = tmp_path / "tree.cmake"
    script.write_text(f"""
        include("{NATIVE}/cmake/LlamaSource.cmake")
        llama_tree("{sdist}" "{tmp_path}/tree" MEMBERS include src
                   PATCHES {" ".join(map(str, patches))})
    """)
    code, said = cmake("-P", script)
    assert code == 0, said
    header = (tmp_path / "tree" / "include" / "llama.h").read_text()
    for function in ("llama_set_adapter_cvec_scaled", "llama_set_adapter_cvec_seq"):
        assert re.search(rf"LLAMA_API .*\b{function}\(", header), function


def test_patches_only_add_to_the_public_header(sdist: Path) -> None:
    """Structs and functions that the bindings know stay as they are."""
    with tarfile.open(sdist) as archive:
        name = next(n for n in archive.getnames() if n.endswith("vendor/llama.cpp/include/llama.h"))
        member = archive.extractfile(name)
        assert member is not None
        stock = member.read().decode().splitlines()
    patched = (BUILD / "llama.cpp" / "include" / "llama.h").read_text().splitlines()
    rest = iter(patched)
    assert all(line in rest for line in stock), "a line of the stock header is gone or has moved"
    text = "\n".join(patched)
    for function in API:
        assert re.search(rf"LLAMA_API .*\b{function} *\(", text), function


@needs_build
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_library_only_adds_symbols() -> None:
    def symbols(library: Path) -> set[str]:
        done = subprocess.run(
            ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
        )
        names = {line.split()[-1] for line in done.stdout.splitlines()}
        return {name for name in names if name.startswith("llama_")}

    stock = BUILD / "lib-stock" / "libllama.so"
    if not stock.exists():
        pytest.skip(f"{stock} is not built: configure with -DLABLOG_TESTS=ON")
    assert symbols(BUILD / "lib" / "libllama.so") - symbols(stock) == API
    assert symbols(stock) <= symbols(BUILD / "lib" / "libllama.so")


@needs_build
def test_the_bindings_work_with_the_patched_library() -> None:
    """Importing them resolves every symbol; the sizes of their structs must be the library's."""
    pytest.importorskip("jinja2", reason="the bindings' dependencies are not installed")
    program = (
        "import ctypes, llama_cpp as l\n"
        "p = l.llama_context_default_params()\n"
        "assert p.n_ctx == 512 and p.n_batch == 2048, 'llama_context_params is misread'\n"
        "lib = ctypes.CDLL(l.llama_cpp._lib._name)\n"
        "lib.llama_commitment_error.restype = ctypes.c_char_p\n"
        "assert lib.llama_clear_commitment(None) == -1\n"
        "print(lib.llama_commitment_error(-1).decode())\n"
    )
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(BUILD / "lib")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "the context is NULL" in done.stdout
