"""An S3 server of a few lines that misbehaves on request, over real HTTP: what a well-behaved MinIO never does."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["conflict", "lost reply", "busy", "not ours", "invalid", "hang"]


class SmallS3(ThreadingHTTPServer):
    """Holds objects in memory. `faults` says how the next writes go wrong, one each, before all goes well."""

    daemon_threads = True

    def __init__(self, *, conditional: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.conditional = conditional
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.writes = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallS3

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.writes += 1
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang":
            time.sleep(60)
        elif fault == "busy":
            self._answer(503, code="SlowDown")
        elif fault == "invalid":
            self._answer(400, code="InvalidRequest")
        elif fault == "conflict":
            self._answer(409, code="ConditionalRequestConflict")
        elif fault == "not ours":
            self.server.objects[self.path] = b"somebody else's"
            self._answer(500, code="InternalError")
        elif self.server.conditional and self.path in self.server.objects:
            self._answer(412, code="PreconditionFailed")
        else:
            self.server.objects[self.path] = body
            self._answer(500, code="InternalError") if fault == "lost reply" else self._answer(200)

    def do_GET(self) -> None:
        content = self.server.objects.get(self.path)
        self._answer(404, code="NoSuchKey") if content is None else self._answer(200, content)

    def do_DELETE(self) -> None:
        self.server.objects.pop(self.path, None)
        self._answer(204)

    def _answer(self, status: int, content: bytes = b"", *, code: str = "") -> None:
        body = f"<Error><Code>{code}</Code></Error>".encode() if code else content
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", '"0"')
        self.send_header("last-modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""
