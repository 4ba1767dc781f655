"""A server that speaks as much of the Hugging Face hub's protocol as a download needs, with faults on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits by branch, tag or hash; each a folder. `gate`: 'gated' or 'private' refuses whoever has no token."""

    revisions: dict[str, str]
    folders: dict[str, Path]
    gate: str = ""


@dataclass
class Hub:
    """What the server has, what it was asked, and what goes wrong.

    asked    (method, path, Range) of every request; the paths of weights begin with /cdn
    cut      bytes of a weight file after which the connection breaks, as often as `cuts` says
    slow     seconds that a weight file waits after its first half
    spoiled  weights arrive with a byte changed
    ranges   whether Range is heeded
    """

    url: str = ""
    cdn: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    cut: int = 0
    cuts: int = 0
    slow: threading.Event | None = None
    reached: threading.Event = field(default_factory=threading.Event)
    spoiled: bool = False
    ranges: bool = True
    told: list[str] = field(default_factory=list)
    blobs: dict[str, Path] = field(default_factory=dict)

    def add(self, name: str, folder: Path, revision: str = "main", gate: str = "") -> str:
        """Publishes a folder as the newest commit of a branch; returns the commit."""
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository({}, {}, gate))
        repository.revisions |= {revision: commit, commit: commit}
        repository.folders[commit] = folder
        return commit

    def weights(self) -> list[tuple[str, str]]:
        """The requests for weights: method and Range."""
        return [(method, given) for method, path, given in self.asked if path.startswith("/cdn")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if path.startswith("/cdn/"):
            if "Authorization" in self.headers:
                self.hub.told.append(path)
            return self._weights(self.hub.blobs[path.removeprefix("/cdn/")], body)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        if found:
            return self._about(found[1], found[2] or "main")
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        return self._file(found[1], found[2], found[3], body) if found else self._refuse(404, "")

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, data: bytes, headers: dict[str, Any], size: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _commit(self, name: str, revision: str, files: bool) -> tuple[str, Path] | None:
        repository = self.hub.repositories.get(name)
        anonymous = "Authorization" not in self.headers
        if repository is None or (repository.gate == "private" and anonymous):
            self._refuse(401, "RepoNotFound")
        elif repository.gate == "gated" and files and anonymous:
            self._refuse(401, "GatedRepo")
        elif revision not in repository.revisions:
            self._refuse(404, "RevisionNotFound")
        else:
            commit = repository.revisions[revision]
            return commit, repository.folders[commit]
        return None

    def _about(self, name: str, revision: str) -> None:
        known = self._commit(name, revision, False)
        if known is None:
            return
        files = sorted(file for file in known[1].rglob("*") if file.is_file())
        siblings: list[dict[str, Any]] = []
        for file in files:
            entry: dict[str, Any] = {"rfilename": file.relative_to(known[1]).as_posix(), "size": file.stat().st_size}
            if file.suffix == ".safetensors":
                entry["lfs"] = {"sha256": _digest(file), "size": entry["size"], "pointerSize": 130}
            siblings.append(entry)
        data = json.dumps({"id": name, "sha": known[0], "siblings": siblings}).encode()
        self._send(200, data, {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str, body: bool) -> None:
        known = self._commit(name, revision, True)
        if known is None:
            return None
        path = known[1] / file
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        if path.suffix != ".safetensors":
            data = path.read_bytes()
            return self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": known[0]})
        digest = _digest(path)
        self.hub.blobs[digest] = path
        headers = {"X-Repo-Commit": known[0], "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": path.stat().st_size}
        return self._send(302, b"", headers | {"Location": f"{self.hub.cdn}/cdn/{digest}"})

    def _weights(self, path: Path, body: bool) -> None:
        data = path.read_bytes()
        if self.hub.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, stop, status, headers = 0, len(data), 200, {"ETag": '"x"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.hub.ranges else None
        if wanted:
            start, stop = int(wanted[1]), min(len(data), int(wanted[2] or len(data)) + 1)
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(data)}"
        part = data[start:stop]
        if body and self.hub.cuts and len(part) > self.hub.cut:
            self.hub.cuts -= 1
            self._send(status, part[: self.hub.cut], headers, len(part))
            self.close_connection = True
        elif body and self.hub.slow is not None:
            self._send(status, part[: len(part) // 2], headers, len(part))
            self.hub.reached.set()
            self.hub.slow.wait(20)
            self.close_connection = True
        else:
            self._send(status, part, headers)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub at an address of this machine; its weights lie at another name of it."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    port = server.server_address[1]
    hub.url, hub.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
