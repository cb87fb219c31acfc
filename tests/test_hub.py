"""Models from the Hub: a tiny repository on loopback, and every way it can fail."""

import hashlib
import json
import re
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from clone import Clone
from tiny_gguf import write_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from lablog.models import hub, locate
from lablog.models.hub import HubError

COMMIT = "c0ffee" * 6 + "0123"
TOKEN = "hf_planted0123456789"


@dataclass
class Repository:
    """Files of a repository, and how it misbehaves."""

    files: dict[str, bytes]
    gated: bool = False
    truncate: int | None = None  # bytes after which the connection breaks
    corrupt: bool = False  # other bytes arrive than the stated hash belongs to


@dataclass
class Hub:
    """What the loopback server serves, and what it was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    status: int | None = None  # answer everything with this


class Handler(BaseHTTPRequestHandler):
    """What huggingface_hub asks the Hub for: trees, and HEAD and GET of files."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state = self.server.hub
        path = unquote(urlsplit(self.path).path)
        state.requests.append(f"{self.command} {path}")
        if state.status:
            return self.answer(state.status, b"", {})
        if path == "/api/agent-harnesses":  # asked once by the client, whatever the answer
            return self.answer(404, b"", {})
        match = re.fullmatch(
            r"/(?:api/models/(?P<listed>[^/]+/[^/]+)/tree/(?P<branch>[^/]+)"
            r"|(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+))", path
        )
        assert match, f"a request that this server does not know: {path}"
        repository = state.repositories.get(match["listed"] or match["name"])
        if repository is None:
            return self.refuse(401, "RepoNotFound")
        if (match["branch"] or match["revision"]) not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if match["listed"]:
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "1" * 40}
                    for name, data in repository.files.items()]
            return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401 if "Authorization" not in self.headers else 403, "GatedRepo")
        if match["file"] not in repository.files:
            return self.refuse(404, "EntryNotFound")
        return self.send_file(repository, match["file"])

    def send_file(self, repository: Repository, name: str) -> None:
        data = repository.files[name]
        large = name.endswith((".gguf", ".safetensors", ".bin"))
        digest = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        body = data[::-1] if repository.corrupt else data
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.command == "GET" and repository.truncate is not None:
            self.send_response(206 if start else 200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start : repository.truncate])
            self.close_connection = True
            return
        self.answer(206 if start else 200, body[start:], headers)


class Server(ThreadingHTTPServer):
    """The loopback server with what it serves."""

    daemon_threads = True
    hub: Hub


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no token, and no waiting between the client's attempts."""
    folder = tmp_path / "cache"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return folder


@pytest.fixture
def served(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub on loopback, with a GGUF repository."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(hub, "HfApi", lambda: huggingface_hub.HfApi(endpoint=endpoint))
    server.hub = Hub({"lab/gguf": Repository({"tiny.Q5_K_M.gguf": GGUF, "README.md": b"hello\n"})})
    return server.hub


GGUF = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in three shards, as transformers writes it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    ))
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def files_in(cache: Path) -> list[str]:
    """What the cache would give to a later reader: names of all files that a snapshot links."""
    return sorted(path.name for path in cache.glob("*/snapshots/*/*") if path.exists())


def whole_blobs(cache: Path) -> list[Path]:
    return [p for p in cache.glob("*/blobs/*") if not p.name.endswith(".incomplete")]


