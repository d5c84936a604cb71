"""An OpenAI-compatible endpoint on the loopback interface for tests, with faults on request.

A real HTTP server in a thread, so that the client under test, or a whole run in other processes, meets real sockets. It answers
POST /v1/chat/completions with ``answer(body)`` unless ``fault(number)`` (from 0) has a fault for that request. Leaves out: streaming, models.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What one request meets in place of an answer. ``body`` None echoes the request's Authorization header."""

    status: int = 200
    body: str | None = ""
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False
    drops: bool = False


def overloaded(retry_after: str | None = None) -> Fault:
    return Fault(429, '{"error": {"message": "slow down"}}', {} if retry_after is None else {"Retry-After": retry_after})


def broken(status: int = 500) -> Fault:
    return Fault(status, None)


def completion(text: str | None, usage: dict[str, int] | None = None, finish_reason: str = "stop") -> str:
    """The body of an answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]} | ({} if usage is None else {"usage": usage}))


HANGS = Fault(hangs=True)
DROPS = Fault(drops=True)
JUNK = Fault(body="<html>Bad gateway</html>")
WRONG_JSON = Fault(body='{"choices": []}')
EMPTY = Fault(body=completion("  ", finish_reason="length"))


def in_order(*faults: Fault | None) -> Callable[[int], Fault | None]:
    """Faults of the first requests; None answers."""
    return lambda number: faults[number] if number < len(faults) else None


class FakeEndpoint:
    """Use as a context. ``bodies`` and ``keys`` (Authorization headers) hold what was received, ``most_at_once`` the requests under way together."""

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str] = lambda body: "fine",
        fault: Callable[[int], Fault | None] = lambda number: None,
        usage: dict[str, int] | None = None,
        pause_s: float = 0.0,
    ) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self._answer, self._fault, self._usage, self._pause_s = answer, fault, usage, pause_s
        self._now = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeEndpoint:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # waits for the requests' threads

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """One request, start to end."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._ended.wait(self._pause_s)
            self._respond(handler, body, self._fault(number) if handler.path == "/v1/chat/completions" else broken(404))
        finally:
            with self._lock:
                self._now -= 1

    def _respond(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], fault: Fault | None) -> None:
        if fault is None:
            fault = Fault(body=completion(self._answer(body), self._usage))
        if fault.hangs:
            self._ended.wait(30)
        if fault.hangs or fault.drops:
            return
        text = fault.body if fault.body is not None else f"you sent {handler.headers.get('Authorization')}"
        handler.send_response(fault.status)
        for name, value in fault.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(text.encode())))
        handler.end_headers()
        handler.wfile.write(text.encode())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fake.serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: tests read stderr."""

        return Handler
