"""What the proxies of the tests share: a listener, a thread a connection, and HTTP/1.1 read request by request.

`fault_proxy` stands before MinIO, `api_proxy` before the API server; each says what becomes of a request.
"""

from __future__ import annotations

import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import BinaryIO

PATIENCE_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it came: its head without the empty line, and its body."""

    method: str
    target: str
    head: bytes
    body: bytes

    @property
    def writes(self) -> bool:
        return self.method in ("PUT", "POST", "PATCH", "DELETE")

    @property
    def headers(self) -> dict[str, str]:
        """By their names in lower case."""
        return _headers(self.head.split(b"\r\n"))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer as it goes back."""

    status: int
    head: bytes
    body: bytes

    @property
    def content(self) -> bytes:
        return self.head + b"\r\n\r\n" + self.body


class Cut(Exception):
    """Leaves a connection where it is."""


class HttpProxy(ABC):
    """Serves from `listen` until `close`."""

    def listen(self, port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @abstractmethod
    def one(self, connection: socket.socket, request: Request) -> None:
        """What becomes of a request: an answer is sent, or `Cut` raised."""

    def close(self) -> None:
        """Returns when nothing is on its way to the server any more."""
        # Without the shutdown, the thread that waits in `accept` would keep the port open.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.tracked(connection), suppress(OSError, HTTPException, Cut):
            stream = connection.makefile("rb")
            while request := _read_request(stream):
                self.one(connection, request)

    @contextmanager
    def tracked(self, connection: socket.socket) -> Iterator[None]:
        """Closed at the end of the block, or by `close`."""
        with self._lock:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


def reset(connection: socket.socket) -> None:
    """End it with RST: no FIN, and what was sent may be lost as well."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise Cut


def _read_request(stream: BinaryIO) -> Request | None:
    lines = _read_head(stream)
    if not lines:
        return None
    method, target, _ = lines[0].decode().split(" ", 2)
    size = int(_headers(lines).get("content-length", "0"))
    body = stream.read(size)
    if len(body) < size:
        return None  # the client went away in the middle of it
    return Request(method=method, target=target, head=b"\r\n".join(lines), body=body)


def _headers(lines: list[bytes]) -> dict[str, str]:
    pairs = (line.decode("latin-1").split(":", 1) for line in lines[1:])
    return {name.lower(): value.strip() for name, value in pairs}


def _read_head(stream: BinaryIO) -> list[bytes]:
    lines: list[bytes] = []
    while line := stream.readline():
        if line == b"\r\n":
            return lines
        lines.append(line.rstrip(b"\r\n"))
    return []


def answer_of(response: HTTPResponse, method: str) -> Answer:
    """All of what a server says, as it goes on to the client."""
    body = response.read()
    kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP]
    if response.status != 204:
        length = response.getheader("content-length", "0") if method == "HEAD" else str(len(body))
        kept.append(("Content-Length", length))
    head = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{name}: {value}" for name, value in kept)]
    return Answer(status=response.status, head="\r\n".join(head).encode("latin-1"), body=body)


def refusal(status: int, body: bytes, *, content_type: str) -> Answer:
    """An answer of the proxy's own."""
    head = f"HTTP/1.1 {status} By The Proxy\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return Answer(status=status, head=head.encode(), body=body)


_HOP_BY_HOP = ("content-length", "transfer-encoding", "connection", "keep-alive")
