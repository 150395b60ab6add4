"""A stand-in of the Hub's HTTP API in this process: repositories are made, files uploaded and read back."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repos` has the files of each repository; `cards` the metadata of models that are only looked up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict[str, Any]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        """Quiet."""

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, answer: object) -> None:
        self._answer(200, json.dumps(answer).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, api, kind, *rest = self.path.partition("?")[0].split("/")
        assert api == "api"
        if kind == "repos":
            made = json.loads(body)
            name = f"{made.get('organization') or 'somebody'}/{made['name']}"
            self.server.repos.setdefault(name, {})
            self._json({"url": f"{self.server.address}/{name}", "name": name})
        elif kind == "validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif rest[2] == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]})
        else:
            entries = [json.loads(line) for line in body.splitlines()]
            files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
            self.server.repos["/".join(rest[:2])].update(files)
            name = "/".join(rest[:2])
            self._json({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].split("/")[1:]
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name in self.server.cards:
                self._json({"id": name, "siblings": [], "cardData": self.server.cards[name]})
            else:
                self._answer(404, b"", X_Error_Code="RepoNotFound")
            return
        name, path = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.server.repos.get(name, {}).get(path)
        if content is None:
            self._answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self._answer(200, content, ETag=f'"{hash(content)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@contextlib.contextmanager
def running_hub(patch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """The stand-in, which huggingface_hub takes for the Hub meanwhile."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
    patch.setattr(huggingface_hub.hf_api.api, "token", "hf_of_nobody")
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
