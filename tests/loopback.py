"""What the tests' servers share: 127.0.0.1 alone, byte ranges, a log, and faults on demand."""

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
    """A request as it arrived; the path is unquoted and has no query."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Fault:
    """An error in the requests in whose "METHOD /path" the pattern is found.

    Attributes:
        pattern: Regular expression, searched for: r"^GET .*\\.safetensors$".
        status: Answer with this status; 0 ends the connection without an answer.
        cut_after: End the connection after so many bytes of a body. A HEAD request has none.
        times: Number of requests; None is all.
        delay: Seconds to wait before the answer.
        body: Send these bytes under the headers of the true content.
        endless: Send this piece for ever, after so many seconds each, without Content-Length.
        headers: Headers to add, such as Location.
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
    """A server in threads, with a log of its requests; of several faults the first applies."""

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
        if not isinstance(sys.exception(), ConnectionError):  # clients may hang up
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; `answer` is for the servers to define."""

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
            while not self.server.stopping.wait(seconds):  # until the client hangs up
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