def refused(call, *arguments: object) -> str:
    """The message of the one error that a call must give, on one line."""
    with pytest.raises(HubError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    return message


# --- success --------------------------------------------------------------------------------------


def test_a_gguf_file_arrives_once_and_whole(served: Hub, cache: Path):
    path = hub.download("lab/gguf", "tiny.Q5_K_M.gguf")
    assert path.read_bytes() == GGUF
    assert cache in path.parents
    assert locate.gguf_file("hub:lab/gguf:tiny.Q5_K_M.gguf", cache / "unused") == path
    assert locate.gguf_file(f"hub:lab/gguf@{COMMIT}:tiny.Q5_K_M.gguf", cache / "unused") == path
    assert len([r for r in served.requests if r.startswith("GET /lab/")]) == 1


def test_a_sharded_model_arrives_and_computes_the_same(served: Hub, sharded: Path, cache: Path):
    files = {path.name: path.read_bytes() for path in sharded.iterdir()}
    files["chat_template.jinja"] = b"{{ messages }}"
    unwanted = {"pytorch_model.bin": b"pickle", "evil.py": b"import os", "onnx/model.onnx": b"x",
                "sub/model.safetensors": b"x", "model.gguf": b"x", "README.md": b"x"}
    served.repositories["lab/llama"] = Repository(files | unwanted)
    folder = locate.hugging_face_folder("hub:lab/llama", cache / "unused")
    assert {path.name for path in folder.iterdir()} == set(files)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        here, there = (LlamaForCausalLM.from_pretrained(p)(tokens).logits
                       for p in (folder, sharded))
    assert torch.equal(here, there)
    assert locate.hugging_face_folder(f"hub:lab/llama@{COMMIT}", cache / "unused") == folder


def test_a_gated_model_arrives_with_a_token(
    served: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    served.repositories["lab/gguf"].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.download("lab/gguf", "tiny.Q5_K_M.gguf").read_bytes() == GGUF


def test_what_is_in_the_cache_needs_no_network(
    served: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    path = hub.download("lab/gguf", "tiny.Q5_K_M.gguf")
    unreachable(monkeypatch)
    assert hub.download("lab/gguf", "tiny.Q5_K_M.gguf") == path


def test_a_broken_connection_is_resumed(served: Hub, cache: Path):
    served.repositories["lab/gguf"].truncate = 5000
    refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf")
    served.repositories["lab/gguf"].truncate = None
    assert hub.download("lab/gguf", "tiny.Q5_K_M.gguf").read_bytes() == GGUF


# --- failure --------------------------------------------------------------------------------------


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client to a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(hub, "HfApi", lambda: huggingface_hub.HfApi(endpoint=endpoint))


def test_no_network(served: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    unreachable(monkeypatch)
    for message in (refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf"),
                    refused(hub.download_model, "lab/llama")):
        assert "cannot be reached" in message
        assert "check the network, or give the path of a local copy as `model`" in message
    assert not files_in(cache)


def test_offline_mode(served: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for message in (refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf"),
                    refused(hub.download_model, "lab/llama")):
        assert "give the path of a local copy as `model`" in message
    assert not [r for r in served.requests if "/lab/" in r]


def test_wrong_revision(served: Hub, cache: Path):
    served.repositories["lab/llama"] = Repository({"config.json": b"{}"})
    for message in (refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf", "v9"),
                    refused(hub.download_model, "lab/llama", "v9")):
        assert "at revision v9: there is no such revision; leave it out for `main`" in message
    assert not files_in(cache)


def test_a_gated_model_without_a_token(served: Hub, sharded: Path, cache: Path):
    files = {path.name: path.read_bytes() for path in sharded.iterdir()}
    served.repositories["lab/llama"] = Repository(files, gated=True)
    served.repositories["lab/gguf"].gated = True
    for message in (refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf"),
                    refused(hub.download_model, "lab/llama")):
        assert "is gated: accept its licence on its page, then run `hf auth login`" in message
    assert not files_in(cache)


def test_a_missing_repository(served: Hub, cache: Path):
    for message in (refused(hub.download, "lab/none", "tiny.gguf"),
                    refused(hub.download_model, "lab/none")):
        assert "lab/none" in message
        assert "no such repository, or it is private: check the name" in message


def test_a_missing_file(served: Hub, cache: Path):
    message = refused(hub.download, "lab/gguf", "tiny.Q4.gguf")
    assert message == "lab/gguf/tiny.Q4.gguf: the repository has no such file; check its name"
    assert not files_in(cache)


@pytest.mark.parametrize("length", [0, 1, 5000])
def test_a_truncated_file(served: Hub, cache: Path, length: int):
    served.repositories["lab/gguf"].truncate = length
    message = refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf")
    assert message == "lab/gguf/tiny.Q5_K_M.gguf arrived truncated; run again to resume it"
    assert not files_in(cache)
    assert not whole_blobs(cache)


def test_a_hash_that_does_not_match(served: Hub, sharded: Path, cache: Path):
    served.repositories["lab/gguf"].corrupt = True
    message = refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf")
    stated, arrived = (hashlib.sha256(data).hexdigest() for data in (GGUF, GGUF[::-1]))
    assert f"SHA-256 {arrived} arrived, the Hub states {stated}" in message
    assert "run again to fetch it anew" in message
    assert not files_in(cache)
    assert not whole_blobs(cache)
    served.repositories["lab/gguf"].corrupt = False
    assert hub.download("lab/gguf", "tiny.Q5_K_M.gguf").read_bytes() == GGUF


def test_a_file_that_was_damaged_in_the_cache(served: Hub, cache: Path):
    path = hub.download("lab/gguf", "tiny.Q5_K_M.gguf")
    path.resolve().write_bytes(GGUF[:-1])
    refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf")
    assert hub.download("lab/gguf", "tiny.Q5_K_M.gguf").read_bytes() == GGUF


def test_a_repository_with_only_pickled_weights(served: Hub, cache: Path):
    served.repositories["lab/old"] = Repository(
        {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    )
    message = refused(hub.download_model, "lab/old")
    assert "lab/old holds no safetensors; pickled weights are not read" in message
    assert not files_in(cache)


def test_a_hub_that_is_down(served: Hub, cache: Path):
    served.status = 503
    for message in (refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf"),
                    refused(hub.download_model, "lab/llama")):
        assert "give the path of a local copy as `model`" in message
    assert not files_in(cache)


def test_a_full_disk_is_not_called_a_fault_of_the_network(
    served: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "hf_hub_download", full)
    message = refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf")
    assert "No space left on device" in message
    assert "network" not in message


# --- what `model` may name ------------------------------------------------------------------------


@pytest.mark.parametrize("model", [
    "hub:", "hub:name", "hub:owner/", "hub:/name", "hub:a/b/c", "hub:owner/name@",
    "hub:owner/name:", "hub:owner/name:file.bin", "hub:owner/name@v1:", "hub:owner/na me@v1:x.gguf",
    "hub:owner/name@v1:../x.gguf", "hub:../name:x.gguf",
])
def test_a_malformed_hub_name_is_refused(model: str, served: Hub, cache: Path):
    with pytest.raises((ValueError, HubError)) as caught:
        locate.gguf_file(model, cache / "artifacts")
    assert model in str(caught.value) or "hub:OWNER/NAME" in str(caught.value)
    assert not [r for r in served.requests if "/lab/" in r]


@pytest.mark.parametrize(("model", "error", "expected"), [
    ("offline:nonsense", Exception, "nonsense"),
    ("nowhere/model.gguf", FileNotFoundError, "there is no file .*nowhere/model.gguf"),
    ("nowhere/model.bin", FileNotFoundError, "no llama2.c model .*nowhere/model.bin"),
    ("nowhere", ValueError, "no GGUF file, llama2.c .bin or Hugging Face folder"),
    ("", ValueError, "hub:OWNER/NAME"),
    ("Hub:lab/gguf", ValueError, "hub:OWNER/NAME"),
    ("lib", ValueError, "with config.json"),
])
def test_other_names_that_lead_nowhere_are_refused(
    model: str, error: type[Exception], expected: str, tmp_path: Path
):
    with pytest.raises(error, match=expected):
        locate.gguf_file(model, tmp_path / "artifacts")


def test_a_gguf_file_that_is_not_there_or_none_becomes_no_folder(served: Hub, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*model\.gguf"):
        locate.hugging_face_folder(str(tmp_path / "model.gguf"), tmp_path)
    with pytest.raises(ValueError, match="not of the form hub:OWNER"):
        locate.hugging_face_folder("hub:lab:tiny.gguf", tmp_path)


def test_a_gguf_file_of_the_hub_becomes_a_folder(served: Hub, tmp_path: Path):
    content = write_tiny(tmp_path / "tiny.gguf", size=600).read_bytes()
    served.repositories["lab/chat"] = Repository({"tiny.gguf": content})
    folder = locate.hugging_face_folder("hub:lab/chat:tiny.gguf", tmp_path / "artifacts")
    assert LlamaForCausalLM.from_pretrained(folder).config.hidden_size == 32


def test_a_local_gguf_file_is_taken_as_it_is(tmp_path: Path):
    path = tmp_path / "own.gguf"
    path.write_bytes(GGUF)
    assert locate.gguf_file(str(path), tmp_path / "artifacts") == path


def test_a_local_folder_is_taken_as_it_is(sharded: Path, tmp_path: Path):
    folder = tmp_path / "own"
    shutil.copytree(sharded, folder)
    assert locate.hugging_face_folder(str(folder), tmp_path / "artifacts") == folder


# --- secrets --------------------------------------------------------------------------------------


def test_no_error_tells_the_token(served: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    broken = served.repositories["lab/gguf"]
    for name, file in (("lab/none", "x.gguf"), ("lab/gguf", "none.gguf"), ("lab/gguf", "..")):
        refused(hub.download, name, file)
    for fault in ({"truncate": 5000}, {"truncate": None, "corrupt": True}):
        vars(broken).update(fault)
        refused(hub.download, "lab/gguf", "tiny.Q5_K_M.gguf")
    for served.status in (403, 404, 500):
        refused(hub.download, "lab/gguf", "README.md")
    unreachable(monkeypatch)
    refused(hub.download_model, "lab/llama")


@pytest.mark.parametrize("arrives", [True, False])
def test_a_token_reaches_no_result_and_no_output(
    served: Hub, server: Server, tmp_path: Path, arrives: bool
):
    """A notebook fetches a gated model, or is refused; every byte that is written is looked at."""
    served.repositories["lab/gguf"].gated = True
    sent = TOKEN if arrives else TOKEN[::-1]
    clone = Clone(tmp_path / "clone")
    work = clone.root / "lib/lablog/alpha/work.py"
    work.write_text(work.read_text().replace("def act(mode, run):\n", """\
def act(mode, run):
    from lablog.models.hub import download
    run.file(download("lab/gguf", "tiny.Q5_K_M.gguf"))
"""))
    clone.environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                          "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": sent}
    done = clone.make("reproduce", "NOTEBOOKS=01")
    assert (done.returncode == 0) == arrives, done.stderr
    assert arrives or "HubError: lab/gguf/tiny.Q5_K_M.gguf is gated" in done.stderr
    assert sent not in done.stdout + done.stderr
    written = [path for folder in ("clone/build/laptop", "clone/build/book", "home")
               for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= {".json", ".ipynb"}
    assert not [path for path in written if sent.encode() in path.read_bytes()]
