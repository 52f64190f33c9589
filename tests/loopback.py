"""What the tests' servers share: 127.0.0.1 alone, byte ranges, a log, and faults on demand."""

import hashlib
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

Content = bytes | Path


class Request(NamedTuple):
    """A request as it arrived; the path is unquoted and has no query."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Fault:
    """What goes wrong with the requests in whose "METHOD /path" the pattern is found.

    Attributes:
        pattern: Regular expression, searched for: r"^GET .*\\.safetensors$".
        status: Answer with this status; 0 ends the connection without an answer.
        cut_after: End the connection after so many bytes of a body (a HEAD request has none and
            does not count).
        times: Go wrong so many times; None is always.
        delay: Seconds to wait before the answer.
        body: Send these bytes under the headers of the true content.
        endless: Send this piece for ever, with so many seconds after each, and no Content-Length.
        reset: Where the connection ends, end it by a reset (RST), not in good order (FIN).
        headers: Headers to add, such as X-Error-Code or Retry-After.
        hits: How many times it went wrong.
    """

    pattern: str
    status: int | None = None
    cut_after: int | None = None
    times: int | None = None
    delay: float = 0
    body: bytes | None = None
    endless: tuple[bytes, float] | None = None
    reset: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    hits: int = field(default=0, init=False)

    def applies(self, request: Request) -> bool:
        if self.cut_after is not None and request.method == "HEAD":
            return False
        left = self.times is None or self.hits < self.times
        return left and re.search(self.pattern, f"{request.method} {request.path}") is not None


def length(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def sha256(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def byte_span(value: str | None, size: int) -> range | None:
    """The bytes that a Range header asks for; None: all of them, an empty range: status 416."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", value or "")
    if match is None:  # others too, which a server may answer with the whole
        return None
    return range(int(match[1]), min(int(match[2] or size) + 1, size))


def pieces(content: Content, span: range, piece: int = 1 << 20) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content[span.start : span.stop]
        return
    with content.open("rb") as file:
        file.seek(span.start)
        for start in range(span.start, span.stop, piece):
            yield file.read(min(piece, span.stop - start))


class Server(ThreadingTCPServer):
    """A server in threads that leaves no thread and no socket behind.

    Attributes:
        log: The requests in the order of their arrival.
        faults: What goes wrong; of several that apply, the first does.
    """

    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, handler: "type[Handler]") -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.stopping = threading.Event()
        self.resetting: set[socket.socket] = set()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def requests(self, pattern: str = "") -> list[Request]:
        return [r for r in list(self.log) if re.search(pattern, f"{r.method} {r.path}")]

    def note(self, request: Request) -> Fault | None:
        with self._lock:
            self.log.append(request)
            fault = next((fault for fault in self.faults if fault.applies(request)), None)
            if fault is not None:
                fault.hits += 1
            return fault

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.stopping.set()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):  # the client has ended it already
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        if request in self.resetting:  # an orderly shutdown would send a FIN before the RST
            self.resetting.discard(request)
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may hang up
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; `answer` is for the servers to define."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    server: Server
    body: bytes
    fault: Fault | None

    def answer(self, path: str) -> None:
        """Answer a request for a path (quoted, without its query)."""
        raise NotImplementedError

    def fail(self, status: int) -> None:
        self.send(status, f"status {status}\n".encode())

    def send(
        self,
        status: int,
        content: Content = b"",
        headers: Mapping[str, str] | None = None,
        *,
        ranges: bool = False,
    ) -> None:
        fault = self.fault or Fault("")
        if fault.body is not None:
            content = fault.body
        size = length(content)
        fields = {**(headers or {}), **fault.headers}
        span = None
        if ranges:
            fields["Accept-Ranges"] = "bytes"
            if self.command == "GET":
                span = byte_span(self.headers.get("Range"), size)
        if span is not None and len(span) == 0:
            status, fields["Content-Range"] = 416, f"bytes */{size}"
        elif span is not None:
            status, fields["Content-Range"] = 206, f"bytes {span.start}-{span.stop - 1}/{size}"
        span = range(size) if span is None else span
        self.send_response(status)
        if fault.endless is None:
            fields["Content-Length"] = str(len(span))
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.endless is not None:
            piece, seconds = fault.endless
            while not self.server.stopping.wait(seconds):  # until the client hangs up
                self.wfile.write(piece)
        for piece in pieces(content, span[: fault.cut_after]):
            self.wfile.write(piece)
        if fault.cut_after is not None:
            self._hang_up(fault)

    def _respond(self) -> None:
        path = urlsplit(self.path).path
        get = self.headers.get
        request = Request(self.command, unquote(path), get("Range"), get("Authorization"))
        self.body = self.rfile.read(int(get("Content-Length") or 0))
        self.fault = self.server.note(request)
        if self.fault is not None:
            self.server.stopping.wait(self.fault.delay)
            if self.fault.status == 0:
                self._hang_up(self.fault)
                return
            if self.fault.status is not None:
                self.fail(self.fault.status)
                return
        self.answer(path)

    do_GET = do_HEAD = do_POST = do_PUT = _respond  # noqa: N815

    def _hang_up(self, fault: Fault) -> None:
        self.close_connection = True
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.server.resetting.add(self.connection)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass
