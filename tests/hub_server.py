"""A server on this machine that speaks as much of the Hub's protocol as folders take, up and down."""

from __future__ import annotations

import base64
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

import huggingface_hub
import pytest


@dataclass(frozen=True)
class Commit:
    """What was uploaded at once."""

    repository: str
    branch: str
    message: str
    files: dict[str, bytes]
    token: str | None

    @property
    def sha(self) -> str:
        return hashlib.sha1(
            json.dumps([self.repository, self.branch, sorted(self.files)]).encode()
        ).hexdigest()


@dataclass
class LocalHub:
    """What was asked of the server."""

    address: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    """Name → whether it is private."""
    branches: set[tuple[str, str]] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)
    refuses: bool = False

    def found(self, repository: str, revision: str) -> Commit | None:
        """The last commit of a branch, or the one of a hash."""
        of = [one for one in self.commits if one.repository == repository]
        return next((one for one in reversed(of) if revision in (one.branch, one.sha)), None)


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """The server, while the block is open."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def client_at_local_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[LocalHub]:
    """The Hub's own client in this process, and the server that it asks."""
    constants = huggingface_hub.constants
    with local_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        at = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", at)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if self.hub.refuses:
            return self._answer({"error": "you may not\nwrite here"}, status=403)
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.hub.repositories
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories.setdefault(name, private)
            return self._answer({"url": f"{self.hub.address}/{name}"}, status=409 if known else 200)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            self.hub.branches.add((found[1], found[2]))
            return self._answer({})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            files = json.loads(content)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._answer({"files": [{"path": file["path"], **modes} for file in files]})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            if found[2] != "main" and (found[1], found[2]) not in self.hub.branches:
                return self._answer({"error": "no such branch"}, status=404)
            return self._commit(found[1], found[2], content)
        return self._answer({"error": "not spoken here"}, status=404)

    def _commit(self, repository: str, branch: str, content: bytes) -> None:
        lines = [json.loads(line) for line in content.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.hub.commits.append(commit := Commit(repository, branch, message, files, token))
        address = f"{self.hub.address}/{repository}/commit/{commit.sha}"
        self._answer({"commitUrl": address, "commitOid": commit.sha, "success": True})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = about or file
        commit = self.hub.found(found[1], found[2]) if found else None
        if found is None or commit is None:
            return self._answer({"error": "nothing there"}, status=404)
        if file is None:
            if "/tree/" in path:
                return self._answer([_entry(name, of) for name, of in sorted(commit.files.items())])
            names = [{"rfilename": name} for name in sorted(commit.files)]
            return self._answer({"id": commit.repository, "sha": commit.sha, "siblings": names})
        if file[3] not in commit.files:
            return self._answer({"error": "no such file"}, status=404)
        content = commit.files[file[3]]
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit.sha}
        return self._send(content, 200, etag)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, value: Any, status: int = 200) -> None:
        errors = {"X-Error-Code": "RevisionNotFound"} if status == 404 else {}
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **errors})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, of in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, of)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *unused: Any) -> None:
        """Nothing on stderr."""


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
