"""A judge behind a real HTTP server on this machine, which can fail in the ways endpoints do."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-local-4711-secret"
Reply = tuple[Any, ...]


def shown_responses(text: str) -> tuple[str, str]:
    """The responses that the default prompt shows as A and as B, those of all turns joined."""
    found = [re.findall(rf"<assistant {x}>\n(.*?)\n</assistant {x}>", text, re.S) for x in "AB"]
    return " ".join(found[0]), " ".join(found[1])


def prefers_good(text: str) -> str:
    """Prefers the response that says "good" more often."""
    a, b = (response.count("good") for response in shown_responses(text))
    return f"They differ. [[{'A' if a > b else 'B' if b > a else 'C'}]]"


class JudgeServer(ThreadingHTTPServer):
    """Answers with ``judge(text)``; ``script`` holds what happens to the first requests instead, in order.

    Attributes:
        requests: Body and headers of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.judge: Callable[[str], str] = prefers_good
        self.script: list[Reply] = []
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.released = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leaves out the tracebacks of connections that a test's client has closed."""


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append((body, dict(self.headers)))
            kind, *details = self.server.script.pop(0) if self.server.script else ("answer",)
        if self.path != "/v1/chat/completions":
            kind, details = "status", [404, {"error": {"message": f"no such path {self.path}"}}]
        getattr(self, f"do_{kind}")(body, *details)

    def do_answer(self, body: dict[str, Any], text: str | None = None, finish: str = "stop") -> None:
        said = self.server.judge(body["messages"][0]["content"]) if text is None else text
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": finish}
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        self.send(
            200, {"id": "x", "object": "chat.completion", "model": "judge-v2", "choices": [choice], "usage": usage}
        )

    def do_status(self, body: dict[str, Any], status: int, content: Any = None, **headers: str) -> None:
        self.send(status, content or {"error": {"message": f"no luck, {self.headers['authorization']}"}})

    def do_limited(self, body: dict[str, Any], wait: str) -> None:
        self.send(429, {"error": {"message": "slow down"}}, {"retry-after": wait})

    def do_body(self, body: dict[str, Any], content: Any) -> None:
        self.send(200, content)

    def do_stall(self, body: dict[str, Any]) -> None:
        self.server.released.wait(5)  # until the test is over
        self.close_connection = True

    def do_close(self, body: dict[str, Any]) -> None:
        self.close_connection = True

    def do_cut(self, body: dict[str, Any]) -> None:
        """Promises more than it sends."""
        self.send(200, b'{"choices": [{"mess', length=500)
        self.close_connection = True

    def do_call(self, body: dict[str, Any], function: Callable[[], None]) -> None:
        function()
        self.do_answer(body)

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None, length: int = 0) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
