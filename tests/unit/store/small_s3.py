"""An S3 server of a few lines that misbehaves on request, over real HTTP: what a well-behaved MinIO never does."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["conflict", "lost reply", "busy", "not ours", "invalid", "hang"]

SILENCE_SECONDS = 60


class SmallS3(ThreadingHTTPServer):
    """Holds objects in memory. `faults` says how the next writes go wrong, one each, before all goes well.

    `body_seconds`: over which a body is read, in equal steps. `silent_after`: so many bytes of the next answer to a
    `GET` come, and no more. `reads`: how many `GET`s there were. `unrouted`: how many of the next requests a proxy
    answers that knows no way here.
    """

    daemon_threads = True

    def __init__(self, *, conditional: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.conditional = conditional
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.writes = self.reads = 0
        self.body_seconds = 0.0
        self.silent_after: int | None = None
        self.unrouted = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallS3

    def do_PUT(self) -> None:
        body = self._body(int(self.headers["content-length"]))
        if self._is_unrouted():
            return
        self.server.writes += 1
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang":
            time.sleep(SILENCE_SECONDS)
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
        if self._is_unrouted():
            return
        if "list-type=2" in self.path:
            self._answer(200, self._listing())
            return
        self.server.reads += 1
        content = self.server.objects.get(self.path)
        if content is None:
            self._answer(404, code="NoSuchKey")
        elif asked := self.headers["range"]:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206, content[start:], **{"content-range": place})
        else:
            self._answer(200, content)

    def _listing(self) -> bytes:
        """All there is: of one bucket, and nobody asks for less."""
        date = "<LastModified>2026-01-01T00:00:00Z</LastModified>"
        contents = "".join(
            f"<Contents><Key>{path.split('/', 2)[2]}</Key>{date}<ETag>0</ETag><Size>{len(content)}</Size></Contents>"
            for path, content in self.server.objects.items()
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()

    def _body(self, size: int) -> bytes:
        steps = 20 if self.server.body_seconds else 1
        parts = []
        for number in range(steps):
            time.sleep(self.server.body_seconds / steps)
            parts.append(self.rfile.read(size * (number + 1) // steps - size * number // steps))
        return b"".join(parts)

    def do_DELETE(self) -> None:
        if self._is_unrouted():
            return
        self.server.objects.pop(self.path, None)
        self._answer(204)

    def _is_unrouted(self) -> bool:
        if not self.server.unrouted:
            return False
        self.server.unrouted -= 1
        self._answer(404, b"404 page not found")
        return True

    def _answer(self, status: int, content: bytes = b"", *, code: str = "", **headers: str) -> None:
        body = f"<Error><Code>{code}</Code></Error>".encode() if code else content
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", '"0"')
        self.send_header("last-modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and self.server.silent_after is not None:
            sent, self.server.silent_after = self.server.silent_after, None
            self.wfile.write(body[:sent])
            time.sleep(SILENCE_SECONDS)
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""
