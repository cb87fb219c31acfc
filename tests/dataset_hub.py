"""A repository on loopback, answering what `datasets` and file downloads ask of the Hub."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "0123"


class Handler(BaseHTTPRequestHandler):
    """Repository information, trees, and files with ranges."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def entry(self, name: str) -> dict[str, Any]:
        if name in self.server.files:
            size = len(self.server.files[name])
            return {"type": "file", "path": name, "size": size, "oid": "1" * 40}
        return {"type": "directory", "path": name, "size": 0, "oid": "2" * 40}

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(urlsplit(self.path).path)
        name, files = self.server.name, self.server.files
        if found := re.fullmatch(rf"(?:/datasets)?/{name}/resolve/[^/]+/(.+)", path):
            return self.send_file(found[1])
        if re.fullmatch(rf"/api/datasets/{name}(/revision/[^/]+)?", path):
            return self.json({"id": name, "sha": COMMIT, "private": False, "tags": [],
                              "siblings": [{"rfilename": file} for file in files]})
        folders = {str(p) for f in files for p in PurePosixPath(f).parents} - {"."}
        if re.fullmatch(rf"/api/datasets/{name}/paths-info/[^/]+", path):
            asked = (json.loads(body)["paths"] if body.startswith("{")
                     else parse_qs(body)["paths"])
            return self.json([self.entry(p) for p in asked if p in files or p in folders])
        if found := re.fullmatch(rf"/api/datasets/{name}/tree/[^/]+/?(.*)", path):
            inside = [p for p in (*files, *sorted(folders)) if p.startswith(found[1])]
            return self.json([self.entry(p) for p in inside if p != found[1]])
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_POST = do_GET

    def send_file(self, name: str) -> None:
        data = self.server.files.get(name)
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        common = {"ETag": '"1"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            return self.answer(206, data[first : last + 1], **common,
                               Content_Range=f"bytes {first}-{last}/{len(data)}")
        return self.answer(200, data, **common)


@contextmanager
def serve(name: str, files: dict[str, bytes]) -> Iterator[str]:
    """Serve `files` as the repository `name`; gives the endpoint for ``HF_ENDPOINT``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.name, server.files = name, files  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
