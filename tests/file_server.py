"""A plain file server on 127.0.0.1, in the place of NAVER's."""

import zlib
from collections.abc import Mapping
from email.utils import formatdate
from urllib.parse import unquote

from tests.loopback import Content, Handler, Server, length

PREFIX = "/ComputerVision/trex_models/"
MODIFIED = formatdate(1_700_000_000, usegmt=True)


class FileServer(Server):
    """Serves files by name below a prefix.

    Args:
        files: Bytes, or paths of files, which are streamed from disk.
        prefix: Folder of the URL.
        ranges: Whether Range requests are answered (with 206), or ignored (200 and the whole file).
        etag: Whether to send an ETag.
        last_modified: Whether to send Last-Modified.
        port: 0 takes a free one.
    """

    def __init__(
        self,
        files: Mapping[str, Content],
        *,
        prefix: str = PREFIX,
        ranges: bool = True,
        etag: bool = False,
        last_modified: bool = False,
        port: int = 0,
    ):
        super().__init__(FileHandler, port)
        self.files = dict(files)
        self.prefix = prefix
        self.ranges = ranges
        self.etag = etag
        self.last_modified = last_modified

    @property
    def url(self) -> str:
        """Address of the folder, with a slash at the end as in NAVER's base address."""
        return super().url + self.prefix


class FileHandler(Handler):
    """Answers with files."""

    server: FileServer

    def answer(self, path: str) -> None:
        """Send the file."""
        server = self.server
        content = server.files.get(unquote(path).removeprefix(server.prefix))
        if self.command not in ("GET", "HEAD"):
            self.send(405, b"method not allowed\n")
        elif content is None or not path.startswith(server.prefix):
            self.send(404, b"not found\n")
        else:
            headers = {"Content-Type": "application/octet-stream"}
            if server.etag:
                headers["ETag"] = _etag(content)
            if server.last_modified:
                headers["Last-Modified"] = MODIFIED
            condition = self.headers.get("If-Range")
            same = condition is None or condition in headers.values()
            self.send(200, content, headers, ranges=server.ranges and same)


def _etag(content: Content) -> str:
    version = zlib.crc32(content) if isinstance(content, bytes) else content.stat().st_mtime_ns
    return f'"{length(content):x}-{version:x}"'
