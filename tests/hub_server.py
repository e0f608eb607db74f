"""A server with the part of the Hugging Face Hub's interface that pushing a model needs; it keeps the files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Holds the repositories: the bytes of each file by repository and path, and all commits with their files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.uploaded: list[tuple[str, bytes]] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}, "siblings": []})

    def do_POST(self) -> None:
        body = self._body()
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            content = json.loads(body)
            name = "/".join(filter(None, (content.get("organization") or "me", content["name"])))
            self.server.files.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif "preupload" in parts:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "commit" in parts:
            repository = "/".join(parts[2:4])
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.server.commits.append(value["summary"])
                elif line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    self.server.files[repository][value["path"]] = content
                    self.server.uploaded.append((value["path"], content))
            self._answer({"commitOid": "0" * 40, "commitUrl": f"{self.server.url}/{repository}/commit/{'0' * 40}"})
        else:
            self._answer({"success": True, "errors": [], "warnings": []})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = b""
        while size := int(self.rfile.readline(), 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return chunks

    def _answer(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[Hub]:
    """Runs a hub in a thread."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
