"""A plain file server on 127.0.0.1, in the place of NAVER's."""

from collections.abc import Mapping
from urllib.parse import unquote

from tests.loopback import Content, Handler, Server

PREFIX = "/ComputerVision/trex_models/"


class FileServer(Server):
    """Serves files by name below a prefix.

    Args:
        files: Bytes, or paths of files, which are streamed from disk.
        ranges: Whether Range requests are answered (with 206), or ignored (200 and the whole file).
    """

    def __init__(self, files: Mapping[str, Content], *, ranges: bool = True) -> None:
        super().__init__(FileHandler)
        self.files = dict(files)
        self.ranges = ranges

    @property
    def url(self) -> str:
        """Address of the folder, with a slash at the end as in NAVER's base address."""
        return super().url + PREFIX


class FileHandler(Handler):
    server: FileServer

    def answer(self, path: str) -> None:
        server = self.server
        content = server.files.get(unquote(path).removeprefix(PREFIX))
        if self.command not in ("GET", "HEAD"):
            self.send(405, b"method not allowed\n")
        elif content is None or not path.startswith(PREFIX):
            self.send(404, b"not found\n")
        else:
            headers = {"Content-Type": "application/octet-stream"}
            self.send(200, content, headers, ranges=server.ranges)
