"""Base of the tests' servers: only on 127.0.0.1, with byte ranges, a log and injected faults."""

import hashlib
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

Content = bytes | Path


class Request(NamedTuple):
    """A received request; the path is unquoted and has no query."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Fault:
    """An injected error in requests whose "METHOD /path" matches a pattern.

    Attributes:
        pattern: Regular expression for re.search, such as r"^GET .*\\.safetensors$".
        status: HTTP status of the response; 0 closes the connection without a response.
        cut_after: Number of bytes of the body after which the connection is closed.
        times: Number of affected requests; None for all.
        delay: Seconds to wait before the response.
        body: Body to send instead of the content, with the content's headers.
        endless: Bytes to send forever without Content-Length, and the interval in seconds.
        headers: Additional headers, such as Location.
    """

    pattern: str
    status: int | None = None
    cut_after: int | None = None
    times: int | None = None
    delay: float = 0
    body: bytes | None = None
    endless: tuple[bytes, float] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def applies(self, request: Request) -> bool:
        if self.times == 0 or (self.cut_after is not None and request.method == "HEAD"):
            return False
        return re.search(self.pattern, f"{request.method} {request.path}") is not None


def read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def sha256(content: Content) -> str:
    return hashlib.sha256(read(content)).hexdigest()


class Server(ThreadingTCPServer):
    """A threaded server with a log of its requests; the first matching fault applies."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: "type[Handler]") -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def requests(self, pattern: str) -> list[Request]:
        return [r for r in list(self.log) if re.search(pattern, f"{r.method} {r.path}")]

    def note(self, request: Request) -> Fault | None:
        with self._lock:
            self.log.append(request)
            fault = next((fault for fault in self.faults if fault.applies(request)), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
            return fault

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may disconnect
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Handler of one connection; subclasses implement `answer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    server: Server
    body: bytes
    fault: Fault

    def answer(self, path: str) -> None:
        """Answer a request for a path (quoted, without its query)."""
        raise NotImplementedError

    def send(
        self,
        status: int,
        content: Content = b"",
        headers: Mapping[str, str] | None = None,
        *,
        ranges: bool = False,
    ) -> None:
        data = memoryview(read(content) if self.fault.body is None else self.fault.body)
        fields = {**(headers or {}), **self.fault.headers}
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if ranges and span:
            status, start = 206, int(span[1])
            fields["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        if self.fault.endless is None:
            fields["Content-Length"] = str(len(data))
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.endless is not None:
            piece, seconds = self.fault.endless
            while not self.server.stopping.wait(seconds):  # until the client disconnects
                self.wfile.write(piece)
        self.wfile.write(data[: self.fault.cut_after])
        self.close_connection |= self.fault.cut_after is not None

    def _respond(self) -> None:
        path = urlsplit(self.path).path
        get = self.headers.get
        request = Request(self.command, unquote(path), get("Range"), get("Authorization"))
        self.body = self.rfile.read(int(get("Content-Length") or 0))
        self.fault = self.server.note(request) or Fault("")
        self.server.stopping.wait(self.fault.delay)
        if self.fault.status == 0:
            self.close_connection = True
        elif self.fault.status is not None:
            self.send(self.fault.status)
        else:
            self.answer(path)

    do_GET = do_HEAD = do_POST = do_PUT = _respond  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass
